"""Records of measurements: one JSON object a line, one line for each benchmark and method."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One method in one benchmark. Times in seconds, memory in bytes; None is what was not measured or not there."""

    date: str  # UTC, ISO 8601
    benchmark: str  # "update" | "act" | "memory update" | "memory act" | "op NAME" | "scaling FACTOR" | "busy WORK"
    method: str
    dtype: str  # of the matrix products
    device: str  # model of the CPU or GPU
    driver: str | None  # the GPU's
    threads: int
    matmul_precision: str  # of float32 products, as the framework names it
    load_average: float | None  # over the minute before the first round
    python: str
    torch: str | None
    triton: str | None
    jax: str | None
    commit: str | None
    dirty: bool | None  # whether the checkout differed from the commit
    sizes: dict[str, int]
    rounds: int  # timed calls; all methods of a benchmark took turns
    p20: float | None
    p50: float | None
    p80: float | None
    ratio_to_jax: float | None  # median over rounds of this method's time by the release's in the same round
    ratio_to_eager: float | None  # likewise by the eager implementation's
    peak_bytes: int  # of the method's own process (CPU) or of its allocations (GPU)
    built_bytes: int  # the same before the first call
    ratio_to_compile: float | None = None  # as ratio_to_eager, by torch.compile's in the same dtype
    # Of single operations, and of scaling:
    op: str | None = None  # what one call is
    grid: str | None = None  # the sizes' name
    fault: str | None = None  # why it was not timed: it differs from the reference
    flops: int | None = None  # that the operation needs; by p50, what was achieved
    moved_bytes: int | None = None  # that it must read and write, once
    copies: int | None = None  # of the inputs, which calls went through by turns
    rotated_bytes: int | None = None  # all copies
    cache_bytes: int | None = None  # of the last-level cache, or a GPU's L2
    flushed_bytes: int | None = None  # written between calls
    timer: str | None = None  # "perf_counter" | "events" | "graph replay"
    clocks: dict[str, int] | None = None  # the GPU's after the last round, MHz
    # Of a busy machine:
    busy_loops: int | None = None  # processes that did nothing but run, beside the methods
    total: float | None = None  # of all timed calls
    ratio_to_one_thread: float | None = None  # of the totals, in the same rounds

    @property
    def flop_rate(self) -> float | None:
        """Achieved FLOP/s at the median."""
        return None if self.flops is None or self.p50 is None else self.flops / self.p50

    @property
    def byte_rate(self) -> float | None:
        """Achieved bytes/s at the median, of those that must be moved."""
        return None if self.moved_bytes is None or self.p50 is None else self.moved_bytes / self.p50

    def to_json(self) -> str:
        """One line; ``read`` reads it back."""
        return json.dumps(dataclasses.asdict(self))


def quantiles(seconds: Sequence[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """20th, 50th and 80th percentile; three times None of nothing."""
    if not seconds:
        return None, None, None
    p20, p50, p80 = (float(q) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    return p20, p50, p80


def paired_ratio(seconds: Sequence[float], peer: Sequence[float]) -> float | None:
    """Median over rounds of ``seconds`` by ``peer`` in the same round; None when either was not measured."""
    if not seconds or not peer:
        return None
    return float(np.median([mine / theirs for mine, theirs in zip(seconds, peer, strict=True)]))


def append(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Add records to a file, each in one write, making its folder if need be."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(record.to_json() + "\n")
            file.flush()


def read(path: str | os.PathLike[str]) -> list[Record]:
    """Every record of a file. Raises ``ValueError`` naming the line that is none."""
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            records.append(Record(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a record: {error}") from error
    return records
