"""Activations of a perceptron's layers: a table from the name to its function and slope, in float32, of any shape.

All of them are 0 at 0, so that a padded column stays zero. To add one, write its two functions and its line of the
table, and its formula in the reference.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from . import launch
from .constants import GELU_CUBIC, GELU_LINEAR


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); Triton's own does not run in its interpreter."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def relu(y: tl.tensor) -> tl.tensor:
    """max(y, 0)."""
    return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_slope(y: tl.tensor) -> tl.tensor:
    """1[y > 0]."""
    return tl.where(y > 0.0, 1.0, 0.0)


@triton.jit
def gelu(y: tl.tensor) -> tl.tensor:
    """Tanh approximation of y Phi(y)."""
    return y * sigmoid(y * (y * y * GELU_CUBIC + GELU_LINEAR))


@triton.jit
def gelu_slope(y: tl.tensor) -> tl.tensor:
    """Derivative of ``gelu``."""
    s = sigmoid(y * (y * y * GELU_CUBIC + GELU_LINEAR))
    return s + y * s * (1.0 - s) * (y * y * (3.0 * GELU_CUBIC) + GELU_LINEAR)


@triton.jit
def swish(y: tl.tensor) -> tl.tensor:
    """y sigmoid(y)."""
    return y * sigmoid(y)


@triton.jit
def swish_slope(y: tl.tensor) -> tl.tensor:
    """Derivative of ``swish``."""
    s = sigmoid(y)
    return s * (1.0 + y * (1.0 - s))


class Activation(NamedTuple):
    """An activation as a kernel takes it, in an argument that is no constexpr: so its functions are part of the key."""

    apply: JITFunction  # y -> activation
    slope: JITFunction  # y -> its derivative at y


ACTIVATIONS = {
    "relu": Activation(relu, relu_slope),
    "gelu": Activation(gelu, gelu_slope),
    "swish": Activation(swish, swish_slope),
}


def activation(name: str) -> Activation:
    """The activation called ``name``. Raises ``ValueError`` naming the known ones if there is none."""
    launch.check_choice("activation", name, tuple(ACTIVATIONS))
    return ACTIVATIONS[name]
