"""The functional API: checks its input, chooses the backend, and calls ``reference`` or the Triton kernels.

``backend="torch"`` runs everywhere. ``backend="triton"`` runs everything as Triton kernels, for up to 128 particles, 64
action dimensions, hidden layers of 1024 units, and weights in float32 or bfloat16; it needs a GPU, or Triton's
interpreter, where products of bfloat16 weights are PyTorch's. ``backend="auto"`` is "triton" for tensors on a GPU
within these limits and "torch" otherwise. Weights are packed for the kernels at every call. On a CPU "triton" refuses
weights that are not finite, and either backend numbers that make a result that is not; on a GPU nothing is looked at,
because looking waits for the device.

Observations are [B, O], particles [B, N, A], values [E, B, N]; empty batches are fine.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends import choice as backends
from vgf_fast.backends import operators
from vgf_fast.backends.choice import Backend, resolve_backend, triton_installed, triton_interpreted
from vgf_fast.checks import check_network, check_range, check_result
from vgf_fast.common import memory
from vgf_fast.common.ambient import neutral
from vgf_fast.common.arrays import check_dense, check_generator
from vgf_fast.config import LARGEST, SMALLEST, TransportBudget, boolean, choice, integer, real
from vgf_fast.flow import Flow
from vgf_fast.networks import EnsembleMLP, VelocityField
from vgf_fast.reference import FlowResult, MLPWeights

__all__ = [
    "Backend",
    "behavior_flow",
    "critic_value_and_score",
    "resolve_backend",
    "select_particle",
    "svgd_direction",
    "td_target",
    "triton_installed",
    "triton_interpreted",
    "value_gradient_flow",
]


# --- checking input --------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, tensor: object, expected: str, ndim: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor of shape {expected}")
    check_dense(name, tensor)
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected {expected}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    return tensor


def _check_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but {other} is on {device}: move one of them")


def _check_same_shape(name: str, tensor: Tensor, other: str, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected {tuple(shape)}, the shape of {other}")


def _check_states(observations: object, other: str, device: torch.device, width: int | None) -> Tensor:
    tensor = _check_tensor("observations", observations, "(B, O)", 2)
    _check_device("observations", tensor, other, device)
    if width is not None and tensor.shape[1] != width:
        raise ValueError(f"observations has shape {_shape(tensor)}, expected (*, {width}): {other}'s observation_dim")
    return tensor


def _check_particles(
    name: str, particles: object, observations: Tensor, other: str, device: torch.device, width: int | None
) -> Tensor:
    tensor = _check_tensor(name, particles, "(B, N, A)", 3)
    _check_device(name, tensor, other, device)
    if tensor.shape[0] != observations.shape[0] or tensor.shape[1] < 1:
        raise ValueError(
            f"{name} has shape {_shape(tensor)}, expected ({observations.shape[0]}, N >= 1, A): one row of particles "
            f"for each of the {observations.shape[0]} observations"
        )
    if width is not None and tensor.shape[2] != width:
        raise ValueError(f"{name} has shape {_shape(tensor)}, expected (*, *, {width}): {other}'s action_dim")
    return tensor


def _check_temperature(temperature: float) -> None:
    if not torch.compiler.is_compiling():
        real("temperature", temperature, SMALLEST, LARGEST)


def _uses_operator(flow_gradient: str) -> bool:
    """Whether a registered operator is called: for its gradient, or because torch.compile cannot trace the function."""
    return flow_gradient != "none" or torch.compiler.is_compiling()


def _without_graph(flow_gradient: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach() for tensor in tensors) if flow_gradient == "none" else tensors


def _particle_dtype(tensor: Tensor) -> torch.dtype:
    """Particles are float32 at least: a small step would be lost in bfloat16."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _critic_weights(critic: EnsembleMLP | MLPWeights) -> tuple[MLPWeights, int | None, int | None]:
    """Weights, observation and action width of a critic; widths are None where only their sum is known."""
    if isinstance(critic, EnsembleMLP):
        return critic.stacked(), critic.observation_dim, critic.action_dim
    if isinstance(critic, MLPWeights):
        check_network("critic", critic)
        return critic, None, None
    raise TypeError(f"critic is a {type(critic).__name__}, expected an EnsembleMLP or MLPWeights")


