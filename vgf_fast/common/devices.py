"""The device that work is done on."""

from __future__ import annotations

import torch


def choose_device(asked: str | None) -> str:
    """The device asked for, else the GPU if there is one. Raises ``ValueError`` for a device that is not here."""
    name = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_of(name).type == "meta":
        raise ValueError(f"device is {name!r}, which cannot be used here: it holds no values")
    return name


def device_of(device: torch.device | str | None) -> torch.device:
    """The device that is named, the CPU by default, with its number. Raises ``ValueError`` for one that is not here."""
    try:
        return torch.zeros((), dtype=torch.float32, device="cpu" if device is None else device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"device is {str(device)!r}, which cannot be used here: {reason}") from error
