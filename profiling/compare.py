"""Is anything slower than before? ``python -m profiling.compare BEFORE.jsonl AFTER.jsonl``; exit status 1 if so.

Records of the same benchmark, method, dtype, sizes, device and threads are compared, the newest of each file. A method
is slower if its median grew by more than the noise: the wider of the two relative spreads between the 20th and the 80th
percentile. Where both files have the same peer in the same benchmark, times are first divided by its, so that a slower
day of the machine is not taken for a slower program.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NamedTuple

from profiling import records
from profiling.bench import say
from profiling.records import Record

PEERS = ("jax-release", "eager-float32")
Key = tuple[object, ...]


class Comparison(NamedTuple):
    """One method before and after."""

    name: str
    ratio: float  # of the times, after by before; below 1 is faster
    noise: float  # relative
    peer: str | None  # whose time both were divided by

    @property
    def slower(self) -> bool:
        """Whether it is slower by more than the noise."""
        return self.ratio > 1.0 + self.noise


def key(record: Record) -> Key:
    """What two records must have in common to be compared."""
    return (
        record.benchmark,
        record.op,
        record.method,
        record.dtype,
        record.device,
        record.threads,
        record.matmul_precision,
        tuple(sorted(record.sizes.items())),
    )


def newest(measured: Sequence[Record]) -> dict[Key, Record]:
    """The last record of every key that has a time."""
    timed = (record for record in measured if record.p50 is not None)
    return {key(record): record for record in sorted(timed, key=lambda record: record.date)}


def _noise(record: Record) -> float:
    assert record.p20 is not None
    assert record.p50 is not None
    assert record.p80 is not None
    return (record.p80 - record.p20) / record.p50


def _peer(record: Record, method: str, by_key: dict[Key, Record]) -> float | None:
    """The time of a peer in the same benchmark on the same machine."""
    for other in by_key.values():
        if other.method == method and _call(other) == _call(record):
            return other.p50
    return None


def _call(record: Record) -> Key:
    """What was called, whoever did it."""
    return record.benchmark, record.op, record.device, record.threads, record.sizes


def _name(record: Record, among: Sequence[Record]) -> str:
    """Benchmark, for several operations or sizes which of them, and method."""
    peers = [other for other in among if (other.benchmark, other.method) == (record.benchmark, record.method)]
    parts = [record.benchmark]
    if len({other.op for other in peers}) > 1 and record.op is not None:
        parts.append(record.op)
    varied = [n for n in record.sizes if len({other.sizes.get(n) for other in peers}) > 1]
    if record.grid is not None:
        parts.append(f"({record.grid})")
    elif varied:
        parts.append(f"({', '.join(f'{n} {record.sizes[n]}' for n in varied)})")
    return " ".join([*parts, record.method])


def compare(before: Sequence[Record], after: Sequence[Record]) -> list[Comparison]:
    """Every method that both have, in the order of the first."""
    old, new = newest(before), newest(after)
    comparisons = []
    common = [k for k in old if k in new]
    for first, second in ((old[k], new[k]) for k in common):
        assert first.p50 is not None
        assert second.p50 is not None
        ratio, by = second.p50 / first.p50, None
        for peer in () if first.method in PEERS else PEERS:
            then, now = _peer(first, peer, old), _peer(second, peer, new)
            if then and now:
                ratio, by = ratio / (now / then), peer
                break
        name = _name(first, [old[k] for k in common])
        comparisons.append(Comparison(name, ratio, max(_noise(first), _noise(second)), by))
    return comparisons


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the ratios; the exit status is 1 when a method of ours became slower, 2 when nothing can be compared."""
    parser = argparse.ArgumentParser(prog="python -m profiling.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", metavar="BEFORE.jsonl")
    parser.add_argument("after", metavar="AFTER.jsonl")
    options = parser.parse_args(arguments)
    try:
        comparisons = compare(records.read(options.before), records.read(options.after))
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    if not comparisons:
        say("nothing to compare: no benchmark of the same method, sizes, dtype, device and threads is in both")
        return 2
    width = max(len(comparison.name) for comparison in comparisons)
    slower = False
    for comparison in comparisons:
        by = f", by {comparison.peer}'s" if comparison.peer else ""
        mark = "  SLOWER" if comparison.slower else ""
        say(f"{comparison.name:<{width}}  x {comparison.ratio:.2f}  noise {comparison.noise:.2f}{by}{mark}")
        method = comparison.name.split()[-1]
        slower |= comparison.slower and method not in PEERS and not method.startswith("compile-")
    return int(slower)


if __name__ == "__main__":
    sys.exit(main())