def _check_critic_input(
    critic: EnsembleMLP | MLPWeights, observations: object, particles: object, name: str
) -> tuple[MLPWeights, Tensor, Tensor]:
    weights, observation_dim, action_dim = _critic_weights(critic)
    device = weights.weights[0].device
    if weights.weights[-1].shape[2] != 1:
        raise ValueError(f"the critic has {weights.weights[-1].shape[2]} outputs, expected 1")
    states = _check_states(observations, "the critic", device, observation_dim)
    x = _check_particles(name, particles, states, "the critic", device, action_dim)
    width = weights.weights[0].shape[1]
    if states.shape[1] + x.shape[2] != width:
        raise ValueError(
            f"observations and {name} have {states.shape[1]} + {x.shape[2]} columns, expected {width}: the critic's"
        )
    check_range("observations", states, weights)
    check_range(name, x, weights)
    return weights, states, x


def _check_memory(weights: MLPWeights, x: Tensor, scores: bool, **parts: int) -> None:
    """Refuse what cannot fit: particles x [B, N, A] in a network, which keeps every layer for their ``scores``."""
    if torch.compiler.is_compiling():
        return
    widths = [weight.shape[2] for weight in weights.weights[:-1]]
    units = sum(widths) if scores else max(widths, default=0)
    members = weights.weights[0].shape[0]
    memory.check_flow(x.shape, _particle_dtype(x), x.device, members=members, units=units, **parts)


# --- the API ---------------------------------------------------------------------------------------------------------


@neutral
def critic_value_and_score(
    critic: EnsembleMLP | MLPWeights,
    observations: Tensor,
    actions: Tensor,
    q_aggregation: str = "mean",
    *,
    backend: Backend = "auto",
    flow_gradient: str = "none",
) -> tuple[Tensor, Tensor]:
    """Q of every member, and the gradient of the aggregated Q with respect to the action.

    observations [B, O], actions [B, N, A] -> q [E, B, N], score [B, N, A]. ``q_aggregation`` is "mean" or "min" over
    members; the gradient of the minimum is that of the smallest member, action by action. ``flow_gradient`` is "none",
    without an autograd graph, or "exact": gradients of q and of the score, which are Hessian-vector products of the
    critic, reach observations and actions, never the critic's weights. The backward pass is PyTorch's on any backend.
    Source: the paper's value gradient; the release's "vgf_q_agg".
    Raises ``ValueError`` or ``TypeError`` naming the argument whose shape, dtype or device is wrong and, on a CPU, that
    is not finite.
    """
    weights, states, x = _check_critic_input(critic, observations, actions, "actions")
    choice("q_aggregation", q_aggregation, ("mean", "min"))
    choice("flow_gradient", flow_gradient, ("none", "exact"))
    _check_memory(weights, x, scores=True)
    states, x = _without_graph(flow_gradient, states, x.to(_particle_dtype(x)))
    if _uses_operator(flow_gradient):
        return operators.critic_op(*operators.flat(weights.detach()), states, x, q_aggregation, backend)
    q, score = backends.critic_value_and_score(weights, states, x, q_aggregation, backend)
    for result in (q, score):
        check_result(result, ("critic", weights), observations=states, actions=x)
    return q, score


@neutral
def svgd_direction(
    particles: Tensor,
    score: Tensor,
    temperature: float,
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    *,
    kernel: str = "rbf",
    backend: Backend = "auto",
) -> Tensor:
    """phi_i = (1/N) [ (1/alpha) sum_j K_ij G_j + sum_j S_ij (x_i - x_j) ] with S = -2 dK / dD, D_ij = |x_i - x_j|^2.

    particles, score [B, N, A] -> phi [B, N, A]. ``kernel`` is "rbf", K = exp(-gamma D), S = 2 gamma K; or "imq", the
    inverse multiquadric K = (1 + gamma D)^(-1/2), S = gamma K^3; gamma is the same, from the median of D.
    ``bandwidth_gradient=True`` differentiates the median too, as the public release does; ``repulsion=False`` is the
    paper's simplified direction (1/N) sum_j K_ij G_j.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong and, on a CPU, that is not finite.
    """
    x = _check_tensor("particles", particles, "(B, N, A)", 3)
    if x.shape[1] < 1:
        raise ValueError(f"particles has shape {_shape(x)}, expected (B, N >= 1, A)")
    g = _check_tensor("score", score, "(B, N, A)", 3)
    _check_same_shape("score", g, "particles", x.shape)
    _check_device("score", g, "particles", x.device)
    _check_temperature(temperature)
    choice("kernel", kernel, tuple(reference.PARTICLE_KERNELS))
    bandwidth_gradient = boolean("bandwidth_gradient", bandwidth_gradient)
    repulsion = boolean("repulsion", repulsion)
    dtype = _particle_dtype(x)
    if not torch.compiler.is_compiling():
        memory.check_flow(x.shape, dtype, x.device, pairs=True)
    if resolve_backend(backend, x.device, x.shape[1], x.shape[2], dtype) == "triton":
        from vgf_fast.kernels import svgd

        return svgd.svgd_direction(x, g, temperature, bandwidth_gradient, repulsion, kernel).to(dtype)
    phi = reference.svgd_direction(x.to(dtype), g.to(dtype), temperature, bandwidth_gradient, repulsion, kernel)
    check_result(phi, particles=x, score=g)
    return phi


