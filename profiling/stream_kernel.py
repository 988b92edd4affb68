"""A Triton kernel that does nothing but read: every program streams the same weights, as the programs of a flow do."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 8192
WARPS = 8


@triton.jit
def stream_kernel(
    w_ptr: tl.tensor,  # [W], W a multiple of BLOCK
    out_ptr: tl.tensor,  # [P] float32, written
    W: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The sum of all weights, in every program: so that no load can be left out."""
    offs = tl.arange(0, BLOCK)
    # Each program begins elsewhere: they do not ask for the same line at the same time.
    shift = (tl.program_id(0) * BLOCK) % W
    total = tl.zeros([BLOCK], tl.float32)  # [BLOCK]
    for first in range(0, W, BLOCK):
        total += tl.load(w_ptr + (first + shift) % W + offs).to(tl.float32)
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


def stream(weights: Tensor, programs: int) -> Tensor:
    """Sum of weights [W] in each of so many programs: [P] float32.

    Raises ``ValueError`` if W is not a multiple of ``BLOCK``, or there is no program.
    """
    if weights.ndim != 1 or not weights.is_contiguous() or len(weights) == 0 or len(weights) % BLOCK:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, expected (W,), contiguous, W a multiple of {BLOCK}"
        )
    if programs < 1:
        raise ValueError(f"programs is {programs}, expected an integer >= 1")
    out = torch.empty((programs,), dtype=torch.float32, device=weights.device)
    stream_kernel[(programs,)](weights, out, len(weights), BLOCK=BLOCK, num_warps=WARPS)
    return out
