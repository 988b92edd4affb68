"""Matrix products of a layer over the whole GPU: out = act(a w + b) or a w^T, for every member of a stack.

A program computes one tile of one member's result. A block of rows has its column tiles side by side in the grid, so
that its rows are read once into the near half of the L2 cache.

With programmatic launches a kernel starts while the one before it runs. Each waits for that one before it reads what
it wrote, and lets the next one start only after its own wait: so before its wait a kernel may read what the kernel
before the last wrote.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .activations import Activation, activation

# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def wait(PDL: tl.constexpr) -> None:
    """Until the kernel before this one has ended, and its writes are seen."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(PDL: tl.constexpr) -> None:
    """Let the kernel after this one start; it waits by itself."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


# --- kernel ----------------------------------------------------------------------------------------------------------


class Strides(NamedTuple):
    """Entries from member to member, 0 for what they share: multiples of 16, which the compiler is told."""

    a: int
    w: int
    bias: int
    out: int


class Constants(NamedTuple):
    """Constants of a product."""

    AP: int  # entries from row to row of a
    WP: int  # of w, as it is stored
    OP: int  # of the result
    TRANSPOSED: bool  # w is stored [columns of the result, K]
    BIAS: bool
    ACTIVATE: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    PRECISION: str
    PDL: bool


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    a_ptr: tl.tensor,  # [E, rows, AP] of which K columns are taken
    w_ptr: tl.tensor,  # [E, K, WP], or TRANSPOSED [E, columns, WP]
    bias_ptr: tl.tensor,  # [E, columns] float32; unused without BIAS
    out_ptr: tl.tensor,  # [E, rows, OP], written
    rows: tl.tensor,
    K: tl.tensor,  # a multiple of BLOCK_K
    strides: Strides,
    activation: Activation,
    CONSTANTS: tl.constexpr,
) -> None:
    """Tile ``program_id(0)`` of columns of block ``program_id(1)`` of rows of member ``program_id(2)``."""
    BLOCK_M: tl.constexpr = CONSTANTS.BLOCK_M
    BLOCK_N: tl.constexpr = CONSTANTS.BLOCK_N
    BLOCK_K: tl.constexpr = CONSTANTS.BLOCK_K
    member = tl.program_id(2).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the last read it again; they are not stored.
    safe_m = tl.minimum(offs_m, rows - 1).to(tl.int64)
    a_ptrs = a_ptr + member * strides.a + (safe_m[:, None] * CONSTANTS.AP + offs_k[None, :])
    if CONSTANTS.TRANSPOSED:
        w_ptrs = w_ptr + member * strides.w + (offs_k[:, None] + offs_n[None, :] * CONSTANTS.WP)
    else:
        w_ptrs = w_ptr + member * strides.w + (offs_k[:, None] * CONSTANTS.WP + offs_n[None, :])
    STEP: tl.constexpr = BLOCK_K if CONSTANTS.TRANSPOSED else BLOCK_K * CONSTANTS.WP
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    wait(CONSTANTS.PDL)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(a_ptrs), tl.load(w_ptrs), total, input_precision=CONSTANTS.PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += STEP
    release(CONSTANTS.PDL)
    if CONSTANTS.BIAS:
        total += tl.load(bias_ptr + member * strides.bias + offs_n)[None, :]
    if CONSTANTS.ACTIVATE:
        total = activation.apply(total)
    out_ptrs = out_ptr + member * strides.out + (offs_m.to(tl.int64)[:, None] * CONSTANTS.OP + offs_n[None, :])
    tl.store(out_ptrs, total.to(out_ptr.dtype.element_ty), mask=(offs_m < rows)[:, None])


# --- launcher --------------------------------------------------------------------------------------------------------


def product(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    activation_name: str | None = None,
    precision: str,
    pdl: bool = False,
    tile: launch.ProductTile | None = None,
) -> Tensor:
    """Write out [E, R, columns] = act(a w + bias): a [E or 1, R, K], w [E, K, columns], bias [E, columns] float32.

    ``activation_name`` None leaves the sum as it is; ``transposed`` takes w as [E, columns, K]. K and columns are
    multiples of 16. Rows may be any distance apart, columns are contiguous. Sums are float32.
    """
    members, rows, columns = out.shape
    depth = a.shape[2]
    if rows == 0:
        return out
    tile = tile or launch.product_tile(rows, columns, members, a.dtype, launch.amd())
    # The largest powers of two that divide them.
    tile = tile._replace(block_n=min(tile.block_n, columns & -columns), block_k=min(tile.block_k, depth & -depth))
    grid = (columns // tile.block_n, triton.cdiv(rows, tile.block_m), members)
    strides = Strides(
        a.stride(0) if a.shape[0] > 1 else 0,
        w.stride(0) if w.shape[0] > 1 else 0,
        0 if bias is None or bias.shape[0] == 1 else bias.stride(0),
        out.stride(0) if members > 1 else 0,
    )
    constants = Constants(
        a.stride(1),
        w.stride(1),
        out.stride(1),
        transposed,
        bias is not None,
        activation_name is not None,
        *tile[:3],
        precision,
        pdl,
    )
    with launch.on_device(out):
        product_kernel[grid](
            a,
            w,
            out if bias is None else bias,
            out,
            rows,
            depth,
            strides,
            activation(activation_name or "relu"),
            constants,
            **launch.options(tile.num_warps, tile.num_stages, pdl),
        )
    return out
