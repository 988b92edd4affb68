"""The torch backend: every formula of VGF in plain PyTorch, in any floating dtype, with closed-form gradients.

It is the oracle of every kernel and what runs where there is no GPU. Nothing here checks its input:
``vgf_fast.functional`` does. Functions that move particles build no autograd graph.

Shapes: B states, N particles, A action, O observation, E members, L flow steps, K behaviour steps, H hidden width.
Particles, scores and the SVGD direction are float32 at least; the matrix products run in the dtype of the weights.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vgf_fast import blocked, native
from vgf_fast.kernels import ranges
from vgf_fast.layers import LAYER_NORM_EPS, MLPWeights, activate_, activation, activation_backward

ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
BANDWIDTH_MIN = 1e-12
GAMMA_EPS = 1e-6
AMORTIZED_NORM = 1.0  # of the direction of an amortised score, over all particles
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
BATCHED_ROWS = 64  # up to so many rows the CPU multiplies all members at once


class FlowResult(NamedTuple):
    """What a value gradient flow returns."""

    particles: Tensor  # [B, N, A] after the last step
    q: Tensor | None  # [E, B, N] value of every member at ``particles``; None when not asked for
    trajectory: Tensor | None  # [L + 1, B, N, A] from the first particles to the last; None when not asked for


# --- layers ----------------------------------------------------------------------------------------------------------


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Member by member ``x @ weight + bias``: x [E, R, in], weight [E, in, out], bias [E, 1, out] -> [E, R, out]."""
    members, rows, _ = x.shape
    if members == 1 or rows <= BATCHED_ROWS or x.device.type != "cpu":
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
    # With many rows the CPU's batched product is a fifth slower than one product a member.
    out = x.new_empty(members, rows, weight.shape[2])
    for e in range(members):
        if bias is None:
            torch.mm(x[e], weight[e], out=out[e])
        else:
            torch.addmm(bias[e], x[e], weight[e], out=out[e])
    return out


