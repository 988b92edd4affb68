"""A training run in a directory: logs, evaluations and checkpoints that an interruption leaves whole.

The directory holds config.yaml, data.json, train.csv, eval.csv, tensorboard/, checkpoint/learner.safetensors and
policy/. At a checkpoint the logs are written first, then the learner, then the policy, so that a run killed anywhere
resumes from the last checkpoint, cuts the logs back to it, and ends with the files of a run that was never killed.
checkpoint/best/ holds the learner of the best evaluation, checkpoint/step_N/ those of the last few checkpoints.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from vgf_fast.common import checkpoints, interrupts
from vgf_fast.common.files import replacing, write_text
from vgf_fast.config import TrainConfig, VGFConfig
from vgf_fast.data.dataset import Dataset
from vgf_fast.envs.evaluation import EvaluationResult, check_environment, evaluate, means
from vgf_fast.envs.tasks import Evaluation
from vgf_fast.experiments.settings import RunConfig, Sections, to_yaml
from vgf_fast.learner import BEST, LEARNER_FILE, Learner
from vgf_fast.loop import Duty
from vgf_fast.policy import CONFIG_FILE, MODEL_FILE, VGFPolicy

SETTINGS_FILE, DATA_FILE = "config.yaml", "data.json"
TRAIN_LOG, EVAL_LOG = "train.csv", "eval.csv"
CHECKPOINT, POLICY, TENSORBOARD = "checkpoint", "policy", "tensorboard"
STEP, KEPT = "step_{step}", 3  # earlier checkpoints, and how many of them
DIGEST_ROWS = 2**20  # most transitions that a fingerprint looks at
LINE_SECONDS = 30.0  # between lines where there is no terminal
EVAL_COLUMNS = (
    "label", "flow_steps", "episodes", "return_mean", "return_low", "return_high", "success_mean", "success_low",
    "success_high", "normalized_mean", "normalized_low", "normalized_high", "length_mean",
)  # fmt: skip


class InterruptedRunError(Exception):
    """A signal ended the run; the message says that a checkpoint was saved and how to go on."""


def interruption(done: int, steps: int, unit: str, again: str) -> InterruptedRunError:
    """The error that says what was saved, and by which command it goes on."""
    name = interrupts.requested() or "interrupted"
    return InterruptedRunError(f"{name}: saved after {done:,} of {steps:,} {unit}; go on with: {again}")


class Reporter(Protocol):
    """Who is told what happens."""

    def line(self, text: str) -> None:
        """A line of text."""

    def results(self, title: str, results: Sequence[EvaluationResult]) -> None:
        """An evaluation's results, under a title."""


