"""Weight gradients of a whole stack of perceptrons in one launch, and with them Adam and the Polyak average.

    g = h^T dz over the batch, or the sum of the blocks' shares for biases and LayerNorm's vectors
    target <- target + tau (p - target)        with the parameter from before its step, as in the public release
    m <- m + (1 - b1) (g - m),  v <- b2 v + (1 - b2) g^2
    p <- p - lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + eps)

A program computes one tile of one gradient and takes the step for it while it is in registers. A table on the device
lists the tiles with the addresses of parameter, moments, target and step counter, which are those of the state of a
``torch.optim.Adam``. The step counters are increased by the launch before this one: here all programs read them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tables
from .arguments import tensor_of
from .constants import ADAM_EPS, BETA1, BETA2, LOG2_BETA1, LOG2_BETA2
from .formulas import adam
from .packing import MIN_DOT, Layout
from .product import release, wait

COLUMNS = tl.constexpr(14)  # of the table, in the order in which the kernel reads them


@triton.jit
def reduce_losses(
    losses_ptr: tl.tensor,  # [blocks, members, 4]
    metrics_ptr: tl.tensor,  # [3], written
    blocks: tl.tensor,
    members: tl.tensor,
    batch: tl.tensor,
    outputs: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Loss, mean output of member 0 and mean target of the batch from the blocks' sums."""
    loss = tl.zeros([BLOCK], tl.float32)
    output = tl.zeros([BLOCK], tl.float32)
    target = tl.zeros([BLOCK], tl.float32)
    for first in range(0, blocks * members, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        in_range = offs < blocks * members
        is_first = in_range & (offs % members == 0)
        loss += tl.load(losses_ptr + offs * 4, mask=in_range, other=0.0)
        output += tl.load(losses_ptr + offs * 4 + 1, mask=is_first, other=0.0)
        target += tl.load(losses_ptr + offs * 4 + 2, mask=is_first, other=0.0)
    count = (tensor_of(batch) * outputs).to(tl.float32)
    tl.store(metrics_ptr, tl.div_rn(tl.sum(loss, axis=0), count))
    tl.store(metrics_ptr + 1, tl.div_rn(tl.sum(output, axis=0), count))
    tl.store(metrics_ptr + 2, tl.div_rn(tl.sum(target, axis=0), count))


class Buffers(NamedTuple):
    """What a launch reads and writes besides what its table lists."""

    left: Any  # the layers' inputs, in the dtype of the packed weights
    right: Any  # the gradients dz, same dtype
    sums: Any  # the blocks' shares of the vectors' gradients, float32
    gradients: Any  # all gradients, float32, written; None with Adam
    losses: Any  # [blocks, members, 4] float32, sums of loss, output and target of a block; None without Adam
    metrics: Any  # [3] float32, written by the last program: loss, mean output of member 0, mean target; likewise


class Counts(NamedTuple):
    """Sizes of a launch."""

    tiles: int
    padded_rows: int  # of left and right, a multiple of BLOCK_K
    blocks: int
    members: int
    batch: int
    outputs: int  # of one member a row


class Rates(NamedTuple):
    """Of Adam and of the Polyak average."""

    learning_rate: float
    tau: float


@triton.jit
def weight_gradient_kernel(
    table_ptr: tl.tensor,  # [tiles, COLUMNS] int64
    buffers: Buffers,
    counts: Counts,
    rates: Rates,
    ADAM: tl.constexpr,
    POLYAK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Tile ``program_id(0)``; program ``counts.tiles``, if there is one, sums the losses."""
    tile = tl.program_id(0)
    wait(PDL)
    release(PDL)
    if tile == counts.tiles:
        if ADAM:
            reduce_losses(
                buffers.losses, buffers.metrics, counts.blocks, counts.members, counts.batch, counts.outputs, BLOCK_M
            )
        return
    row_ptr = table_ptr + tile * COLUMNS
    is_vector = tl.load(row_ptr)
    rows = tl.load(row_ptr + 1).to(tl.int32)  # of the parameter from the tile's first one on; 1 for a vector
    columns = tl.load(row_ptr + 2).to(tl.int32)
    stride = tl.load(row_ptr + 3).to(tl.int32)  # between rows of the parameter
    place = tl.load(row_ptr + 4)  # of the tile's first gradient in the buffer
    left = tl.load(row_ptr + 5)  # of the tile's first column of h
    stride_left = tl.load(row_ptr + 6).to(tl.int32)
    right = tl.load(row_ptr + 7)  # of the tile's first column of dz, or the vector's first share
    stride_right = tl.load(row_ptr + 8)  # between rows of the batch, or between the blocks' shares
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    if is_vector != 0:
        share = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, counts.blocks, BLOCK_M):
            offs_b = first + offs_m
            share_ptrs = buffers.sums + right + offs_b.to(tl.int64)[:, None] * stride_right + offs_n[None, :]
            share += tl.load(share_ptrs, mask=(offs_b < counts.blocks)[:, None], other=0.0)
        grad = tl.broadcast_to(tl.sum(share, axis=0)[None, :], [BLOCK_M, BLOCK_N])
    else:
        # Everything that is read lies at multiples of 16 entries, and past a layer's width only fills unused columns.
        step_left = tl.multiple_of(stride_left, 16)
        step_right = tl.multiple_of(stride_right.to(tl.int32), 16)
        offs_k = tl.arange(0, BLOCK_K)
        left_ptrs = buffers.left + tl.multiple_of(left, 16) + (offs_k[:, None] * step_left + offs_m[None, :])
        right_ptrs = buffers.right + tl.multiple_of(right, 16) + (offs_k[:, None] * step_right + offs_n[None, :])
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for _ in range(0, counts.padded_rows, BLOCK_K):
            h = tl.load(left_ptrs)  # [BLOCK_K, BLOCK_M]
            grad = tl.dot(tl.trans(h), tl.load(right_ptrs), grad, input_precision=PRECISION)
            left_ptrs += BLOCK_K * step_left
            right_ptrs += BLOCK_K * step_right
    in_tile = (offs_m < rows)[:, None] & (offs_n < columns)[None, :]
    offs = offs_m[:, None] * stride + offs_n[None, :]
    if ADAM:
        p_ptrs = tl.load(row_ptr + 9).to(tl.pointer_type(tl.float32)) + place + offs
        m_ptrs = tl.load(row_ptr + 10).to(tl.pointer_type(tl.float32)) + place + offs
        v_ptrs = tl.load(row_ptr + 11).to(tl.pointer_type(tl.float32)) + place + offs
        step = tl.load(tl.load(row_ptr + 12).to(tl.pointer_type(tl.float32))).to(tl.float64)
        correction1 = (1.0 - tl.exp2(step * LOG2_BETA1)).to(tl.float32)
        correction2 = (1.0 - tl.exp2(step * LOG2_BETA2)).to(tl.float32)
        p = tl.load(p_ptrs, mask=in_tile, other=0.0)
        if POLYAK:
            target_ptrs = tl.load(row_ptr + 13).to(tl.pointer_type(tl.float32)) + place + offs
            target = tl.load(target_ptrs, mask=in_tile, other=0.0)
            tl.store(target_ptrs, target + rates.tau * (p - target), mask=in_tile)
        m = tl.load(m_ptrs, mask=in_tile, other=0.0)
        v = tl.load(v_ptrs, mask=in_tile, other=0.0)
        m, v, move = adam(grad, m, v, correction2)
        tl.store(m_ptrs, m, mask=in_tile)
        tl.store(v_ptrs, v, mask=in_tile)
        tl.store(p_ptrs, p - rates.learning_rate / correction1 * move, mask=in_tile)
    else:
        tl.store(buffers.gradients + place + offs, grad, mask=in_tile)


# --- launchers -------------------------------------------------------------------------------------------------------


class Extents(NamedTuple):
    """Where what the backward pass leaves lies in three flat buffers: layers' inputs, gradients dz, blocks' shares."""

    layout: Layout
    padded_rows: int  # BP: rows of a batch padded to what is multiplied at a time
    block_rows: int  # whose share of a sum over rows is one

    @property
    def blocks(self) -> int:
        """Of rows."""
        return -(-self.padded_rows // self.block_rows)

    @property
    def input_width(self) -> int:
        """IP: state, action and time, each padded."""
        return self.layout.padded_state + self.layout.padded_action + (MIN_DOT if self.layout.time else 0)

    @property
    def output_width(self) -> int:
        """GO."""
        return max(self.layout.padded_output, MIN_DOT)

    @property
    def hidden_size(self) -> int:
        """Entries of all hidden layers of all members."""
        return self.layout.members * len(self.layout.widths) * self.padded_rows * self.layout.padded_width

    @property
    def hidden_place(self) -> int:
        """Of h in the buffer of inputs, after x [BP, IP], which all members share."""
        return self.padded_rows * self.input_width

    @property
    def left_size(self) -> int:
        """Entries of the buffer of x [BP, IP] and h [D, E, BP, HP], and what a tile may read past its end."""
        return self.hidden_place + self.hidden_size + launch.GRADIENT_TILE

    @property
    def right_size(self) -> int:
        """Entries of the buffer of dz [D, E, BP, HP] and dout [E, BP, GO], likewise."""
        return self.hidden_size + self.layout.members * self.padded_rows * self.output_width + launch.GRADIENT_TILE

    @property
    def vectors_size(self) -> int:
        """Entries of the shares [blocks, E, D, 3, HP]; those of the head's bias [blocks, E, GO] follow."""
        return self.blocks * self.layout.members * len(self.layout.widths) * 3 * self.layout.padded_width

    @property
    def sums_size(self) -> int:
        """Entries of the buffer of shares, likewise."""
        return self.vectors_size + self.blocks * self.layout.members * self.output_width + launch.GRADIENT_TILE


class _Region(NamedTuple):
    """A part of a parameter whose gradient is one product, or one sum of shares."""

    parameter: int  # its index in the order of ``Stack.parameters``
    is_vector: bool
    rows: int
    columns: int
    place: int  # of its first entry in the parameter
    left: int
    stride_left: int
    right: int
    stride_right: int


def _regions(extents: Extents) -> list[_Region]:
    layout, bp, hp = extents.layout, extents.padded_rows, extents.layout.padded_width
    depth, states, actions = len(layout.widths), layout.observation_dim, layout.action_dim
    ip, go, regions = extents.input_width, extents.output_width, []
    sizes = (layout.inputs, *layout.widths, layout.output_dim)
    for e in range(layout.members):
        inputs = [(0, states, 0), (states, actions, layout.padded_state)]
        if layout.time:
            inputs.append((states + actions, 1, layout.padded_state + layout.padded_action))
        for i in range(depth + 1):
            right, stride_right = (i * layout.members + e) * bp * hp, hp
            if i == depth:
                right, stride_right = extents.hidden_size + e * bp * go, go
            first = e * sizes[i] * sizes[i + 1]
            if i == 0:
                parts = [(first + row * sizes[1], rows, column, ip) for row, rows, column in inputs]
            else:
                parts = [(first, sizes[i], extents.hidden_place + ((i - 1) * layout.members + e) * bp * hp, hp)]
            regions += [
                _Region(i, False, rows, sizes[i + 1], place, left, stride_left, right, stride_right)
                for place, rows, left, stride_left in parts
                if rows > 0
            ]
        kinds = 3 if layout.layer_norm else 1
        for kind in range(kinds):
            # Biases come after the weights, head's included, then the scales, then the shifts.
            first = depth + 1 if kind == 0 else 2 * (depth + 1) + (kind - 1) * depth
            regions += [
                _Region(
                    first + i,
                    True,
                    1,
                    width,
                    e * width,
                    0,
                    0,
                    ((e * depth + i) * 3 + kind) * hp,
                    layout.members * depth * 3 * hp,
                )
                for i, width in enumerate(layout.widths)
            ]
        place, right = e * layout.output_dim, extents.vectors_size + e * go
        regions.append(_Region(2 * depth + 1, True, 1, layout.output_dim, place, 0, 0, right, layout.members * go))
    return regions


def _tiles(extents: Extents, block_m: int, block_n: int, columns: Sequence[Sequence[int]]) -> list[list[int]]:
    """The table's rows. ``columns``: per parameter, an offset of its entries and the addresses that end its rows."""
    return [
        [
            int(region.is_vector),
            region.rows - row,
            region.columns - column,
            region.columns,
            columns[region.parameter][0] + region.place + row * region.columns + column,
            region.left + row,
            region.stride_left,
            region.right + column,
            region.stride_right,
            *columns[region.parameter][1:],
        ]
        for region in _regions(extents)
        for row in range(0, region.rows, block_m)
        for column in range(0, region.columns, block_n)
    ]


def parameter_shapes(layout: Layout) -> list[tuple[int, ...]]:
    """Shapes of a stack's parameters in the order of ``Stack.parameters``."""
    e, sizes = layout.members, (layout.inputs, *layout.widths, layout.output_dim)
    normed = layout.widths if layout.layer_norm else ()
    return [
        *((e, a, b) for a, b in itertools.pairwise(sizes)),
        *((e, width) for width in sizes[1:]),
        *((e, width) for _ in range(2) for width in normed),
    ]


def _launch(
    table: Tensor,
    extents: Extents,
    buffers: Buffers,
    rates: Rates,
    batch: int,
    polyak: bool,
    precision: str | None,
    config: launch.GradientLaunch,
) -> None:
    left, layout, adam = buffers.left, extents.layout, buffers.gradients is None
    counts = Counts(len(table), extents.padded_rows, extents.blocks, layout.members, batch, layout.output_dim)
    pdl = launch.programmatic(left.device)
    with launch.on_device(left):
        # With Adam one program more, of the losses.
        weight_gradient_kernel[(len(table) + adam,)](
            table,
            buffers,
            counts,
            rates,
            ADAM=adam,
            POLYAK=polyak,
            PRECISION=precision or launch.precision(left.dtype),
            PDL=pdl,
            **launch.arguments(config),
            **({"launch_pdl": True} if pdl else {}),
        )


def weight_gradients(
    extents: Extents,
    left: Tensor,
    right: Tensor,
    sums: Tensor,
    precision: str | None = None,
    config: launch.GradientLaunch | None = None,
) -> Tensor:
    """Gradients of all parameters, one after another in the order of ``Stack.parameters``: float32, one launch."""
    config = config or launch.weight_gradient(left.dtype)
    sizes = [math.prod(shape) for shape in parameter_shapes(extents.layout)]
    gradients = torch.empty(sum(sizes), dtype=torch.float32, device=left.device)
    starts = [0, *itertools.accumulate(sizes)]
    table = tables.device_table(
        ("gradients", extents, config),
        left.device,
        lambda: _tiles(extents, config.block_m, config.block_n, [(start, 0, 0, 0, 0, 0) for start in starts]),
    )
    buffers = Buffers(left, right, sums, gradients, None, None)
    _launch(table, extents, buffers, Rates(0.0, 0.0), 1, False, precision, config)
    return gradients


class AdamState(NamedTuple):
    """Parameters in the order of ``Stack.parameters`` and the state of their ``torch.optim.Adam``."""

    parameters: tuple[Tensor, ...]
    exp_avgs: tuple[Tensor, ...]
    exp_avg_sqs: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]  # [] float32 each, on the parameters' device
    learning_rate: float


def adam_state(adam: torch.optim.Adam, parameters: Sequence[Tensor]) -> AdamState:
    """The optimiser's own tensors for these parameters, made as its first step would make them.

    Raises ``ValueError`` if the optimiser's settings are not those of the kernel.
    """
    group = next(group for group in adam.param_groups if any(p is parameters[0] for p in group["params"]))
    for name, expected in (
        ("betas", (BETA1.value, BETA2.value)),
        ("eps", ADAM_EPS.value),
        ("weight_decay", 0),
        ("amsgrad", False),
        ("maximize", False),
    ):
        if group[name] != expected:
            raise ValueError(f"the optimiser's {name} is {group[name]!r}, expected {expected!r}: the kernel's")
    for parameter in parameters:
        state = adam.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    exp_avgs, exp_avg_sqs, steps = (
        tuple(adam.state[parameter][key] for parameter in parameters) for key in ("exp_avg", "exp_avg_sq", "step")
    )
    return AdamState(tuple(parameters), exp_avgs, exp_avg_sqs, steps, float(group["lr"]))


def step_table(steps: Sequence[Tensor]) -> Tensor:
    """Addresses of the step counters, [parameters, 1] int64 on their device."""
    addresses = tuple(step.data_ptr() for step in steps)
    return tables.device_table(("steps", addresses), steps[0].device, lambda: [[address] for address in addresses])


def check_state(state: AdamState, targets: Sequence[Tensor], layout: Layout) -> None:
    """Raise ``ValueError`` naming a tensor that ``adam_step_`` cannot reach by its address."""
    device = state.parameters[0].device
    groups = {
        "a parameter": state.parameters,
        "a first moment": state.exp_avgs,
        "a second moment": state.exp_avg_sqs,
        "a target parameter": targets,
    }
    for name, tensors in groups.items():
        if name == "a target parameter" and not tensors:
            continue
        for tensor, shape in zip(tensors, parameter_shapes(layout), strict=True):
            launch.check_shape(name, tensor, shape, "the shape of its parameter")
            launch.check_dtype(name, tensor, (torch.float32,))
            launch.check_same_device(name, tensor, "the first parameter", device)
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}, expected a contiguous tensor")
    for step in state.steps:
        launch.check_shape("a step counter", step, (), "a scalar")
        launch.check_dtype("a step counter", step, (torch.float32,))
        launch.check_same_device("a step counter", step, "the first parameter", device)


