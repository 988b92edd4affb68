"""The device that work is done on."""

from __future__ import annotations

import torch


def choose_device(asked: str | None) -> str:
    """The device asked for, else the GPU if there is one. Raises ``ValueError`` for a device that is not here."""
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, dtype=torch.float32, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device is {name!r}, which cannot be used here: {reason}") from error
    return name
