"""The paper's protocol: a preset, several seeds, one table against the paper's numbers.

A directory holds settings.yaml, a run for each seed (see ``experiments.run``), and, written anew from the runs' own
logs whenever one ends: evaluations.csv, summary.json, curve.png. Runs that are done are not run again and one that was
interrupted goes on, so that a call that was killed anywhere is repeated to the same table.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgf_fast.common import locks
from vgf_fast.common.devices import choose_device
from vgf_fast.common.files import replacing, write_text
from vgf_fast.common.intervals import bootstrap_interval
from vgf_fast.config import MAX_SEED, VGFConfig
from vgf_fast.envs import tasks
from vgf_fast.experiments import run as runs
from vgf_fast.experiments.presets import PaperScore
from vgf_fast.experiments.settings import RunConfig, Sections, read_file, to_yaml

SETTINGS, EVALUATIONS, SUMMARY, CURVE = "settings.yaml", "evaluations.csv", "summary.json", "curve.png"
# What a score is, the first that the evaluations have: column, name, factor.
METRICS = (
    ("success_mean", "success, %", 100.0),
    ("normalized_mean", "normalised score", 1.0),
    ("return_mean", "return", 1.0),
)
CONFIDENCE = 0.95
MAX_SEEDS = 1_000  # of a range: more is a slip of the pen


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of flow steps: the score at the end of training, over seeds."""

    flow_steps: int
    mean: float
    low: float  # of a percentile bootstrap over seeds
    high: float
    scores: tuple[float, ...]  # by seed


@dataclasses.dataclass(frozen=True)
class Summary:
    """What the runs of all seeds came to.

    Attributes:
        metric: what a score is.
        seeds: those whose runs have ended.
        steps: updates after which they were evaluated.
        cells: one for each number of flow steps.
        fixed: the cell of the preset's own number of test steps; None if that is not among those evaluated.
        best: the cell with the highest mean. It was chosen by the numbers that it reports, so it is a little high.
        last: mean over the last three evaluations, for each cell; as ``scores`` it is over seeds.
        paper: the paper's, or None.
    """

    metric: str
    seeds: tuple[int, ...]
    steps: int
    cells: tuple[Cell, ...]
    fixed: Cell | None
    best: Cell
    last: tuple[float, ...]
    paper: PaperScore | None


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "0..7" or "0,3,5" or both; without repetition, in the order given. Raises ``ValueError``."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*\.\.\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds is {text!r}, expected such as 0..7 or 0,3,5")
        low, high = int(match[1]), int(match[2] or match[1])
        if high > MAX_SEED or high - low >= MAX_SEEDS:
            raise ValueError(f"--seeds is {text!r}, expected at most {MAX_SEEDS:,} seeds, each at most {MAX_SEED}")
        seeds += range(low, high + 1)
    return tuple(dict.fromkeys(seeds))


def reproduce(
    out: Path,
    sections: Sections,
    seeds: Sequence[int],
    paper: PaperScore | None,
    reporter: runs.Reporter,
    progress: bool = True,
) -> Summary:
    """Train and evaluate every seed that is not done; the summary of all.

    All seeds learn from the same transitions on the device, one after the other in this process.

    Raises ``ValueError`` when the directory holds other settings, or there is nothing to evaluate in or with,
    ``locks.InUseError`` when another call works in it, and what ``run.train`` raises.
    """
    with locks.holding(out):
        return _reproduce(out, sections, seeds, paper, reporter, progress)


