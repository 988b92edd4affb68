"""First and last layer of a training pass; between them are ``product`` and ``rows``.

    inputs    h_0 = [s, a, t] or [s, (1 - t) noise + t a, t],  z_1 = h_0 W_1 + b_1
    head      h_D = act(LN(z_D)),  out = h_D W + b,  loss and d loss / d out,  dz_D

All rows of a batch and some more, which fill blocks of rows: these have inputs of zero and no part in the loss, so that
they add zeros to every sum over rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import launch
from .activations import Activation
from .arguments import Net, Shape, tensor_of
from .packing import MIN_DOT, PackedMLP
from .product import release, wait
from .rows import affine, affine_backward, scale_and_shift, store_sums, width_of

MIN_DOT_COLUMNS = tl.constexpr(MIN_DOT)  # of the time, padded

# --- losses ----------------------------------------------------------------------------------------------------------


@triton.jit
def squared(u: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """u^2."""
    return u * u, -2.0 * u


@triton.jit
def expectile(u: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """|weight - 1[u < 0]| u^2."""
    share = tl.where(u < 0.0, tl.abs(weight - 1.0), weight)
    return share * u * u, -2.0 * share * u


@triton.jit
def sql(u: tl.tensor, weight: tl.tensor) -> tl.tensor:
    """weight max(u / (2 weight) + 1, 0)^2 - u."""
    r = tl.maximum(u / (2.0 * weight) + 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return weight * r * r - u, 1.0 - r


class Loss(NamedTuple):
    """A loss as a kernel takes it."""

    apply: JITFunction  # (u = target - out, weight) -> the loss, and its derivative with respect to out


LOSSES = {"squared": Loss(squared), "expectile": Loss(expectile), "sql": Loss(sql)}


# --- kernels ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A batch on the device: float32, any strides, B rows."""

    observations: Any  # [B, O]
    actions: Any  # [B, A]
    time: Any = None  # [B, 1], of networks that take it
    noise: Any = None  # [B, A]: the network's action is (1 - t) noise + t action, its target action - noise
    target: Any = None  # [B, OUT]


class Strides(NamedTuple):
    """Of a batch's tensors: from row to row, then from column to column; 0 of those that are not given."""

    observations: tuple[int, ...]
    actions: tuple[int, ...]
    time: tuple[int, ...]
    noise: tuple[int, ...]
    target: tuple[int, ...]


class Sizes(NamedTuple):
    """Of a batch and a network."""

    batch: int  # B
    rows: int  # B padded to whole blocks
    observation_dim: int  # O
    action_dim: int  # A
    depth: int  # D
    outputs: int  # OUT
    counters: int  # Adam's step counters


class First(NamedTuple):
    """Packed weights of the first layer."""

    state: Any  # [E, SP, HP]
    action: Any  # [E, RP, HP]
    time: Any  # [E, HP] float32
    vectors: Any  # [E, D, 3, HP] float32, whose first row is the bias


class FirstConstants(NamedTuple):
    """Constants of the first layer."""

    SP: int
    RP: int
    HP: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int  # of the state's columns
    COUNTERS: int  # padded
    PRECISION: str
    PDL: bool


@triton.jit
def count_steps(steps_ptr: tl.tensor, counters: tl.tensor, COUNTERS: tl.constexpr) -> None:
    """Increase Adam's step counters by one; ``steps_ptr`` is to their addresses."""
    offs = tl.arange(0, COUNTERS)
    in_range = offs < counters
    # What is past the last is not followed.
    step_ptrs = tl.load(steps_ptr + offs, mask=in_range, other=0).to(tl.pointer_type(tl.float32))
    tl.store(step_ptrs, tl.load(step_ptrs, mask=in_range, other=0.0) + 1.0, mask=in_range)


