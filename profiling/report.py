"""Write the README's performance tables from the committed records: ``python -m profiling.report``, ``make report``.

What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced; nothing else is touched. No record, no number.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "profiling" / "results"
NOT_YET = "Not yet measured on a GPU."
NAMES = {
    "ours-float32": "vgf_fast, float32",
    "ours-bfloat16": "vgf_fast, bfloat16 matrix products",
    "eager-float32": "plain PyTorch with autograd, float32",
    "jax-release": "public JAX release, jit, float32",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def latest(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The newest records of a file: benchmark -> method -> record."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            same = found.setdefault(record["benchmark"], {})
            if record["method"] not in same or record["date"] >= same[record["method"]]["date"]:
                same[record["method"]] = record
    return found


def _ratio(record: dict[str, Any] | None) -> str:
    if record is None or record["p50"] is None:
        return ""
    return "1.00" if record["method"] == "jax-release" else f"{record['ratio_to_jax']:.2f}"


def _source(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> str:
    records = [record for methods in found.values() for record in methods.values()]
    dates = sorted({record["date"][:10] for record in records})
    devices = sorted({record["device"] for record in records})
    name = path.relative_to(REPOSITORY)
    return f"Record: `{name}` ({', '.join(dates)}, {', '.join(devices)})."


def times(path: Path) -> str:
    """Time of an update and of an action as multiples of the JAX release's, and peak memory."""
    found = latest(path)
    if not found:
        return NOT_YET
    update, act, memory = found.get("update", {}), found.get("act", {}), found.get("memory update", {})
    rows = []
    for method, name in NAMES.items():
        if method not in update:
            continue
        peak = (memory.get(method) or update[method])["peak_bytes"]
        rows.append([name, _ratio(update[method]), _ratio(act.get(method)), f"{peak / 2**20:.0f}"])
    header = ["", "one update", "one action, one state", "peak memory, MiB"]
    return table(header, rows) + "\n\n" + _source(found, path)


def launches() -> str:
    """Launches of an update and of an action, and of an update in eager PyTorch."""
    found = json.loads((RESULTS / "launches.json").read_text(encoding="utf-8"))
    rows = [[name, str(entry["triton"]), str(entry["torch"]), str(entry["total"])] for name, entry in found.items()]
    header = ["launches at the paper's sizes", "Triton", "PyTorch", "together"]
    return table(header, rows) + "\n\nRecord: `profiling/results/launches.json`, from `python -m profiling.launches`."


def resources() -> str:
    """Registers, spills and shared memory of the kernels of an update and an action in bfloat16."""
    found = json.loads((RESULTS / "resources.json").read_text(encoding="utf-8"))
    targets = list(dict.fromkeys(row["target"] for row in found["rows"]))
    kernels: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in found["rows"]:
        if row["paper_size"] and "bf16" in row["scenario"] and row["has_product"]:
            kernels.setdefault(row["kernel"], {}).setdefault(row["target"], []).append(row)
    rows = []
    for kernel, of_target in kernels.items():
        cells = [f"`{kernel}`"]
        for target in targets:
            variants = of_target.get(target, [])
            registers, spilled, shared = (
                max((variant[key] for variant in variants), default=0)
                for key in ("registers", "spilled_bytes", "shared_bytes")
            )
            cells.append(f"{registers} / {spilled} / {shared / 1024:.0f}")
        rows.append(cells)
    header = ["registers / bytes spilled / KiB shared", *targets]
    source = (
        f"Record: `profiling/results/resources.json` (Triton {found['triton']}), from `python -m profiling.resources`."
    )
    return (
        table(header, rows)
        + "\n\nThe largest of each kernel's variants at the paper's sizes in bfloat16, as the compiler gives them; "
        + f"no measurement of a run. {source}"
    )


SECTIONS: dict[str, Callable[[], str]] = {
    "cpu": lambda: times(RESULTS / "cpu.jsonl"),
    "gpu": lambda: times(RESULTS / "gpu.jsonl"),
    "launches": launches,
    "resources": resources,
}


def rendered(text: str) -> str:
    """The text with every section written anew. Raises ``ValueError`` for a section whose markers it lacks."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"the README has no one place for {name!r}: expected {begin} and {end}, once each")
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        section = f"{begin}\n{make()}\n{end}"
        text = re.sub(pattern, lambda match, section=section: section, text, flags=re.DOTALL)  # type: ignore[misc]
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the README, or with ``--check`` say whether it is what the records give."""
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if the README is out of date"
    )
    options = parser.parse_args(arguments)
    before = README.read_text(encoding="utf-8")
    after = rendered(before)
    if options.check:
        return int(after != before)
    if after != before:
        README.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
