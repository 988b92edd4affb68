"""Lines and tables on standard output; imported by the command line, which has rich."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console as RichConsole
from rich.console import JustifyMethod
from rich.table import Table

from vgf_fast.envs.evaluation import EvaluationResult


class Console:
    """What the command line says: a table's width is the terminal's, a line is never broken."""

    def __init__(self) -> None:
        # Into a file or a pipe, tables are as wide as they are.
        self._console = RichConsole(highlight=False, width=None if sys.stdout.isatty() else 200)

    def line(self, text: str) -> None:
        """One line of text."""
        self._console.print(text, markup=False, soft_wrap=True)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], justify: JustifyMethod = "right"
    ) -> None:
        """A table; ``justify`` is for all columns but the first, which is flush left."""
        table = Table(title=title, title_justify="left", box=SIMPLE)
        for number, column in enumerate(columns):
            table.add_column(column, justify=justify if number else "left")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def results(
        self,
        title: str,
        results: Sequence[EvaluationResult],
        confidence: float = 0.95,
        baseline: tuple[str, float, float, float] | None = None,
    ) -> None:
        """A row for each result, after one for ``baseline``: name, mean return, and its interval's low and high."""
        has_success = any(result.success_mean is not None for result in results)
        has_score = any(result.normalized_mean is not None for result in results)
        columns = ["", "return", f"{100 * confidence:g} % interval", "steps"]
        rows = []
        if baseline is not None:
            rows.append([baseline[0], *_mean_and_interval(*baseline[1:]), ""])
        for result in results:
            interval = _mean_and_interval(result.return_mean, result.return_low, result.return_high)
            rows.append([name_of(result.label), *interval, f"{result.length_mean:.0f}"])
            if has_success:
                parts = (result.success_mean, result.success_low, result.success_high)
                rows[-1] += _mean_and_interval(*(100.0 * part for part in parts if part is not None))
            if has_score:
                score = (result.normalized_mean, result.normalized_low, result.normalized_high)
                rows[-1] += _mean_and_interval(*(part for part in score if part is not None))
        if has_success:
            columns += ["success %", "interval"]
        if has_score:
            columns += ["normalised score", "interval"]
        self.table(title, columns, rows)


def name_of(label: str) -> str:
    """What a person calls an evaluation's label."""
    names = {"bc": "behaviour cloning", "L=0": "L = 0, best of N"}
    return names.get(label, label.replace("=", " = "))


def _mean_and_interval(*values: float) -> list[str]:
    """Two cells for a mean and its interval; empty ones where there are none."""
    if not values:
        return ["", ""]
    mean, low, high = values
    return [f"{mean:.1f}", f"{low:.1f} to {high:.1f}"]