@triton.jit
def first_layer_kernel(
    batch: Batch,
    strides: Strides,
    sizes: Sizes,
    weights: First,
    x_ptr: tl.tensor,  # [rows, SP + RP (+ 16)] of the weights' dtype, written: state, action and time padded by zeros
    z_ptr: tl.tensor,  # [E, rows, HP] float32, written
    steps_ptr: tl.tensor,  # [counters] int64, addresses of Adam's step counters, increased by one; or None
    CONSTANTS: tl.constexpr,
) -> None:
    """Tile ``program_id(0)`` of columns of block ``program_id(1)`` of rows of member ``program_id(2)``."""
    SP: tl.constexpr = CONSTANTS.SP
    RP: tl.constexpr = CONSTANTS.RP
    HP: tl.constexpr = CONSTANTS.HP
    BLOCK_M: tl.constexpr = CONSTANTS.BLOCK_M
    BLOCK_N: tl.constexpr = CONSTANTS.BLOCK_N
    BLOCK_K: tl.constexpr = CONSTANTS.BLOCK_K
    HAS_TIME: tl.constexpr = batch.time is not None
    IP: tl.constexpr = SP + RP + (MIN_DOT_COLUMNS if HAS_TIME else 0)
    tile = tl.program_id(0)
    block = tl.program_id(1)
    member = tl.program_id(2).to(tl.int64)
    offs_m = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, RP)
    in_batch = (offs_m < sizes.batch)[:, None]
    # One of the programs that read an input writes it.
    writes = (offs_m < tl.where((tile == 0) & (member == 0), sizes.rows, 0))[:, None]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    x_ptrs = x_ptr + offs_m[:, None] * IP
    w_ptrs = weights.state + member * (SP * HP) + (offs_k[:, None] * HP + offs_n[None, :])
    bias = tl.load(weights.vectors + member * sizes.depth * (3 * HP) + offs_n)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait(CONSTANTS.PDL)
    release(CONSTANTS.PDL)
    if steps_ptr is not None:  # noqa: SIM102
        if (tile == 0) & (block == 0) & (member == 0):
            count_steps(steps_ptr, sizes.counters, CONSTANTS.COUNTERS)
    for first in range(0, sizes.observation_dim, BLOCK_K):
        offs_o = (first + offs_k).to(tl.int64)[None, :]
        s_ptrs = batch.observations + (offs_m[:, None] * strides.observations[0] + offs_o * strides.observations[1])
        s = tl.load(s_ptrs, mask=in_batch & (offs_o < sizes.observation_dim), other=0.0).to(dtype)
        tl.store(x_ptrs + offs_o, s, mask=writes)
        total = tl.dot(s, tl.load(w_ptrs), total, input_precision=CONSTANTS.PRECISION)
        w_ptrs += BLOCK_K * HP
    in_a = in_batch & (offs_r < sizes.action_dim)[None, :]
    wide_r = offs_r.to(tl.int64)[None, :]
    a_ptrs = batch.actions + (offs_m[:, None] * strides.actions[0] + wide_r * strides.actions[1])
    a = tl.load(a_ptrs, mask=in_a, other=0.0)
    if HAS_TIME:
        t = tl.load(batch.time + offs_m[:, None] * strides.time[0], mask=in_batch, other=0.0)  # [BLOCK_M, 1]
        if batch.noise is not None:
            noise_ptrs = batch.noise + (offs_m[:, None] * strides.noise[0] + wide_r * strides.noise[1])
            a = (1.0 - t) * tl.load(noise_ptrs, mask=in_a, other=0.0) + t * a
        total += t * tl.load(weights.time + member * HP + offs_n)[None, :]
        offs_t = tl.arange(0, MIN_DOT_COLUMNS)[None, :]
        tl.store(x_ptrs + (SP + RP) + offs_t, tl.where(offs_t == 0, t, 0.0).to(dtype), mask=writes)
    tl.store(x_ptrs + SP + wide_r, a.to(dtype), mask=writes)
    w = tl.load(weights.action + member * (RP * HP) + (offs_r[:, None] * HP + offs_n[None, :]))
    total = tl.dot(a.to(dtype), w, total, input_precision=CONSTANTS.PRECISION)
    z_ptrs = z_ptr + (member * sizes.rows + offs_m[:, None]) * HP + offs_n[None, :]
    tl.store(z_ptrs, total + bias[None, :], mask=(offs_m < sizes.rows)[:, None])


class Outputs(NamedTuple):
    """What the last layer leaves; None where it is not wanted."""

    h: Any  # [E, rows, HP] of the weights' dtype, the last hidden layer
    out: Any  # [E, B, OUT] float32
    dout: Any  # [E, B, OUT] float32, d loss / d out: written with a loss, read by a backward pass alone
    losses: Any  # [blocks, E, 4] float32: sums over the block of loss, out and target
    dz: Any  # [E, rows, HP] of the weights' dtype, the last hidden layer's
    dhead: Any  # [E, rows, GO] of the weights' dtype, dout
    sums: Any  # [blocks, E, D, 3, HP] float32 from the last layer on, the block's share of dbias, dscale and dshift
    head_sums: Any  # [blocks, E, GO] float32, of the head's dbias


class HeadConstants(NamedTuple):
    """Constants of the last layer."""

    OP: int  # outputs padded, as the weights are
    GO: int  # outputs padded, as their gradient is
    FORWARD: bool
    LOSS: bool
    BACKWARD: bool


