"""Weights of a stack of perceptrons as the kernels read them: in one dtype, widths padded to a power of two by zeros.

Equal sizes of all hidden layers let a kernel loop over layers at run time, and zeros need no masks: a padded column of
z is zero, every activation is zero there, and a padded row adds nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch

MIN_DOT = 16  # the least extent of a matrix product's operand


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
    widths: Tensor  # [D] int32 on the device
    observation_dim: int  # O
    action_dim: int  # A
    output_dim: int
    layer_norm: bool
    activation: str

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


@functools.lru_cache(maxsize=64)
def width_table(widths: tuple[int, ...], device: torch.device) -> Tensor:
    """The hidden widths as an int32 tensor on a device; made once, for a copy from the host cannot be captured."""
    return torch.tensor(widths, dtype=torch.int32, device=device)


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_scales: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    activation: str,
    observation_dim: int,
    action_dim: int,
    dtype: torch.dtype = torch.float32,
) -> PackedMLP:
    """Pack stacked parameters (per layer weights [E, in, out], biases [E, out]; per hidden layer scales and biases).

    The first layer's rows are those of the state, the action and, if there is one more, the time.
    """
    first = weights[0]
    members, inputs, _ = first.shape
    widths = tuple(w.shape[2] for w in weights[:-1])
    depth, output_dim = len(widths), weights[-1].shape[2]
    hp = max(launch.padded(max(widths)), MIN_DOT)
    sp = -(-max(observation_dim, 1) // 64) * 64
    rp = max(launch.padded(action_dim), MIN_DOT)
    op = 1 if output_dim == 1 else max(launch.padded(output_dim), MIN_DOT)
    matrix = functools.partial(torch.zeros, dtype=dtype, device=first.device)
    vector = functools.partial(torch.zeros, dtype=torch.float32, device=first.device)
    state, action, time = matrix((members, sp, hp)), matrix((members, rp, hp)), vector((members, hp))
    hidden, head = matrix((members, depth - 1, hp, hp)), matrix((members, hp, op))
    vectors, head_bias = vector((members, depth, 3, hp)), vector((members, op))
    with torch.no_grad():
        state[:, :observation_dim, : widths[0]] = first[:, :observation_dim]
        action[:, :action_dim, : widths[0]] = first[:, observation_dim : observation_dim + action_dim]
        if inputs > observation_dim + action_dim:
            time[:, : widths[0]] = first[:, -1]
        for i in range(1, depth):
            hidden[:, i - 1, : widths[i - 1], : widths[i]] = weights[i]
        head[:, : widths[-1], :output_dim] = weights[-1]
        head_bias[:, :output_dim] = biases[-1]
        for i, width in enumerate(widths):
            vectors[:, i, 0, :width] = biases[i]
            if norm_scales:
                vectors[:, i, 1, :width] = norm_scales[i]
                vectors[:, i, 2, :width] = norm_biases[i]
    return PackedMLP(
        state,
        action,
        time,
        hidden,
        head,
        vectors,
        head_bias,
        width_table(widths, first.device),
        observation_dim,
        action_dim,
        output_dim,
        bool(norm_scales),
        activation,
    )
