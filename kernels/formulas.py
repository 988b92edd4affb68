"""Device functions of the formulas that several kernels share: LayerNorm, distances, median, particle kernel, Adam.

For the N particles x_i of a state and the score G_j = grad Q(x_j):

    D_ij = |x_i - x_j|^2,  h = max(median of all N * N entries of D / (2 ln(N + 1)), 1e-12),  gamma = 1 / (1e-6 + 2 h)
    K_ij = exp(-gamma D_ij)            "rbf"
    K_ij = (1 + gamma D_ij)^(-1/2)     "imq", the inverse multiquadric (Gorham and Mackey, 2017), with the same gamma
    S_ij = -2 dK_ij / dD_ij = 2 gamma K_ij | gamma K_ij^3
    phi_i = (1/N) [ (1/temperature) sum_j K_ij G_j + sum_j S_ij (x_i - x_j) + bandwidth term ]

The bandwidth term is what -d/dx_i of sum K(x_i, stop(x_j)) sends through the median. As dK/dgamma = -D S / (2 gamma)
for both kernels, with T = sum_ij S_ij D_ij the middle entry (p, q) of the row-major D in stable order gives particle p
alone -gamma T / ln(N + 1) (x_p - x_q); if N * N is even there are two middle entries with half of it each; nothing
where h is at its lower bound.

All arithmetic is float32. Sums over j are taken of differences x_i - x_j, which do not cancel when particles clump.
N particles are padded to BLOCK_N; a tile over pairs, [BLOCK_N, BLOCK_N], is [source j, target i], so that sums over j
stay within a thread. Rows of a layer are [ROWS, HP], the hidden width padded to HP columns of which ``in_width`` [HP]
says which are real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from . import launch
from .constants import ADAM_EPS, BANDWIDTH_MIN, BETA1, BETA2, GAMMA_EPS, INFINITY_BITS, INT32_MAX, LAYER_NORM_EPS

COUNTED = 16  # particles padded, up to which the median is found by counting, in memory of the program's own
COUNTED_PARTICLES = tl.constexpr(COUNTED)

# --- LayerNorm -------------------------------------------------------------------------------------------------------


@triton.jit
def normalise(z: tl.tensor, in_width: tl.tensor, width: tl.tensor) -> tl.tensor:
    """(z - mean) / sqrt(var + eps) of every row [ROWS, HP], zero in the padding; and 1 / sqrt(var + eps) [ROWS, 1].

    Two passes over the row: the difference of its moments would lose the digits of a large mean.
    """
    share = 1.0 / width.to(tl.float32)
    mean = tl.sum(tl.where(in_width[None, :], z, 0.0), axis=1) * share  # [ROWS]
    centred = tl.where(in_width[None, :], z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) * share + LAYER_NORM_EPS)[:, None]
    return centred * rstd, rstd


@triton.jit
def normalise_backward(
    grad: tl.tensor, normal: tl.tensor, rstd: tl.tensor, in_width: tl.tensor, width: tl.tensor
) -> tl.tensor:
    """Gradient [ROWS, HP] with respect to z of ``normalise``, zero in the padding.

    ``grad`` is the one with respect to its result ``normal``, and as that zero in the padding.
    """
    share = 1.0 / width.to(tl.float32)
    mean = (tl.sum(grad, axis=1) * share)[:, None]
    along = (tl.sum(grad * normal, axis=1) * share)[:, None]
    return tl.where(in_width[None, :], rstd * (grad - mean - normal * along), 0.0)


# --- distances and their median --------------------------------------------------------------------------------------


@triton.jit
def squared_distances(
    x_ptr: tl.tensor,
    offs_x: tl.tensor,
    stride_a: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """D [BLOCK_N, BLOCK_N] of one state by differences, exactly symmetric; infinite where a particle is padding.

    ``x_ptr`` is the state's first particle, ``offs_x`` [BLOCK_N] the offset of each, valid for padding too.
    """
    distances = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    if PAIRED:
        # Two columns at a time go through shared memory: a pointer to every source would fill the registers.
        for first in range(0, A, 2):
            offs_c = first + tl.arange(0, 2)
            x = tl.load(x_ptr + (offs_x[:, None] + tl.minimum(offs_c, A - 1)[None, :] * stride_a)).to(tl.float32)
            left, right = tl.split(tl.where((offs_c < A)[None, :], x, 0.0))  # [BLOCK_N] each
            difference = left[None, :] - left[:, None]
            distances += difference * difference
            difference = right[None, :] - right[:, None]
            distances += difference * difference
    else:
        for _ in tl.range(0, A, loop_unroll_factor=UNROLL):
            source = tl.load(x_ptr + offs_x[:, None]).to(tl.float32)  # [BLOCK_N, 1]
            target = tl.load(x_ptr + offs_x[None, :]).to(tl.float32)  # [1, BLOCK_N]
            difference = target - source
            distances += difference * difference
            x_ptr += stride_a
    in_n = tl.arange(0, BLOCK_N) < N
    return tl.where(in_n[:, None] & in_n[None, :], distances, float("inf"))


@triton.jit
def order_statistic(keys: tl.tensor, rank: tl.tensor) -> tl.tensor:
    """The entry of ``keys`` (int32 in [0, INFINITY_BITS]) with ``rank`` before it in sorted order; how many are <= it.

    Bisection on the values, exact: at every turn more than ``rank`` keys are <= ``high`` and at most that many <=
    ``low``. It ends early once exactly ``rank + 1`` are <= ``high``: their largest is the answer.
    """
    low = tl.full([], -1, tl.int32)
    high = tl.full([], INFINITY_BITS, tl.int32)
    count = rank + 2
    while (high - low > 1) & (count != rank + 1):
        middle = low + ((high - low) >> 1)
        below = tl.sum((keys <= middle).to(tl.int32))
        enough = below > rank
        high = tl.where(enough, middle, high)
        count = tl.where(enough, below, count)
        low = tl.where(enough, low, middle)
    return tl.max(tl.where(keys <= high, keys, -1)), count


@triton.jit
def middle_keys(keys: tl.tensor, scratch_ptr: tl.tensor, N: tl.tensor, BLOCK_N: tl.constexpr) -> tl.tensor:
    """The two middle entries of the N * N real ones of ``keys`` [BLOCK_N, BLOCK_N] in sorted order, exact in ties.

    With ``scratch_ptr``, to BLOCK_N^2 int32 of this program's own, and at most ``COUNTED`` particles, by counting: an
    entry of rank r is the largest that has at most r smaller ones. Else by bisection.
    """
    lower_rank = (N * N - 1) // 2
    upper_rank = N * N // 2
    if scratch_ptr is not None and BLOCK_N <= COUNTED_PARTICLES:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_N
        CHUNK: tl.constexpr = min(SIZE, 32)
        offs_n = tl.arange(0, BLOCK_N)
        offs = tl.arange(0, SIZE)
        # The real entries side by side, infinity after them.
        tl.store(scratch_ptr + offs, INFINITY_BITS, mask=offs >= N * N)
        inside = (offs_n < N)[:, None] & (offs_n < N)[None, :]
        tl.store(scratch_ptr + (offs_n[:, None] * N + offs_n[None, :]), keys, mask=inside)
        tl.debug_barrier()
        flat = tl.load(scratch_ptr + offs)  # [SIZE]
        smaller = tl.zeros([SIZE], tl.int32)
        for first in range(0, N * N, CHUNK):
            chunk = tl.load(scratch_ptr + first + tl.arange(0, CHUNK))
            smaller += tl.sum((chunk[:, None] < flat[None, :]).to(tl.int32), axis=0)
        lower = tl.max(tl.where(smaller <= lower_rank, flat, 0), axis=0)
        upper = tl.max(tl.where(smaller <= upper_rank, flat, 0), axis=0)
    else:
        lower, up_to_lower = order_statistic(keys, lower_rank)
        upper = tl.where(up_to_lower > upper_rank, lower, tl.min(tl.where(keys > lower, keys, INT32_MAX)))
    return lower, upper


@triton.jit
def entry_position(
    keys: tl.tensor, value: tl.tensor, rank: tl.tensor, N: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """Row and column of the entry equal to ``value`` with ``rank`` equals before it in row-major, symmetric keys."""
    offs_n = tl.arange(0, BLOCK_N)
    in_row = tl.sum((keys == value).to(tl.int32), axis=0)  # [BLOCK_N] equals in each row
    row = tl.sum((tl.cumsum(in_row, axis=0) <= rank).to(tl.int32))
    rank -= tl.sum(tl.where(offs_n < row, in_row, 0))
    row_keys = tl.sum(tl.where(offs_n[:, None] == row, keys, 0), axis=0)  # [BLOCK_N], that row by symmetry
    column = tl.sum((tl.cumsum((row_keys == value).to(tl.int32), axis=0) <= rank).to(tl.int32))
    # NaN particles have no median: stay within the state all the same.
    return tl.minimum(row, N - 1), tl.minimum(column, N - 1)


# --- particle kernels ------------------------------------------------------------------------------------------------


@triton.jit
def rbf(distances: tl.tensor, gamma: tl.tensor) -> tl.tensor:
    """K = exp(-gamma D)."""
    return tl.exp(-gamma * distances)


@triton.jit
def rbf_slope(kernel: tl.tensor, gamma: tl.tensor) -> tl.tensor:
    """S = 2 gamma K."""
    return kernel, 2.0 * gamma


@triton.jit
def inverse_multiquadric(distances: tl.tensor, gamma: tl.tensor) -> tl.tensor:
    """K = (1 + gamma D)^(-1/2)."""
    return tl.rsqrt(1.0 + gamma * distances)


@triton.jit
def inverse_multiquadric_slope(kernel: tl.tensor, gamma: tl.tensor) -> tl.tensor:
    """S = gamma K^3."""
    return kernel * kernel * kernel, gamma


class ParticleKernel(NamedTuple):
    """A particle kernel as a Triton kernel takes it: device functions, passed as constants."""

    apply: JITFunction  # (D, gamma) -> K, zero where D is infinite
    slope: JITFunction  # (K, gamma) -> a tile and a scalar whose product is S; sums over the tile need no second one


PARTICLE_KERNELS = {
    "rbf": ParticleKernel(rbf, rbf_slope),
    "imq": ParticleKernel(inverse_multiquadric, inverse_multiquadric_slope),
}


def particle_kernel(name: str) -> ParticleKernel:
    """The particle kernel called ``name``. Raises ``ValueError`` naming the known ones if there is none."""
    launch.check_choice("kernel", name, tuple(PARTICLE_KERNELS))
    return PARTICLE_KERNELS[name]


@triton.jit
def particle_weights(
    distances: tl.tensor,
    scratch_ptr: tl.tensor,
    N: tl.tensor,
    log_n1: tl.tensor,
    KERNEL: ParticleKernel,
    BLOCK_N: tl.constexpr,
    BANDWIDTH_GRADIENT: tl.constexpr,
) -> tl.tensor:
    """K [BLOCK_N, BLOCK_N] (zero for padding), gamma, and for the bandwidth term its factor and two entries of D.

    ``KERNEL`` is a ``ParticleKernel``, ``scratch_ptr`` as in ``middle_keys`` or None, ``log_n1`` ln(N + 1). A middle
    entry (row, column) adds factor * (x_row - x_column) to N phi_row; if N * N is odd both entries are the same one.
    """
    # Bits of floats >= 0 are ordered as the floats are.
    keys = distances.to(tl.int32, bitcast=True)
    lower, upper = middle_keys(keys, scratch_ptr, N, BLOCK_N)
    median = 0.5 * (lower.to(tl.float32, bitcast=True) + upper.to(tl.float32, bitcast=True))
    bandwidth = median / (2.0 * log_n1)
    gamma = 1.0 / (GAMMA_EPS + 2.0 * tl.maximum(bandwidth, BANDWIDTH_MIN))
    kernel = KERNEL.apply(distances, gamma)
    factor = 0.0 * gamma
    row_a = tl.full([], 0, tl.int32)
    column_a, row_b, column_b = row_a, row_a, row_a
    if BANDWIDTH_GRADIENT:
        lower_rank = (N * N - 1) // 2
        upper_rank = N * N // 2
        value = lower
        rank = lower_rank - tl.sum((keys < lower).to(tl.int32))
        rank_b = tl.where(lower == upper, rank + 1, 0)
        # A loop, of one turn if N * N is odd: unrolled, its tiles would live side by side.
        for _ in range(lower_rank, upper_rank + 1):
            row_a, column_a = row_b, column_b
            row_b, column_b = entry_position(keys, value, rank, N, BLOCK_N)
            value, rank = upper, rank_b
        if lower_rank == upper_rank:
            row_a, column_a = row_b, column_b
        weights, slope = KERNEL.slope(kernel, gamma)
        total = tl.sum(weights * tl.where(distances < float("inf"), distances, 0.0))
        factor = tl.where(bandwidth > BANDWIDTH_MIN, -gamma * (slope * total / (2.0 * log_n1)), 0.0)
    return kernel, gamma, factor, row_a, column_a, row_b, column_b


@triton.jit
def weighted_sums(
    kernel: tl.tensor,
    gamma: tl.tensor,
    x_i: tl.tensor,
    x_j: tl.tensor,
    score_j: tl.tensor,
    inverse_temperature: tl.tensor,
    KERNEL: ParticleKernel,
    REPULSION: tl.constexpr,
) -> tl.tensor:
    """(1/temperature) sum_j K_ij G_j + sum_j S_ij (x_i - x_j) over axis 0; without repulsion sum_j K_ij G_j."""
    attraction = tl.sum(kernel * score_j, axis=0)
    if not REPULSION:
        return attraction
    # By differences: x_i sum_j S_ij - sum_j S_ij x_j would cancel once the particles have clumped.
    weights, slope = KERNEL.slope(kernel, gamma)
    drift = tl.sum(weights * (x_i - x_j), axis=0)
    return inverse_temperature * attraction + slope * drift


@triton.jit
def direction(
    kernel: tl.tensor,
    gamma: tl.tensor,
    x: tl.tensor,
    score: tl.tensor,
    inverse_temperature: tl.tensor,
    KERNEL: ParticleKernel,
    REPULSION: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """N phi without its bandwidth term for some columns: x, score [BLOCK_N, BLOCK_C] -> [BLOCK_N, BLOCK_C]."""
    if PAIRED:
        left, right = tl.split(x)  # [BLOCK_N] each
        score_l, score_r = tl.split(score)
        return tl.join(
            weighted_sums(
                kernel, gamma, left[None, :], left[:, None], score_l[:, None], inverse_temperature, KERNEL, REPULSION
            ),
            weighted_sums(
                kernel, gamma, right[None, :], right[:, None], score_r[:, None], inverse_temperature, KERNEL, REPULSION
            ),
        )
    return weighted_sums(
        kernel[:, :, None],
        gamma,
        x[None, :, :],
        x[:, None, :],
        score[:, None, :],
        inverse_temperature,
        KERNEL,
        REPULSION,
    )


@triton.jit
def bandwidth_term(
    x: tl.tensor, x_ptr: tl.tensor, offs_c: tl.tensor, row: tl.tensor, factor: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """factor * (x_row - x_column) in the row of one middle entry: x [BLOCK_N, BLOCK_C], ``x_ptr`` to x_column."""
    other = tl.load(x_ptr + offs_c).to(tl.float32)  # [BLOCK_C]
    return tl.where((tl.arange(0, BLOCK_N) == row)[:, None], factor * (x - other[None, :]), 0.0)


# --- optimisers ------------------------------------------------------------------------------------------------------


@triton.jit
def adam(gradient: tl.tensor, m: tl.tensor, v: tl.tensor, v_correction: tl.tensor) -> tl.tensor:
    """Moments after one step of Adam, and m / (sqrt(v / v_correction) + eps), v_correction = 1 - BETA2^step.

    The caller divides its step size by 1 - BETA1^step.
    """
    m += (1.0 - BETA1) * (gradient - m)
    v = BETA2 * v + (1.0 - BETA2) * gradient * gradient
    return m, v, m / (tl.sqrt(v / v_correction) + ADAM_EPS)


@triton.jit
def ascent(gradient: tl.tensor, m: tl.tensor, v: tl.tensor, v_correction: tl.tensor) -> tl.tensor:
    """The gradient itself; moments are none, and stay what they are."""
    return m, v, gradient


class ParticleOptimizer(NamedTuple):
    """An optimiser of particles: its device function, passed as a constant, and what the host does for it."""

    step: JITFunction  # (phi, m, v, v_correction) -> m, v, move
    moments: bool  # whether m and v are kept from step to step
    corrections: Callable[[int], tuple[float, float]]  # step from 1 -> what divides the step size; v_correction


PARTICLE_OPTIMIZERS = {
    "adam": ParticleOptimizer(adam, True, lambda step: (1.0 - BETA1.value**step, 1.0 - BETA2.value**step)),
    "ascent": ParticleOptimizer(ascent, False, lambda step: (1.0, 1.0)),
}


def particle_optimizer(name: str) -> ParticleOptimizer:
    """The optimiser called ``name``. Raises ``ValueError`` naming the known ones if there is none."""
    launch.check_choice("optimizer", name, tuple(PARTICLE_OPTIMIZERS))
    return PARTICLE_OPTIMIZERS[name]
