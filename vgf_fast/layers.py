"""What all forms of the torch backend share: a stack of perceptrons' weights, activations and their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6


class MLPWeights(NamedTuple):
    """A stack of E perceptrons of one shape: linear, LayerNorm (optional), activation; linear at the end."""

    weights: tuple[Tensor, ...]  # per layer [E, in, out]
    biases: tuple[Tensor, ...]  # per layer [E, out]
    norm_scales: tuple[Tensor, ...]  # per hidden layer [E, out]; empty without LayerNorm
    norm_biases: tuple[Tensor, ...]  # per hidden layer [E, out]; empty without LayerNorm
    activation: str  # "relu" | "gelu" (tanh approximation) | "swish"

    def to(self, dtype: torch.dtype) -> MLPWeights:
        """The same weights in another dtype; gradients flow back to these."""
        return self._map(lambda tensor: tensor.to(dtype))

    def detach(self) -> MLPWeights:
        """The same weights outside of any autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MLPWeights:
        weights, biases, scales, shifts = (tuple(map(function, group)) for group in self[:4])
        return MLPWeights(weights, biases, scales, shifts, self.activation)


class Activation(NamedTuple):
    """An activation, and what its derivative makes of a gradient."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]  # the same, and may overwrite its argument
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient, input) -> gradient; relu's input may be its output


ACTIVATIONS = {
    "relu": Activation(F.relu, torch.relu_, lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0)),
    "gelu": Activation(
        lambda y: F.gelu(y, approximate="tanh"),
        lambda y: F.gelu(y, approximate="tanh"),
        lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
    ),
    "swish": Activation(F.silu, F.silu, lambda grad, y: torch.ops.aten.silu_backward(grad, y)),
}


def activation(name: str) -> Activation:
    """The activation called ``name``. Raises ``ValueError`` naming the known ones if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def activate_(name: str, y: Tensor) -> Tensor:
    """The activation of ``y``; relu overwrites its argument, whose sign its derivative can still be read from."""
    return activation(name).apply_(y)


def activation_backward(name: str, grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` times the activation's derivative at its input ``y`` (for relu, ``y`` may be its output)."""
    return activation(name).backward(grad, y)