def _reproduce(
    out: Path,
    sections: Sections,
    seeds: Sequence[int],
    paper: PaperScore | None,
    reporter: runs.Reporter,
    progress: bool,
) -> Summary:
    run = RunConfig.from_dict(sections["run"])
    if not run.eval_interval or not run.eval_flow_steps:
        raise ValueError(
            f"run.eval_interval is {run.eval_interval} and run.eval_flow_steps is {run.eval_flow_steps}, expected "
            "evaluations: a reproduction is a table of them"
        )
    if run.dataset_dir is not None:
        run = dataclasses.replace(run, dataset_dir=str(Path(run.dataset_dir).expanduser().resolve()))
    sections = {**sections, "run": dataclasses.asdict(run)}
    _check_settings(out, sections)
    device, dtype = choose_device(run.device), getattr(torch, run.data_precision)
    task = tasks.load(
        run.task, run.dataset_dir, env=run.env, url=run.data_url, action_low=run.action_low,
        action_high=run.action_high, device=device, dtype=dtype,
    )  # fmt: skip
    if task.evaluation.make_env is None:
        raise ValueError(f"{run.task} has no environment to evaluate in: give run.env")
    for line in task.summary.splitlines():
        reporter.line(line)
    write_text(out / SETTINGS, to_yaml(sections))
    for seed in seeds:
        folder = out / f"seed_{seed}"
        own = {**sections, "train": {**sections["train"], "seed": seed}}
        with locks.holding(folder):
            learner = runs.open_learner(folder, own, task.train, run)
            if learner.step == run.steps and (folder / runs.POLICY / runs.MODEL_FILE).is_file():
                reporter.line(f"seed {seed}: done already")
            else:
                reporter.line(f"seed {seed}: {'going on after' if learner.step else 'from'} update {learner.step:,}")
                again = f"the same vgf-fast reproduce --out {shlex.quote(str(out))}"
                runs.train(folder, run, learner, task.train, task.evaluation, reporter, progress, again)
        del learner
        summary = summarise(out, sections, seeds, paper)
    return summary


def _check_settings(out: Path, sections: Sections) -> None:
    if not (out / SETTINGS).is_file():
        return
    old = read_file(out / SETTINGS)
    new = json.loads(json.dumps(sections))
    for section, fields in new.items():
        for name, value in fields.items():
            if name in ("device", "backend", "eval_workers", "tensorboard", "dataset_dir", "data_url"):
                continue
            begun = old.get(section, {}).get(name)
            if begun != value:
                raise ValueError(
                    f"{section}.{name} is {value!r}, but {out} was begun with {begun!r}: leave it, or choose another "
                    "directory"
                )