@triton.jit(do_not_specialize=["weight"])
def head_kernel(
    net: Net,
    z_ptr: tl.tensor,  # [E, rows, HP] float32, the last hidden layer's linear part
    outputs: Outputs,
    batch: Batch,
    strides: Strides,
    sizes: Sizes,
    shape: Shape,
    weight: tl.tensor,  # of the loss
    activation: Activation,
    loss: Loss,
    OPTIONS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Rows from ``program_id(0) * ROWS`` on of member ``program_id(1)``: forward, loss, backward as CONSTANTS say."""
    HP: tl.constexpr = OPTIONS.HP
    OP: tl.constexpr = CONSTANTS.OP
    GO: tl.constexpr = CONSTANTS.GO
    LAYER_NORM: tl.constexpr = OPTIONS.LAYER_NORM
    block = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    offs_m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    offs_h = tl.arange(0, HP)
    in_rows = offs_m < sizes.rows
    in_batch = offs_m < sizes.batch
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, sizes.rows - 1)
    offs = (member * sizes.rows + safe_m)[:, None] * HP + offs_h[None, :]  # [ROWS, HP]
    row = member * sizes.batch + offs_m  # [ROWS] of the outputs
    part = block.to(tl.int64) * tl.num_programs(1) + member
    width = width_of(shape, OPTIONS)
    scale, shift = scale_and_shift(net.vectors + member * sizes.depth * (3 * HP), HP, LAYER_NORM)
    head_ptrs = net.head + member * (HP * OP) + offs_h * OP
    wait(OPTIONS.PDL)
    z = tl.load(z_ptr + offs)
    release(OPTIONS.PDL)
    y, normal, rstd = affine(z, scale, shift, width, LAYER_NORM)
    h = activation.apply(y)
    if CONSTANTS.FORWARD:
        tl.store(outputs.h + offs, h.to(outputs.h.dtype.element_ty), mask=in_rows[:, None])
    grad = tl.zeros([ROWS, HP], tl.float32)
    loss_sum = tl.zeros([ROWS], tl.float32)
    out_sum = tl.zeros([ROWS], tl.float32)
    target_sum = tl.zeros([ROWS], tl.float32)
    for column in range(sizes.outputs):
        w = tl.load(head_ptrs + column).to(tl.float32)[None, :]
        place = row * sizes.outputs + column
        dout = tl.zeros([ROWS], tl.float32)
        if CONSTANTS.FORWARD:
            out = tl.sum(h * w, axis=1) + tl.load(net.head_bias + member * OP + column)
            tl.store(outputs.out + place, out, mask=in_batch)
            if CONSTANTS.LOSS:
                if batch.noise is not None:
                    a_ptrs = batch.actions + (offs_m * strides.actions[0] + column * strides.actions[1])
                    noise_ptrs = batch.noise + (offs_m * strides.noise[0] + column * strides.noise[1])
                    target = tl.load(a_ptrs, mask=in_batch, other=0.0)
                    target -= tl.load(noise_ptrs, mask=in_batch, other=0.0)
                else:
                    target_ptrs = batch.target + (offs_m * strides.target[0] + column * strides.target[1])
                    target = tl.load(target_ptrs, mask=in_batch, other=0.0)
                value, slope = loss.apply(target - out, weight)
                dout = tl.where(in_batch, slope / (tensor_of(sizes.batch) * sizes.outputs).to(tl.float32), 0.0)
                tl.store(outputs.dout + place, dout, mask=in_batch)
                loss_sum += tl.where(in_batch, value, 0.0)
                out_sum += tl.where(in_batch, out, 0.0)
                target_sum += target
        else:
            dout = tl.load(outputs.dout + place, mask=in_batch, other=0.0)
        if CONSTANTS.BACKWARD:
            dhead_ptrs = outputs.dhead + (member * sizes.rows + offs_m) * GO + column
            tl.store(dhead_ptrs, dout.to(outputs.dhead.dtype.element_ty), mask=in_rows)
            tl.store(outputs.head_sums + part * GO + column, tl.sum(dout, axis=0))
            grad += dout[:, None] * w
    if CONSTANTS.LOSS:
        tl.store(outputs.losses + part * 4, tl.sum(loss_sum, axis=0))
        tl.store(outputs.losses + part * 4 + 1, tl.sum(out_sum, axis=0))
        tl.store(outputs.losses + part * 4 + 2, tl.sum(target_sum, axis=0))
    if CONSTANTS.BACKWARD:
        dy = grad * activation.slope(y)
        dz = affine_backward(dy, normal, rstd, scale, width, HP, LAYER_NORM)
        tl.store(outputs.dz + offs, dz.to(outputs.dz.dtype.element_ty), mask=in_rows[:, None])
        store_sums(dz, dy, normal, outputs.sums + part * sizes.depth * (3 * HP), HP, LAYER_NORM)


# --- launcher --------------------------------------------------------------------------------------------------------


def strides_of(batch: Batch) -> Strides:
    """What a launch needs of where the batch's numbers lie."""
    return Strides(*((0, 0) if tensor is None else tensor.stride() for tensor in batch))


def first_layer(
    mlp: PackedMLP, batch: Batch, sizes: Sizes, x: Tensor, z: Tensor, steps: Tensor | None, precision: str, pdl: bool
) -> None:
    """Write x [rows, inputs padded] and z [E, rows, HP]; count ``steps``, a column of addresses."""
    hp = mlp.padded_width
    block_m, block_n, block_k = launch.share_tile(hp)
    padded = (mlp.state.shape[1], mlp.action.shape[1], hp)
    constants = FirstConstants(*padded, block_m, block_n, block_k, launch.padded(sizes.counters), precision, pdl)
    grid = (hp // block_n, triton.cdiv(sizes.rows, block_m), mlp.members)
    weights = First(mlp.state, mlp.action, mlp.time, mlp.vectors)
    with launch.on_device(x):
        first_layer_kernel[grid](
            batch._replace(target=None),
            strides_of(batch),
            sizes,
            weights,
            x,
            z,
            steps,
            constants,
            **launch.options(4, 3, pdl),
        )
