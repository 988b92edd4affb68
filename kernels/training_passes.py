"""Passes of training as sequences of launches: each is one line here.

Forward the first layer, D - 1 times rows and product, and the last layer with the loss; backward, where it begins in
the same launch, D - 1 times transposed product and rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import launch, optimizer
from .activations import activation
from .arguments import Net, Options, Shape
from .packing import Layout, PackedMLP
from .product import product
from .rows import rows
from .training_layers import LOSSES, Batch, HeadConstants, Outputs, Sizes, first_layer, head_kernel, strides_of


class Pass(NamedTuple):
    """What the forward pass leaves for the backward pass, and the two leave for the weights' gradients."""

    out: Tensor | None  # [E, B, OUT]
    dout: Tensor | None  # [E, B, OUT]
    left: Tensor  # x [BP, IP], then h [D, E, BP, HP], in the weights' dtype
    z: Tensor  # [D, E, BP, HP]
    losses: Tensor | None  # [blocks, E, 4]
    right: Tensor | None = None  # dz [D, E, BP, HP], then dout [E, BP, GO], in the weights' dtype
    sums: Tensor | None = None  # [blocks, E, D, 3, HP], then [blocks, E, GO]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the weights' gradients are made of: left, right and sums."""
        assert self.right is not None
        assert self.sums is not None
        return self.left, self.right, self.sums


