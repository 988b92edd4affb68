"""Write the tables and charts of README.md and docs/ from the records: ``python -m profiling.report``.

What stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is replaced; nothing else is touched. No record, no number.
The charts in ``docs/`` are drawn anew when the numbers they show have changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from profiling import charts, scaling
from profiling.charts import Bars, Curve
from profiling.tables import language, latest, learned, newest, speed

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "profiling" / "results"
DOCS = REPOSITORY / "docs"


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of a page: the files or folders of its records in ``results/``, and what writes it from them."""

    files: tuple[str, ...]
    write: Callable[..., str]

    def __call__(self) -> str:
        """The section's text."""
        return self.write(*(RESULTS / file for file in self.files))


CPU = Section(("cpu.jsonl",), speed.times)
# Page, from the repository's root -> its sections, by the name between their markers.
PAGES: Mapping[str, Mapping[str, Section]] = {
    "README.md": {
        "demo": Section(("demo",), learned.demonstration),
        "cpu": CPU,
        "predicted": Section(("predicted.json", "gpu.jsonl"), speed.predicted_times),
    },
    "docs/reproduce.md": {
        "learning": Section(("learning",), learned.learned),
        "online": Section(("learning",), learned.online),
        "release": Section(("demo",), learned.beside_the_release),
    },
    "docs/language-models.md": {
        "alignment": Section(("alignment.json", "alignment-overhead.json", "alignment-320.json"), language.alignment),
    },
    "docs/kernels.md": {
        "launches": Section(("launches.json",), speed.launches),
        "resources": Section(("resources.json",), speed.resources),
    },
    "docs/performance.md": {
        "cpu": CPU,
        "gpu": Section(("gpu.jsonl",), speed.times),
        "predicted": Section(("predicted.json", "gpu.jsonl"), speed.predicted),
        "ops": Section(("ops-cpu.jsonl",), speed.operations),
        "ops-gpu": Section(("gpu.jsonl",), speed.operations),
        "llm": Section(("llm-cpu.jsonl",), speed.nearest),
        "scaling": Section(("scaling-cpu.jsonl",), speed.exponents),
        "roofline": Section(("roofline-cpu.json",), speed.roofline),
        "roofline-gpu": Section(("roofline-cuda.json",), speed.roofline),
    },
}


def rendered(text: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """The text with every section written anew.

    Raises ``ValueError`` for a section whose markers it lacks.
    """
    for name, make in sections.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
            raise ValueError(f"the text has no one place for {name!r}: expected {begin} and {end}, once each")
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{make()}\n{after}"
    return text


# --- charts ----------------------------------------------------------------------------------------------------------


def update_bars() -> list[Bars]:
    """Time of an update by method, a panel a record: the JAX release is 1, or eager PyTorch where it was not there."""
    panels = []
    for name in ("cpu", "gpu"):
        methods = latest(RESULTS / f"{name}.jsonl").get("update", {})
        against = "jax" if "jax-release" in methods else "eager"
        values = {
            label: 1.0 if method == "jax-release" else methods[method][f"ratio_to_{against}"]
            for method, label in speed.NAMES.items()
            if method in methods and methods[method]["p50"] is not None
        }
        if values:
            peer = speed.NAMES["jax-release" if against == "jax" else "eager-float32"]
            device = next(iter(methods.values()))["device"]
            panels.append(Bars(f"One training update, {device}", f"time, multiples of: {peer}", values))
    return panels


def cost_curves(path: Path) -> list[Curve]:
    """Cost against states, as rows, in multiples of that of one state."""
    return [
        Curve(
            curve.op.replace("_", " "),
            [record.sizes["batch"] * record.sizes["particles"] for record in curve.records],
            [seconds / curve.seconds[0] for seconds in curve.seconds],
        )
        for curve in scaling.curves(newest(path))
        if curve.factor == "states"
    ]


def draw(check: bool) -> bool:
    """Draw the charts whose numbers changed, or with ``check`` none; whether all showed their numbers already."""
    wanted: list[tuple[Path, Any, Callable[[Path], None]]] = []
    if panels := update_bars():
        wanted.append((DOCS / "update_time.png", panels, lambda path: charts.time_by_method(path, panels)))
    if curves := cost_curves(RESULTS / "scaling-cpu.jsonl"):
        title, unit = "Cost against rows, CPU", "time, multiples of that of one state"
        draw_curves = functools.partial(charts.cost_against_rows, curves=curves, title=title, unit=unit)
        wanted.append((DOCS / "cost_against_rows.png", [curves, title, unit], draw_curves))
    stale = [(path, make) for path, numbers, make in wanted if charts.stored_digest(path) != charts.digest(numbers)]
    if not check:
        for path, make in stale:
            make(path)
    return not stale


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages and the charts, or with ``--check`` say whether they are what the records give."""
    parser = argparse.ArgumentParser(prog="python -m profiling.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a page or a chart is out of date"
    )
    options = parser.parse_args(arguments)
    fresh = draw(options.check)
    for page, sections in PAGES.items():
        path = REPOSITORY / page
        before = path.read_text(encoding="utf-8")
        after = rendered(before, sections)
        fresh &= after == before
        if after != before and not options.check:
            path.write_text(after, encoding="utf-8")
    return int(options.check and not fresh)


if __name__ == "__main__":
    sys.exit(main())
