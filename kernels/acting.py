"""Acting for a few states: everything from the observations to the actions in one launch, layers spread over the GPU.

    shares of the states | K Euler steps, clip | L flow steps: critic forward, backward, SVGD, Adam, clip | q | choice

The formulas are those of ``behavior_flow``, ``critic``, ``svgd`` and ``selection``. With few rows a program that walks
a network by itself waits for its port to read the weights; here every layer is cut into work items (member, block of
rows, tile of columns), programs take items in turn, and a barrier of the whole grid stands between phases. So that a
layer is one phase, what it needs besides the z before it is computed again by each of its items: LayerNorm and
activation of whole rows, the first layer, the last layer and the Euler step. An item's weights are asked for before
the barrier.

    phase                                    items                       how often
    states' share of the first layers        tiles                       1
    [v, Euler step, layer 0 and] layer 1     blocks x tiles              K
    layers 2 to D - 1                        blocks x tiles              K (D - 2)
    last Euler step, clip                    blocks                      1
    [layer 0 and] layer 1                    members x blocks x tiles    L + 1
    layers 2 to D - 1                        members x blocks x tiles    (L + 1) (D - 2)
    backward from layers D - 1 to 1          members x blocks x tiles    L (D - 1)
    [layer 0 backward and] particle step     states                      L
    q, choice                                states                      1

That is 3 + K (D_v - 1) + (2 L + 1) (D_c - 1) + L phases: 71 at the paper's sizes (K 10, L 5, D 4). The particle step
and the choice are one program's, all members and rows of its state one after another: for few rows that is cheaper
than one more barrier.

Estimate, not yet measured on a GPU: for one state with ten particles on an H200 in bfloat16 a phase takes a barrier of
1.2 us and about 1 us for a chain of two or three reads of L2 (an item reads 16 KB of weights, ahead of the barrier,
and 16 KB of z), a product and its reduction; five particle steps and the choice take about 3 us more each:
71 x 2.2 + 18, in all about 175 us. Weights are 0.8 M entries a network; 10 reads of the velocity field's and 11 of the
two critics' are 52 MB from L2, 10 us at 5 TB/s: the latency of the phases is what counts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import activate, normalise
from .mlp import rows_backward
from .packing import PackedMLP
from .selection import aggregate_members, choose
from .svgd import BETA1, BETA2, move_state

# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def grid_barrier(counter_ptr: tl.tensor, ALONE: tl.constexpr) -> None:
    """Wait for all programs of the grid; what they wrote before is read after. ``counter_ptr``: one int32.

    The first program adds 2^31 - (programs - 1) and the others 1: the sum flips the top bit and leaves the rest, so
    that the counter needs no reset, whatever was launched before.
    """
    # Every thread's stores come before the release, and every thread's loads after the acquire.
    tl.debug_barrier()
    if not ALONE:
        arrival = tl.where(tl.program_id(0) == 0, 0x7FFFFFFF - (tl.num_programs(0) - 2), 1)
        before = tl.atomic_add(counter_ptr, arrival, sem="release", scope="gpu")
        now = before
        while (before ^ now) >= 0:
            now = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        tl.debug_barrier()


@triton.jit
def load_rows(x_ptr: tl.tensor, offs_row: tl.tensor, HP: tl.constexpr) -> tl.tensor:
    """Rows ``offs_row`` [BLOCK_M] of [*, HP], as float32: [BLOCK_M, HP]. Other programs wrote them: not from L1."""
    offs = offs_row[:, None] * HP + tl.arange(0, HP)[None, :]
    return tl.load(x_ptr + offs, cache_modifier=".cg").to(tl.float32)


@triton.jit
def load_particles(
    x_ptr: tl.tensor, offs_row: tl.tensor, stride_n: tl.tensor, stride_a: tl.tensor, A: tl.tensor, RP: tl.constexpr
) -> tl.tensor:
    """Rows at ``offs_row`` [BLOCK_M] of particles, padded by zeros: float32 [BLOCK_M, RP]."""
    offs_r = tl.arange(0, RP)
    ptrs = x_ptr + (offs_row[:, None] * stride_n + offs_r[None, :] * stride_a)
    return tl.load(ptrs, mask=(offs_r < A)[None, :], other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def initial_particles(
    noise_ptr: tl.tensor,  # [B, N, A] any strides; with SEEDED one int64, the seed
    offs_row: tl.tensor,  # [BLOCK_M]
    stride_nb: tl.tensor,
    stride_nn: tl.tensor,
    stride_na: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    RP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SEEDED: tl.constexpr,
) -> tl.tensor:
    """Standard normal numbers of the rows, padded by zeros: float32 [BLOCK_M, RP]."""
    offs_r = tl.arange(0, RP)
    in_a = tl.broadcast_to((offs_r < A)[None, :], [BLOCK_M, RP])
    if SEEDED:
        # Every entry its own counter, whatever the blocks.
        x = tl.where(in_a, tl.randn(tl.load(noise_ptr), offs_row[:, None] * A + offs_r[None, :]), 0.0)
    else:
        noise_rows = (offs_row // N).to(tl.int64) * stride_nb + (offs_row % N).to(tl.int64) * stride_nn
        ptrs = noise_ptr + (noise_rows[:, None] + offs_r.to(tl.int64)[None, :] * stride_na)
        x = tl.load(ptrs, mask=in_a, other=0.0).to(tl.float32)
    return x


@triton.jit
def weight_tile(
    w_ptr: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    item: tl.tensor,
    items: tl.tensor,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """All K rows of BLOCK_N columns of a matrix, cut into SPLIT sums: [SPLIT, K / SPLIT, BLOCK_N].

    Zeros, and nothing read, past the last item.
    """
    offs_k = tl.arange(0, SPLIT)[:, None] * (K // SPLIT) + tl.arange(0, K // SPLIT)[None, :]
    ptrs = w_ptr + (offs_k[:, :, None] * stride_k + tl.arange(0, BLOCK_N)[None, None, :] * stride_n)
    is_wanted = tl.zeros([SPLIT, K // SPLIT, BLOCK_N], tl.int32) + item < items
    return tl.load(ptrs, mask=is_wanted, other=0.0)


@triton.jit
def split_product(x: tl.tensor, w: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """x w, float32 [BLOCK_M, BLOCK_N]: x [BLOCK_M, K], w [SPLIT, K / SPLIT, BLOCK_N], each warp a part of the sum."""
    parts = tl.reshape(x, [x.shape[0], w.shape[0], w.shape[1]])
    return tl.sum(tl.dot(tl.permute(parts, [1, 0, 2]), w, input_precision=PRECISION), axis=0)


@triton.jit
def affine(
    z: tl.tensor, vector_ptr: tl.tensor, width: tl.tensor, HP: tl.constexpr, LAYER_NORM: tl.constexpr
) -> tl.tensor:
    """What the activation of z [BLOCK_M, HP] is applied to; the normalised rows, 1 / std [BLOCK_M, 1], scale [1, HP].

    ``vector_ptr`` is the layer's [3, HP] float32: bias, scale, shift.
    """
    offs_h = tl.arange(0, HP)
    normal = z
    rstd = tl.zeros([z.shape[0], 1], tl.float32)
    scale = tl.zeros([1, HP], tl.float32)
    if LAYER_NORM:
        normal, rstd = normalise(z, offs_h < width, width)
        scale = tl.load(vector_ptr + HP + offs_h)[None, :]
        z = normal * scale + tl.load(vector_ptr + 2 * HP + offs_h)[None, :]
    return z, normal, rstd, scale


@triton.jit
def first_rows(
    x: tl.tensor,  # [BLOCK_M, RP] float32
    offs_s: tl.tensor,  # [BLOCK_M] each row's state
    share_ptr: tl.tensor,  # [B, HP] float32
    action_ptr: tl.tensor,  # [RP, HP]
    time_ptr: tl.tensor,  # [HP] float32; read if HAS_TIME
    time: tl.tensor,
    HP: tl.constexpr,
    RP: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_TIME: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """z of layer 0, whole rows: float32 [BLOCK_M, HP]."""
    # A warp takes a part of the columns.
    PART: tl.constexpr = HP // SPLIT
    offs_h = (tl.arange(0, SPLIT)[:, None] * PART + tl.arange(0, PART)[None, :])[:, None, :]  # [SPLIT, 1, PART]
    z = tl.load(share_ptr + (offs_s[None, :, None] * HP + offs_h), cache_modifier=".cg")  # [SPLIT, BLOCK_M, PART]
    if HAS_TIME:
        z += time * tl.load(time_ptr + offs_h)
    w = tl.load(action_ptr + (tl.arange(0, RP)[None, :, None] * HP + offs_h))  # [SPLIT, RP, PART]
    x = tl.broadcast_to(x.to(w.dtype)[None, :, :], [SPLIT, x.shape[0], RP])
    z = tl.dot(x, w, z, input_precision=PRECISION)
    return tl.reshape(tl.permute(z, [1, 0, 2]), [x.shape[1], HP])


@triton.jit
def velocity_rows(
    z: tl.tensor,  # [BLOCK_M, HP] of the last hidden layer
    vector_ptr: tl.tensor,  # [3, HP] float32 of that layer
    width: tl.tensor,
    head_ptr: tl.tensor,  # [HP, RP]
    head_bias_ptr: tl.tensor,  # [RP] float32
    HP: tl.constexpr,
    RP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """The velocity of every row, float32 [BLOCK_M, RP]."""
    y, _, _, _ = affine(z, vector_ptr, width, HP, LAYER_NORM)
    w = weight_tile(head_ptr, RP, 1, 0, 1, HP, SPLIT, RP)
    product = split_product(activate(y, ACTIVATION).to(w.dtype), w, PRECISION)
    return product + tl.load(head_bias_ptr + tl.arange(0, RP))[None, :]


@triton.jit
def critic_rows(
    z: tl.tensor,  # [BLOCK_M, HP] of the last hidden layer
    vector_ptr: tl.tensor,  # [3, HP] float32 of that layer
    width: tl.tensor,
    head_ptr: tl.tensor,  # [HP]
    head_bias_ptr: tl.tensor,  # [1] float32
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """The value of every row, float32 [BLOCK_M]."""
    y, _, _, _ = affine(z, vector_ptr, width, HP, LAYER_NORM)
    head = tl.load(head_ptr + tl.arange(0, HP)).to(tl.float32)[None, :]
    return tl.sum(activate(y, ACTIVATION) * head, axis=1) + tl.load(head_bias_ptr)


# --- phases ----------------------------------------------------------------------------------------------------------


@triton.jit
def share_phase(
    s_ptr: tl.tensor,  # [B, O] observations
    stride_sb: tl.tensor,
    stride_so: tl.tensor,
    w_ptr: tl.tensor,  # [E, SP, HP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32
    share_ptr: tl.tensor,  # [E, B, HP] float32, written
    B: tl.tensor,
    OBSERVATION: tl.tensor,  # O
    SP: tl.tensor,
    E: tl.tensor,
    D: tl.tensor,
    HP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """W^s s + b of all states; items are tiles of columns of a member."""
    TILES: tl.constexpr = HP // BLOCK_N
    offs_b = tl.arange(0, BLOCK_B)
    offs_k = tl.arange(0, 64)
    in_b = (offs_b < B)[:, None]
    for item in range(tl.program_id(0), E * TILES, tl.num_programs(0)):
        member = item // TILES
        offs_n = (item % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
        w_ptrs = w_ptr + member * SP * HP + (offs_k[:, None] * HP + offs_n[None, :])
        total = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
        for first in range(0, SP, 64):
            offs_o = first + offs_k
            s_ptrs = s_ptr + (offs_b.to(tl.int64)[:, None] * stride_sb + offs_o.to(tl.int64)[None, :] * stride_so)
            s = tl.load(s_ptrs, mask=in_b & (offs_o < OBSERVATION)[None, :], other=0.0)  # [BLOCK_B, 64]
            w = tl.load(w_ptrs)  # [64, BLOCK_N]
            total = tl.dot(s.to(w.dtype), w, total, input_precision=PRECISION)
            w_ptrs += 64 * HP
        total += tl.load(vector_ptr + member * D * 3 * HP + offs_n)[None, :]
        tl.store(share_ptr + (member * B + offs_b)[:, None] * HP + offs_n[None, :], total, mask=in_b)


@triton.jit
def item_tile(
    w_ptr: tl.tensor,  # [HP, HP] of the first member
    item: tl.tensor,
    items: tl.tensor,
    blocks: tl.tensor,
    stride_we: tl.tensor,
    TRANSPOSED: tl.constexpr,
    HP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Member, block and first column of a work item, and its weights: zeros past the last item."""
    TILES: tl.constexpr = HP // BLOCK_N
    first = (item % TILES) * BLOCK_N
    member = item // (TILES * blocks)
    w_ptr += member * stride_we
    if TRANSPOSED:
        w = weight_tile(w_ptr + first * HP, 1, HP, item, items, HP, SPLIT, BLOCK_N)
    else:
        w = weight_tile(w_ptr + first, HP, 1, item, items, HP, SPLIT, BLOCK_N)
    return member, (item // TILES) % blocks, first, w


@triton.jit
def store_tile(
    total: tl.tensor,  # [BLOCK_M, BLOCK_N]
    bias_ptr: tl.tensor,  # [HP] float32
    z_ptr: tl.tensor,  # [rows, HP], written
    offs_m: tl.tensor,  # [BLOCK_M]
    first: tl.tensor,
    HP: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Store a tile of a layer's linear part."""
    offs_n = first + tl.arange(0, BLOCK_N)
    total += tl.load(bias_ptr + offs_n)[None, :]
    tl.store(z_ptr + (offs_m[:, None] * HP + offs_n[None, :]), total.to(z_ptr.dtype.element_ty))


@triton.jit
def layer_phase(
    counter_ptr: tl.tensor,
    z_ptr: tl.tensor,  # [E, rows, HP] of the layer before
    out_ptr: tl.tensor,  # [E, rows, HP], written
    w_ptr: tl.tensor,  # [HP, HP] of the first member
    vector_ptr: tl.tensor,  # [3, HP] float32 of the layer before, first member; this layer's follows
    width: tl.tensor,  # of the layer before
    stride_we: tl.tensor,
    stride_ve: tl.tensor,
    E: tl.tensor,
    blocks: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    ALONE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One hidden layer from z to z."""
    items = E * blocks * (HP // BLOCK_N)
    programs = tl.num_programs(0)
    start = tl.program_id(0)
    member, block, first, w = item_tile(w_ptr, start, items, blocks, stride_we, False, HP, SPLIT, BLOCK_N)
    grid_barrier(counter_ptr, ALONE)
    for item in tl.range(start, items, programs, disable_licm=True):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        member_rows = member * blocks * BLOCK_M * HP
        z = load_rows(z_ptr + member_rows, offs_m, HP)
        y, _, _, _ = affine(z, vector_ptr + member * stride_ve, width, HP, LAYER_NORM)
        total = split_product(activate(y, ACTIVATION).to(w.dtype), w, PRECISION)
        bias_ptr = vector_ptr + member * stride_ve + 3 * HP
        store_tile(total, bias_ptr, out_ptr + member_rows, offs_m, first, HP, BLOCK_N)
        member, block, first, w = item_tile(w_ptr, item + programs, items, blocks, stride_we, False, HP, SPLIT, BLOCK_N)


# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "N", "A", "E", "D_V", "D_C", "K", "L"])
def acting_kernel(
    s_ptr: tl.tensor,  # [B, O] observations, any strides
    noise_ptr: tl.tensor,  # [B, N, A] any strides; with SEEDED one int64, the seed
    uniform_ptr: tl.tensor,  # [B] float32, contiguous; unless SELECTION is "max"
    action_ptr: tl.tensor,  # [B, A] float32, contiguous, written
    index_ptr: tl.tensor,  # [B] int64, written
    x_ptr: tl.tensor,  # [B, N, A] float32 particles, contiguous, written
    q_ptr: tl.tensor,  # [E, B, N] float32, contiguous, written
    state_v_ptr: tl.tensor,  # velocity field, as PackedMLP: [SP, V]
    action_v_ptr: tl.tensor,  # [RP, V]
    time_v_ptr: tl.tensor,  # [V] float32
    hidden_v_ptr: tl.tensor,  # [D_V - 1, V, V]
    head_v_ptr: tl.tensor,  # [V, RP]
    vector_v_ptr: tl.tensor,  # [D_V, 3, V] float32
    head_bias_v_ptr: tl.tensor,  # [RP] float32
    widths_v_ptr: tl.tensor,  # [D_V] int32
    state_c_ptr: tl.tensor,  # critic, as PackedMLP: [E, SP, C]
    action_c_ptr: tl.tensor,  # [E, RP, C]
    hidden_c_ptr: tl.tensor,  # [E, D_C - 1, C, C]
    head_c_ptr: tl.tensor,  # [E, C]
    vector_c_ptr: tl.tensor,  # [E, D_C, 3, C] float32
    head_bias_c_ptr: tl.tensor,  # [E] float32
    widths_c_ptr: tl.tensor,  # [D_C] int32
    scratch_ptr: tl.tensor,  # [2 rows V + (D_C + 2) E rows C] of the weights' dtype
    float_ptr: tl.tensor,  # [E B C + B V + 5 R A] float32 scratch
    counter_ptr: tl.tensor,  # [1] int32 of ``grid_barrier``
    stride_sb: tl.tensor,
    stride_so: tl.tensor,
    stride_nb: tl.tensor,
    stride_nn: tl.tensor,
    stride_na: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    E: tl.tensor,
    D_V: tl.tensor,
    D_C: tl.tensor,
    OBSERVATION: tl.tensor,  # O
    SP: tl.tensor,
    K: tl.tensor,  # Euler steps
    L: tl.tensor,  # flow steps
    euler_step: tl.tensor,  # 1 / K
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    step_size: tl.tensor,
    selection_inverse_temperature: tl.tensor,
    V: tl.constexpr,  # padded width of the velocity field
    C: tl.constexpr,  # padded width of the critic
    RP: tl.constexpr,
    DEEP_V: tl.constexpr,  # D_V > 1
    DEEP_C: tl.constexpr,  # D_C > 1
    LAYER_NORM_V: tl.constexpr,
    LAYER_NORM_C: tl.constexpr,
    ACTIVATION_V: tl.constexpr,
    ACTIVATION_C: tl.constexpr,
    SEEDED: tl.constexpr,
    MINIMUM: tl.constexpr,  # aggregate members by their minimum for the score
    VALUE_MINIMUM: tl.constexpr,  # and for the choice
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    ADAM: tl.constexpr,
    SELECTION: tl.constexpr,  # "max", "softmax" or "random"
    BLOCK_B: tl.constexpr,  # states, padded
    BLOCK_P: tl.constexpr,  # particles of a state, padded, of the choice
    BLOCK_M: tl.constexpr,  # rows of an item
    TILE_V: tl.constexpr,  # columns of an item
    TILE_C: tl.constexpr,
    SPLIT_V: tl.constexpr,  # parts of the sum of a product
    SPLIT_C: tl.constexpr,
    ALONE: tl.constexpr,  # the grid is one program
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,  # this and the rest are ``move_state``'s
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """Phases of the module's docstring."""
    start = tl.program_id(0)
    programs = tl.num_programs(0)
    R = B * N
    blocks = tl.cdiv(R, BLOCK_M)
    rows = blocks * BLOCK_M
    offs_r = tl.arange(0, RP)
    in_a = (offs_r < A)[None, :]
    z_slot = rows * V
    g_slot = E * rows * C
    z_v_ptr = scratch_ptr  # [2, rows, V]
    g_ptr = z_v_ptr + 2 * z_slot  # [2, E, rows, C]
    z_c_ptr = g_ptr + 2 * g_slot  # [D_C, E, rows, C]
    share_c_ptr = float_ptr  # [E, B, C]
    share_v_ptr = share_c_ptr + E * B * C  # [B, V]
    old_ptr = share_v_ptr + B * V  # [2, R, A]
    m_ptr = old_ptr + 2 * R * A  # [R, A]
    v_ptr = m_ptr + R * A  # [R, A]
    score_ptr = v_ptr + R * A  # [R, A]
    last_v_ptr = vector_v_ptr + (D_V - 1) * 3 * V
    stride_wc = (D_C - 1) * C * C
    stride_vc = D_C * 3 * C

    share_phase(
        s_ptr,
        stride_sb,
        stride_so,
        state_c_ptr,
        vector_c_ptr,
        share_c_ptr,
        B,
        OBSERVATION,
        SP,
        E,
        D_C,
        C,
        BLOCK_B,
        TILE_C,
        PRECISION,
    )
    share_phase(
        s_ptr,
        stride_sb,
        stride_so,
        state_v_ptr,
        vector_v_ptr,
        share_v_ptr,
        B,
        OBSERVATION,
        SP,
        1,
        D_V,
        V,
        BLOCK_B,
        TILE_V,
        PRECISION,
    )

    # --- behaviour flow: step k's particles lie in slot k % 2 of ``old_ptr``; z goes from one slot to the other
    slot = 0
    if DEEP_V:
        items = blocks * (V // TILE_V)
        for k in tl.range(0, K, disable_licm=True):
            _, block, first, w = item_tile(hidden_v_ptr, start, items, blocks, 0, False, V, SPLIT_V, TILE_V)
            first_width = tl.load(widths_v_ptr)
            last_width = tl.load(widths_v_ptr + D_V - 1)
            grid_barrier(counter_ptr, ALONE)
            for item in tl.range(start, items, programs, disable_licm=True):
                offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
                # Rows past the last read it again, so that they stay finite; they are not stored.
                safe_m = tl.minimum(offs_m, R - 1)
                if k == 0:
                    x = initial_particles(noise_ptr, safe_m, stride_nb, stride_nn, stride_na, N, A, RP, BLOCK_M, SEEDED)
                else:
                    x = load_particles(old_ptr + ((k - 1) % 2) * R * A, safe_m, A, 1, A, RP)
                    x += euler_step * velocity_rows(
                        load_rows(z_v_ptr + slot * z_slot, offs_m, V),
                        last_v_ptr,
                        last_width,
                        head_v_ptr,
                        head_bias_v_ptr,
                        V,
                        RP,
                        LAYER_NORM_V,
                        ACTIVATION_V,
                        SPLIT_V,
                        PRECISION,
                    )
                if first == 0:
                    new_ptrs = old_ptr + (k % 2) * R * A + (offs_m[:, None] * A + offs_r[None, :])
                    tl.store(new_ptrs, x, mask=(offs_m < R)[:, None] & in_a)
                z = first_rows(
                    x,
                    safe_m // N,
                    share_v_ptr,
                    action_v_ptr,
                    time_v_ptr,
                    k * euler_step,
                    V,
                    RP,
                    SPLIT_V,
                    True,
                    PRECISION,
                )
                y, _, _, _ = affine(z, vector_v_ptr, first_width, V, LAYER_NORM_V)
                total = split_product(activate(y, ACTIVATION_V).to(w.dtype), w, PRECISION)
                out_ptr = z_v_ptr + (1 - slot) * z_slot
                store_tile(total, vector_v_ptr + 3 * V, out_ptr, offs_m, first, V, TILE_V)
                _, block, first, w = item_tile(
                    hidden_v_ptr, item + programs, items, blocks, 0, False, V, SPLIT_V, TILE_V
                )
            slot = 1 - slot
            for layer in tl.range(2, D_V, disable_licm=True):
                layer_phase(
                    counter_ptr,
                    z_v_ptr + slot * z_slot,
                    z_v_ptr + (1 - slot) * z_slot,
                    hidden_v_ptr + (layer - 1) * V * V,
                    vector_v_ptr + (layer - 1) * 3 * V,
                    tl.load(widths_v_ptr + layer - 1),
                    0,
                    0,
                    1,
                    blocks,
                    V,
                    LAYER_NORM_V,
                    ACTIVATION_V,
                    BLOCK_M,
                    TILE_V,
                    SPLIT_V,
                    ALONE,
                    PRECISION,
                )
                slot = 1 - slot
    last_width = tl.load(widths_v_ptr + D_V - 1)
    grid_barrier(counter_ptr, ALONE)
    for block in tl.range(start, blocks, programs, disable_licm=True):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        safe_m = tl.minimum(offs_m, R - 1)
        if DEEP_V:
            x = load_particles(old_ptr + ((K - 1) % 2) * R * A, safe_m, A, 1, A, RP)
        else:
            x = initial_particles(noise_ptr, safe_m, stride_nb, stride_nn, stride_na, N, A, RP, BLOCK_M, SEEDED)
        # With one hidden layer nothing is exchanged: a block takes all its steps here.
        for k in range(K - 1 if DEEP_V else 0, K):
            if DEEP_V:
                z = load_rows(z_v_ptr + slot * z_slot, offs_m, V)
            else:
                z = first_rows(
                    x,
                    safe_m // N,
                    share_v_ptr,
                    action_v_ptr,
                    time_v_ptr,
                    k * euler_step,
                    V,
                    RP,
                    SPLIT_V,
                    True,
                    PRECISION,
                )
            x += euler_step * velocity_rows(
                z,
                last_v_ptr,
                last_width,
                head_v_ptr,
                head_bias_v_ptr,
                V,
                RP,
                LAYER_NORM_V,
                ACTIVATION_V,
                SPLIT_V,
                PRECISION,
            )
        x = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
        offs = offs_m[:, None] * A + offs_r[None, :]
        is_real = (offs_m < R)[:, None] & in_a
        tl.store(x_ptr + offs, x, mask=is_real)
        if ADAM:
            tl.store(m_ptr + offs, tl.zeros([BLOCK_M, RP], tl.float32), mask=is_real)
            tl.store(v_ptr + offs, tl.zeros([BLOCK_M, RP], tl.float32), mask=is_real)

    # --- flow steps, and once more forward
    for step in tl.range(0, L + 1, disable_licm=True):
        if DEEP_C:
            items = E * blocks * (C // TILE_C)
            member, block, first, w = item_tile(
                hidden_c_ptr, start, items, blocks, stride_wc, False, C, SPLIT_C, TILE_C
            )
            first_width = tl.load(widths_c_ptr)
            grid_barrier(counter_ptr, ALONE)
            for item in tl.range(start, items, programs, disable_licm=True):
                offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
                safe_m = tl.minimum(offs_m, R - 1)
                x = load_particles(x_ptr, safe_m, A, 1, A, RP)
                z = first_rows(
                    x,
                    safe_m // N,
                    share_c_ptr + member * B * C,
                    action_c_ptr + member * RP * C,
                    share_c_ptr,
                    0.0,
                    C,
                    RP,
                    SPLIT_C,
                    False,
                    PRECISION,
                )
                member_rows = member * rows * C
                if first == 0:
                    z_ptrs = z_c_ptr + member_rows + (offs_m[:, None] * C + tl.arange(0, C)[None, :])
                    tl.store(z_ptrs, z.to(w.dtype))
                layer_ptr = vector_c_ptr + member * stride_vc
                y, _, _, _ = affine(z, layer_ptr, first_width, C, LAYER_NORM_C)
                total = split_product(activate(y, ACTIVATION_C).to(w.dtype), w, PRECISION)
                out_ptr = z_c_ptr + g_slot + member_rows
                store_tile(total, layer_ptr + 3 * C, out_ptr, offs_m, first, C, TILE_C)
                member, block, first, w = item_tile(
                    hidden_c_ptr, item + programs, items, blocks, stride_wc, False, C, SPLIT_C, TILE_C
                )
            for layer in tl.range(2, D_C, disable_licm=True):
                layer_phase(
                    counter_ptr,
                    z_c_ptr + (layer - 1) * g_slot,
                    z_c_ptr + layer * g_slot,
                    hidden_c_ptr + (layer - 1) * C * C,
                    vector_c_ptr + (layer - 1) * 3 * C,
                    tl.load(widths_c_ptr + layer - 1),
                    stride_wc,
                    stride_vc,
                    E,
                    blocks,
                    C,
                    LAYER_NORM_C,
                    ACTIVATION_C,
                    BLOCK_M,
                    TILE_C,
                    SPLIT_C,
                    ALONE,
                    PRECISION,
                )
        if step < L:
            g_from = 0
            if DEEP_C:
                for down in tl.range(1, D_C, disable_licm=True):
                    layer = D_C - down
                    layer_w_ptr = hidden_c_ptr + (layer - 1) * C * C
                    width = tl.load(widths_c_ptr + layer)
                    member, block, first, w = item_tile(
                        layer_w_ptr, start, items, blocks, stride_wc, True, C, SPLIT_C, TILE_C
                    )
                    grid_barrier(counter_ptr, ALONE)
                    for item in tl.range(start, items, programs, disable_licm=True):
                        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
                        member_rows = member * rows * C
                        z = load_rows(z_c_ptr + layer * g_slot + member_rows, offs_m, C)
                        layer_ptr = vector_c_ptr + member * stride_vc + layer * 3 * C
                        y, normal, rstd, scale = affine(z, layer_ptr, width, C, LAYER_NORM_C)
                        if down == 1:
                            head = tl.load(head_c_ptr + member * C + tl.arange(0, C)).to(tl.float32)[None, :]
                            grad = tl.broadcast_to(head, [BLOCK_M, C])
                            if MINIMUM and first == 0:
                                q = tl.sum(activate(y, ACTIVATION_C) * head, axis=1)
                                q += tl.load(head_bias_c_ptr + member)
                                tl.store(q_ptr + member * R + offs_m, q, mask=offs_m < R)
                        else:
                            grad = load_rows(g_ptr + g_from * g_slot + member_rows, offs_m, C)
                        grad = rows_backward(grad, y, normal, rstd, scale, width, C, LAYER_NORM_C, ACTIVATION_C)
                        total = split_product(grad.to(w.dtype), w, PRECISION)
                        offs = offs_m[:, None] * C + (first + tl.arange(0, TILE_C))[None, :]
                        new_ptrs = g_ptr + (1 - g_from) * g_slot + member_rows + offs
                        tl.store(new_ptrs, total.to(w.dtype))
                        member, block, first, w = item_tile(
                            layer_w_ptr, item + programs, items, blocks, stride_wc, True, C, SPLIT_C, TILE_C
                        )
                    g_from = 1 - g_from
            # 1 - beta^step by its recurrence: a difference loses digits. Carried along it would take registers.
            m_correction = 0.0
            v_correction = 0.0
            for _ in range(step + 1):
                m_correction = m_correction * BETA1 + (1.0 - BETA1)
                v_correction = v_correction * BETA2 + (1.0 - BETA2)
            rate = step_size
            if ADAM:
                rate = tl.div_rn(step_size, m_correction)
            first_width = tl.load(widths_c_ptr)
            grid_barrier(counter_ptr, ALONE)
            for state in tl.range(start, B, programs, disable_licm=True):
                for first_n in tl.range(0, N, BLOCK_M, disable_licm=True):
                    offs_m = first_n + tl.arange(0, BLOCK_M)
                    offs_row = state * N + tl.minimum(offs_m, N - 1)
                    score = tl.zeros([BLOCK_M, RP], tl.float32)
                    smallest = tl.zeros([BLOCK_M], tl.float32)
                    for e in tl.range(0, E, disable_licm=True):
                        layer_ptr = vector_c_ptr + e * stride_vc
                        w_ptr = action_c_ptr + e * RP * C
                        head_ptr = head_c_ptr + e * C
                        if DEEP_C:
                            z = load_rows(z_c_ptr + e * rows * C, offs_row, C)
                        else:
                            z = first_rows(
                                load_particles(x_ptr, offs_row, A, 1, A, RP),
                                tl.zeros([BLOCK_M], tl.int32) + state,
                                share_c_ptr + e * B * C,
                                w_ptr,
                                share_c_ptr,
                                0.0,
                                C,
                                RP,
                                SPLIT_C,
                                False,
                                PRECISION,
                            )
                        y, normal, rstd, scale = affine(z, layer_ptr, first_width, C, LAYER_NORM_C)
                        if DEEP_C:
                            grad = load_rows(g_ptr + g_from * g_slot + e * rows * C, offs_row, C)
                        else:
                            head = tl.load(head_ptr + tl.arange(0, C)).to(tl.float32)[None, :]
                            grad = tl.broadcast_to(head, [BLOCK_M, C])
                        grad = rows_backward(grad, y, normal, rstd, scale, first_width, C, LAYER_NORM_C, ACTIVATION_C)
                        w_back = weight_tile(w_ptr, 1, C, 0, 1, C, SPLIT_C, RP)
                        grad_x = split_product(grad.to(w_back.dtype), w_back, PRECISION)
                        if MINIMUM:
                            # The first of the smallest members, particle by particle.
                            if DEEP_C:
                                q = tl.load(q_ptr + e * R + offs_row, cache_modifier=".cg")
                            else:
                                q = tl.sum(activate(y, ACTIVATION_C) * head, axis=1) + tl.load(head_bias_c_ptr + e)
                            is_smaller = (q < smallest) | (e == 0)
                            score = tl.where(is_smaller[:, None], grad_x, score)
                            smallest = tl.where(is_smaller, q, smallest)
                        else:
                            score += grad_x
                    if not MINIMUM:
                        score = tl.div_rn(score, E.to(tl.float32))
                    score_ptrs = score_ptr + (offs_row[:, None] * A + offs_r[None, :])
                    tl.store(score_ptrs, score, mask=(offs_m < N)[:, None] & in_a)
                tl.debug_barrier()
                first_entry = state * N * A
                move_state(
                    x_ptr + first_entry,
                    score_ptr + first_entry,
                    m_ptr + first_entry,
                    v_ptr + first_entry,
                    A,
                    1,
                    A,
                    1,
                    A,
                    1,
                    A,
                    1,
                    N,
                    A,
                    log_n1,
                    inverse_temperature,
                    rate,
                    v_correction,
                    -1.0,
                    1.0,
                    BANDWIDTH_GRADIENT,
                    REPULSION,
                    ADAM,
                    BLOCK_N,
                    BLOCK_C,
                    UNROLL,
                    PAIRED,
                )

    # --- values and choice
    last_width = tl.load(widths_c_ptr + D_C - 1)
    grid_barrier(counter_ptr, ALONE)
    for state in tl.range(start, B, programs, disable_licm=True):
        for first_n in tl.range(0, N, BLOCK_M, disable_licm=True):
            offs_m = first_n + tl.arange(0, BLOCK_M)
            offs_row = state * N + tl.minimum(offs_m, N - 1)
            for e in tl.range(0, E, disable_licm=True):
                if DEEP_C:
                    z = load_rows(z_c_ptr + (D_C - 1) * g_slot + e * rows * C, offs_row, C)
                else:
                    z = first_rows(
                        load_particles(x_ptr, offs_row, A, 1, A, RP),
                        tl.zeros([BLOCK_M], tl.int32) + state,
                        share_c_ptr + e * B * C,
                        action_c_ptr + e * RP * C,
                        share_c_ptr,
                        0.0,
                        C,
                        RP,
                        SPLIT_C,
                        False,
                        PRECISION,
                    )
                q = critic_rows(
                    z,
                    vector_c_ptr + e * stride_vc + (D_C - 1) * 3 * C,
                    last_width,
                    head_c_ptr + e * C,
                    head_bias_c_ptr + e,
                    C,
                    LAYER_NORM_C,
                    ACTIVATION_C,
                )
                tl.store(q_ptr + e * R + offs_row, q, mask=offs_m < N)
        tl.debug_barrier()
        offs_p = tl.arange(0, BLOCK_P)
        q_ptrs = q_ptr + state * N + offs_p[None, :]
        values = aggregate_members(q_ptrs, R, (offs_p < N)[None, :], E, VALUE_MINIMUM, ".cg")  # [1, BLOCK_P]
        uniform = tl.zeros([1], tl.float32)
        if SELECTION != "max":
            uniform += tl.load(uniform_ptr + state)
        index = choose(values, uniform, N, selection_inverse_temperature, SELECTION, BLOCK_P)  # [1]
        tl.store(index_ptr + state + tl.arange(0, 1), index.to(tl.int64))
        chosen = (state * N + index)[:, None] * A + offs_r[None, :]  # [1, RP]
        action = tl.load(x_ptr + chosen, mask=in_a, cache_modifier=".cg")
        tl.store(action_ptr + state * A + offs_r[None, :], action, mask=in_a)


# --- launcher and registered op --------------------------------------------------------------------------------------


class Acted(NamedTuple):
    """What ``act`` returns."""

    action: Tensor  # [B, A] float32
    chosen_index: Tensor  # [B] int64
    particles: Tensor  # [B, N, A] float32 after the last step
    q: Tensor  # [E, B, N] float32 of every member at ``particles``


@torch.library.custom_op("vgf_fast::act", mutates_args=("counter",))
def _act(
    observations: Tensor,
    start: Tensor,
    uniform: Tensor | None,
    counter: Tensor,
    velocity: list[Tensor],
    critic: list[Tensor],
    particles: int,
    action_dim: int,
    velocity_layer_norm: bool,
    velocity_activation: str,
    critic_layer_norm: bool,
    critic_activation: str,
    behavior_steps: int,
    flow_steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    selection: str,
    selection_temperature: float,
    value_aggregation: str,
    precision: str,
    config: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``start`` is the noise [B, N, A], or the seed [1]; the networks' tensors are PackedMLP's first eight."""
    device = observations.device
    chosen = launch.ActingLaunch(*config)
    batch, members = observations.shape[0], critic[0].shape[0]
    result = _fake_act(observations, critic, particles, action_dim)
    if batch == 0:
        return result
    action, index, x, q = result
    rows = -(-batch * particles // chosen.block_m) * chosen.block_m
    depth_v, depth_c = velocity[5].shape[1], critic[5].shape[1]
    width_v, width_c = velocity[0].shape[2], critic[0].shape[2]
    entries = 2 * rows * width_v + (depth_c + 2) * members * rows * width_c
    floats = batch * (members * width_c + width_v) + 5 * x.numel()
    scratch = torch.empty(entries, dtype=critic[0].dtype, device=device)
    float_scratch = torch.empty(floats, dtype=torch.float32, device=device)
    alone = chosen.programs == 1
    with launch.on_device(observations):
        acting_kernel[(chosen.programs,)](
            observations,
            start,
            x if uniform is None else uniform,
            action,
            index,
            x,
            q,
            *velocity,
            *critic[:2],
            *critic[3:],
            scratch,
            float_scratch,
            counter,
            *observations.stride(),
            *(start.stride() if start.ndim == 3 else (0, 0, 0)),
            B=batch,
            N=particles,
            A=action_dim,
            E=members,
            D_V=depth_v,
            D_C=depth_c,
            OBSERVATION=observations.shape[1],
            SP=critic[0].shape[1],
            K=behavior_steps,
            L=flow_steps,
            euler_step=1.0 / behavior_steps,
            log_n1=math.log(particles + 1.0),
            inverse_temperature=1.0 / temperature,
            step_size=step_size,
            selection_inverse_temperature=1.0 / selection_temperature,
            V=width_v,
            C=width_c,
            RP=critic[1].shape[1],
            DEEP_V=depth_v > 1,
            DEEP_C=depth_c > 1,
            LAYER_NORM_V=velocity_layer_norm,
            LAYER_NORM_C=critic_layer_norm,
            ACTIVATION_V=velocity_activation,
            ACTIVATION_C=critic_activation,
            SEEDED=start.ndim == 1,
            MINIMUM=q_aggregation == "min",
            VALUE_MINIMUM=value_aggregation == "min",
            BANDWIDTH_GRADIENT=bandwidth_gradient and repulsion,
            REPULSION=repulsion,
            ADAM=optimizer == "adam",
            SELECTION=selection,
            BLOCK_B=max(launch.padded(batch), 16),
            BLOCK_P=launch.padded(particles),
            BLOCK_M=chosen.block_m,
            TILE_V=chosen.velocity_tile,
            TILE_C=chosen.critic_tile,
            SPLIT_V=min(chosen.num_warps, width_v // 16),
            SPLIT_C=min(chosen.num_warps, width_c // 16),
            ALONE=alone,
            PRECISION=precision,
            **chosen.particle_options(particles),
            num_warps=chosen.num_warps,
            # Nothing is read ahead of a barrier but what the kernel says.
            num_stages=1,
            **({} if alone else {"launch_cooperative_grid": True}),
        )
    return result


def _fake_act(
    observations: Tensor, critic: list[Tensor], particles: int, action_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, device = observations.shape[0], observations.device
    return (
        torch.empty((batch, action_dim), dtype=torch.float32, device=device),
        torch.empty((batch,), dtype=torch.int64, device=device),
        torch.empty((batch, particles, action_dim), dtype=torch.float32, device=device),
        torch.empty((critic[0].shape[0], batch, particles), dtype=torch.float32, device=device),
    )


@_act.register_fake
def _(
    observations: Tensor,
    start: Tensor,
    uniform: Tensor | None,
    counter: Tensor,
    velocity: list[Tensor],
    critic: list[Tensor],
    particles: int,
    action_dim: int,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_act(observations, critic, particles, action_dim)


# --- public functions ------------------------------------------------------------------------------------------------


def act(
    velocity: PackedMLP,
    critic: PackedMLP,
    observations: Tensor,
    noise: Tensor | None,
    behavior_steps: int,
    flow_steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    selection: str = "max",
    selection_temperature: float = 1.0,
    value_aggregation: str = "min",
    *,
    uniform: Tensor | None = None,
    particles: int | None = None,
    seed: Tensor | None = None,
    counter: Tensor | None = None,
    precision: str | None = None,
    config: launch.ActingLaunch | None = None,
) -> Acted:
    """Actions at observations [B, O], B at most 16, from noise [B, N, A] of any strides: one launch.

    Instead of ``noise``, ``seed``, one int64 on the device, gives the numbers that ``behavior_flow`` draws from it, for
    ``particles`` a state. ``uniform`` [B] float32 in [0, 1) is for the selections "softmax" and "random".
    ``value_aggregation`` is over members for the choice, ``q_aggregation`` for the score. N is 1 to 128, A 1 to 64, and
    less where ``launch.acting_fits`` says so.
    ``counter`` [1] int32 is the grid's barrier: zero at first, ready again after every launch, and not for two launches
    at once; by default ``barrier_counter``'s.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    batch, n = _check(velocity, critic, observations, noise, particles, seed)
    _check_steps(behavior_steps, flow_steps, temperature, selection_temperature)
    for name, value, choices in (
        ("q_aggregation", q_aggregation, ("mean", "min")),
        ("value_aggregation", value_aggregation, ("mean", "min")),
        ("optimizer", optimizer, ("adam", "ascent")),
        ("selection", selection, ("max", "softmax", "random")),
    ):
        if value not in choices:
            raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")
    if selection == "max":
        uniform = None
    elif uniform is None:
        raise ValueError(f"uniform is None, expected one float32 number in [0, 1) a state: selection={selection!r}")
    else:
        launch.check_shape("uniform", uniform, (batch,), "one number a state")
        launch.check_dtype("uniform", uniform, (torch.float32,))
        launch.check_same_device("uniform", uniform, "observations", observations.device)
        uniform = uniform.contiguous()
    config = config or launch.acting(
        batch * n,
        critic.members,
        velocity.padded_width,
        critic.padded_width,
        critic.dtype,
        n,
        launch.processors(observations.device),
    )
    if counter is None:
        counter = barrier_counter(observations.device)
    else:
        launch.check_shape("counter", counter, (1,), "one number")
        launch.check_dtype("counter", counter, (torch.int32,))
        launch.check_same_device("counter", counter, "observations", observations.device)
    start = seed if noise is None else noise
    assert start is not None
    return Acted(
        *_act(
            observations,
            start,
            uniform,
            counter,
            list(velocity[:8]),
            list(critic[:8]),
            n,
            critic.action_dim,
            velocity.layer_norm,
            velocity.activation,
            critic.layer_norm,
            critic.activation,
            behavior_steps,
            flow_steps,
            float(step_size),
            float(temperature),
            q_aggregation,
            bandwidth_gradient,
            repulsion,
            optimizer,
            selection,
            float(selection_temperature),
            value_aggregation,
            precision or launch.precision(critic.dtype),
            config.entries(),
        )
    )


def _check(
    velocity: PackedMLP,
    critic: PackedMLP,
    observations: Tensor,
    noise: Tensor | None,
    particles: int | None,
    seed: Tensor | None,
) -> tuple[int, int]:
    """B and N."""
    launch.check_device("observations", observations)
    if observations.ndim != 2 or observations.shape[0] > launch.MAX_ACTING_STATES:
        raise ValueError(
            f"observations has shape {tuple(observations.shape)}, expected (B <= {launch.MAX_ACTING_STATES}, O)"
        )
    batch, device = observations.shape[0], observations.device
    launch.check_shape("observations", observations, (batch, critic.observation_dim), "the critic's observation_dim")
    launch.check_dtype("observations", observations, launch.PARTICLE_DTYPES)
    sizes = (critic.observation_dim, critic.action_dim)
    if (velocity.observation_dim, velocity.action_dim) != sizes or velocity.output_dim != critic.action_dim:
        raise ValueError(
            f"velocity has {velocity.observation_dim} + {velocity.action_dim} inputs and {velocity.output_dim} "
            f"outputs, expected {sizes[0]} + {sizes[1]} and {sizes[1]}: the critic's observation_dim and action_dim"
        )
    if velocity.members != 1 or critic.output_dim != 1:
        raise ValueError(
            f"velocity has {velocity.members} members and critic {critic.output_dim} outputs, expected 1 of each"
        )
    if velocity.dtype != critic.dtype:
        raise ValueError(f"velocity has dtype {velocity.dtype}, expected {critic.dtype}, the critic's")
    width = max(velocity.padded_width, critic.padded_width)
    if width > launch.MAX_WIDTH:
        raise ValueError(f"the widest hidden layer is {width} padded, expected at most {launch.MAX_WIDTH}")
    if not launch.acting_fits(width, critic.action_dim, critic.dtype, torch.version.hip is not None):
        raise ValueError(
            f"layers of {width} padded units with {critic.action_dim} action entries in {critic.dtype} do not fit into "
            "shared memory for acting in one launch, expected fewer: several launches have no such limit"
        )
    launch.check_same_device("critic", critic.state, "observations", device)
    launch.check_same_device("velocity", velocity.state, "observations", device)
    if (noise is None) == (seed is None):
        raise ValueError("noise and seed are both given or both None, expected one of them")
    if noise is not None:
        if noise.ndim != 3:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected (B, N, A)")
        particles = noise.shape[1]
        launch.check_shape("noise", noise, (batch, particles, critic.action_dim), "one row a particle of each state")
        launch.check_dtype("noise", noise, launch.PARTICLE_DTYPES)
        launch.check_same_device("noise", noise, "observations", device)
    elif particles is None:
        raise ValueError("particles is None, expected a number: without noise it says how many a state")
    elif seed is not None:
        launch.check_shape("seed", seed, (1,), "one number")
        launch.check_dtype("seed", seed, (torch.int64,))
        launch.check_same_device("seed", seed, "observations", device)
    assert particles is not None
    if not 1 <= particles <= launch.MAX_PARTICLES:
        raise ValueError(f"particles is {particles} a state, expected 1 to {launch.MAX_PARTICLES}: the kernel's limit")
    if critic.action_dim > launch.MAX_ACTION_DIM:
        raise ValueError(
            f"action_dim is {critic.action_dim}, expected 1 to {launch.MAX_ACTION_DIM}: the kernel's limit"
        )
    return batch, particles


def _check_steps(behavior_steps: int, flow_steps: int, temperature: float, selection_temperature: float) -> None:
    if behavior_steps < 1:
        raise ValueError(f"behavior_steps is {behavior_steps}, expected an integer >= 1")
    if flow_steps < 0:
        raise ValueError(f"flow_steps is {flow_steps}, expected an integer >= 0")
    for name, value in (("temperature", temperature), ("selection_temperature", selection_temperature)):
        if not value > 0.0:
            raise ValueError(f"{name} is {value!r}, expected a number > 0")


# --- counters of the grid barrier ------------------------------------------------------------------------------------

COUNTERS = 1024  # a device
_pools: dict[torch.device, tuple[Tensor, dict[int, Tensor], list[Tensor]]] = {}


def barrier_counter(device: torch.device) -> Tensor:
    """A counter [1] for launches on the current stream, which come one after another, or for one captured graph alone.

    A graph's counter is kept for its replays. All of a device are zeroed when the first one is asked for; a capture
    that comes before that, or after ``COUNTERS``, records the zeroing of its own.
    """
    if device.type == "cpu":
        return torch.zeros(1, dtype=torch.int32, device="cpu")
    capturing = torch.cuda.is_current_stream_capturing()
    if device not in _pools:
        if capturing:
            return torch.zeros(1, dtype=torch.int32, device=device)
        zeros = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        _pools[device] = (zeros, {}, list(zeros.split(1)))
    _, by_stream, free = _pools[device]
    stream = torch.cuda.current_stream(device).cuda_stream
    if not capturing and stream in by_stream:
        return by_stream[stream]
    if not free:
        return torch.zeros(1, dtype=torch.int32, device=device)
    counter = free.pop()
    if not capturing:
        by_stream[stream] = counter
    return counter
