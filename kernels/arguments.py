"""What kernels take, grouped: a kernel's argument is one of these, or a pointer.

``Net``, ``Particles`` and ``Choice`` hold pointers, ``Shape`` and ``Step`` numbers, ``Options`` and ``Flow`` constants.
Triton specialises integers in a tuple whatever it is told: a 1 is a constant then, and ``tensor_of`` makes it a tensor
where one is needed. Floats it leaves alone. An activation, a particle kernel and an optimiser are tuples of device
functions, in an argument of their own that is no constexpr: then their text is part of a compiled kernel's key.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


@triton.jit
def tensor_of(size: tl.tensor) -> tl.tensor:
    """An integer of a tuple as an int32 tensor, also where Triton has made it a constant."""
    return tl.full([], size, tl.int32)


class Net(NamedTuple):
    """Packed weights of E perceptrons, and what the states add to their first layer."""

    action: Any  # [E, RP, HP] the action's rows of the first layer
    time: Any  # [E, HP] float32, the time's row of the first layer
    head: Any  # [E, HP, OP] the last layer; OP is 1 for a critic
    vectors: Any  # [E, D, 3, HP] float32: bias, LayerNorm scale and shift; from the layer on that is worked on
    head_bias: Any  # [E, OP] float32
    share: Any  # [E, B, HP] float32, the states' share of the first layer, bias included


class Particles(NamedTuple):
    """Particles of B states and the state of their optimiser, contiguous float32."""

    old: Any  # [B, N, A], of any dtype
    new: Any  # [B, N, A], written; may be ``old``. Where only the score or the direction is asked for, that
    first_moment: Any  # [B, N, A], written; read from the second step on
    second_moment: Any  # [B, N, A], likewise
    scratch: Any  # [B, BLOCK_N * BLOCK_N] int32, of the median; None of many particles


class Choice(NamedTuple):
    """What a flow ends in: a particle chosen a state, or TD targets."""

    uniform: Any  # [B] float32 in [0, 1), unless the largest is chosen
    rewards: Any  # [B], any stride
    masks: Any  # [B], any stride
    result: Any  # [B, A] chosen actions or [B] TD targets, float32, written
    index: Any  # [B] int64 chosen particles, written


class Shape(NamedTuple):
    """Sizes of a network and its rows."""

    rows: Any  # B * N
    particles: Any  # N, rows of a state
    action_dim: Any  # A
    members: Any  # E
    depth: Any  # D, hidden layers
    width: Any  # units of the layer that is worked on


class Step(NamedTuple):
    """Numbers of a flow step and of its ending."""

    number: Any = 1.0  # counted from 1
    log_n1: Any = 0.0  # ln(N + 1)
    inverse_temperature: Any = 1.0
    step_size: Any = 0.0  # divided by the first moment's bias correction
    v_correction: Any = 1.0  # the second moment's
    low: Any = -1.0  # bounds of the particles
    high: Any = 1.0
    discount: Any = 0.0
    inverse_choice_temperature: Any = 1.0
    stride_rewards: Any = 0
    stride_masks: Any = 0


class Options(NamedTuple):
    """Constants of a network's kernels."""

    HP: int  # columns of a hidden layer, padded
    RP: int  # columns of the action, padded
    LAYER_NORM: bool
    PRECISION: str  # of products of float32
    PDL: bool  # whether the kernel is launched before the one ahead of it has ended
    WHOLE: bool  # whether every hidden layer has HP units


class Flow(NamedTuple):
    """Constants of a flow step: what the kernel does, and how."""

    PART: str  # "move", "direction", "score", "select" or "td"
    MINIMUM: bool = False  # members are aggregated by their minimum
    BANDWIDTH_GRADIENT: bool = False
    REPULSION: bool = True
    MOMENTS: bool = False  # the optimiser keeps moments
    SELECTION: str = "max"  # or "softmax" or "random"
    LARGEST: bool = False  # TD target of the largest particle's value instead of the mean