class CsvLog:
    """Rows of numbers, "step" first. Opening it drops the rows later than ``step`` and a row that was cut off.

    Raises ``OSError`` where it cannot be written.
    """

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        self.steps: set[int] = set()
        kept = []
        if path.is_file():
            header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            complete = [row for row in rows if row.endswith("\n") and int(row.split(",")[0]) <= step]
            self.steps = {int(row.split(",")[0]) for row in complete}
            kept = [header, *complete] if complete else []
        write_text(path, "".join(kept))
        self._is_empty = not kept
        self._file = path.open("a", encoding="utf-8", newline="")

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows of the same step with one write."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        if self._is_empty:
            writer.writeheader()
            self._is_empty = False
        writer.writerows(rows)
        self._file.write(text.getvalue())
        self._file.flush()
        self.steps |= {int(row["step"]) for row in rows}

    def sync(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def holds_run(out: Path) -> bool:
    """Whether the directory has files of a run."""
    names = (SETTINGS_FILE, TRAIN_LOG, EVAL_LOG, f"{CHECKPOINT}/{LEARNER_FILE}")
    return any((out / name).exists() for name in names)


def clear(out: Path) -> None:
    """Remove a run's files, and nothing else; first the checkpoint, without which the rest is no run to resume."""
    policy = [f"{POLICY}/{MODEL_FILE}", f"{POLICY}/{CONFIG_FILE}"]
    for name in (f"{CHECKPOINT}/{LEARNER_FILE}", *policy, TRAIN_LOG, EVAL_LOG, DATA_FILE, SETTINGS_FILE):
        (out / name).unlink(missing_ok=True)
    for folder in (out / CHECKPOINT / BEST, *_steps(out / CHECKPOINT).values()):
        _remove_checkpoint(folder)
    for events in (out / TENSORBOARD).glob("events.out.tfevents.*"):
        events.unlink()


def _steps(directory: Path) -> dict[int, Path]:
    """Folders of earlier checkpoints by their steps, in order."""
    prefix = STEP.format(step="")
    numbers = (path.name.removeprefix(prefix) for path in directory.glob(f"{prefix}*"))
    return {step: directory / STEP.format(step=step) for step in sorted(int(one) for one in numbers if one.isdecimal())}


def _remove_checkpoint(folder: Path) -> None:
    (folder / LEARNER_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def save_checkpoint(learner: Learner, directory: Path) -> None:
    """Save a learner under the name of the newest, and keep that of the last ``KEPT`` under their steps as well.

    Raises what ``Learner.save`` raises.
    """
    learner.save(directory)
    folder = directory / STEP.format(step=learner.step)
    folder.mkdir(exist_ok=True)
    kept = folder / LEARNER_FILE
    kept.unlink(missing_ok=True)
    try:
        # Saving replaces a file's name and never writes into it: two names can share one file.
        os.link(directory / LEARNER_FILE, kept)
    except OSError:
        with replacing(kept) as temporary:
            shutil.copyfile(directory / LEARNER_FILE, temporary)
    for old in list(_steps(directory).values())[:-KEPT]:
        _remove_checkpoint(old)


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What tells transitions from others: their number, widths, dtype, and a digest of at most ``DIGEST_ROWS``."""
    count = min(len(dataset), DIGEST_ROWS)
    digest = hashlib.sha256()
    for index in (
        torch.linspace(0, len(dataset) - 1, count, dtype=torch.float64, device="cpu").round().long().split(2**16)
    ):
        for name, field in dataset.take(index.to(dataset.device)).items():
            digest.update(name.encode())
            digest.update(field.contiguous().cpu().view(torch.uint8).numpy().data)
    return {
        "transitions": len(dataset),
        "observation_dim": dataset.observation_dim,
        "action_dim": dataset.action_dim,
        "dtype": str(dataset.dtype).removeprefix("torch."),
        "sha256": digest.hexdigest(),
    }


def check_data(out: Path, dataset: Dataset) -> None:
    """Raise ``ValueError`` when the directory's checkpoint was trained on other transitions, as far as it says."""
    if not (out / CHECKPOINT / LEARNER_FILE).is_file() or not (out / DATA_FILE).is_file():
        return
    begun, given = checkpoints.read_object(out / DATA_FILE), fingerprint(dataset)
    different = [name for name in given if begun.get(name) != given[name]]
    if different:
        told = "; ".join(f"{name} is {given[name]}, was {begun.get(name)}" for name in different[:1])
        raise ValueError(
            f"the checkpoint in {out} was trained on other transitions ({told}): give it those, or start another run"
        )


def write_data(out: Path, dataset: Dataset) -> None:
    """Note in a run's directory what it learns from. Raises ``OSError`` where that cannot be written."""
    write_text(out / DATA_FILE, json.dumps(fingerprint(dataset), indent=2) + "\n")


def open_learner(out: Path, sections: Sections, dataset: Dataset, run: RunConfig) -> Learner:
    """The learner of the directory's checkpoint, or a new one if there is none.

    Raises ``ValueError`` for settings or transitions that differ from the checkpoint's, and for sizes that are not the
    dataset's.
    """
    for name in ("observation_dim", "action_dim"):
        width = getattr(dataset, name)
        asked = sections["policy"].get(name, width)
        if asked != width:
            raise ValueError(f"policy.{name} is {asked}, but the data of {run.task} have {width}: another preset?")
    sizes: dict[str, Any] = {"observation_dim": dataset.observation_dim, "action_dim": dataset.action_dim}
    if dataset.action_bounds is not None and sections["policy"].get("action_low") is None:
        sizes |= {"action_low": dataset.action_bounds.low, "action_high": dataset.action_bounds.high}
    policy, train = VGFConfig.from_dict({**sections["policy"], **sizes}), TrainConfig.from_dict(sections["train"])
    device = str(dataset.device)
    if not (out / CHECKPOINT / LEARNER_FILE).is_file():
        return Learner(VGFPolicy(policy, device=device, backend=run.backend, seed=train.seed), train)
    check_data(out, dataset)
    learner = Learner.resume(out / CHECKPOINT, device=device, backend=run.backend)
    for section, asked, begun in (("policy", policy, learner.policy.config), ("train", train, learner.config)):
        for field in dataclasses.fields(asked):
            mine, saved = getattr(asked, field.name), getattr(begun, field.name)
            if mine != saved:
                raise ValueError(
                    f"{section}.{field.name} is {mine!r}, but the checkpoint in {out} was trained with {saved!r}: "
                    "leave it, or start another run"
                )
    return learner


def train(
    out: Path,
    run: RunConfig,
    learner: Learner,
    dataset: Dataset,
    evaluation: Evaluation,
    reporter: Reporter,
    progress: bool = True,
    again: str | None = None,
) -> None:
    """Train to ``run.steps`` updates in all, evaluating in ``evaluation``, if it has an environment, saving to ``out``.

    ``again`` is the command that goes on with an interrupted run, if it is not ``vgf-fast train``'s own.

    Raises ``InterruptedRunError`` after SIGINT or SIGTERM, with everything saved, ``ArithmeticError`` when the loss is
    no longer a number, and ``OSError`` when something cannot be written; then the last checkpoint stays.
    """
    if learner.step > run.steps:
        raise ValueError(f"run.steps is {run.steps}, but the checkpoint in {out} has {learner.step} updates already")
    if evaluation.make_env is not None and run.eval_interval:
        # Rather now than after the first hundred thousand updates.
        check_environment(learner.policy, evaluation.make_env)
    out.mkdir(parents=True, exist_ok=True)
    policy, train_ = learner.policy.config.to_dict(), learner.config.to_dict()
    sections = {"policy": policy, "train": train_, "run": dataclasses.asdict(run)}
    write_text(out / SETTINGS_FILE, to_yaml(sections))
    write_data(out, dataset)
    with interrupts.listening(), _Logs(out, learner.step, run.tensorboard) as logs:
        try:
            _Training(out, run, learner, dataset, evaluation, reporter, logs).go(progress)
        except KeyboardInterrupt:
            again = again or f"vgf-fast train --out {shlex.quote(str(out))} --resume"
            raise interruption(learner.step, run.steps, "updates", again) from None


class _Logs:
    """The two CSV files and, if it is installed and wanted, TensorBoard's events."""

    def __init__(self, out: Path, step: int, tensorboard: bool) -> None:
        self.train, self.evaluation = CsvLog(out / TRAIN_LOG, step), CsvLog(out / EVAL_LOG, step)
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._board = SummaryWriter(str(out / TENSORBOARD), purge_step=step + 1)

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, *error: object) -> None:
        self.train.close()
        self.evaluation.close()
        if self._board is not None:
            self._board.close()

    def scalars(self, prefix: str, values: Mapping[str, float], step: int) -> None:
        """Write values to TensorBoard alone."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def sync(self) -> None:
        """Flush all to the disk."""
        self.train.sync()
        self.evaluation.sync()
        if self._board is not None:
            self._board.flush()


@dataclasses.dataclass
class _Training:
    out: Path
    run: RunConfig
    learner: Learner
    dataset: Dataset
    evaluation: Evaluation
    reporter: Reporter
    logs: _Logs
    spoke: float = -math.inf  # when the last line was written
    begun: tuple[int, float] = (0, 0.0)  # step and time of the last record, or where updates went on after it

    def go(self, progress: bool) -> None:
        """Train to the end."""
        learner, run = self.learner, self.run
        if progress and sys.stderr.isatty():
            # The bar says it all.
            self.spoke = math.inf
        has_evaluations = self.evaluation.make_env is not None and run.eval_interval > 0
        is_done = learner.step == run.steps
        self._begin()
        learner.loop(
            self.dataset,
            run.steps,
            run.log_interval,
            self._log,
            first=self._evaluate_again if has_evaluations else None,
            evaluation=Duty(run.eval_interval, self._evaluate) if has_evaluations else None,
            save=Duty(run.checkpoint_interval, self._save),
            progress=progress,
        )
        if is_done:
            # The policy may be what is missing.
            self._save()

    def _begin(self) -> None:
        self.begun = self.learner.step, time.perf_counter()

    def _evaluate_again(self) -> None:
        """Evaluate at the step that a run is resumed at, if that is what it was interrupted in."""
        step, run = self.learner.step, self.run
        is_due = step % run.eval_interval == 0 or step == run.steps
        if step and is_due and step not in self.logs.evaluation.steps:
            self._evaluate()

    def _log(self, record: dict[str, float]) -> None:
        step = int(record["step"])
        rate = (step - self.begun[0]) / (time.perf_counter() - self.begun[1])
        self.logs.train.write([record])
        metrics = {name: value for name, value in record.items() if name != "step"}
        self.logs.scalars("train", {**metrics, "updates_per_second": rate}, step)
        if time.monotonic() - self.spoke > LINE_SECONDS:
            self.spoke = time.monotonic()
            left = (self.run.steps - step) / rate
            self.reporter.line(
                f"update {step:,} of {self.run.steps:,}: critic_loss {record['critic_loss']:.4g}, bc_loss "
                f"{record['bc_loss']:.4g}, q_mean {record['q_mean']:.4g}; {rate:.3g} updates/s, "
                f"{_duration(left)} left"
            )
        self._begin()

    def _evaluate(self) -> None:
        make_env, score = self.evaluation
        assert make_env is not None
        run, step = self.run, self.learner.step
        self.reporter.line(f"update {step:,}: evaluating {run.eval_episodes} episodes for each number of flow steps")
        results = evaluate(
            self.learner.policy,
            make_env,
            episodes=run.eval_episodes,
            flow_steps=run.eval_flow_steps,
            seed=self.learner.config.seed,
            num_envs=run.eval_num_envs,
            behavior_cloning=run.eval_behavior_cloning,
            workers=run.eval_workers,
            score=score,
            # The bar of the training is on the screen.
            progress=False,
        )
        with interrupts.held():
            self._keep(step, results)
        self._begin()

    def _keep(self, step: int, results: Sequence[EvaluationResult]) -> None:
        """Write an evaluation down, and the learner if it is the best so far."""
        rows = [{"step": step, **{name: getattr(result, name) for name in EVAL_COLUMNS}} for result in results]
        self.logs.evaluation.write(rows)
        scalars = means(results)
        self.logs.scalars("evaluation", scalars, step)
        self.learner.save_best(self.out / CHECKPOINT, scalars)
        self.reporter.results(f"update {step:,}", results)

    def _save(self) -> None:
        with interrupts.held():
            self.logs.sync()
            save_checkpoint(self.learner, self.out / CHECKPOINT)
            self.learner.policy.save_pretrained(self.out / POLICY)
        self._begin()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
