"""Drawing particles, and moving them along the critic's value gradient. Nothing here builds an autograd graph.

Particles, scores and the SVGD direction are float32 at least; the matrix products run in the dtype of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .networks import CriticAtStates, MLPWeights, StackAtStates

ADAM_BETA1, ADAM_BETA2, ADAM_EPS = 0.9, 0.999, 1e-8
BANDWIDTH_MIN = 1e-12
GAMMA_EPS = 1e-6
AMORTIZED_NORM = 1.0  # of the direction of an amortised score, over all particles
LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0


class FlowResult(NamedTuple):
    """What a value gradient flow returns."""

    particles: Tensor  # [B, N, A] after the last step
    q: Tensor | None  # [E, B, N] value of every member at ``particles``; None when not asked for
    trajectory: Tensor | None  # [L + 1, B, N, A] from the first particles to the last; None when not asked for


# --- drawing particles -----------------------------------------------------------------------------------------------


@torch.no_grad()
def behavior_flow(velocity: MLPWeights, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """K Euler steps x <- x + v(s, x, k/K)/K of the flow-matching sampler, then clip to [-1, 1].

    observations [B, O], noise [B, N, A] -> particles [B, N, A] in the dtype of ``noise``.
    """
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


def zero_moments(particles: Tensor, optimizer: str) -> tuple[Tensor | None, Tensor | None]:
    """Adam's moments at the start of a flow of particles [B, N, A]; None for "ascent", which has none."""
    return (torch.zeros_like(particles), torch.zeros_like(particles)) if optimizer == "adam" else (None, None)


def adam_step_(
    particles: Tensor, direction: Tensor, first_moment: Tensor, second_moment: Tensor, step: int, step_size: float
) -> None:
    """Adam's ascent along a direction, then the clip to [-1, 1]; all [B, N, A], ``step`` counts from 1."""
    first_moment.mul_(ADAM_BETA1).add_(direction, alpha=1.0 - ADAM_BETA1)
    second_moment.mul_(ADAM_BETA2).addcmul_(direction, direction, value=1.0 - ADAM_BETA2)
    scale = (second_moment / (1.0 - ADAM_BETA2**step)).sqrt_().add_(ADAM_EPS)
    particles.addcdiv_(first_moment, scale, value=step_size / (1.0 - ADAM_BETA1**step)).clamp_(-1.0, 1.0)


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
    at_states = CriticAtStates(critic, observations)
    x = particles.clone(memory_format=torch.contiguous_format)
    moments = zero_moments(x, optimizer)

    def move(step: int) -> None:
        score = at_states.score(x, q_aggregation)
        svgd_step_(x, score, *moments, step, step_size, temperature, bandwidth_gradient, repulsion, optimizer, kernel)

    trajectory = repeated(x, steps, move, return_trajectory)
    return FlowResult(x, at_states.values(x) if evaluate else None, trajectory)


def repeated(x: Tensor, steps: int, move: Callable[[int], None], return_trajectory: bool) -> Tensor | None:
    """Call ``move`` with the numbers 1 to ``steps``, which writes the particles x [B, N, A]; their trajectory if asked.

    The trajectory is [L + 1, B, N, A], from the first particles to the last.
    """
    trajectory = [x.clone()] if return_trajectory else []
    for step in range(1, steps + 1):
        move(step)
        if return_trajectory:
            trajectory.append(x.clone())
    return torch.stack(trajectory) if return_trajectory else None


def clip_to_norm(x: Tensor, max_norm: float, dim: tuple[int, ...] | None = None) -> Tensor:
    """x as it is where its norm is below ``max_norm``, else shortened to it; over ``dim``, or over all entries."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=dim is not None)
    return torch.where(norm < max_norm, x, x / norm * max_norm)


def amortized_step_(
    particles: Tensor,
    score: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step: int,
    step_size: float,
    per_state: bool,
) -> None:
    """Move the particles [B, N, A] one step along an amortised score, in place, with no kernel (AVGF).

    The direction is clipped to norm 1, over the particles of each state (``per_state``, as when the release acts, which
    has one state a call) or over all of them (as when it trains); then Adam and the clip to [-1, 1].
    """
    direction = clip_to_norm(score, AMORTIZED_NORM, (1, 2) if per_state else None)
    adam_step_(particles, direction, first_moment, second_moment, step, step_size)


def aggregate(q: Tensor, aggregation: str) -> Tensor:
    """Mean or minimum over members: [E, ...] -> [...]."""
    return q.amin(dim=0) if aggregation == "min" else q.mean(dim=0)


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