def extents_of(layout: Layout, batch: int, dtype: torch.dtype) -> optimizer.Extents:
    """Where a pass of so many rows leaves what it leaves, with operands of a dtype."""
    block = launch.weight_gradient(dtype).block_k
    # Shares of many rows would be long sums.
    share = min(launch.rows_block(layout.padded_width), 16)
    return optimizer.Extents(layout, -(-batch // block) * block, share)


class Network:
    """A packed network and a batch: the launches of its passes."""

    def __init__(self, mlp: PackedMLP, layout: Layout, batch: Batch, precision: str | None) -> None:
        self.mlp, self.layout, self.batch = mlp, layout, batch
        self.precision = precision or launch.precision(mlp.dtype)
        self.device = batch.actions.device
        self.size = len(batch.actions)
        self.extents = extents_of(layout, self.size, mlp.dtype)
        self.last = mlp.depth - 1
        pdl = launch.programmatic(self.device)
        whole = min(layout.widths) == mlp.padded_width
        self.options = Options(mlp.padded_width, mlp.action.shape[1], layout.layer_norm, self.precision, pdl, whole)

    def sizes(self, counters: int = 0) -> Sizes:
        """Of the batch and the network."""
        layout = self.layout
        dims = (layout.observation_dim, layout.action_dim, self.mlp.depth, layout.output_dim)
        return Sizes(self.size, self.extents.padded_rows, *dims, counters)

    def shape(self, layer: int) -> Shape:
        """Sizes of a hidden layer, for ``rows``."""
        layout = self.layout
        width = layout.widths[layer]
        return Shape(self.extents.padded_rows, 1, layout.action_dim, layout.members, self.mlp.depth, width)

    def net_at(self, layer: int) -> Net:
        """Pointers, those of the vectors at a hidden layer; there is no states' share."""
        mlp = self.mlp
        return Net(mlp.action, mlp.time, mlp.head, mlp.vectors[:, layer], mlp.head_bias, mlp.vectors)

    def sums_of(self, sums: Tensor | None, layer: int) -> Tensor | None:
        """Shares of the vectors' gradients, from a layer on."""
        return None if sums is None else sums[layer * 3 * self.mlp.padded_width :]

    def empty(self, size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor on the batch's device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def slots(self, buffer: Tensor, start: int = 0) -> Tensor:
        """Hidden layers [D, E, BP, HP] in a buffer."""
        shape = (self.mlp.depth, self.layout.members, self.extents.padded_rows, self.mlp.padded_width)
        return buffer[start : start + self.extents.hidden_size].view(shape)

    def rows_of(self, mode: str, layer: int, **tensors: Any) -> None:
        """``rows`` of a layer."""
        layers = (self.net_at(layer), self.shape(layer), self.options, self.mlp.activation)
        rows(mode, *layers, block=self.extents.block_rows, **tensors)

    def product(self, a: Tensor, w: Tensor, out: Tensor, bias: Tensor | None = None, transposed: bool = False) -> None:
        """``product`` of all rows."""
        product(a, w, out, bias, transposed=transposed, precision=self.precision, pdl=self.options.PDL)

    def head(self, result: Pass, loss: str | None, weight: float, forward: bool, backward: bool) -> None:
        """The last layer forward with a loss, if there is one, and backward, as asked."""
        extents = self.extents
        dz = dhead = sums = head_sums = None
        if backward:
            _, right, shares = result.operands
            dz, dhead = self.slots(right)[self.last], right[extents.hidden_size :]
            sums, head_sums = self.sums_of(shares, self.last), shares[extents.vectors_size :]
        h = self.slots(result.left, extents.hidden_place)[self.last] if forward else None
        columns, block = self.mlp.head.shape[2], extents.block_rows
        with launch.on_device(result.z):
            head_kernel[(triton.cdiv(extents.padded_rows, block), self.mlp.members)](
                self.net_at(self.last),
                result.z[self.last],
                Outputs(h, result.out, result.dout, result.losses, dz, dhead, sums, head_sums),
                self.batch,
                strides_of(self.batch),
                self.sizes(),
                self.shape(self.last),
                weight,
                activation(self.mlp.activation),
                LOSSES[loss or "squared"],
                self.options,
                HeadConstants(columns, extents.output_width, forward, loss is not None, backward),
                block,
                **launch.options(1, 1, self.options.PDL),
            )

    def forward(
        self, loss: str | None, weight: float = 0.0, steps: Tensor | None = None, backward: bool = False
    ) -> Pass:
        """Up to the outputs and, with a loss, to it and its derivative; ``backward`` starts that pass too.

        ``steps``, a column of addresses, are step counters that the first launch increases by one.
        """
        layout, extents, mlp = self.layout, self.extents, self.mlp
        shape = (layout.members, self.size, layout.output_dim)
        hidden = (mlp.depth, layout.members, extents.padded_rows, mlp.padded_width)
        result = Pass(
            self.empty(shape),
            self.empty(shape) if loss else None,
            self.empty(extents.left_size, mlp.dtype),
            self.empty(hidden),
            self.empty((extents.blocks, layout.members, 4)) if loss else None,
        )
        if backward:
            result = self.with_gradients(result)
        x = result.left[: extents.hidden_place].view(extents.padded_rows, extents.input_width)
        h, z = self.slots(result.left, extents.hidden_place), result.z
        counters = 0 if steps is None else len(steps)
        first_layer(mlp, self.batch, self.sizes(counters), x, z[0], steps, self.precision, self.options.PDL)
        for layer in range(1, mlp.depth):
            self.rows_of("forward", layer - 1, z=z[layer - 1], out=h[layer - 1])
            self.product(h[layer - 1], mlp.hidden[:, layer - 1], z[layer], mlp.vectors[:, layer, 0])
        self.head(result, loss, weight, True, backward)
        return result

    def with_gradients(self, result: Pass) -> Pass:
        """A pass with room for what the backward pass leaves."""
        right = self.empty(self.extents.right_size, self.mlp.dtype)
        return result._replace(right=right, sums=self.empty(self.extents.sums_size))

    def backward(self, result: Pass) -> None:
        """From the last hidden layer's dz down to the first one's."""
        dz = self.slots(result.operands[1])
        grad = self.empty(dz.shape[1:])
        for layer in range(self.last, 0, -1):
            self.product(dz[layer], self.mlp.hidden[:, layer - 1], grad, transposed=True)
            below = layer - 1
            sums = self.sums_of(result.sums, below)
            self.rows_of("backward", below, z=result.z[below], grad=grad, out=dz[below], sums=sums)

    def input_gradients(self, result: Pass) -> Tensor:
        """Sum over members of the gradients with respect to state, action and time [B, inputs], from dz."""
        layout, mlp = self.layout, self.mlp
        dz = self.slots(result.operands[1])[0]
        parts = []
        for w, width in ((mlp.state, layout.observation_dim), (mlp.action, layout.action_dim)):
            out = self.empty((*dz.shape[:2], w.shape[1]))
            self.product(dz, w, out, transposed=True)
            parts.append(out[..., :width].sum(dim=0))
        if layout.time:
            parts.append((dz.float() * mlp.time.unsqueeze(1)).sum(dim=2, keepdim=True).sum(dim=0))
        return torch.cat(parts, dim=1)[: self.size]
