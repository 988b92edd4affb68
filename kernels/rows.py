"""Whole rows of a hidden layer, between two products: LayerNorm, activation, first layer and head, and back.

    "first"     x -> z_1 = share + x W_a, h_1 = act(LN(z_1))      "forward"  z -> h
    "head"      z -> q = w . h + b and dq / dz of the last layer   "value"    z -> q
    "backward"  z, dh -> dz, and if asked a block's share of the sums over rows: of dz, dy LN(z) and dy

Without LayerNorm LN is the identity. One warp holds a few rows, so that sums along them need no other warp.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import Activation, activation
from .arguments import Net, Options, Shape, tensor_of
from .formulas import normalise, normalise_backward
from .product import release, wait

MODES = ("first", "forward", "head", "value", "backward")

# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def width_of(shape: Shape, OPTIONS: tl.constexpr) -> tl.tensor:
    """Units of the layer; where that is known to be all columns, a constant, for which masks by it fall away."""
    width = tensor_of(shape.width)
    if OPTIONS.WHOLE:
        width = tl.full([], OPTIONS.HP, tl.int32)
    return width


@triton.jit
def scale_and_shift(vector_ptr: tl.tensor, HP: tl.constexpr, LAYER_NORM: tl.constexpr) -> tl.tensor:
    """LayerNorm's scale and shift [1, HP]; ``vector_ptr`` to the layer's [3, HP]: bias, scale, shift."""
    vector_ptrs = vector_ptr + tl.arange(0, HP)
    scale = tl.zeros([1, HP], tl.float32)
    shift = tl.zeros([1, HP], tl.float32)
    if LAYER_NORM:
        scale = tl.load(vector_ptrs + HP)[None, :]
        shift = tl.load(vector_ptrs + 2 * HP)[None, :]
    return scale, shift


@triton.jit
def affine(z: tl.tensor, scale: tl.tensor, shift: tl.tensor, width: tl.tensor, LAYER_NORM: tl.constexpr) -> tl.tensor:
    """What the activation is applied to, y [ROWS, HP], of float32 z; normalised rows, and 1 / std [ROWS, 1]."""
    y = z
    normal = z
    rstd = tl.zeros([z.shape[0], 1], tl.float32)
    if LAYER_NORM:
        normal, rstd = normalise(z, tl.arange(0, z.shape[1]) < width, width)
        y = normal * scale + shift
    return y, normal, rstd


@triton.jit
def affine_backward(
    grad: tl.tensor,  # [ROWS, HP] with respect to y
    normal: tl.tensor,
    rstd: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
) -> tl.tensor:
    """Gradient with respect to z [ROWS, HP], zero in the padding; the rest is what ``affine`` took and returned."""
    in_width = tl.arange(0, HP) < width
    if LAYER_NORM:
        return normalise_backward(grad * scale, normal, rstd, in_width, width)
    return tl.where(in_width[None, :], grad, 0.0)


@triton.jit
def store_sums(
    dz: tl.tensor, dy: tl.tensor, normal: tl.tensor, sum_ptr: tl.tensor, HP: tl.constexpr, LN: tl.constexpr
) -> None:
    """These rows' share of the gradients of bias, scale and shift, [3, HP]."""
    sum_ptrs = sum_ptr + tl.arange(0, HP)
    tl.store(sum_ptrs, tl.sum(dz, axis=0))
    if LN:
        tl.store(sum_ptrs + HP, tl.sum(dy * normal, axis=0))
        tl.store(sum_ptrs + 2 * HP, tl.sum(dy, axis=0))


# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def rows_kernel(
    net: Net,
    x_ptr: tl.tensor,  # [rows, A] float32; "first"
    z_ptr: tl.tensor,  # [E, rows, HP] the layer's linear part; written by "first"
    grad_ptr: tl.tensor,  # [E, rows, HP] with respect to the layer's activation; "backward"
    out_ptr: tl.tensor,  # [E, rows, HP] h or dz, written; may be ``grad_ptr``
    q_ptr: tl.tensor,  # [E, rows] float32, written by "head" and "value"
    sums_ptr: tl.tensor,  # [blocks, E, D, 3, HP] float32, from the layer on, written by "backward" if SUMS
    shape: Shape,
    activation: Activation,
    OPTIONS: tl.constexpr,
    MODE: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Rows from ``program_id(0) * ROWS`` on of member ``program_id(1)``."""
    HP: tl.constexpr = OPTIONS.HP
    LAYER_NORM: tl.constexpr = OPTIONS.LAYER_NORM
    block = tl.program_id(0)
    member = tl.program_id(1).to(tl.int64)
    offs_m = block * ROWS + tl.arange(0, ROWS)
    offs_h = tl.arange(0, HP)
    in_rows = offs_m < shape.rows
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, shape.rows - 1).to(tl.int64)
    first_row = member * shape.rows
    offs = (first_row + safe_m)[:, None] * HP + offs_h[None, :]  # [ROWS, HP]
    width = width_of(shape, OPTIONS)
    vector_ptr = net.vectors + member * shape.depth * (3 * HP)
    # Weights are older than the kernel before this one, and need not wait for it.
    if MODE != "first":
        scale, shift = scale_and_shift(vector_ptr, HP, LAYER_NORM)
    if MODE == "head" or MODE == "value":
        head = tl.load(net.head + member * HP + offs_h).to(tl.float32)[None, :]
    if MODE == "first":
        states = shape.rows // shape.particles
        share_rows = member * states + safe_m // shape.particles
        w_ptr = net.action + member * (OPTIONS.RP * HP) + offs_h
        dtype: tl.constexpr = net.action.dtype.element_ty
        wait(OPTIONS.PDL)
        z = tl.load(net.share + share_rows[:, None] * HP + offs_h[None, :])
        for column in tl.range(0, shape.action_dim, loop_unroll_factor=4):
            x = tl.load(x_ptr + safe_m * shape.action_dim + column).to(dtype).to(tl.float32)
            z += x[:, None] * tl.load(w_ptr + column * HP).to(tl.float32)[None, :]
        tl.store(z_ptr + offs, z.to(z_ptr.dtype.element_ty), mask=in_rows[:, None])
        scale, shift = scale_and_shift(vector_ptr, HP, LAYER_NORM)
    else:
        wait(OPTIONS.PDL)
        z = tl.load(z_ptr + offs).to(tl.float32)
    release(OPTIONS.PDL)
    y, normal, rstd = affine(z, scale, shift, width, LAYER_NORM)
    if MODE == "first" or MODE == "forward":
        result = activation.apply(y)
    else:
        if MODE == "backward":
            grad = tl.load(grad_ptr + offs).to(tl.float32)
        else:
            q = tl.sum(activation.apply(y) * head, axis=1) + tl.load(net.head_bias + member)
            tl.store(q_ptr + first_row + offs_m, q, mask=in_rows)
            grad = tl.broadcast_to(head, [ROWS, HP])
        if MODE != "value":
            dy = grad * activation.slope(y)
            if SUMS:
                dy = tl.where(in_rows[:, None], dy, 0.0)
            result = affine_backward(dy, normal, rstd, scale, width, HP, LAYER_NORM)
            if SUMS:
                place = (block.to(tl.int64) * tl.num_programs(1) + member) * shape.depth
                store_sums(result, dy, normal, sums_ptr + place * (3 * HP), HP, LAYER_NORM)
    if MODE != "value":
        tl.store(out_ptr + offs, result.to(out_ptr.dtype.element_ty), mask=in_rows[:, None])


# --- launcher --------------------------------------------------------------------------------------------------------


def rows(
    mode: str,
    net: Net,
    shape: Shape,
    options: Options,
    activation_name: str,
    *,
    z: Tensor,
    x: Tensor | None = None,
    grad: Tensor | None = None,
    out: Tensor | None = None,
    q: Tensor | None = None,
    sums: Tensor | None = None,
    block: int | None = None,
) -> None:
    """One of ``MODES`` for all rows and members of a layer, that of ``net.vectors``; what is written the kernel says.

    ``block`` rows a program; with ``sums`` [blocks, E, D, 3, HP], from the layer on, their share of the vectors'
    gradients is kept.
    """
    if shape.rows == 0:
        return
    # Going backward two row tiles are held, whose vectors are worth reading for more rows where there are many.
    many = mode != "forward" and shape.rows >= launch.MANY_ROWS
    block = block or launch.rows_block(options.HP, many)
    with launch.on_device(z):
        rows_kernel[(triton.cdiv(shape.rows, block), shape.members)](
            net,
            z if x is None else x,
            z,
            z if grad is None else grad,
            z if out is None else out,
            z if q is None else q,
            z if sums is None else sums,
            shape,
            activation(activation_name),
            options,
            mode,
            sums is not None,
            block,
            **launch.options(1, 1, options.PDL),
        )
