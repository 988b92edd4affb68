"""Tables of the documentation, each from its records; ``profiling.report`` says which stands where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from profiling import records
from profiling.records import Record

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NOT_YET = "Not yet measured."
NOT_ON_GPU = "Not yet measured on a GPU."


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def by_columns(items: Iterable[Any], columns: Mapping[str, Callable[[Any], str]]) -> str:
    """A Markdown table with a row for each item: title of a column -> cell of an item."""
    return table(list(columns), [[cell(item) for cell in columns.values()] for item in items])


def number(value: float | None, digits: int = 2) -> str:
    """A cell; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def load(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def load_all(folder: Path, pattern: str) -> dict[Path, Any]:
    """The contents of a folder's JSON files that match, by their paths."""
    return {path: load(path) for path in sorted(folder.glob(pattern))}


def latest(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The newest records of a file: benchmark -> method -> record."""
    by_benchmark: dict[str, dict[str, dict[str, Any]]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            same = by_benchmark.setdefault(record["benchmark"], {})
            if record["method"] not in same or record["date"] >= same[record["method"]]["date"]:
                same[record["method"]] = record
    return by_benchmark


def newest(path: Path) -> list[Record]:
    """The records of a file without those that a later one of the same measurement replaces; none without a file."""
    in_order = sorted(records.read(path), key=lambda record: record.date) if path.is_file() else []
    return list({(r.benchmark, r.op, r.method, r.grid, json.dumps(r.sizes)): r for r in in_order}.values())


def named(*paths: Path) -> str:
    """Files as a reader of the repository finds them."""
    return ", ".join(f"`{path.relative_to(REPOSITORY)}`" for path in paths)


def source(path: Path, dates: Iterable[str], devices: Iterable[str], command: str = "") -> str:
    """The sentence that names a record, when and where it was made, and by which module's command."""
    facts = ", ".join([*sorted({date[:10] for date in dates}), *sorted(set(devices))])
    made = f", from `python -m profiling.{command}`" if command else ""
    return f"Record: {named(path)} ({facts}){made}."
