"""The operations on networks as operators of ``torch.library``, and their exact gradients.

The forward pass is either backend's. The backward pass is PyTorch's on both: it states the map that was computed once
more in differentiable form, the critic's score, the SVGD kernel with its median, Adam and the clip included, and takes
one flow step at a time. Only the particles of every step are kept for it, no activations; moments and scores are
recomputed. States do not meet, so a few are taken at a time, which bounds memory whatever the batch.

Gradients reach particles (or noise, or actions) and observations, never the networks' weights, and cannot be
differentiated again. The median and the clip have kinks, and Adam is steep where a direction is nearly zero: there the
derivative of the map is the true one, and of little use.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends import choice
from vgf_fast.common.ambient import neutral
from vgf_fast.flow import Flow
from vgf_fast.reference import ADAM_BETA1, ADAM_BETA2, ADAM_EPS, LAYER_NORM_EPS, MLPWeights, activation

MODES = ("none", "identity", "exact")
_CHUNK_ENTRIES = 2**20  # of one layer's activations, or of the differences of all pairs of particles


# --- the maps, differentiable any number of times --------------------------------------------------------------------


def _perceptrons(mlp: MLPWeights, states: Tensor, rest: Tensor) -> Tensor:
    """A stack on [state, rest]: states [B, O], rest [B, N, R] -> [E, B, N, out]."""
    first, dtype = mlp.weights[0], mlp.weights[0].dtype
    biases, scales, shifts = ([t.unsqueeze(1) for t in group] for group in mlp[1:4])
    split = states.shape[1]
    share = biases[0] + states.to(dtype) @ first[:, :split]  # [E, B, H]
    h = ((rest.to(dtype).unsqueeze(0) @ first[:, None, split:]) + share.unsqueeze(2)).flatten(1, 2)
    for i in range(len(mlp.weights) - 1):
        if i > 0:
            h = torch.baddbmm(biases[i], h, mlp.weights[i])
        if scales:
            h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS) * scales[i] + shifts[i]
        h = activation(mlp.activation).apply(h)
    return torch.baddbmm(biases[-1], h, mlp.weights[-1]).unflatten(1, rest.shape[:2])


def _values(critic: MLPWeights, states: Tensor, actions: Tensor) -> Tensor:
    """Q of every member: states [B, O], actions [B, N, A] -> [E, B, N], in float32 at least."""
    q = _perceptrons(critic, states, actions).squeeze(3)
    return q.to(torch.promote_types(q.dtype, torch.float32))


def _values_and_score(critic: MLPWeights, aggregation: str, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """Q of every member [E, B, N], and the gradient of their mean or smallest with respect to the actions."""

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        q = _values(critic, states, x)
        value = q.gather(0, q.argmin(dim=0, keepdim=True)) if aggregation == "min" else q.mean(dim=0)
        return value.sum(), q

    score, q = torch.func.grad(total, has_aux=True)(actions)
    return q, score


def _euler_step(velocity: MLPWeights, number: int, steps: int, states: Tensor, x: Tensor) -> Tensor:
    """Step ``number``, from 0, of the flow-matching sampler, without its clip: [B, N, A] -> [B, N, A]."""
    time = x.new_full((*x.shape[:2], 1), number / steps)
    return x + _perceptrons(velocity, states, torch.cat([x, time], dim=2)).squeeze(0).to(x.dtype) / steps


def _direction(flow: Flow, x: Tensor, score: Tensor) -> Tensor:
    """``reference.svgd_direction`` of particles and score [B, N, A]."""
    distances = (x.unsqueeze(2) - x.unsqueeze(1)).square().sum(dim=3)
    bandwidth = reference.median_bandwidth(distances)
    particle_kernel = reference.PARTICLE_KERNELS[flow.kernel]
    kernel = particle_kernel.matrix(distances, bandwidth.gamma)
    attraction = kernel @ score
    if not flow.repulsion:
        return attraction / x.shape[1]
    y = x - x[:, :1]
    weights, slope = particle_kernel.slope(kernel, bandwidth.gamma)
    drift = y * weights.sum(dim=2, keepdim=True) - weights @ y
    phi = attraction / flow.temperature + slope * drift
    if flow.bandwidth_gradient:
        phi = phi + reference.bandwidth_term(x, weights, slope, distances, bandwidth)
    return phi / x.shape[1]


def _step(
    critic: MLPWeights, flow: Flow, number: int, states: Tensor, x: Tensor, *moments: Tensor
) -> tuple[Tensor, ...]:
    """Step ``number``, from 1, of the flow: particles and, with Adam, moments [B, N, A] -> the same, moved."""
    _, score = _values_and_score(critic, flow.q_aggregation, states, x)
    phi = _direction(flow, x, score)
    if not moments:
        return ((x + flow.step_size * phi).clamp(-1.0, 1.0),)
    m, v = _moments(phi, *moments)
    v_hat = v / (1.0 - ADAM_BETA2**number)
    # The root has no derivative at zero, where the first moment is zero too and the step's derivative is 1 / eps.
    is_moving = v_hat > 0.0
    root = v_hat.where(is_moving, 1.0).sqrt().where(is_moving, 0.0)
    x = x + flow.step_size / (1.0 - ADAM_BETA1**number) * m / (root + ADAM_EPS)
    return x.clamp(-1.0, 1.0), m, v


def _moments(phi: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Adam's moments after one more direction."""
    return ADAM_BETA1 * m + (1.0 - ADAM_BETA1) * phi, ADAM_BETA2 * v + (1.0 - ADAM_BETA2) * phi.square()


