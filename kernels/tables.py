"""Tables of addresses and offsets on a device, by which one launch reaches many tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

CACHED_TABLES = 256
_tables: OrderedDict[Hashable, Tensor] = OrderedDict()
_captured: dict[int, Tensor] = {}


def device_table(key: Hashable, device: torch.device, rows: Callable[[], list[list[int]]]) -> Tensor:
    """``rows()`` as an int64 tensor on a device, made once for a ``key``, which must determine it.

    A table that a CUDA graph captures is kept for ever, for its replays read it. Raises ``RuntimeError`` if a graph is
    being captured and the table was never made: the copy from the host cannot be captured.
    """
    key = (device, key)
    table = _tables.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if table is None:
        if capturing:
            raise RuntimeError("a CUDA graph is being captured with tensors not seen before: run it once uncaptured")
        table = torch.tensor(rows(), dtype=torch.int64, device=device)
        _tables[key] = table
        if len(_tables) > CACHED_TABLES:
            _tables.popitem(last=False)
    _tables.move_to_end(key)
    if capturing:
        _captured[id(table)] = table
    return table
