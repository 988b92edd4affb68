"""Device helpers that move the particles of several states in one program: ``particles`` with an axis of states.

S states of N particles are padded to BLOCK_S and BLOCK_N; a tile over pairs is [BLOCK_S, source j, target i]. With the
paper's ten particles a warp holds all pairs of a state, so that its reductions need no other warp. All is float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .particles import BANDWIDTH_MIN, GAMMA_EPS, INFINITY_BITS, INT32_MAX
from .svgd import BETA1, BETA2, EPS


@triton.jit
def order_statistics(keys: tl.tensor, rank: tl.tensor, BLOCK_S: tl.constexpr) -> tl.tensor:
    """Per state the entry with ``rank`` before it in sorted order, and how many are <= it: exact, by bisection.

    ``keys`` [BLOCK_S, M] are int32 in [0, INFINITY_BITS].
    """
    low = tl.full([BLOCK_S], -1, tl.int32)
    high = tl.full([BLOCK_S], INFINITY_BITS, tl.int32)
    for _ in range(31):
        middle = low + ((high - low) >> 1)
        enough = tl.sum((keys <= middle[:, None]).to(tl.int32), axis=1) > rank
        # Once they are neighbours, the middle is ``low`` and nothing changes.
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high, tl.sum((keys <= high[:, None]).to(tl.int32), axis=1)


@triton.jit
def entry_positions(
    keys: tl.tensor,  # [BLOCK_S, BLOCK_N, BLOCK_N], symmetric in the last two
    value: tl.tensor,  # [BLOCK_S]
    rank: tl.tensor,  # [BLOCK_S]
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Row and column [BLOCK_S] of the entry equal to ``value`` with ``rank`` equals before it in row-major order."""
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    is_equal = (keys == value[:, None, None]).to(tl.int32)
    in_row = tl.sum(is_equal, axis=1)  # [BLOCK_S, BLOCK_N] equals in each row
    row = tl.sum((tl.cumsum(in_row, axis=1) <= rank[:, None]).to(tl.int32), axis=1)
    rank -= tl.sum(tl.where(offs_n < row[:, None], in_row, 0), axis=1)
    source = tl.arange(0, BLOCK_N)[None, :, None]
    in_column = tl.sum(tl.where(source == row[:, None, None], is_equal, 0), axis=1)  # that row by symmetry
    column = tl.sum((tl.cumsum(in_column, axis=1) <= rank[:, None]).to(tl.int32), axis=1)
    return row, column


