"""Passes over rows of unequal lengths in chunks that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch


def run_in_chunks(name: str, lengths: Sequence[int], max_tokens: int, run: Callable[[list[int]], None]) -> None:
    """Call ``run`` with indices of rows, longest first, at most ``max_tokens`` padded tokens (or one row) a call.

    A chunk that runs out of memory is halved, with a warning, and later chunks take no more tokens than the half.
    Raises ``torch.OutOfMemoryError`` when a single row does not fit.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, min(len(order), max_tokens // max(1, lengths[order[0]])))
        chunk = order[:size]
        try:
            run(chunk)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            max_tokens = (size // 2) * lengths[order[0]]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            warnings.warn(
                f"{name}: {size} sequences of up to {lengths[order[0]]} tokens did not fit into memory; going on with "
                f"{size // 2} at once (give max_tokens={max_tokens} to begin there)",
                RuntimeWarning,
                stacklevel=3,
            )
            continue
        order = order[size:]