def adam_step_(
    extents: Extents,
    left: Tensor,
    right: Tensor,
    sums: Tensor,
    losses: Tensor,
    state: AdamState,
    targets: Sequence[Tensor],
    tau: float,
    batch: int,
    precision: str | None = None,
    config: launch.GradientLaunch | None = None,
) -> Tensor:
    """Gradients, step of Adam and Polyak average in one launch; the step counters already count this step.

    ``targets`` are moved towards the parameters as they were before the step; empty for none. Returns loss, mean output
    of member 0 and mean target [3] from the blocks' sums [blocks, E, 4].
    """
    config = config or launch.weight_gradient(left.dtype)
    groups = [state.parameters, state.exp_avgs, state.exp_avg_sqs, state.steps, targets or state.parameters]
    addresses = tuple(tuple(tensor.data_ptr() for tensor in group) for group in groups)
    table = tables.device_table(
        ("adam", extents, config, addresses),
        left.device,
        lambda: _tiles(
            extents, config.block_m, config.block_n, [(0, *column) for column in zip(*addresses, strict=True)]
        ),
    )
    metrics = torch.empty(3, dtype=torch.float32, device=left.device)
    buffers, rates = Buffers(left, right, sums, None, losses, metrics), Rates(state.learning_rate, tau)
    _launch(table, extents, buffers, rates, batch, len(targets) > 0, precision, config)
    return metrics
