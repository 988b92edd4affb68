"""Device helpers of the kernels that move the particles of one state: distances, median, RBF kernel, direction.

The formulas are those of ``svgd``. N particles are padded to BLOCK_N; a tile over pairs, [BLOCK_N, BLOCK_N], is
[source j, target i], so that sums over j stay within a thread. All arithmetic is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

BANDWIDTH_MIN, GAMMA_EPS = tl.constexpr(1e-12), tl.constexpr(1e-6)
INT32_MAX, INFINITY_BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)


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


@triton.jit
def rbf_kernel(
    distances: tl.tensor, N: tl.tensor, log_n1: tl.tensor, BLOCK_N: tl.constexpr, BANDWIDTH_GRADIENT: tl.constexpr
) -> tl.tensor:
    """K [BLOCK_N, BLOCK_N] (zero for padding), gamma, and for the bandwidth term its slope and two entries of D.

    ``log_n1`` is ln(N + 1). A middle entry (row, column) adds slope * (x_row - x_column) to N phi_row; if N * N is odd
    both entries are the same one.
    """
    # Bits of floats >= 0 are ordered as the floats are.
    keys = distances.to(tl.int32, bitcast=True)
    lower_rank = (N * N - 1) // 2
    upper_rank = N * N // 2
    lower, up_to_lower = order_statistic(keys, lower_rank)
    is_equal = up_to_lower > upper_rank
    upper = tl.where(is_equal, lower, tl.min(tl.where(keys > lower, keys, INT32_MAX)))
    median = 0.5 * (lower.to(tl.float32, bitcast=True) + upper.to(tl.float32, bitcast=True))
    bandwidth = tl.div_rn(median, 2.0 * log_n1)
    gamma = tl.div_rn(1.0, GAMMA_EPS + 2.0 * tl.maximum(bandwidth, BANDWIDTH_MIN))
    row_a = tl.full([], 0, tl.int32)
    column_a, row_b, column_b = row_a, row_a, row_a
    if BANDWIDTH_GRADIENT:
        value = lower
        rank = lower_rank - tl.sum((keys < lower).to(tl.int32))
        rank_b = tl.where(is_equal, rank + 1, 0)
        # A loop, of one turn if N * N is odd: unrolled, its tiles would live side by side.
        for _ in range(lower_rank, upper_rank + 1):
            row_a, column_a = row_b, column_b
            row_b, column_b = entry_position(keys, value, rank, N, BLOCK_N)
            value, rank = upper, rank_b
        if lower_rank == upper_rank:
            row_a, column_a = row_b, column_b
    kernel = tl.exp(-gamma * distances)
    slope = 0.0 * gamma
    if BANDWIDTH_GRADIENT:
        total = tl.sum(kernel * tl.where(kernel > 0.0, distances, 0.0))
        slope = tl.where(bandwidth > BANDWIDTH_MIN, -gamma * tl.div_rn(gamma * total, log_n1), 0.0)
    return kernel, gamma, slope, row_a, column_a, row_b, column_b


@triton.jit
def weighted_sums(
    kernel: tl.tensor,
    gamma: tl.tensor,
    x_i: tl.tensor,
    x_j: tl.tensor,
    score_j: tl.tensor,
    inverse_temperature: tl.tensor,
    REPULSION: tl.constexpr,
) -> tl.tensor:
    """(1/temperature) sum_j K_ij G_j + 2 gamma sum_j K_ij (x_i - x_j) over axis 0; without repulsion sum_j K_ij G_j."""
    attraction = tl.sum(kernel * score_j, axis=0)
    if not REPULSION:
        return attraction
    # By differences: x_i sum_j K_ij - sum_j K_ij x_j would cancel once the particles have clumped.
    drift = tl.sum(kernel * (x_i - x_j), axis=0)
    return inverse_temperature * attraction + (2.0 * gamma) * drift


@triton.jit
def direction(
    kernel: tl.tensor,
    gamma: tl.tensor,
    x: tl.tensor,
    score: tl.tensor,
    inverse_temperature: tl.tensor,
    REPULSION: tl.constexpr,
    PAIRED: tl.constexpr,
) -> tl.tensor:
    """N phi without its bandwidth term for some columns: x, score [BLOCK_N, BLOCK_C] -> [BLOCK_N, BLOCK_C]."""
    if PAIRED:
        left, right = tl.split(x)  # [BLOCK_N] each
        score_l, score_r = tl.split(score)
        return tl.join(
            weighted_sums(
                kernel, gamma, left[None, :], left[:, None], score_l[:, None], inverse_temperature, REPULSION
            ),
            weighted_sums(
                kernel, gamma, right[None, :], right[:, None], score_r[:, None], inverse_temperature, REPULSION
            ),
        )
    return weighted_sums(
        kernel[:, :, None], gamma, x[None, :, :], x[:, None, :], score[:, None, :], inverse_temperature, REPULSION
    )


@triton.jit
def bandwidth_term(
    x: tl.tensor, x_ptr: tl.tensor, offs_c: tl.tensor, row: tl.tensor, slope: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """slope * (x_row - x_column) in the row of one middle entry: x [BLOCK_N, BLOCK_C], ``x_ptr`` to x_column."""
    other = tl.load(x_ptr + offs_c).to(tl.float32)  # [BLOCK_C]
    return tl.where((tl.arange(0, BLOCK_N) == row)[:, None], slope * (x - other[None, :]), 0.0)
