"""The least memory that a call needs, by its sizes: what no machine like this can hold is refused before it begins."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Up to this many particles a state, compiled code and kernels hold no pairs of particles and no layer of all rows.
STREAMED_PARTICLES = 128
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@functools.cache
def total_memory(device: str = "cpu") -> int | None:
    """Bytes that a device has, for "cpu" those that this process may take; None where it does not say."""
    kind, _, index = device.partition(":")
    if kind == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(int(index or 0)).total_memory)
    if kind != "cpu" or not hasattr(os, "sysconf"):
        return None
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _LIMITS):
        text = path.read_text(encoding="ascii").strip() if path.is_file() else ""
        if text.isdigit():
            sizes.append(int(text))
    return min(sizes)


def flow_bytes(
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    members: int = 0,
    units: int = 0,
    pairs: bool = False,
    snapshots: int = 0,
) -> int:
    """At least so many bytes does a call on particles of shape (B, N, A) hold at once.

    ``members`` of a network keep ``units`` activations a particle; ``pairs``: SVGD compares the particles of a state;
    ``snapshots`` of the particles are returned.
    """
    batch, particles, action_dim = shape
    rows = batch * particles
    # The particles, and of every one a score or direction and the members' values.
    entries = rows * (action_dim * (2 + snapshots) + members)
    few = particles <= STREAMED_PARTICLES
    # Where neither compiled code nor kernels take the rows a part at a time.
    if dtype != torch.float32 or not (device.type == "cpu" or (device.type == "cuda" and few)):
        entries += rows * members * units
    if pairs and not few:
        # Distances, their exponents, the kernel.
        entries += 3 * rows * particles
    return entries * dtype.itemsize


def check_flow(shape: Sequence[int], dtype: torch.dtype, device: torch.device, **parts: Any) -> None:
    """Raise ``ValueError`` naming the sizes where ``flow_bytes`` of them is more than the device has."""
    need = flow_bytes(shape, dtype, device, **parts)
    batch, particles, action_dim = shape
    check_fits(f"{particles} particles for each of {batch} states (action_dim {action_dim}, {dtype})", need, device)


def check_fits(sizes: str, need: int, device: torch.device) -> None:
    """Raise ``ValueError`` where ``need`` bytes, for what ``sizes`` describes, are more than the device has."""
    have = total_memory(str(device))
    if have is not None and need > have:
        gib = f"{need / 2**30:,.1f} GiB, and {device} has {have / 2**30:,.1f}"
        raise ValueError(f"{sizes} need at least {gib}: expected fewer or smaller ones")
