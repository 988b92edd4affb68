"""Packing of perceptrons' weights in one launch: programs copy tiles that a table on the device lists.

    packed[row, col] = parameter[row, col] inside the parameter, 0 in the padding

A row of the table is one tile of at most ``packing.TILE`` consecutive packed entries. Parameters are separate tensors:
the table holds their addresses, and is cached by everything it is computed from, so it cannot be out of date.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .packing import TILE, PackedMLP, Stack, pairs

COLUMNS = tl.constexpr(10)  # of the table, in the order in which the kernel reads them
SOURCES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def packing_kernel(
    table_ptr: tl.tensor,  # [tiles, COLUMNS] int64
    matrices_ptr: tl.tensor,  # the first packed matrix; offsets are relative to it
    vectors_ptr: tl.tensor,  # the first packed float32 vectors
    SOURCE: tl.constexpr,  # dtype of the parameters
    BLOCK: tl.constexpr,
) -> None:
    """Copy and convert tile ``program_id(0)``."""
    row_ptr = table_ptr + tl.program_id(0) * COLUMNS
    source_ptr = tl.load(row_ptr).to(tl.pointer_type(SOURCE))  # the parameter's entry at the tile's first row
    stride_row = tl.load(row_ptr + 1).to(tl.int32)
    stride_column = tl.load(row_ptr + 2).to(tl.int32)
    rows = tl.load(row_ptr + 3).to(tl.int32)  # of the parameter from there on
    columns = tl.load(row_ptr + 4).to(tl.int32)  # of the parameter
    bits = tl.load(row_ptr + 5).to(tl.int32)  # log2 of the padded columns
    position = tl.load(row_ptr + 6).to(tl.int32)  # of the tile's first entry within its row
    target = tl.load(row_ptr + 7)  # where the tile begins among the packed entries
    count = tl.load(row_ptr + 8).to(tl.int32)
    is_vector = tl.load(row_ptr + 9)
    offs = tl.arange(0, BLOCK)
    place = position + offs
    row = place >> bits  # [BLOCK]
    column = place & ((1 << bits) - 1)
    in_tile = offs < count
    is_real = in_tile & (row < rows) & (column < columns)
    values = tl.load(source_ptr + (row * stride_row + column * stride_column), mask=is_real, other=0.0).to(tl.float32)
    if is_vector != 0:
        tl.store(vectors_ptr + target + offs, values, mask=in_tile)
    else:
        tl.store(matrices_ptr + target + offs, values.to(matrices_ptr.dtype.element_ty), mask=in_tile)


def check_span(source: Tensor) -> None:
    """Raise ``ValueError`` if a parameter does not lie within the kernel's 32-bit offsets."""
    if sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True)) >= 2**31:
        raise ValueError(
            f"a parameter has strides {source.stride()}, so that it spans 2**31 elements or more: make it contiguous"
        )


def _tiles(stack: Stack, packed: PackedMLP, matrices: Tensor, vectors: Tensor) -> list[list[int]]:
    """The table's rows of one stack; targets are relative to the two tensors."""
    tiles = []
    for target, source in pairs(stack, packed):
        base = vectors if target.ndim == 1 else matrices
        rows, source = torch.atleast_2d(target), None if source is None else torch.atleast_2d(source)
        offset, size, width = (target.data_ptr() - base.data_ptr()) // target.itemsize, target.numel(), rows.shape[1]
        if source is not None:
            check_span(source)
        for start in range(0, size, TILE):
            row = start // width
            bits = width.bit_length() - 1  # widths are powers of two
            tile = [0, 0, 0, 0, 0, bits, start % width, offset + start, min(TILE, size - start), int(base is vectors)]
            if source is not None and row < source.shape[0]:
                address = source.data_ptr() + row * source.stride(0) * source.itemsize
                tile[:5] = [address, *source.stride(), source.shape[0] - row, source.shape[1]]
            tiles.append(tile)
    return tiles


def write(stacks: Sequence[Stack], packed: Sequence[PackedMLP]) -> None:
    """Pack stacks of one dtype, float32 or bfloat16, into ``packed``, of one dtype and device, in one launch."""
    matrices, vectors = packed[0].state, packed[0].vectors
    parameters = [parameter for stack in stacks for parameter in stack.parameters]
    targets = [tensor for mlp in packed for tensor in (mlp.state, mlp.action, mlp.hidden, mlp.head)]
    float32_targets = [tensor for mlp in packed for tensor in (mlp.time, mlp.vectors, mlp.head_bias)]
    for tensor in targets + float32_targets:
        if not tensor.is_contiguous():
            raise ValueError(f"out has strides {tensor.stride()}, expected a contiguous tensor")
    source = parameters[0].dtype
    key = (
        "packing",
        matrices.dtype,
        source,
        tuple(stack.layout for stack in stacks),
        tuple((parameter.data_ptr(), parameter.stride()) for parameter in parameters),
        # Tensors without entries have no address.
        tuple(tensor.data_ptr() - matrices.data_ptr() for tensor in targets if tensor.numel() > 0),
        tuple(tensor.data_ptr() - vectors.data_ptr() for tensor in float32_targets),
    )
    table = tables.device_table(
        key,
        matrices.device,
        lambda: [
            tile for stack, mlp in zip(stacks, packed, strict=True) for tile in _tiles(stack, mlp, matrices, vectors)
        ],
    )
    with launch.on_device(matrices):
        packing_kernel[(table.shape[0],)](table, matrices, vectors, SOURCES[source], TILE, num_warps=4)
