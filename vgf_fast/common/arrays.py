"""The one way in for arrays that a caller hands over: NumPy's or torch's, of any byte order, strides and precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# What numbers are computed and stored in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dense(name: str, tensor: torch.Tensor) -> None:
    """Raise ``TypeError`` naming a tensor that is sparse, nested or quantised, or of a dtype PyTorch cannot add in."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "is nested" if tensor.is_nested else f"has layout {tensor.layout}"
        raise TypeError(f"{name} {kind}, expected a dense tensor: call .to_dense()")
    if tensor.is_complex() or tensor.is_quantized or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected real numbers of {', '.join(map(str, DTYPES))}")


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """``value`` as a tensor of real numbers where it lies; it shares memory where torch can.

    Takes a dense tensor of any device, a NumPy array or what ``np.asarray`` makes one of. An array may be read-only, of
    any strides and byte order, masked with nothing masked, and of more precision than float64, which it becomes.

    Raises ``TypeError`` for what is no array of real numbers, and ``ValueError`` for a masked array with entries that
    are masked, because no number stands for them; ``name`` is what the message calls it.
    """
    if isinstance(value, torch.Tensor):
        check_dense(name, value)
        return value.detach()
    try:
        array = np.asanyarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} is a {type(value).__name__}, expected numbers ({error})") from error
    if array.dtype.kind not in "fiub":
        what = f"has dtype {array.dtype}, expected real" if value is array else f"is a {type(value).__name__}, expected"
        raise TypeError(f"{name} {what} numbers")
    if np.ma.is_masked(array):
        row = np.argwhere(np.ma.getmaskarray(array))[0].tolist()
        count = np.ma.count_masked(array)
        raise ValueError(f"{name} has {count} masked entries, the first at {row}, expected none: fill or drop them")
    dtype = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    native = np.ma.getdata(array).astype(dtype, copy=False)
    # Torch takes neither read-only memory without a warning, nor negative strides or those of half a number.
    plain = native.flags.writeable and all(stride >= 0 and stride % dtype.itemsize == 0 for stride in native.strides)
    return torch.from_numpy(native if plain else native.copy())


def with_values(name: str, value: Any) -> torch.Tensor:
    """Do as ``as_tensor``, and raise ``TypeError`` for a tensor without memory too."""
    tensor = as_tensor(name, value)
    if tensor.is_meta:
        raise TypeError(f"{name} is on the meta device, expected values")
    return tensor


def check_generator(generator: Any, device: torch.device) -> None:
    """Raise ``TypeError`` for what is no generator of torch's, and ``ValueError`` for one on another kind of device."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {generator!r}, expected a torch.Generator, such as one with manual_seed(0)")
    if generator.device.type != device.type:
        raise ValueError(f"generator is on {generator.device}, expected torch.Generator(device={str(device)!r})")


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has numbers: False for what transforms and traces of PyTorch put in a tensor's place."""
    if torch.compiler.is_compiling():
        return False
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False