@triton.jit
def move_particles(
    x_ptr: tl.tensor,  # [S, N, A] float32, contiguous, of the block's states; written
    m_ptr: tl.tensor,  # as x: first moment; unused by ascent
    v_ptr: tl.tensor,  # as x: second moment; unused by ascent
    q_ptr: tl.tensor,  # [S, N] of the first member, float32; read by MINIMUM
    g_ptr: tl.tensor,  # [S, N, A] of the first member, float32: gradient of its value
    stride_qe: tl.tensor,  # from member to member
    stride_ge: tl.tensor,
    S: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    E: tl.tensor,
    log_n1: tl.tensor,  # ln(N + 1)
    inverse_temperature: tl.tensor,
    step_size: tl.tensor,  # divided by the first moment's bias correction if ADAM
    v_correction: tl.tensor,  # 1 - BETA2^step
    step: tl.tensor,  # counted from 1; in the first the moments are zero, and not read
    MINIMUM: tl.constexpr,
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One flow step of all particles of the block: members' gradients combined, direction, optimiser, clip.

    Starts and ends with a barrier. The formulas are those of ``svgd``.
    """
    tl.debug_barrier()
    offs_s = tl.arange(0, BLOCK_S)
    offs_n = tl.arange(0, BLOCK_N)
    is_real = (offs_s < S)[:, None] & (offs_n < N)[None, :]  # [BLOCK_S, BLOCK_N]
    # Padding reads the last particle and state again: it is in no sum and is not stored.
    row = tl.minimum(offs_s, S - 1)[:, None] * N + tl.minimum(offs_n, N - 1)[None, :]
    offs = row * A
    distances = tl.zeros([BLOCK_S, BLOCK_N, BLOCK_N], tl.float32)
    for column in range(A):
        x = tl.load(x_ptr + offs + column)
        difference = x[:, None, :] - x[:, :, None]
        distances += difference * difference
    in_n = offs_n < N
    distances = tl.where((in_n[:, None] & in_n[None, :])[None, :, :], distances, float("inf"))
    # Bits of floats >= 0 are ordered as the floats are.
    keys = distances.to(tl.int32, bitcast=True)
    flat = tl.reshape(keys, [BLOCK_S, BLOCK_N * BLOCK_N])
    lower_rank = (N * N - 1) // 2
    upper_rank = N * N // 2
    lower, up_to_lower = order_statistics(flat, lower_rank, BLOCK_S)
    is_equal = up_to_lower > upper_rank
    upper = tl.where(is_equal, lower, tl.min(tl.where(flat > lower[:, None], flat, INT32_MAX), axis=1))
    median = (lower.to(tl.float32, bitcast=True) + upper.to(tl.float32, bitcast=True)) * 0.5
    bandwidth = tl.div_rn(median, log_n1 * 2.0)
    gamma = tl.div_rn(1.0, tl.maximum(bandwidth, BANDWIDTH_MIN) * 2.0 + GAMMA_EPS)  # [BLOCK_S]
    kernel = tl.exp(distances * -gamma[:, None, None])
    slope = gamma * 0.0
    row_a, column_a, row_b, column_b = (tl.zeros([BLOCK_S], tl.int32),) * 4
    if BANDWIDTH_GRADIENT:
        total = tl.sum(tl.sum(kernel * tl.where(kernel > 0.0, distances, 0.0), axis=2), axis=1)
        slope = tl.where(bandwidth > BANDWIDTH_MIN, -gamma * tl.div_rn(gamma * total, log_n1), 0.0)
        rank = lower_rank - tl.sum((flat < lower[:, None]).to(tl.int32), axis=1)
        row_a, column_a = entry_positions(keys, lower, rank, BLOCK_N)
        if lower_rank == upper_rank:
            row_b, column_b = row_a, column_a
        else:
            row_b, column_b = entry_positions(keys, upper, tl.where(is_equal, rank + 1, 0), BLOCK_N)
    has_moments = (offs_s < S)[:, None] & (offs_n < tl.where(step > 1, N, 0))[None, :]
    best_ptrs = g_ptr + offs
    if MINIMUM:
        # The first of the smallest members, particle by particle.
        smallest = tl.load(q_ptr + row)
        for e in range(1, E):
            q = tl.load(q_ptr + e * stride_qe + row)
            best_ptrs = tl.where(q < smallest, g_ptr + e * stride_ge + offs, best_ptrs)
            smallest = tl.minimum(smallest, q)
    for column in range(A):
        x = tl.load(x_ptr + offs + column)  # [BLOCK_S, BLOCK_N]
        score = tl.load(best_ptrs + column)
        if not MINIMUM:
            for e in range(1, E):
                score += tl.load(g_ptr + e * stride_ge + offs + column)
            score = tl.div_rn(score, E.to(tl.float32))
        phi = tl.sum(kernel * score[:, :, None], axis=1)
        if REPULSION:
            # By differences: x_i sum_j K_ij - sum_j K_ij x_j would cancel once the particles have clumped.
            drift = tl.sum(kernel * (x[:, None, :] - x[:, :, None]), axis=1)
            phi = phi * inverse_temperature + drift * (gamma[:, None] * 2.0)
        if BANDWIDTH_GRADIENT:
            at_a, other_a = offs_n[None, :] == row_a[:, None], offs_n[None, :] == column_a[:, None]
            at_b, other_b = offs_n[None, :] == row_b[:, None], offs_n[None, :] == column_b[:, None]
            x_a = tl.sum(tl.where(other_a, x, 0.0), axis=1)[:, None]
            x_b = tl.sum(tl.where(other_b, x, 0.0), axis=1)[:, None]
            phi += slope[:, None] * (tl.where(at_a, x - x_a, 0.0) + tl.where(at_b, x - x_b, 0.0))
        phi = tl.div_rn(phi, N.to(tl.float32))
        if ADAM:
            m = tl.load(m_ptr + offs + column, mask=has_moments, other=0.0) * BETA1 + phi * (1.0 - BETA1)
            v = tl.load(v_ptr + offs + column, mask=has_moments, other=0.0) * BETA2 + phi * phi * (1.0 - BETA2)
            tl.store(m_ptr + offs + column, m, mask=is_real)
            tl.store(v_ptr + offs + column, v, mask=is_real)
            phi = tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, v_correction)) + EPS)
        x = tl.clamp(x + step_size * phi, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        # Every thread has read this column of every particle before any is overwritten.
        tl.debug_barrier()
        tl.store(x_ptr + offs + column, x, mask=is_real)
    tl.debug_barrier()
