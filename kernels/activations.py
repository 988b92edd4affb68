"""Device helpers for one layer of a perceptron: activations and LayerNorm of rows, forward and backward, in float32.

A row tile is [ROWS, HP], the hidden width padded to HP columns; ``in_width`` [HP] says which are real.
"""

from __future__ import annotations

import triton
import triton.language as tl

LAYER_NORM_EPS = tl.constexpr(1e-6)
# gelu(y) = y sigmoid(y (LINEAR + CUBIC y^2)): 0.5 (1 + tanh(u)) is sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3).
GELU_LINEAR, GELU_CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481627260025)


@triton.jit
def sigmoid(x: tl.tensor) -> tl.tensor:
    """1 / (1 + exp(-x)); Triton's own does not run in its interpreter."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-x))


@triton.jit
def activate(y: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """relu, gelu (tanh approximation) or swish of ``y``, any shape; all of them are 0 at 0."""
    if ACTIVATION == "relu":
        return tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if ACTIVATION == "swish":
        return y * sigmoid(y)
    return y * sigmoid(y * (y * y * GELU_CUBIC + GELU_LINEAR))


@triton.jit
def activation_slope(y: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Derivative of the activation at its input ``y``; relu's is 0 at 0."""
    if ACTIVATION == "relu":
        return tl.where(y > 0.0, 1.0, 0.0)
    if ACTIVATION == "swish":
        s = sigmoid(y)
        return s * (1.0 + y * (1.0 - s))
    s = sigmoid(y * (y * y * GELU_CUBIC + GELU_LINEAR))
    return s + y * s * (1.0 - s) * (y * y * (3.0 * GELU_CUBIC) + GELU_LINEAR)


@triton.jit
def normalise(z: tl.tensor, in_width: tl.tensor, width: tl.tensor) -> tl.tensor:
    """(z - mean) / sqrt(var + eps) of every row [ROWS, HP], zero in the padding; and 1 / sqrt(var + eps) [ROWS, 1].

    Two passes over the row: the difference of its moments would lose the digits of a large mean.
    """
    count = width.to(tl.float32)
    mean = tl.div_rn(tl.sum(tl.where(in_width[None, :], z, 0.0), axis=1), count)  # [ROWS]
    centred = tl.where(in_width[None, :], z - mean[:, None], 0.0)
    variance = tl.div_rn(tl.sum(centred * centred, axis=1), count)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + LAYER_NORM_EPS))[:, None]
    return centred * rstd, rstd


@triton.jit
def normalise_backward(grad: tl.tensor, normal: tl.tensor, rstd: tl.tensor, width: tl.tensor) -> tl.tensor:
    """Gradient with respect to z of ``normalise``, given the one with respect to its result ``normal``: [ROWS, HP].

    ``grad`` is zero in the padding, and ``normal`` is too; so is the product with the mask that the caller applies.
    """
    count = width.to(tl.float32)
    mean = tl.div_rn(tl.sum(grad, axis=1), count)[:, None]
    along = tl.div_rn(tl.sum(grad * normal, axis=1), count)[:, None]
    return rstd * (grad - mean - normal * along)
