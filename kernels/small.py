"""Products of few rows, as of acting: a layer over many programs, each of which finishes the layer before it anew.

    "plain"     h -> act(h w + b)           of a network without LayerNorm whose z nobody needs
    "forward"   z -> act(LN(z)) w + b       the next layer's z
    "head"      z -> q and dz w^T           from the last layer back, dz as of ``rows``
    "backward"  z, dh -> dz w^T             the gradient with respect to the activation of the layer before

A program asks for its tile of the weights before it waits for the rows: with few rows the time is that of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import Activation, activation
from .arguments import Net, Options, Shape
from .product import release, wait
from .rows import affine, affine_backward, scale_and_shift, width_of

MODES = ("plain", "forward", "head", "backward")


@triton.jit
def small_kernel(
    net: Net,
    w_ptr: tl.tensor,  # [E, D - 1, HP, HP] from the matrix on that is multiplied by
    z_ptr: tl.tensor,  # [E, rows, HP] linear part of the layer that is finished; "plain": its activation
    grad_ptr: tl.tensor,  # [E, rows, HP] with respect to its activation; "backward"
    out_ptr: tl.tensor,  # [E, rows, HP], written
    q_ptr: tl.tensor,  # [E, rows] float32, written by "head"
    shape: Shape,
    activation: Activation,
    OPTIONS: tl.constexpr,
    MODE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of the sum, one a warp
) -> None:
    """Tile ``program_id(0)`` of columns of block ``program_id(1)`` of rows of member ``program_id(2)``."""
    HP: tl.constexpr = OPTIONS.HP
    PART: tl.constexpr = HP // SPLIT
    BACK: tl.constexpr = MODE == "head" or MODE == "backward"
    member = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, HP)
    offs_k = tl.arange(0, SPLIT)[:, None, None] * PART + tl.arange(0, PART)[None, :, None]
    in_rows = offs_m < shape.rows
    # Rows past the last read it again; they are not stored.
    safe_m = tl.minimum(offs_m, shape.rows - 1)
    first_row = member * shape.rows
    w_ptr += member * (shape.depth - 1) * (HP * HP)
    if BACK:
        w = tl.load(w_ptr + offs_k + offs_n[None, None, :] * HP)
    else:
        w = tl.load(w_ptr + offs_k * HP + offs_n[None, None, :])  # [SPLIT, PART, BLOCK_N]
    vector_ptr = net.vectors + member * shape.depth * (3 * HP)
    width = width_of(shape, OPTIONS)
    if MODE != "plain":
        scale, shift = scale_and_shift(vector_ptr, HP, OPTIONS.LAYER_NORM)
    wait(OPTIONS.PDL)
    offs = (first_row + safe_m)[:, None] * HP + offs_h[None, :]
    a = tl.load(z_ptr + offs).to(tl.float32)  # [BLOCK_M, HP]
    if MODE != "plain":
        y, normal, rstd = affine(a, scale, shift, width, OPTIONS.LAYER_NORM)
        if BACK:
            if MODE == "head":
                head = tl.load(net.head + member * HP + offs_h).to(tl.float32)[None, :]
                if tl.program_id(0) == 0:
                    q = tl.sum(activation.apply(y) * head, axis=1) + tl.load(net.head_bias + member)
                    tl.store(q_ptr + first_row + offs_m, q, mask=in_rows)
                grad = tl.broadcast_to(head, [BLOCK_M, HP])
            else:
                grad = tl.load(grad_ptr + offs).to(tl.float32)
            a = affine_backward(grad * activation.slope(y), normal, rstd, scale, width, HP, OPTIONS.LAYER_NORM)
        else:
            a = activation.apply(y)
    a = tl.permute(tl.reshape(a.to(w.dtype), [BLOCK_M, SPLIT, PART]), [1, 0, 2])
    total = tl.sum(tl.dot(a, w, input_precision=OPTIONS.PRECISION), axis=0)  # [BLOCK_M, BLOCK_N]
    release(OPTIONS.PDL)
    if not BACK:
        total += tl.load(vector_ptr + 3 * HP + offs_n)[None, :]
    if MODE == "plain":
        total = activation.apply(total)
    out_ptrs = out_ptr + (first_row + offs_m)[:, None] * HP + offs_n[None, :]
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=in_rows[:, None])


def small(
    mode: str,
    net: Net,
    w: Tensor,
    shape: Shape,
    options: Options,
    activation_name: str,
    *,
    z: Tensor,
    out: Tensor,
    grad: Tensor | None = None,
    q: Tensor | None = None,
) -> None:
    """One of ``MODES`` on all rows and members of the layer of ``net.vectors``, and packed weights w [E, HP, HP]."""
    if shape.rows == 0:
        return
    tile = launch.small_tile(options.HP)
    grid = (options.HP // tile.block_n, triton.cdiv(shape.rows, tile.block_m), shape.members)
    with launch.on_device(z):
        small_kernel[grid](
            net,
            w,
            z,
            z if grad is None else grad,
            out,
            z if q is None else q,
            shape,
            activation(activation_name),
            options,
            mode,
            tile.block_m,
            tile.block_n,
            min(tile.num_warps, options.HP // 16),
            **launch.options(tile.num_warps, 1, options.PDL),
        )
