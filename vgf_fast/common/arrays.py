"""The one way in for arrays that a caller hands over: NumPy's or torch's, of any byte order, strides and precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def as_tensor(name: str, value: Any) -> torch.Tensor:
    """``value`` as a tensor of real numbers where it lies; it shares memory where torch can.

    Takes a dense tensor of any device, a NumPy array or what ``np.asarray`` makes one of. An array may be read-only, of
    any strides and byte order, masked with nothing masked, and of more precision than float64, which it becomes.

    Raises ``TypeError`` for what is no array of real numbers, and ``ValueError`` for a masked array with entries that
    are masked, because no number stands for them; ``name`` is what the message calls it.
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            raise TypeError(f"{name} has dtype {value.dtype}, expected real numbers")
        if value.layout is not torch.strided:
            raise TypeError(f"{name} has layout {value.layout}, expected a dense tensor: call .to_dense()")
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
