"""Weights of a stack of perceptrons as the kernels read them: in one dtype, widths padded to a power of two by zeros.

Equal sizes of all hidden layers let a kernel loop over layers at run time, and zeros need no masks: a padded column of
z is zero, every activation is zero there, and a padded row adds nothing.

Packing is done afresh for every use, so that no stale weights can be read: one launch for any number of stacks on a
GPU or in Triton's interpreter, PyTorch's copies for float64 and elsewhere.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch

MIN_DOT = 16  # the least extent of a matrix product's operand
ALIGNMENT = 64  # elements: every packed tensor starts at a multiple of it
TILE = 2048  # packed entries written by one program


class PackedMLP(NamedTuple):
    """E perceptrons with D hidden layers on [state, rest], or on [state, action, time].

    HP is the widest hidden layer padded; SP, RP and OP are the padded state, action and output widths.
    """

    state: Tensor  # [E, SP, HP] the state's rows of the first layer; SP a multiple of 64
    action: Tensor  # [E, RP, HP] the action's rows of the first layer
    time: Tensor  # [E, HP] float32, the time's row of the first layer; zero without one
    hidden: Tensor  # [E, D - 1, HP, HP] in, out
    head: Tensor  # [E, HP, OP] the last layer; OP is 1 for a critic
    vectors: Tensor  # [E, D, 3, HP] float32: bias, LayerNorm scale, LayerNorm bias
    head_bias: Tensor  # [E, OP] float32
    observation_dim: int  # O
    action_dim: int  # A
    output_dim: int
    layer_norm: bool
    activation: str
    hidden_dims: tuple[int, ...]  # D widths before padding

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Matrices and vectors."""
        return self[:7]

    @property
    def members(self) -> int:
        """E."""
        return self.state.shape[0]

    @property
    def depth(self) -> int:
        """D, hidden layers."""
        return self.vectors.shape[1]

    @property
    def padded_width(self) -> int:
        """HP."""
        return self.vectors.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices."""
        return self.state.dtype


class Stack(NamedTuple):
    """Parameters of E perceptrons as they are trained, to be packed: the arguments of ``pack``."""

    weights: Sequence[Tensor]  # per layer [E, in, out]
    biases: Sequence[Tensor]  # per layer [E, out]
    norm_scales: Sequence[Tensor]  # per hidden layer [E, out]; empty without LayerNorm
    norm_biases: Sequence[Tensor]  # per hidden layer [E, out]; empty without LayerNorm
    activation: str
    observation_dim: int
    action_dim: int

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """All of them in one fixed order."""
        return (*self.weights, *self.biases, *self.norm_scales, *self.norm_biases)

    @property
    def layout(self) -> Layout:
        """Sizes of the packed weights."""
        first, head = self.weights[0], self.weights[-1]
        return Layout(
            first.shape[0],
            first.shape[1],
            tuple(w.shape[2] for w in self.weights[:-1]),
            head.shape[2],
            self.observation_dim,
            self.action_dim,
            bool(self.norm_scales),
        )


class Layout(NamedTuple):
    """Sizes of a stack, and where its packed tensors lie in one buffer of matrices and one of float32 vectors."""

    members: int
    inputs: int
    widths: tuple[int, ...]
    output_dim: int
    observation_dim: int
    action_dim: int
    layer_norm: bool

    @property
    def sizes(self) -> tuple[int, int, int, bool]:
        """As ``PackedMLP`` has them after its tensors."""
        return self.observation_dim, self.action_dim, self.output_dim, self.layer_norm

    def packed(self, tensors: Iterable[Tensor], activation: str) -> PackedMLP:
        """``PackedMLP.tensors`` with what else it holds."""
        return PackedMLP._make((*tensors, *self.sizes, activation, self.widths))

    @property
    def time(self) -> bool:
        """Whether the last row of the first layer is the time's."""
        return self.inputs > self.observation_dim + self.action_dim

    @property
    def padded_width(self) -> int:
        """HP."""
        return max(launch.padded(max(self.widths)), MIN_DOT)

    @property
    def padded_state(self) -> int:
        """SP."""
        return -(-max(self.observation_dim, 1) // 64) * 64

    @property
    def padded_action(self) -> int:
        """RP."""
        return max(launch.padded(self.action_dim), MIN_DOT)

    @property
    def padded_output(self) -> int:
        """OP: a critic's is 1, and any other's that of a matrix product."""
        return 1 if self.output_dim == 1 and not self.time else max(launch.padded(self.output_dim), MIN_DOT)

    @property
    def matrix_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of state, action, hidden and head."""
        e, hp = self.members, self.padded_width
        hidden = (e, len(self.widths) - 1, hp, hp)
        return (e, self.padded_state, hp), (e, self.padded_action, hp), hidden, (e, hp, self.padded_output)

    @property
    def vector_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of time, vectors and head_bias."""
        e, hp = self.members, self.padded_width
        return (e, hp), (e, len(self.widths), 3, hp), (e, self.padded_output)


def buffer_sizes(layouts: Sequence[Layout]) -> tuple[int, int]:
    """Entries of the buffer of matrices and of the buffer of vectors that ``views`` cuts up."""
    aligned = [
        sum(-(-math.prod(shape) // ALIGNMENT) * ALIGNMENT for layout in layouts for shape in getattr(layout, name))
        for name in ("matrix_shapes", "vector_shapes")
    ]
    return aligned[0], aligned[1]


def views(
    layouts: Sequence[Layout], activations: Sequence[str], matrices: Tensor, vectors: Tensor
) -> tuple[PackedMLP, ...]:
    """Packed stacks in a buffer of matrices and a float32 buffer of vectors with ``buffer_sizes`` entries."""
    packed, starts = [], [0, 0]

    def cut(buffer: int, shape: tuple[int, ...]) -> Tensor:
        start, size = starts[buffer], math.prod(shape)
        starts[buffer] += -(-size // ALIGNMENT) * ALIGNMENT
        return (matrices, vectors)[buffer][start : start + size].view(shape)

    for layout, activation in zip(layouts, activations, strict=True):
        state, action, hidden, head = (cut(0, shape) for shape in layout.matrix_shapes)
        time, triples, head_bias = (cut(1, shape) for shape in layout.vector_shapes)
        packed.append(layout.packed((state, action, time, hidden, head, triples, head_bias), activation))
    return tuple(packed)


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_scales: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    activation: str,
    observation_dim: int,
    action_dim: int,
    dtype: torch.dtype = torch.float32,
    out: PackedMLP | None = None,
) -> PackedMLP:
    """Pack stacked parameters (per layer weights [E, in, out], biases [E, out]; per hidden layer scales and biases).

    The first layer's rows are those of the state, the action and, if there is one more, the time. ``out`` is written
    instead of new tensors; its matrices have ``dtype``. Raises ``ValueError`` if ``out`` is of other sizes.
    """
    stack = Stack(weights, biases, norm_scales, norm_biases, activation, observation_dim, action_dim)
    return pack_many([stack], dtype, None if out is None else [out])[0]


@torch.no_grad()
def pack_many(
    stacks: Sequence[Stack], dtype: torch.dtype = torch.float32, out: Sequence[PackedMLP] | None = None
) -> tuple[PackedMLP, ...]:
    """``pack`` of several stacks of one device in one launch; ``out`` as an earlier call returned it is written again.

    A CUDA graph needs one call before its capture: addresses are copied to the device when first seen.
    """
    device = stacks[0].weights[0].device
    layouts = [stack.layout for stack in stacks]
    if out is None:
        sizes = buffer_sizes(layouts)
        matrices = torch.empty(sizes[0], dtype=dtype, device=device)
        vectors = torch.empty(sizes[1], dtype=torch.float32, device=device)
        packed = views(layouts, [stack.activation for stack in stacks], matrices, vectors)
    else:
        packed = tuple(out)
        _check_out(packed, stacks, layouts, dtype)
    parameters = [parameter for stack in stacks for parameter in stack.parameters]
    source = parameters[0].dtype
    if _kernel_runs(device, source, dtype) and all(parameter.dtype == source for parameter in parameters):
        from . import packing_kernel

        packing_kernel.write(stacks, packed)
    else:
        for stack, target in zip(stacks, packed, strict=True):
            _copy(stack, target)
    return packed


def _kernel_runs(device: torch.device, source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether Triton packs: where it runs, but the interpreter truncates to bfloat16 where a GPU rounds."""
    narrow = (torch.float32, torch.bfloat16)
    if source not in narrow or dtype not in narrow or importlib.util.find_spec("triton") is None:
        return False
    exact = dtype in (torch.float32, source)
    return device.type == "cuda" or (exact and device.type == "cpu" and launch.interpreted())


def _check_out(
    packed: Sequence[PackedMLP], stacks: Sequence[Stack], layouts: Sequence[Layout], dtype: torch.dtype
) -> None:
    if len(packed) != len(stacks):
        raise ValueError(f"out has {len(packed)} packed stacks, expected {len(stacks)}: one for each to be packed")
    for target, stack, layout in zip(packed, stacks, layouts, strict=True):
        matrices = (target.state, target.action, target.hidden, target.head)
        vectors = (target.time, target.vectors, target.head_bias)
        for name, tensors, shapes, kind in (
            ("matrices", matrices, layout.matrix_shapes, dtype),
            ("vectors", vectors, layout.vector_shapes, torch.float32),
        ):
            for tensor, shape in zip(tensors, shapes, strict=True):
                launch.check_shape(f"out's {name}", tensor, shape, "the padded sizes of the parameters")
                launch.check_dtype(f"out's {name}", tensor, (kind,))
                launch.check_same_device(f"out's {name}", tensor, "the parameters", stack.weights[0].device)
        sizes, expected = target[7:12], (*layout.sizes, stack.activation)
        if sizes != expected or target.hidden_dims != layout.widths:
            raise ValueError(f"out was packed from other sizes {sizes}, expected {expected} and widths {layout.widths}")


def pairs(stack: Stack, packed: PackedMLP) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Packed tensors [rows, columns] or [columns], which make up all of them, each with the smaller one it begins with.

    None where there is no such parameter: all of it is zero.
    """
    depth, states = len(stack.layout.widths), stack.observation_dim
    for e, first in enumerate(stack.weights[0]):
        yield packed.state[e], first[:states]
        yield packed.action[e], first[states : states + stack.action_dim]
        yield packed.time[e], first[-1] if stack.layout.time else None
        for i in range(1, depth):
            yield packed.hidden[e, i - 1], stack.weights[i][e]
        yield packed.head[e], stack.weights[-1][e]
        yield packed.head_bias[e], stack.biases[-1][e]
        for i in range(depth):
            yield packed.vectors[e, i, 0], stack.biases[i][e]
            for j, group in ((1, stack.norm_scales), (2, stack.norm_biases)):
                yield packed.vectors[e, i, j], group[i][e] if group else None


def _copy(stack: Stack, packed: PackedMLP) -> None:
    """Packing by PyTorch's copies."""
    for target, source in pairs(stack, packed):
        target.zero_()
        if source is not None:
            target[tuple(map(slice, source.shape))] = source