def layer_norm_backward(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of (z - mean) * rstd with respect to z, all over the last axis."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def mlp_forward(mlp: MLPWeights, x: Tensor) -> Tensor:
    """Differentiable forward pass: x [R, in] -> [E, R, out]. The one to train with."""
    h = x.to(mlp.weights[0].dtype).expand(mlp.weights[0].shape[0], -1, -1)
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        h = torch.baddbmm(bias.unsqueeze(1), h, weight)
        if i + 1 < len(mlp.weights):
            if mlp.norm_scales:
                h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
                h = torch.addcmul(mlp.norm_biases[i].unsqueeze(1), h, mlp.norm_scales[i].unsqueeze(1))
            h = activation(mlp.activation).apply(h)
    return h


def member_values(critic: MLPWeights, observations: Tensor, actions: Tensor) -> Tensor:
    """Differentiable Q of every member at one action a state: [B, O], [B, A] -> [E, B], in float32 at least."""
    q = mlp_forward(critic, torch.cat([observations, actions], dim=-1)).squeeze(-1)
    return q.to(torch.promote_types(q.dtype, torch.float32))


class _Layer(NamedTuple):
    """What the backward pass needs of one hidden layer."""

    z: Tensor  # [E, R, H] before LayerNorm
    mean: Tensor | None  # [E, R, 1]
    rstd: Tensor | None  # [E, R, 1]
    y: Tensor  # [E, R, H] before the activation (for relu, after it)


class StackAtStates:
    """A stack of MLPs on [state, rest] bound to B states, whose share of the first layer is computed once.

    ``state_share`` is W_s s + b, [E, B, H]; every call adds W_r r for rows r of N particles a state.
    """

    def __init__(self, mlp: MLPWeights, observations: Tensor) -> None:
        mlp = mlp.detach()
        first = mlp.weights[0]
        self.activation = mlp.activation
        self.dtype = first.dtype
        self.rest_weight = first[:, observations.shape[-1] :]
        self.weights = (self.rest_weight, *mlp.weights[1:])
        self.biases, self.scales, self.shifts = (
            [tensor.unsqueeze(1) for tensor in group] for group in (mlp.biases, mlp.norm_scales, mlp.norm_biases)
        )
        x = observations.detach().to(self.dtype).expand(first.shape[0], -1, -1)
        self.state_share = matmul(x, first[:, : observations.shape[-1]], self.biases[0])

    def first_layer(self, rest: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        """z of the first layer: rest [B, N, R], its weight [E, R, H], the states' share [E, B, H] -> [E, B * N, H]."""
        batch, particles, width = rest.shape
        flat = rest.detach().reshape(batch * particles, width).to(self.dtype)
        z = matmul(flat.expand(weight.shape[0], -1, -1), weight)
        z.view(z.shape[0], batch, particles, z.shape[2]).add_(share.unsqueeze(2))
        return z

    def hidden(self, z: Tensor, tape: list[_Layer] | None = None) -> Tensor:
        """From z of the first layer to the last activation [E, R, H]; ``tape`` collects what a backward needs."""
        h = self._normalise_and_activate(0, z, tape)
        for i in range(1, len(self.weights) - 1):
            h = self._normalise_and_activate(i, matmul(h, self.weights[i], self.biases[i]), tape)
        return h

    def _normalise_and_activate(self, i: int, z: Tensor, tape: list[_Layer] | None) -> Tensor:
        mean = rstd = None
        y = z
        if self.scales:
            y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, LAYER_NORM_EPS)
            torch.addcmul(self.shifts[i], y, self.scales[i], out=y)
        if tape is not None:
            tape.append(_Layer(z, mean, rstd, y))
        return activate_(self.activation, y)

    def output(self, h: Tensor) -> Tensor:
        """The last linear layer: [E, R, H] -> [E, R, out]."""
        return matmul(h, self.weights[-1], self.biases[-1])


class CriticAtStates(StackAtStates):
    """An ensemble critic bound to B states: values, and the action gradient of the aggregated value."""

    def values(self, actions: Tensor) -> Tensor:
        """Q of every member: actions [B, N, A] -> [E, B, N], in float32 at least."""
        return self._as_values(self.output(self._hidden_at(actions)), actions)

    def values_and_score(self, actions: Tensor, aggregation: str = "mean") -> tuple[Tensor, Tensor]:
        """Q of every member [E, B, N] and grad_a Q_agg [B, N, A], with Q_agg the mean or the minimum over members.

        The gradient of the minimum is that of the smallest member, particle by particle. (ALGORITHM: flow step 1.)
        """
        tape: list[_Layer] = []
        q = self.output(self._hidden_at(actions, tape))
        return self._as_values(q, actions), self._backward(tape, q, aggregation, actions)

    def score(self, actions: Tensor, aggregation: str = "mean") -> Tensor:
        """The score of ``values_and_score`` alone: the mean's gradient needs no values."""
        tape: list[_Layer] = []
        h = self._hidden_at(actions, tape)
        return self._backward(tape, self.output(h) if aggregation == "min" else None, aggregation, actions)

    def _hidden_at(self, actions: Tensor, tape: list[_Layer] | None = None) -> Tensor:
        return self.hidden(self.first_layer(actions, self.rest_weight, self.state_share), tape)

    def _backward(self, tape: list[_Layer], q: Tensor | None, aggregation: str, actions: Tensor) -> Tensor:
        head = self.weights[-1].transpose(1, 2)  # [E, 1, H]
        members = head.shape[0]
        if q is None or aggregation == "mean":
            # Copied out: element-wise products run several times slower over a broadcast tensor.
            grad = (head / members).repeat(1, tape[-1].y.shape[1], 1)
        else:
            smallest = q.argmin(dim=0, keepdim=True) == torch.arange(members, device=q.device).view(-1, 1, 1)
            grad = smallest * head
        for i in range(len(tape) - 1, -1, -1):
            layer = tape.pop()
            grad = activation_backward(self.activation, grad, layer.y)
            if layer.mean is not None and layer.rstd is not None:
                grad.mul_(self.scales[i])
                grad = layer_norm_backward(grad, layer.z, layer.mean, layer.rstd)
            grad = matmul(grad, self.weights[i].transpose(1, 2))
        return grad.to(actions.dtype).sum(dim=0).view_as(actions)

    @staticmethod
    def _as_values(q: Tensor, actions: Tensor) -> Tensor:
        return q.view(q.shape[0], *actions.shape[:2]).to(torch.promote_types(q.dtype, torch.float32))


def critic_at_states(
    critic: MLPWeights, observations: Tensor, particles: int, backward: bool = True
) -> CriticAtStates | native.NativeCriticAtStates | blocked.BlockedCriticAtStates:
    """A critic bound to states, N ``particles`` each; ``backward`` if scores are wanted, not values alone.

    A CPU takes few rows in compiled code, and for many, where that is faster, lays the weights out in advance.
    """
    rows = observations.shape[0] * particles
    if native.pays(critic, rows, observations):
        return native.NativeCriticAtStates(critic, observations, particles, backward)
    if not blocked.pays(critic, rows):
        return CriticAtStates(critic, observations)
    rows = min(rows, blocked.chunk_rows(critic))
    return blocked.BlockedCriticAtStates(blocked.block(critic, observations.shape[1], rows, backward), observations)


def aggregate(q: Tensor, aggregation: str) -> Tensor:
    """Mean or minimum over members: [E, ...] -> [...]."""
    return q.amin(dim=0) if aggregation == "min" else q.mean(dim=0)


class FieldAtStates(StackAtStates):
    """A score field bound to B states."""

    def __call__(self, actions: Tensor) -> Tensor:
        """Scores at actions [B, N, A] -> [B, N, A], in the actions' dtype."""
        z = self.first_layer(actions, self.rest_weight, self.state_share)
        return self.output(self.hidden(z)).view_as(actions).to(actions.dtype)


# --- drawing particles -----------------------------------------------------------------------------------------------


@torch.no_grad()
def behavior_flow(velocity: MLPWeights, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """K Euler steps x <- x + v(s, x, k/K)/K of the flow-matching sampler, then clip to [-1, 1].

    observations [B, O], noise [B, N, A] -> particles [B, N, A] in the dtype of ``noise``.
    """
    rows = noise.shape[0] * noise.shape[1]
    if native.pays(velocity, rows, observations):
        return native.behavior_flow(velocity, observations, noise, steps)
    if blocked.pays(velocity, rows):
        rows = min(rows, blocked.chunk_rows(velocity))
        return blocked.behavior_flow(
            blocked.block(velocity, observations.shape[1], rows, backward=False), observations, noise, steps
        )
    field = StackAtStates(velocity, observations)
    action_weight, time_weight = field.rest_weight[:, :-1], field.rest_weight[:, -1:]
    x = noise
    for k in range(steps):
        z = field.first_layer(x, action_weight, torch.add(field.state_share, time_weight, alpha=k / steps))
        v = field.output(field.hidden(z)).view_as(x)
        x = x.add(v, alpha=1.0 / steps)
    return x.clamp(-1.0, 1.0)


def gaussian_log_std(log_std: Tensor) -> Tensor:
    """The Gaussian behaviour model's state-independent log standard deviation, clipped to [-5, 2]."""
    return log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def gaussian_sample(mean: Tensor, log_std: Tensor, noise: Tensor, tanh: bool) -> Tensor:
    """Draws of the Gaussian behaviour model: mean [B, A], log_std [A], noise [B, N, A] -> particles [B, N, A]."""
    x = mean.unsqueeze(1) + gaussian_log_std(log_std).exp() * noise
    return (x.tanh() if tanh else x).clamp(-1.0, 1.0)


# --- the flow --------------------------------------------------------------------------------------------------------


def squared_distances(particles: Tensor) -> Tensor:
    """D_ij = ||x_i - x_j||^2 by differences, so exactly symmetric: [B, N, A] -> [B, N, N]."""
    return torch.cdist(particles, particles, compute_mode="donot_use_mm_for_euclid_dist").square_()


class Bandwidth(NamedTuple):
    """Median bandwidth of the RBF kernel exp(-gamma D)."""

    gamma: Tensor  # [B, 1, 1], 1 / (1e-6 + 2 h)
    clamped: Tensor  # [B, 1, 1] bool, whether h is its lower bound
    middle: Tensor | None  # [B, 1 or 2] flat index into D of the entries whose mean is the median (one if N * N is odd)


def median_bandwidth(distances: Tensor, positions: bool = True) -> Bandwidth:
    """h = median of all N * N squared distances / (2 ln(N + 1)), at least 1e-12; gamma = 1 / (1e-6 + 2 h).

    Without ``positions`` the middle entries are not looked for, which is several times faster.
    """
    batch, n, _ = distances.shape
    entries = n * n
    flat = distances.reshape(batch, entries)
    lower, upper = (entries - 1) // 2, entries // 2
    middle = None
    if positions:
        # Stable: which of several equal entries is the median decides which particle the bandwidth's gradient reaches.
        values, order = flat.sort(dim=1, stable=True)
        median, middle = values[:, lower : upper + 1].mean(dim=1), order[:, lower : upper + 1]
    else:
        median = flat.kthvalue(lower + 1, dim=1).values
        if upper > lower:
            median = torch.stack([median, flat.kthvalue(upper + 1, dim=1).values], dim=1).mean(dim=1)
    h = median / (2.0 * math.log(n + 1.0))
    gamma = 1.0 / (GAMMA_EPS + 2.0 * h.clamp(min=BANDWIDTH_MIN))
    return Bandwidth(gamma.view(-1, 1, 1), (h <= BANDWIDTH_MIN).view(-1, 1, 1), middle)


class ParticleKernel(NamedTuple):
    """K as a function of the squared distances D [B, N, N] and gamma [B, 1, 1], and its slope S = -2 dK / dD.

    Particle i is pushed by S_ij (x_i - x_j) from every particle j, and dK / dgamma is -D S / (2 gamma).
    """

    matrix: Callable[[Tensor, Tensor], Tensor]  # (D, gamma) -> K
    slope: Callable[
        [Tensor, Tensor], tuple[Tensor, Tensor]
    ]  # (K, gamma) -> [B, N, N] and [B, 1, 1], whose product is S


PARTICLE_KERNELS = {
    # exp(-gamma D)
    "rbf": ParticleKernel(lambda d, gamma: torch.exp(-gamma * d), lambda k, gamma: (k, 2.0 * gamma)),
    # (1 + gamma D)^(-1/2), the inverse multiquadric
    "imq": ParticleKernel(lambda d, gamma: torch.rsqrt(1.0 + gamma * d), lambda k, gamma: (k * k * k, gamma)),
}


def kernel_matrix(particles: Tensor, positions: bool = True, kernel: str = "rbf") -> tuple[Tensor, Tensor, Bandwidth]:
    """Kernel matrix K [B, N, N], squared distances D [B, N, N] and bandwidth of the particles [B, N, A]."""
    distances = squared_distances(particles)
    bandwidth = median_bandwidth(distances, positions)
    return PARTICLE_KERNELS[kernel].matrix(distances, bandwidth.gamma), distances, bandwidth


@torch.no_grad()
def svgd_direction(
    particles: Tensor,
    score: Tensor,
    temperature: float,
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    kernel: str = "rbf",
) -> Tensor:
    """phi_i = (1/N) [ (1/alpha) sum_j K_ij G_j + sum_j S_ij (x_i - x_j) ], S = -2 dK / dD: [B, N, A] -> [B, N, A].

    ``kernel`` is one of ``PARTICLE_KERNELS``, all with the same median bandwidth.
    ``bandwidth_gradient`` adds what the public release's automatic gradient of sum_ij K(x_i, stop(x_j)) sends through
    the median. ``repulsion=False`` is the paper's simplified direction (1/N) sum_j K_ij G_j.
    """
    n = particles.shape[1]
    matrix, distances, bandwidth = kernel_matrix(particles, bandwidth_gradient and repulsion, kernel)
    attraction = matrix @ score
    if not repulsion:
        return attraction / n
    # Relative to one particle of the same state: the sum below would cancel once the particles have clumped.
    x = particles - particles[:, :1]
    weights, slope = PARTICLE_KERNELS[kernel].slope(matrix, bandwidth.gamma)
    drift = x * weights.sum(dim=2, keepdim=True) - weights @ x
    phi = (attraction / temperature).add_(slope * drift)
    if bandwidth_gradient:
        phi.add_(bandwidth_term(particles, weights, slope, distances, bandwidth))
    return phi / n


def bandwidth_term(
    particles: Tensor, weights: Tensor, slope: Tensor, distances: Tensor, bandwidth: Bandwidth
) -> Tensor:
    """-d/dx_i of sum K through the median: only the row index i of the one or two middle entries (i, j) receives it.

    ``weights`` times ``slope`` is S of the particle kernel.
    """
    assert bandwidth.middle is not None
    n = particles.shape[1]
    # d sum(K) / d median = sum(D S) gamma / (2 ln(N + 1)), shared by the middle; d D_ij / d x_i = 2 (x_i - x_j).
    share = (distances * weights).sum(dim=(1, 2), keepdim=True) * (0.5 * slope * bandwidth.gamma) / math.log(n + 1.0)
    share = share.masked_fill(bandwidth.clamped, 0.0) / bandwidth.middle.shape[1]
    width = particles.shape[2]
    row = torch.div(bandwidth.middle, n, rounding_mode="floor").unsqueeze(2).expand(-1, -1, width)
    column = (bandwidth.middle % n).unsqueeze(2).expand(-1, -1, width)
    term = -2.0 * share * (particles.gather(1, row) - particles.gather(1, column))
    return torch.zeros_like(particles).scatter_add_(1, row, term)


@torch.no_grad()
def svgd_step_(
    particles: Tensor,
    score: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    step: int,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    kernel: str = "rbf",
) -> None:
    """Move the particles one flow step, in place: direction, Adam (``step`` counts from 1) or plain ascent, clip.

    The moments [B, N, A] are Adam's and are written too; they start at zero with every flow. ``None`` for "ascent".
    """
    phi = svgd_direction(particles, score, temperature, bandwidth_gradient, repulsion, kernel)
    if optimizer == "ascent":
        particles.add_(phi, alpha=step_size).clamp_(-1.0, 1.0)
    else:
        if first_moment is None or second_moment is None:
            raise ValueError("first_moment and second_moment are None, expected tensors: optimizer='adam'")
        adam_step_(particles, phi, first_moment, second_moment, step, step_size)


def adam_step_(
    particles: Tensor, direction: Tensor, first_moment: Tensor, second_moment: Tensor, step: int, step_size: float
) -> None:
    """Adam's ascent along a direction, then the clip to [-1, 1]; all [B, N, A], ``step`` counts from 1."""
    first_moment.mul_(ADAM_BETA1).add_(direction, alpha=1.0 - ADAM_BETA1)
    second_moment.mul_(ADAM_BETA2).addcmul_(direction, direction, value=1.0 - ADAM_BETA2)
    scale = (second_moment / (1.0 - ADAM_BETA2**step)).sqrt_().add_(ADAM_EPS)
    particles.addcdiv_(first_moment, scale, value=step_size / (1.0 - ADAM_BETA1**step)).clamp_(-1.0, 1.0)


def _steps(
    x: Tensor,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    kernel: str,
) -> Callable[[Tensor], None]:
    """``svgd_step_`` of particles x along a score, step after step; few particles a state in compiled code on a CPU."""
    if native.moves(x):
        constants = (ADAM_BETA1, ADAM_BETA2, ADAM_EPS, BANDWIDTH_MIN, GAMMA_EPS)
        options = (step_size, temperature, bandwidth_gradient, repulsion, optimizer, kernel)
        return native.FlowSteps(x, *options, constants).step
    zeros = (torch.zeros_like(x), torch.zeros_like(x))
    moments: tuple[Tensor | None, Tensor | None] = zeros if optimizer == "adam" else (None, None)
    numbers = itertools.count(1)

    def move(score: Tensor) -> None:
        step = next(numbers)
        svgd_step_(x, score, *moments, step, step_size, temperature, bandwidth_gradient, repulsion, optimizer, kernel)

    return move


@torch.no_grad()
def value_gradient_flow(
    critic: MLPWeights,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    return_trajectory: bool = False,
    evaluate: bool = True,
    kernel: str = "rbf",
) -> FlowResult:
    """Move particles [B, N, A] ``steps`` times by the critic's score and the SVGD kernel, each step clipped to [-1, 1].

    ``evaluate`` also returns every member's value at the last particles.
    """
    at_states = critic_at_states(critic, observations, particles.shape[1], backward=steps > 0)
    x = particles.clone(memory_format=torch.contiguous_format)
    trajectory = [x.clone()] if return_trajectory else []
    move = _steps(x, step_size, temperature, bandwidth_gradient, repulsion, optimizer, kernel)
    for step in range(1, steps + 1):
        with ranges.span(f"vgf/flow_step/{step - 1}"):
            move(at_states.score(x, q_aggregation))
        if return_trajectory:
            trajectory.append(x.clone())
    q = None
    if evaluate:
        with ranges.span("vgf/values"):
            q = at_states.values(x)
    return FlowResult(x, q, torch.stack(trajectory) if return_trajectory else None)


def clip_to_norm(x: Tensor, max_norm: float, dim: tuple[int, ...] | None = None) -> Tensor:
    """x as it is where its norm is below ``max_norm``, else shortened to it; over ``dim``, or over all entries."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=dim is not None)
    return torch.where(norm < max_norm, x, x / norm * max_norm)


@torch.no_grad()
def amortized_flow(
    field: Callable[[Tensor], Tensor],
    particles: Tensor,
    steps: int,
    step_size: float,
    per_state: bool,
    return_trajectory: bool = False,
) -> FlowResult:
    """Move particles [B, N, A] by an amortised score ``field``: [B, N, A] -> [B, N, A], with no kernel (AVGF).

    The direction is clipped to norm 1, over the particles of each state (``per_state``, as when the release acts, which
    has one state a call) or over all of them (as when it trains); then Adam and the clip to [-1, 1]. No values.
    """
    x = particles.clone()
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    trajectory = [x.clone()] if return_trajectory else []
    for step in range(1, steps + 1):
        with ranges.span(f"vgf/flow_step/{step - 1}"):
            direction = clip_to_norm(field(x), AMORTIZED_NORM, (1, 2) if per_state else None)
            adam_step_(x, direction, first, second, step, step_size)
        if return_trajectory:
            trajectory.append(x.clone())
    return FlowResult(x, None, torch.stack(trajectory) if return_trajectory else None)


def score_field_loss(prediction: Tensor, score: Tensor, normalize: bool = False) -> Tensor:
    """Mean square of prediction - score, [B, A] each; ``normalize`` takes the scores at length one (AVGF)."""
    return (prediction - score_target(score, normalize)).square().mean()


def score_target(score: Tensor, normalize: bool) -> Tensor:
    """What the score field learns: score [B, A] itself, or s / (|s| + 1e-8)."""
    if not normalize:
        return score
    return score / (torch.linalg.vector_norm(score, dim=-1, keepdim=True) + 1e-8)


@torch.no_grad()
def select_particle(
    particles: Tensor, q: Tensor, mode: str = "max", temperature: float = 1.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose one particle a state: particles [B, N, A], q [B, N] -> (action [B, A], index [B]).

    ``max``: the first of the largest. ``softmax``: probability proportional to exp(q / temperature), drawn by inverting
    the cumulative sum at ``uniform`` [B]. ``random``: every particle alike, drawn from ``uniform``.
    """
    n = q.shape[1]
    if mode == "max":
        index = q.argmax(dim=1)
    else:
        if uniform is None:
            raise ValueError(f"uniform is None, expected one number a state: mode={mode!r}")
        if mode == "softmax":
            cumulative = torch.softmax(q / temperature, dim=1).cumsum(dim=1)
            index = (cumulative <= uniform.to(q.dtype).unsqueeze(1)).sum(dim=1)
        else:
            index = (uniform * n).long()
        index = index.clamp(max=n - 1)
    action = particles.gather(1, index.view(-1, 1, 1).expand(-1, 1, particles.shape[2])).squeeze(1)
    return action, index


# --- learning --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def td_target(
    q: Tensor, rewards: Tensor, masks: Tensor, discount: float, aggregation: str = "min", reduce: str = "mean"
) -> Tensor:
    """y = r + discount * mask * reduce_n Q_agg(s', x_n): q [E, B, N], rewards [B], masks [B] -> [B]."""
    values = aggregate(q, aggregation)
    values = values.amax(dim=1) if reduce == "max" else values.mean(dim=1)
    return rewards + discount * masks * values


def td_loss(q: Tensor, target: Tensor) -> Tensor:
    """mean_b sum_e (y - Q_e)^2: q [E, B], target [B] -> scalar."""
    return (target - q).square().sum(dim=0).mean()


def expectile_loss(q: Tensor, target: Tensor, expectile: float) -> Tensor:
    """mean_b sum_e |expectile - 1[u < 0]| u^2 with u = y - Q_e (the release's ``iql-q``): [E, B], [B] -> scalar."""
    u = target - q
    return ((expectile - (u < 0).to(u.dtype)).abs() * u.square()).sum(dim=0).mean()


def sql_loss(q: Tensor, target: Tensor, alpha: float) -> Tensor:
    """mean_b sum_e alpha max(u/(2 alpha) + 1, 0)^2 - u, u = y - Q_e (the release's ``sql-q``): [E, B], [B] -> []."""
    u = target - q
    return (alpha * F.relu(u / (2.0 * alpha) + 1.0).square() - u).sum(dim=0).mean()


CRITIC_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "td": lambda q, target, weight: td_loss(q, target),
    "expectile": expectile_loss,
    "sql": sql_loss,
}


