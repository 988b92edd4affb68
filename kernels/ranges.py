"""Named ranges around the phases of an update and of acting, for Nsight and for torch's profiler; off by default.

    with ranges.switched_on("nvtx"):      # or "profiler": torch.profiler.record_function
        learner.update(batch)

``VGF_FAST_RANGES=nvtx`` or ``profiler`` in the environment switches them on from the start. A CUDA graph is replayed as
a whole: switch it off, or read its nodes, to see the phases of a replayed update.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

# Every name there is, and what lies in it; {} counts flow steps from 0.
NAMES = {
    "vgf/sample_batch": "transitions of a batch are drawn and gathered",
    "vgf/update": "one training update of a batch and its noise",
    "vgf/noise": "random numbers of the particles, of the flow-matching loss, of the choice of a particle",
    "vgf/pack": "weights laid out for the kernels (Triton)",
    "vgf/behavior_flow": "all Euler steps of the behaviour model: particles are drawn",
    "vgf/state_share": "the state's share of a network's first layer (Triton)",
    "vgf/flow_step/{}": "score, SVGD direction and step of all particles",
    "vgf/values": "values of the particles after the last step, and on Triton the TD target or the choice of one",
    "vgf/td_target": "TD target of those values (torch)",
    "vgf/td_loss": "the critic's loss; on Triton with gradients, optimiser and target critic",
    "vgf/behavior_loss": "the behaviour model's loss; on Triton with gradients and optimiser",
    "vgf/score_loss": "the score field's loss; on Triton with its value's gradient by the outputs",
    "vgf/backward": "gradients of both losses (torch)",
    "vgf/target_critic": "Polyak average (torch)",
    "vgf/optimizer": "Adam of both networks (torch)",
    "vgf/metrics": "what is logged of the particles",
    "vgf/act": "actions for a batch of states, from their noise",
    "vgf/select": "one particle a state is chosen (torch)",
}
KINDS = ("nvtx", "profiler")
VARIABLE = "VGF_FAST_RANGES"

_Open = Callable[[str], AbstractContextManager[Any]]
_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()
_open: _Open | None = None


def span(name: str) -> AbstractContextManager[Any]:
    """A range of one of ``NAMES``; while ranges are off, always the same object that does nothing."""
    return _NOTHING if _open is None else _open(name)


def switch(kind: str | None) -> None:
    """Ranges of that kind from now on, or none.

    Raises ``ValueError`` for an unknown kind, and ``ImportError`` for "nvtx" with neither the package of that name
    nor a PyTorch for CUDA, which has ranges of its own.
    """
    global _open
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected {' or '.join(map(repr, KINDS))}, or None for no ranges")
    _open = None if kind is None else _nvtx() if kind == "nvtx" else _profiler()


@contextlib.contextmanager
def switched_on(kind: str) -> Iterator[None]:
    """Ranges of that kind inside the block; raises as ``switch``."""
    global _open
    before = _open
    switch(kind)
    try:
        yield
    finally:
        _open = before


def _nvtx() -> _Open:
    try:
        import nvtx
    except ImportError as error:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.nvtx.range
        raise ImportError(f"ranges of kind 'nvtx' need the package nvtx ({error}): pip install nvtx") from error
    return lambda name: nvtx.annotate(name, domain="vgf_fast")


def _profiler() -> _Open:
    from torch.profiler import record_function

    return record_function


if os.environ.get(VARIABLE):
    switch(os.environ[VARIABLE])