@neutral
def behavior_flow(
    velocity: VelocityField | MLPWeights,
    observations: Tensor,
    noise: Tensor,
    steps: int,
    *,
    backend: Backend = "auto",
    flow_gradient: str = "none",
) -> Tensor:
    """Draw particles: ``steps`` Euler steps of the flow-matching sampler from ``noise``, then clip to [-1, 1].

    observations [B, O], noise [B, N, A] -> particles [B, N, A], as in the release. ``flow_gradient`` as in
    ``value_gradient_flow``, with the noise for the initial particles.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong and, on a CPU, that is not finite.
    """
    if isinstance(velocity, VelocityField):
        weights, observation_dim, action_dim = velocity.stacked(), velocity.observation_dim, velocity.action_dim
    elif isinstance(velocity, MLPWeights):
        check_network("velocity", velocity)
        if velocity.weights[0].shape[0] != 1:
            raise ValueError(f"the velocity field has {velocity.weights[0].shape[0]} members, expected 1")
        weights, observation_dim, action_dim = velocity, None, velocity.weights[-1].shape[2]
    else:
        raise TypeError(f"velocity is a {type(velocity).__name__}, expected a VelocityField or MLPWeights")
    steps = integer("steps", steps, 1)
    device = weights.weights[0].device
    states = _check_states(observations, "the velocity field", device, observation_dim)
    x = _check_particles("noise", noise, states, "the velocity field", device, action_dim)
    width = weights.weights[0].shape[1]
    if states.shape[1] + x.shape[2] + 1 != width:
        raise ValueError(
            f"observations, noise and time have {states.shape[1]} + {x.shape[2]} + 1 columns, expected {width}: the "
            "velocity field's input"
        )
    check_range("observations", states, weights)
    check_range("noise", x, weights)
    choice("flow_gradient", flow_gradient, operators.MODES)
    _check_memory(weights, x, scores=False)
    states, x = _without_graph(flow_gradient, states, x.to(_particle_dtype(x)))
    if _uses_operator(flow_gradient):
        return operators.behavior_op(*operators.flat(weights.detach()), states, x, steps, backend, flow_gradient)
    drawn = backends.behavior_flow(weights, states, x, steps, backend)
    check_result(drawn, ("velocity", weights), observations=states, noise=x)
    return drawn


@neutral
def value_gradient_flow(
    critic: EnsembleMLP | MLPWeights,
    observations: Tensor,
    particles: Tensor,
    budget: TransportBudget,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    return_trajectory: bool = False,
    *,
    kernel: str = "rbf",
    evaluate: bool = True,
    backend: Backend = "auto",
    flow_gradient: str = "none",
) -> FlowResult:
    """Move particles within a transport budget along the gradient flow of KL(. || exp(Q / alpha)).

    observations [B, O], particles [B, N, A] -> FlowResult(particles [B, N, A], q [E, B, N], trajectory
    [L + 1, B, N, A] or None). Every step ends with a clip to [-1, 1]; ``optimizer`` is "adam" (its moments start at
    zero) or "ascent", the paper's plain equation; ``kernel`` as in ``svgd_direction``. ``evaluate=False`` leaves q out.
    The given particles are not written.

    ``flow_gradient`` says what autograd sees of particles, q and trajectory. "none": nothing, there is no graph.
    "exact": gradients reach the initial particles and the observations through every step, with the derivative of the
    score, of the kernel and its median, of Adam and of the clip; the backward pass is PyTorch's on any backend,
    recomputes every step from its particles, and cannot be differentiated again. "identity": the initial particles
    receive the gradient of the moved ones unchanged (and, of q, that of Q at the moved ones), observations none.
    The critic's weights never receive gradients.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong and, on a CPU, that is not finite.
    """
    weights, states, x = _check_critic_input(critic, observations, particles, "particles")
    if not isinstance(budget, TransportBudget):
        raise TypeError(f"budget is a {type(budget).__name__}, expected a TransportBudget")
    choice("q_aggregation", q_aggregation, ("mean", "min"))
    choice("optimizer", optimizer, ("adam", "ascent"))
    choice("kernel", kernel, tuple(reference.PARTICLE_KERNELS))
    choice("flow_gradient", flow_gradient, operators.MODES)
    bandwidth_gradient = boolean("bandwidth_gradient", bandwidth_gradient)
    repulsion = boolean("repulsion", repulsion)
    return_trajectory = boolean("return_trajectory", return_trajectory)
    evaluate = boolean("evaluate", evaluate)
    moving = budget.steps > 0
    snapshots = budget.steps + 1 if return_trajectory else 0
    _check_memory(weights, x, scores=moving, pairs=moving, snapshots=snapshots)
    states, x = _without_graph(flow_gradient, states, x.to(_particle_dtype(x)))
    flow = Flow(
        float(budget.step_size),
        float(budget.temperature),
        q_aggregation,
        bandwidth_gradient,
        repulsion,
        optimizer,
        kernel,
    )
    asked = (return_trajectory, evaluate, backend)
    if not _uses_operator(flow_gradient):
        result = backends.value_gradient_flow(weights, states, x, budget.steps, flow, *asked)
        # Particles that are not finite have no finite values.
        shown = result.particles if result.q is None else result.q
        check_result(shown, ("critic", weights), observations=states, particles=x)
        return result
    moved, q, trajectory = operators.flow_op(
        *operators.flat(weights.detach()), states, x, budget.steps, *flow, *asked, flow_gradient
    )
    return FlowResult(moved, q if evaluate else None, trajectory if return_trajectory else None)