def critic_loss(name: str, q: Tensor, target: Tensor, weight: float) -> Tensor:
    """The loss called ``name``; ``weight`` is the expectile, or SQL's alpha.

    Raises ``ValueError`` naming the known ones if there is none.
    """
    if name not in CRITIC_LOSSES:
        raise ValueError(f"critic_loss is {name!r}, expected one of {', '.join(map(repr, CRITIC_LOSSES))}")
    return CRITIC_LOSSES[name](q, target, weight)


def flow_matching_inputs(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x_0 + t a and the velocity a - x_0: actions, noise [B, A], time [B, 1] -> two of [B, A]."""
    return (1.0 - time) * noise + time * actions, actions - noise


def flow_matching_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean over states and action entries of (v(s, x_t, t) - (a - x_0))^2: [B, A], [B, A] -> scalar."""
    return (prediction - velocity).square().mean()


def gaussian_log_likelihood(mean: Tensor, log_std: Tensor, actions: Tensor, tanh: bool) -> Tensor:
    """Log density of actions under the Gaussian behaviour model: mean [B, A], log_std [A], actions [B, A] -> [B]."""
    log_std = gaussian_log_std(log_std)
    # In float32 the arc tangent of an action of 1 is infinite; data are clipped to 1 - 1e-5 as in the release.
    x = actions.atanh() if tanh else actions
    normal = -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2.0 * math.pi)
    if tanh:
        normal = normal - 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
    return normal.sum(dim=-1)


@torch.no_grad()
def polyak_(target: list[Tensor], source: list[Tensor], tau: float) -> None:
    """target <- tau * source + (1 - tau) * target, in place."""
    torch._foreach_lerp_(target, source, tau)
