"""What a caller may have switched on in PyTorch, and what must not change a result: one decorator leaves it.

Besides what it leaves, every tensor is made with its device and dtype named (no default device or dtype is read), and
operations are taken that have a deterministic form.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def _autocast_devices() -> list[str]:
    """Device types that a caller's autocast is for."""
    return [kind for kind in _AUTOCAST_DEVICES if torch.is_autocast_enabled(kind)]


def neutral(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Call ``function`` outside of its caller's autocast, default device and inference mode.

    Whether gradients are recorded stays as it is. What is made inside, and kept, are ordinary tensors, whatever the
    mode of the call that first needed them. Under ``torch.compile`` only autocast is left: a traced function keeps no
    tensors and names its devices.
    """

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if torch.compiler.is_compiling():
            for kind in _autocast_devices():
                with torch.autocast(kind, enabled=False):
                    return call(*args, **kwargs)
            return function(*args, **kwargs)
        # A default device is a mode of torch functions.
        with torch._C.DisableTorchFunction():
            devices = _autocast_devices()
            if not devices and not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            with contextlib.ExitStack() as stack:
                for kind in devices:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                if torch.is_inference_mode_enabled():
                    # Leaving the mode would switch gradients on.
                    stack.enter_context(torch.inference_mode(False))
                    stack.enter_context(torch.no_grad())
                return function(*args, **kwargs)

    return call