@neutral
def select_particle(
    particles: Tensor,
    q: Tensor,
    mode: str = "max",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Choose one particle a state: particles [B, N, A], q [B, N] -> (action [B, A], index [B]).

    "max": the largest q, the first among equals. "softmax": probability proportional to exp(q / temperature).
    "random": every particle alike. The latter two draw one number a state from ``generator``. As in the release.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong and, on a CPU, that is not finite.
    """
    x = _check_tensor("particles", particles, "(B, N, A)", 3)
    values = _check_tensor("q", q, "(B, N)", 2)
    if values.shape != x.shape[:2] or x.shape[1] < 1:
        raise ValueError(
            f"q has shape {_shape(values)}, expected {tuple(x.shape[:2])} with N >= 1: one value a particle"
        )
    _check_device("q", values, "particles", x.device)
    choice("mode", mode, ("max", "softmax", "random"))
    _check_temperature(temperature)
    if values.is_cpu and not torch.compiler.is_compiling():
        # Minus infinity leaves a particle out.
        largest = values.amax(dim=1)
        check_result(largest, q=largest)
    uniform = None
    if generator is not None:
        check_generator(generator, x.device)
    if mode != "max":
        uniform = torch.rand(x.shape[0], device=x.device, dtype=torch.float32, generator=generator)
    if resolve_backend(backend, x.device, x.shape[1], x.shape[2], x.dtype) == "triton":
        from vgf_fast.kernels import selection

        return selection.select_particle(x, values, mode, temperature, uniform)
    action, index = reference.select_particle(x, values, mode, temperature, uniform)
    check_result(action, particles=x)
    return action, index


@neutral
def td_target(
    q: Tensor,
    rewards: Tensor,
    masks: Tensor,
    discount: float,
    q_aggregation: str = "min",
    reduce: str = "mean",
    *,
    backend: Backend = "auto",
) -> Tensor:
    """TD target y = r + discount * mask * reduce_n Q_agg(s', x_n): q [E, B, N], rewards [B], masks [B] -> y [B].

    Source: the paper's critic loss; ``q_aggregation`` and ``reduce`` as in the release.
    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong and, on a CPU, that is not finite.
    """
    values = _check_tensor("q", q, "(E, B, N)", 3)
    if values.shape[0] < 1 or values.shape[2] < 1:
        raise ValueError(f"q has shape {_shape(values)}, expected (E >= 1, B, N >= 1)")
    for name, tensor in (("rewards", rewards), ("masks", masks)):
        _check_tensor(name, tensor, "(B,)", 1)
        _check_device(name, tensor, "q", values.device)
        if tensor.shape[0] != values.shape[1]:
            raise ValueError(f"{name} has shape {_shape(tensor)}, expected ({values.shape[1]},): one number a state")
    choice("q_aggregation", q_aggregation, ("mean", "min"))
    choice("reduce", reduce, ("mean", "max"))
    if not torch.compiler.is_compiling():
        real("discount", discount, 0.0, 1.0)
    if resolve_backend(backend, values.device, values.shape[2], 1, values.dtype) == "triton":
        from vgf_fast.kernels import selection

        return selection.td_target(values, rewards, masks, discount, q_aggregation, reduce)
    values, rewards, masks = (tensor.to(_particle_dtype(tensor)) for tensor in (values, rewards, masks))
    target = reference.td_target(values, rewards, masks, discount, q_aggregation, reduce)
    check_result(target, q=values, rewards=rewards, masks=masks)
    return target
