"""Euler steps of the behaviour flow: head of the velocity, step, and the first layer of the next velocity.

    x <- x + v / K,  v = h W + b;  clip to [-1, 1] after the last step
    z_1 = share + x W_a + t w_t,  h_1 = act(z_1) where no LayerNorm follows

Particles are given, or drawn at the start by Philox from a seed. The first layer alone is also a critic's, of actions
too wide for ``rows``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import Activation, activation
from .arguments import Net, Options, Shape
from .product import release, wait


class Euler(NamedTuple):
    """Numbers of an Euler step; run-time values, for constants would unroll the loops over columns."""

    time: float  # at the particles after the step
    step: float  # 1 / K
    stride_row: int  # of the particles before it
    stride_column: int
    width: int  # HP
    columns: int  # of the first layer, a program


class EulerConstants(NamedTuple):
    """What an Euler step does, and how."""

    SEEDED: bool  # the particles before it are drawn
    MOVE: bool  # the velocity is added
    LAST: bool  # then they are clipped, and there is no next first layer
    TIME: bool
    ACTIVATE: bool
    RP: int
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    SPLIT: int  # parts of the head's sum, one a warp


@triton.jit
def euler_kernel(
    net: Net,
    x_ptr: tl.tensor,  # [rows, A] particles before the step, any strides and dtype; SEEDED one int64, the seed
    new_ptr: tl.tensor,  # [rows, A] float32, contiguous, written if MOVE or SEEDED; not ``x_ptr``
    h_ptr: tl.tensor,  # [rows, HP] activation of the last hidden layer; read if MOVE
    out_ptr: tl.tensor,  # [E, rows, HP] the first layer's z, or h if ACTIVATE, written unless LAST
    shape: Shape,
    euler: Euler,
    activation: Activation,
    OPTIONS: tl.constexpr,
    CONSTANTS: tl.constexpr,
) -> None:
    """Block ``program_id(0)`` of rows, and of the first layer part ``program_id(1)`` of member ``program_id(2)``."""
    HP: tl.constexpr = OPTIONS.HP
    RP: tl.constexpr = OPTIONS.RP
    BLOCK_M: tl.constexpr = CONSTANTS.BLOCK_M
    BLOCK_N: tl.constexpr = CONSTANTS.BLOCK_N
    BLOCK_K: tl.constexpr = CONSTANTS.BLOCK_K
    part = tl.program_id(1)
    member = tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RP)
    in_rows = (offs_m < shape.rows)[:, None]
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, shape.rows - 1).to(tl.int64)
    in_a = tl.broadcast_to((offs_r < shape.action_dim)[None, :], [BLOCK_M, RP])
    wait(OPTIONS.PDL)
    release(OPTIONS.PDL)
    if CONSTANTS.SEEDED:
        # Every entry its own counter, whatever the blocks.
        counter = (safe_m[:, None] * shape.action_dim + offs_r[None, :]).to(tl.int32)
        x = tl.where(in_a, tl.randn(tl.load(x_ptr), counter), 0.0)
    else:
        x_ptrs = x_ptr + (safe_m[:, None] * euler.stride_row + offs_r.to(tl.int64)[None, :] * euler.stride_column)
        x = tl.load(x_ptrs, mask=in_a, other=0.0).to(tl.float32)  # [BLOCK_M, RP]
    if CONSTANTS.MOVE:
        SPLIT: tl.constexpr = CONSTANTS.SPLIT
        offs_k = tl.arange(0, SPLIT)[:, None] * (BLOCK_K // SPLIT) + tl.arange(0, BLOCK_K // SPLIT)[None, :]
        velocity = tl.zeros([SPLIT, BLOCK_M, RP], tl.float32)
        h_ptrs = h_ptr + (safe_m[None, :, None] * HP + offs_k[:, None, :])
        w_ptrs = net.head + (offs_k[:, :, None] * RP + offs_r[None, None, :])
        for _ in range(0, euler.width, BLOCK_K):
            velocity = tl.dot(tl.load(h_ptrs), tl.load(w_ptrs), velocity, input_precision=OPTIONS.PRECISION)
            h_ptrs += BLOCK_K
            w_ptrs += BLOCK_K * RP
        x += euler.step * (tl.sum(velocity, axis=0) + tl.load(net.head_bias + offs_r)[None, :])
        if CONSTANTS.LAST:
            x = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    if CONSTANTS.MOVE or CONSTANTS.SEEDED:
        new_ptrs = new_ptr + (offs_m.to(tl.int64)[:, None] * shape.action_dim + offs_r[None, :])
        stored = offs_m < tl.where(part == 0, shape.rows, 0)
        tl.store(new_ptrs, x, mask=stored[:, None] & in_a)
    if not CONSTANTS.LAST:
        low = x.to(net.action.dtype.element_ty)
        states = shape.rows // shape.particles
        share_rows = (member * states + safe_m // shape.particles)[:, None] * HP
        out_rows = (member * shape.rows + offs_m)[:, None] * HP
        w_ptr = net.action + member * (RP * HP)
        for first in range(part * euler.columns, (part + 1) * euler.columns, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            y = tl.load(net.share + share_rows + offs_n[None, :])
            if CONSTANTS.TIME:
                y += euler.time * tl.load(net.time + offs_n)[None, :]
            w = tl.load(w_ptr + (offs_r[:, None] * HP + offs_n[None, :]))
            y = tl.dot(low, w, y, input_precision=OPTIONS.PRECISION)
            if CONSTANTS.ACTIVATE:
                y = activation.apply(y)
            tl.store(out_ptr + out_rows + offs_n[None, :], y.to(out_ptr.dtype.element_ty), mask=in_rows)


def euler_step(
    net: Net,
    shape: Shape,
    options: Options,
    activation_name: str,
    *,
    x: Tensor,
    new: Tensor,
    h: Tensor | None,
    out: Tensor | None,
    time: float | None,
    step: float = 0.0,
) -> None:
    """Particles x [R, A] of any strides, or the seed [1] they are drawn from, to ``new`` [R, A] and the next layer.

    Without ``h`` [R, HP] they stay where they are; without ``out`` [E, R, HP] this is the last step. ``time`` is None
    for a critic's first layer. Without LayerNorm a velocity's ``out`` is the layer's activation.
    """
    if shape.rows == 0:
        return
    seeded = x.ndim == 1
    tile = launch.euler_tile(shape.rows, options.HP, options.RP, net.action.dtype)
    parts = 1 if out is None else options.HP // tile.columns
    constants = EulerConstants(
        SEEDED=seeded,
        MOVE=h is not None,
        LAST=out is None,
        TIME=time is not None,
        ACTIVATE=time is not None and not options.LAYER_NORM,
        RP=options.RP,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT=max(min(tile.num_warps, tile.block_k // 16), 1),
    )
    strides = (0, 0) if seeded else (x.stride(0), x.stride(1))
    numbers = Euler(time or 0.0, step, *strides, options.HP, tile.columns)
    with launch.on_device(x):
        euler_kernel[(triton.cdiv(shape.rows, tile.block_m), parts, shape.members)](
            net,
            x,
            new,
            new if h is None else h,
            new if out is None else out,
            shape,
            numbers,
            activation(activation_name),
            options,
            constants,
            **launch.options(tile.num_warps, 2, options.PDL),
        )
