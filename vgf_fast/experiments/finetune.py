"""Offline to online in a directory: a run's learner, its task's simulator, records and checkpoints.

The directory holds config.yaml, data.json, online.jsonl, checkpoint/ and policy/. Called again, it goes on from the
last checkpoint, with the records later than that removed; the episode that was under way is begun anew.
checkpoint/best/ holds the learner of the best evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vgf_fast.common import interrupts, locks
from vgf_fast.common.devices import choose_device
from vgf_fast.common.files import write_text
from vgf_fast.envs import tasks
from vgf_fast.experiments.run import (
    CHECKPOINT,
    POLICY,
    SETTINGS_FILE,
    check_data,
    interruption,
    write_data,
)
from vgf_fast.experiments.settings import RunConfig, read_file, to_yaml
from vgf_fast.functional import Backend
from vgf_fast.learner import LEARNER_FILE, Learner
from vgf_fast.online import OnlineTraining, Record, Style

RECORDS = "online.jsonl"


class Console(Protocol):
    """Who is told what happens."""

    def line(self, text: str) -> None:
        """A line of text."""


def finetune(
    run: Path,
    out: Path,
    *,
    steps: int,
    style: Style,
    warm_up: int,
    buffer_size: int,
    eval_interval: int,
    eval_episodes: int,
    eval_flow_steps: Sequence[int],
    log_interval: int,
    checkpoint_interval: int,
    dataset_dir: str | None,
    seed: int,
    device: str | None,
    backend: Backend,
    console: Console,
    progress: bool = True,
) -> list[Record]:
    """Take the learner of ``run`` online, to ``steps`` steps in all; the arguments are ``vgf-fast finetune``'s.

    Returns the records of this call. Raises ``FileNotFoundError`` when ``run`` is no run, ``ValueError`` for a task
    without an environment or other transitions than before, ``locks.InUseError``, ``InterruptedRunError``
    after SIGINT or SIGTERM, with everything saved, and what ``OnlineTraining`` raises.
    """
    if not (run / CHECKPOINT / LEARNER_FILE).is_file():
        raise FileNotFoundError(f"{run} has no {CHECKPOINT}/{LEARNER_FILE}: expected the directory of a trained run")
    with locks.holding(out), interrupts.listening():
        settings = RunConfig.from_dict(read_file(run / SETTINGS_FILE).get("run", {}))
        if dataset_dir is not None:
            settings = dataclasses.replace(settings, dataset_dir=str(Path(dataset_dir).expanduser().resolve()))
        name, env, folder = settings.task, settings.env, settings.dataset_dir
        device = choose_device(device)
        evaluation = tasks.environment(name, folder, env=env)
        if evaluation.make_env is None:
            raise ValueError(f"{name} has no environment to act in: train with --env")
        task = tasks.load(
            name, folder, env=env, url=settings.data_url, action_low=settings.action_low,
            action_high=settings.action_high, device=device,
        )  # fmt: skip
        check_data(out, task.train)
        held = out / CHECKPOINT / LEARNER_FILE
        learner = Learner.resume((out if held.is_file() else run) / CHECKPOINT, device=device, backend=backend)
        training = OnlineTraining(
            learner,
            task.train,
            evaluation.make_env,
            style=style,
            warm_up=warm_up,
            buffer_size=buffer_size,
            reward_scale=task.reward_scale,
            reward_shift=task.reward_shift,
            seed=seed,
        )
        try:
            if held.is_file():
                training.restore(out / CHECKPOINT)
            if training.steps >= steps:
                raise ValueError(f"steps is {steps}, but the checkpoint in {out} has {training.steps} already")
            policy, train = learner.policy.config.to_dict(), learner.config.to_dict()
            sections = {"policy": policy, "train": train, "run": dataclasses.asdict(settings)}
            write_text(out / SETTINGS_FILE, to_yaml(sections))
            write_data(out, task.train)
            _cut(out / RECORDS, training.steps)
            start = "going on after" if training.steps else "after"
            console.line(
                f"{start} {training.steps:,} of {steps:,} steps in the simulator, {learner.step:,} updates in all"
            )
            with (out / RECORDS).open("a", encoding="utf-8") as file:

                def log(record: Record) -> None:
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    if any(name.startswith("return/") for name in record):
                        learner.save_best(out / CHECKPOINT, record)
                    shown = [key for key in record if key.partition("/")[0] in ("return", "success")]
                    text = ", ".join(f"{key} {record[key]:.3g}" for key in shown)
                    console.line(f"step {int(record['step']):,}: {text}" if text else f"step {int(record['step']):,}")

                records = training.run(
                    steps - training.steps,
                    log_interval=log_interval,
                    on_log=log,
                    eval_interval=eval_interval,
                    make_eval_env=evaluation.make_env,
                    eval_episodes=eval_episodes,
                    eval_flow_steps=tuple(eval_flow_steps),
                    score=evaluation.score,
                    checkpoint_dir=out / CHECKPOINT,
                    checkpoint_interval=checkpoint_interval,
                    progress=progress,
                )
        except KeyboardInterrupt:
            learner.policy.save_pretrained(out / POLICY)
            again = f"the same vgf-fast finetune --out {shlex.quote(str(out))}"
            raise interruption(training.steps, steps, "steps", again) from None
        finally:
            training.close()
        learner.policy.save_pretrained(out / POLICY)
        return records


def _cut(path: Path, step: int) -> None:
    """Drop the records later than a step, and one that was cut off; without any step, all."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() and step else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    write_text(path, "".join(kept))