def read_evaluations(out: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of every seed's evaluation log, "seed" first; numbers as floats, empty cells as None."""
    rows = []
    for seed in seeds:
        log = out / f"seed_{seed}" / runs.EVAL_LOG
        if log.is_file():
            with log.open(encoding="utf-8", newline="") as file:
                for row in csv.DictReader(file):
                    numbers = {name: float(value) if value else None for name, value in row.items() if name != "label"}
                    rows.append({"seed": seed, "label": row["label"], **numbers})
    return rows


def summarise(out: Path, sections: Sections, seeds: Sequence[int], paper: PaperScore | None) -> Summary:
    """Read the runs' logs, and write the three files. Raises ``ValueError`` when no run has ended."""
    run = RunConfig.from_dict(sections["run"])
    rows = read_evaluations(out, seeds)
    ended = tuple(seed for seed in seeds if any(row["seed"] == seed and row["step"] == run.steps for row in rows))
    if not ended:
        raise ValueError(f"{out} holds no run that has ended, expected one of seeds {', '.join(map(str, seeds))}")
    column, metric, factor = next(one for one in METRICS if all(row[one[0]] is not None for row in rows))
    steps = sorted({int(row["step"]) for row in rows})

    def scores(flow_steps: int, step: int) -> list[float]:
        by_seed = {
            row["seed"]: factor * row[column]
            for row in rows
            if row["step"] == step and row["label"] == f"L={flow_steps}"
        }
        return [by_seed[seed] for seed in ended if seed in by_seed]

    cells = []
    for flow_steps in run.eval_flow_steps:
        own = scores(flow_steps, run.steps)
        low, high = bootstrap_interval(own, CONFIDENCE, seed=0)
        cells.append(Cell(flow_steps, float(np.mean(own)), low, high, tuple(own)))
    test_steps = VGFConfig.from_dict({"observation_dim": 1, "action_dim": 1, **sections["policy"]}).test_budget.steps
    summary = Summary(
        metric=metric,
        seeds=ended,
        steps=run.steps,
        cells=tuple(cells),
        fixed=next((cell for cell in cells if cell.flow_steps == test_steps), None),
        best=max(cells, key=lambda cell: cell.mean),
        last=tuple(float(np.mean([np.mean(scores(cell.flow_steps, step)) for step in steps[-3:]])) for cell in cells),
        paper=paper,
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / EVALUATIONS, text.getvalue())
    write_text(out / SUMMARY, json.dumps(dataclasses.asdict(summary), indent=2) + "\n")
    _draw(out / CURVE, summary, steps, run.eval_flow_steps, scores)
    return summary


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows for a reader."""
    header = ["", summary.metric, f"{100 * CONFIDENCE:g} % interval over seeds", "last three evaluations"]

    def row(name: str, cell: Cell) -> list[str]:
        last = summary.last[summary.cells.index(cell)]
        return [name, f"{cell.mean:.1f}", f"{cell.low:.1f} to {cell.high:.1f}", f"{last:.1f}"]

    rows = [row(f"L = {cell.flow_steps}", cell) for cell in summary.cells]
    if summary.fixed is not None:
        rows.append(row(f"fixed L = {summary.fixed.flow_steps}, the preset's", summary.fixed))
    rows.append(row(f"best L = {summary.best.flow_steps}, chosen by these numbers", summary.best))
    if summary.paper is not None:
        about = f" ({summary.paper.about})" if summary.paper.about else ""
        for name, score in (("VGF", summary.paper.vgf), ("FQL", summary.paper.fql), ("IQL", summary.paper.iql)):
            rows.append([f"paper, {name}{about}", f"{score:g}", "", ""])
    return header, rows


def _draw(
    path: Path,
    summary: Summary,
    steps: Sequence[int],
    flow_steps: Sequence[int],
    scores: Callable[[int, int], list[float]],
) -> None:
    """Score against updates, a line for each number of flow steps; none without matplotlib."""
    try:
        figure = curve(summary, steps, flow_steps, scores)
    except ImportError:
        return
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=130)


def curve(
    summary: Summary, steps: Sequence[int], flow_steps: Sequence[int], scores: Callable[[int, int], list[float]]
) -> Any:
    """The figure of ``curve.png``; ``scores(L, step)`` are those of the seeds. Raises ``ImportError``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for index, one in enumerate(flow_steps):
        by_step: Mapping[int, list[float]] = {step: scores(one, step) for step in steps}
        shown = [step for step in steps if by_step[step]]
        intervals = [bootstrap_interval(by_step[step], CONFIDENCE, seed=0) for step in shown]
        means = [float(np.mean(by_step[step])) for step in shown]
        # Broader the further back: where scores are equal, every line is still seen.
        behind = len(flow_steps) - 1 - index
        style: dict[str, Any] = {
            "lw": 1.5 + 2.0 * behind,
            "ms": 4.0 + 3.0 * behind,
            "color": f"C{index % 10}",
            "clip_on": False,
        }
        axes.plot(shown, means, "o-", label=f"L = {one}", zorder=3 + 0.01 * index, **style)
        low, high = ([interval[side] for interval in intervals] for side in (0, 1))
        axes.fill_between(shown, low, high, color=style["color"], alpha=0.15, lw=0)
    if summary.paper is not None:
        axes.axhline(summary.paper.vgf, color="black", ls=":", lw=1, label="paper, VGF")
    if "%" in summary.metric:
        # No axis of what cannot be; of the margin that matplotlib leaves, only the part between 0 and 100.
        bottom, top = axes.get_ylim()
        axes.set_ylim(max(bottom, 0.0), min(max(top, 5.0), 100.0))
    axes.set_xlabel("updates")
    axes.set_ylabel(summary.metric)
    axes.set_title(f"{len(summary.seeds)} seeds, band: {100 * CONFIDENCE:g} % interval over seeds", fontsize=10)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