# --- vector-Jacobian products ----------------------------------------------------------------------------------------


@neutral
def _pull_back(function: Callable[..., Any], inputs: Sequence[Tensor], gradient: Any) -> tuple[Tensor, ...]:
    """Gradients of the inputs from those of the outputs; the graph lives no longer than this call."""
    # torch.func, because autograd proper is switched off inside an operator.
    return torch.func.vjp(function, *inputs)[1](gradient)


def _chunks(mlp: MLPWeights, rest: Tensor) -> Iterator[slice]:
    """States [B, N, R] a few at a time."""
    _, n, width = rest.shape
    entries = n * max(mlp.weights[0].shape[0] * max(weight.shape[2] for weight in mlp.weights), n * width)
    states = max(_CHUNK_ENTRIES // entries, 1)
    return (slice(start, start + states) for start in range(0, rest.shape[0], states))


@neutral
def _flow_pull_back(
    critic: MLPWeights, flow: Flow, states: Tensor, trajectory: Tensor, grad_q: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the states [B, O] and the first particles from ``grad`` of all particles [L + 1, B, N, A]."""
    grad_states, grad_x = torch.zeros_like(states), grad[-1]
    if grad_q is not None:
        grad_states, from_q = _pull_back(partial(_values, critic), (states, trajectory[-1]), grad_q)
        grad_x = grad_x + from_q
    steps = len(trajectory) - 1
    moments: list[tuple[Tensor, ...]] = [()] * steps
    grad_moments: tuple[Tensor, ...] = ()
    if flow.optimizer == "adam" and steps > 0:
        zero = torch.zeros_like(grad_x)
        grad_moments = (zero, zero)
        moments[0] = (zero, zero)
        for i in range(1, steps):
            x = trajectory[i - 1]
            phi = _direction(flow, x, _values_and_score(critic, flow.q_aggregation, states, x)[1])
            moments[i] = _moments(phi, *moments[i - 1])
    for number in range(steps, 0, -1):
        i = number - 1
        from_states, grad_x, *rest = _pull_back(
            partial(_step, critic, flow, number), (states, trajectory[i], *moments[i]), (grad_x, *grad_moments)
        )
        grad_moments = tuple(rest)
        grad_states = grad_states + from_states
        grad_x = grad_x + grad[i]
    return grad_states, grad_x


@neutral
def _behavior_pull_back(
    velocity: MLPWeights, steps: int, states: Tensor, noise: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the states [B, O] and the noise from that of the particles [B, N, A]."""
    path = [noise]
    for k in range(steps):
        path.append(_euler_step(velocity, k, steps, states, path[-1]))
    grad_states = torch.zeros_like(states)
    (grad_x,) = _pull_back(lambda x: x.clamp(-1.0, 1.0), (path[-1],), grad)
    for k in range(steps - 1, -1, -1):
        from_states, grad_x = _pull_back(partial(_euler_step, velocity, k, steps), (states, path[k]), grad_x)
        grad_states = grad_states + from_states
    return grad_states, grad_x


# --- operators -------------------------------------------------------------------------------------------------------


def flat(mlp: MLPWeights) -> tuple[list[Tensor], str]:
    """A network as operators take it: its parameters in one list, and the activation."""
    return [tensor for group in mlp[:4] for tensor in group], mlp.activation


def _network(parameters: Sequence[Tensor], activation: str) -> MLPWeights:
    """The network of ``flat``; matrices [E, in, out] are told from vectors [E, out] by their shape."""
    layers = sum(parameter.ndim == 3 for parameter in parameters)
    norms = (len(parameters) - 2 * layers) // 2
    ends = (0, layers, 2 * layers, 2 * layers + norms, len(parameters))
    weights, biases, scales, shifts = (tuple(parameters[i:j]) for i, j in itertools.pairwise(ends))
    return MLPWeights(weights, biases, scales, shifts, activation)


def _save(ctx: Any, inputs: Sequence[Any], *tensors: Tensor) -> None:
    """Keep for the backward pass the network that the first two inputs are, and tensors."""
    parameters, ctx.activation, *_ = inputs
    ctx.save_for_backward(*tensors, *parameters)


def _saved(ctx: Any, tensors: int) -> tuple[list[Tensor], str, list[Tensor]]:
    """What ``_save`` kept: parameters, activation, and so many tensors."""
    saved = list(ctx.saved_tensors)
    return saved[tensors:], ctx.activation, saved[:tensors]


def _value_dtype(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@torch.library.custom_op("vgf_fast::critic_value_and_score", mutates_args=())
def critic_op(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    actions: Tensor,
    q_aggregation: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """``choice.critic_value_and_score`` with its exact gradient."""
    mlp = _network(parameters, activation)
    return choice.critic_value_and_score(mlp, observations, actions.contiguous(), q_aggregation, backend)


@critic_op.register_fake
def _(
    parameters: list[Tensor], activation: str, observations: Tensor, actions: Tensor, *settings: object
) -> tuple[Tensor, Tensor]:
    q = actions.new_empty((parameters[0].shape[0], *actions.shape[:2]), dtype=_value_dtype(parameters[0]))
    return q, actions.new_empty(actions.shape)


@torch.library.custom_op("vgf_fast::critic_value_and_score_backward", mutates_args=())
def _critic_backward(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    actions: Tensor,
    grad_q: Tensor,
    grad_score: Tensor,
    q_aggregation: str,
) -> tuple[Tensor, Tensor]:
    mlp = _network(parameters, activation)
    grad_observations = observations.new_empty(observations.shape)
    grad_actions = actions.new_empty(actions.shape)
    for part in _chunks(mlp, actions):
        grad_observations[part], grad_actions[part] = _pull_back(
            partial(_values_and_score, mlp, q_aggregation),
            (observations[part], actions[part]),
            (grad_q[:, part], grad_score[part]),
        )
    return grad_observations, grad_actions


@_critic_backward.register_fake
def _(
    parameters: list[Tensor], activation: str, observations: Tensor, actions: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    return observations.new_empty(observations.shape), actions.new_empty(actions.shape)


def _critic_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    _save(ctx, inputs, inputs[2], inputs[3])
    ctx.q_aggregation = inputs[4]


def _critic_gradient(ctx: Any, grad_q: Tensor, grad_score: Tensor) -> tuple[Any, ...]:
    parameters, activation, (states, x) = _saved(ctx, 2)
    found = _critic_backward(parameters, activation, states, x, grad_q, grad_score, ctx.q_aggregation)
    return [None] * len(parameters), None, *found, None, None


critic_op.register_autograd(_critic_gradient, setup_context=_critic_setup)


@torch.library.custom_op("vgf_fast::behavior_flow", mutates_args=())
def behavior_op(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    noise: Tensor,
    steps: int,
    backend: str,
    flow_gradient: str,
) -> Tensor:
    """``choice.behavior_flow`` with its exact gradient or the identity's; "none" is for tensors that want none."""
    mlp = _network(parameters, activation)
    return choice.behavior_flow(mlp, observations, noise.contiguous(), steps, backend)


@behavior_op.register_fake
def _(parameters: list[Tensor], activation: str, observations: Tensor, noise: Tensor, *settings: object) -> Tensor:
    return noise.new_empty(noise.shape)


@torch.library.custom_op("vgf_fast::behavior_flow_backward", mutates_args=())
def _behavior_backward(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    noise: Tensor,
    grad: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    mlp = _network(parameters, activation)
    grad_observations = observations.new_empty(observations.shape)
    grad_noise = noise.new_empty(noise.shape)
    for part in _chunks(mlp, noise):
        grad_observations[part], grad_noise[part] = _behavior_pull_back(
            mlp, steps, observations[part], noise[part], grad[part]
        )
    return grad_observations, grad_noise


@_behavior_backward.register_fake
def _(
    parameters: list[Tensor], activation: str, observations: Tensor, noise: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    return observations.new_empty(observations.shape), noise.new_empty(noise.shape)


def _behavior_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    *_, ctx.steps, _, ctx.mode = inputs
    _save(ctx, inputs, inputs[2], inputs[3])


def _behavior_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    parameters, activation, (states, noise) = _saved(ctx, 2)
    found: tuple[Tensor | None, Tensor] = (None, grad)
    if ctx.mode == "exact":
        found = _behavior_backward(parameters, activation, states, noise, grad, ctx.steps)
    return [None] * len(parameters), None, *found, None, None, None


behavior_op.register_autograd(_behavior_gradient, setup_context=_behavior_setup)


@torch.library.custom_op("vgf_fast::value_gradient_flow", mutates_args=())
def flow_op(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    kernel: str,
    return_trajectory: bool,
    evaluate: bool,
    backend: str,
    flow_gradient: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """``choice.value_gradient_flow`` with its exact gradient, which needs the trajectory, or the identity's.

    "none" is for tensors that want no gradient. Tensors without entries stand for a missing q or trajectory.
    """
    result = choice.value_gradient_flow(
        _network(parameters, activation),
        observations,
        particles.contiguous(),
        steps,
        Flow(step_size, temperature, q_aggregation, bandwidth_gradient, repulsion, optimizer, kernel),
        return_trajectory or flow_gradient == "exact",
        evaluate,
        backend,
    )
    q = particles.new_empty((0,), dtype=_value_dtype(parameters[0])) if result.q is None else result.q
    if result.trajectory is None:
        return result.particles, q, particles.new_empty((0,))
    # Results of an operator share no memory: the kernels' last particles are the trajectory's end.
    return result.particles.clone(), q, result.trajectory


@flow_op.register_fake
def _(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    kernel: str,
    return_trajectory: bool,
    evaluate: bool,
    backend: str,
    flow_gradient: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = particles.shape
    q = particles.new_empty(
        (parameters[0].shape[0], *shape[:2]) if evaluate else (0,), dtype=_value_dtype(parameters[0])
    )
    has_trajectory = return_trajectory or flow_gradient == "exact"
    return particles.new_empty(shape), q, particles.new_empty((steps + 1, *shape) if has_trajectory else (0,))


@torch.library.custom_op("vgf_fast::value_gradient_flow_backward", mutates_args=())
def _flow_backward(
    parameters: list[Tensor],
    activation: str,
    observations: Tensor,
    trajectory: Tensor,
    grad_particles: Tensor | None,
    grad_q: Tensor | None,
    grad_trajectory: Tensor | None,
    step_size: float,
    temperature: float,
    q_aggregation: str,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    mlp = _network(parameters, activation)
    flow = Flow(step_size, temperature, q_aggregation, bandwidth_gradient, repulsion, optimizer, kernel)
    grad_observations = observations.new_empty(observations.shape)
    grad_start = trajectory.new_empty(trajectory.shape[1:])
    for part in _chunks(mlp, trajectory[0]):
        xs = trajectory[:, part]
        grad = torch.zeros_like(xs) if grad_trajectory is None else grad_trajectory[:, part].clone()
        if grad_particles is not None:
            grad[-1] += grad_particles[part]
        grad_observations[part], grad_start[part] = _flow_pull_back(
            mlp, flow, observations[part], xs, None if grad_q is None else grad_q[:, part], grad
        )
    return grad_observations, grad_start


@_flow_backward.register_fake
def _(
    parameters: list[Tensor], activation: str, observations: Tensor, trajectory: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    return observations.new_empty(observations.shape), trajectory.new_empty(trajectory.shape[1:])


def _flow_setup(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    particles, _, trajectory = output
    ctx.mode, ctx.flow = inputs[-1], Flow(*inputs[5:12])
    ctx.set_materialize_grads(False)
    _save(ctx, inputs, inputs[2], trajectory if ctx.mode == "exact" else particles)


def _flow_gradient(
    ctx: Any, grad_particles: Tensor | None, grad_q: Tensor | None, grad_trajectory: Tensor | None
) -> tuple[Any, ...]:
    parameters, activation, (states, trajectory) = _saved(ctx, 2)
    # Tensors without entries may receive gradients without entries.
    grad_q, grad_trajectory = (None if t is None or t.ndim == 1 else t for t in (grad_q, grad_trajectory))
    if ctx.mode != "exact":
        # As if there were no steps: every step's particles are the first ones.
        trajectory = trajectory.unsqueeze(0)
        grad_trajectory = None if grad_trajectory is None else grad_trajectory.sum(dim=0, keepdim=True)
    grad_states, grad_x = _flow_backward(
        parameters, activation, states, trajectory, grad_particles, grad_q, grad_trajectory, *ctx.flow
    )
    return [None] * len(parameters), None, grad_states if ctx.mode == "exact" else None, grad_x, *[None] * 12


flow_op.register_autograd(_flow_gradient, setup_context=_flow_setup)
