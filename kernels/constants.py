"""Numbers of the formulas, each once: constants of a kernel, whose ``value`` the host reads."""

from __future__ import annotations

import triton.language as tl

BETA1, BETA2, ADAM_EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)
LOG2_BETA1, LOG2_BETA2 = tl.constexpr(-0.15200309344504997), tl.constexpr(-0.0014434168696687186)
LAYER_NORM_EPS = tl.constexpr(1e-6)
BANDWIDTH_MIN, GAMMA_EPS = tl.constexpr(1e-12), tl.constexpr(1e-6)
# gelu(y) = y sigmoid(y (LINEAR + CUBIC y^2)): 0.5 (1 + tanh(u)) is sigmoid(2 u), u = sqrt(2 / pi) (y + 0.044715 y^3).
GELU_LINEAR, GELU_CUBIC = tl.constexpr(1.5957691216057308), tl.constexpr(0.07135481627260025)
# As floats >= 0 are ordered by their bits, so are their keys: int32 up to infinity's.
INT32_MAX, INFINITY_BITS = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)
