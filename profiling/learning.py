"""Does it learn? VGF against its own parts on data made here: ``python -m profiling.learning TASK --data DIR``.

Behaviour cloning (a random particle), best-of-N (L = 0) and the flow (L > 0) are one policy evaluated in different ways
on the same episodes, and the data's own trajectories stand beside them. Three seeds with small networks, on a CPU. The
data come from ``vgf-fast generate`` and ``profiling.locomotion``. ``--online`` takes the trained runs online instead.
Runs go on where they were stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profiling import machine
from vgf_fast.common.files import write_text
from vgf_fast.common.intervals import bootstrap_interval
from vgf_fast.envs import tasks
from vgf_fast.envs.evaluation import EvaluationResult
from vgf_fast.experiments import reproduce
from vgf_fast.experiments.finetune import RECORDS, finetune

RESULTS = machine.REPOSITORY / "profiling" / "results" / "learning"
FLOW_STEPS = [0, 1, 2, 3, 5]
NETWORKS: dict[str, Any] = {
    "hidden_dims": [128, 128], "behavior_hidden_dims": [128, 128], "particles": 5, "behavior_steps": 5,
}  # fmt: skip


ONLINE: dict[str, Any] = {
    "steps": 6000, "style": "half_and_half", "warm_up": 1000, "buffer_size": 100_000, "eval_interval": 2000,
    "eval_episodes": 5, "eval_flow_steps": [0, 3], "log_interval": 1000, "checkpoint_interval": 1000,
}  # fmt: skip


def _budgets(steps: int, step_size: float, temperature: float) -> dict[str, Any]:
    budget = {"steps": steps, "step_size": step_size, "temperature": temperature}
    return {"train_budget": budget, "test_budget": budget}


TRAIN: dict[str, Any] = {
    "batch_size": 128, "discount": 0.99, "critic_learning_rate": 1e-3, "behavior_learning_rate": 1e-3,
}  # fmt: skip


TASKS: dict[str, dict[str, Any]] = {
    "pointmaze": {
        "tuning": (
            "four other settings were tried with one seed each, all without success; three seeds of this one had 22.7 "
            "at L = 0, 9.3 at L = 2 and 37.3 at L = 5 after 8,000 updates, before they were taken on to 20,000"
        ),
        "data": "vgf-fast generate --env pointmaze-medium-navigate --episodes 200 --out DIR",
        "online": ("success", "success, %", 100.0),
        "policy": {**NETWORKS, **_budgets(2, 0.15, 0.5), "target_q_aggregation": "mean"},
        # A value travels one step of the maze's two hundred with each renewal of the target critic.
        "train": {**TRAIN, "tau": 0.2, "critic_learning_rate": 2e-3},
        "run": {"task": "pointmaze-medium-navigate-singletask-v0", "steps": 20000, "eval_episodes": 25},
    },
    "cube-single": {
        "tuning": (
            "three seeds with a step size of 0.05 and temperature 0.5 had 18.7 at L = 0 and 0.0 at L = 3 after 12,000 "
            "updates; those of these settings 12.0 at L = 0, 8.0 at L = 1 and 1.3 at L = 3, before they were taken on "
            "to 30,000"
        ),
        "data": "vgf-fast generate --env cube-single-play --episodes 200 --out DIR",
        "online": ("success", "success, %", 100.0),
        # The behaviour's actions in a state are a few hundredths apart.
        "policy": {**NETWORKS, **_budgets(3, 0.01, 0.2), "target_q_aggregation": "mean"},
        "train": {**TRAIN, "tau": 0.05},
        "run": {"task": "cube-single-play-singletask-v0", "steps": 30000, "eval_episodes": 25},
    },
    "halfcheetah": {
        "tuning": "a step size of 0.1 was tried with one seed of 3,000 updates",
        "data": "python -m profiling.locomotion --out DIR",
        "online": ("normalized", "normalised score", 1.0),
        "policy": {**NETWORKS, **_budgets(3, 0.05, 0.1), "target_q_aggregation": "min"},
        "train": {**TRAIN, "tau": 0.02},
        "run": {"task": "d4rl/halfcheetah-medium-replay-v2", "steps": 5000, "eval_episodes": 10},
    },
}


class _Reporter:
    def line(self, text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def results(self, title: str, results: Sequence[EvaluationResult]) -> None:
        for result in results:
            self.line(f"{title}, {result.label}: return {result.return_mean:.1f}, success {result.success_mean}")


def settings(name: str, data: Path) -> dict[str, dict[str, Any]]:
    """The sections of a task."""
    task = TASKS[name]
    run = {
        **task["run"], "dataset_dir": str(data), "eval_interval": task["run"]["steps"], "eval_num_envs": 25,
        "eval_flow_steps": FLOW_STEPS, "eval_behavior_cloning": True, "checkpoint_interval": 1000, "log_interval": 500,
        "tensorboard": False, "device": "cpu",
    }  # fmt: skip
    return {"policy": task["policy"], "train": task["train"], "run": run}


def data_scores(name: str, data: Path, metric: str) -> list[float]:
    """What the data's own trajectories reached, each: success in percent, or its normalised return."""
    task = tasks.load(TASKS[name]["run"]["task"], data)
    train = task.train
    ends = train.terminals.clone()
    ends[-1] = True
    number = torch.cumsum(ends, 0) - ends.long()
    count = int(number[-1]) + 1
    if metric.startswith("success"):
        reached = torch.zeros(count).index_add_(0, number, (train.masks == 0).float()) > 0
        return (100.0 * reached.float()).tolist()
    rewards = (train.rewards.double() - task.reward_shift) / task.reward_scale
    returns = torch.zeros(count, dtype=torch.float64).index_add_(0, number, rewards)
    assert isinstance(task.evaluation.score, tuple)
    low, high = task.evaluation.score
    return (100.0 * (returns - low) / (high - low)).tolist()


def measure(name: str, data: Path, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Train and evaluate what is not done, and return the record."""
    sections = settings(name, data)
    summary = reproduce.reproduce(work / name, sections, seeds, None, _Reporter(), progress=False)
    column, metric, factor = next(one for one in reproduce.METRICS if one[1] == summary.metric)
    rows = [row for row in reproduce.read_evaluations(work / name, seeds) if row["step"] == summary.steps]
    methods = {}
    for label in ("bc", *(f"L={steps}" for steps in FLOW_STEPS)):
        scores = [factor * row[column] for row in rows if row["label"] == label]
        methods[label] = _with_interval(scores)
    own = data_scores(name, data, metric)
    sections["run"].pop("dataset_dir")
    fixed = sections["policy"]["train_budget"]["steps"]
    differences = np.subtract(methods[f"L={fixed}"]["scores"], methods["L=0"]["scores"])
    return {
        **_facts(f"{name} --data DIR"), "task": name, "metric": metric,
        "data_command": TASKS[name]["data"], "tuning": TASKS[name]["tuning"],
        "seeds": list(seeds), "settings": sections, "trajectories": len(own),
        "data": {**_with_interval(own), "scores": []}, "methods": methods,
        "fixed": fixed, "best": max(FLOW_STEPS, key=lambda steps: methods[f"L={steps}"]["mean"]),
        "gain": _with_interval(differences.tolist()),
    }  # fmt: skip


def measure_online(name: str, data: Path, work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Take every seed's run online, if it is not yet, and return the record: scores against steps."""
    kind, metric, factor = TASKS[name]["online"]
    scores: dict[int, dict[str, list[float]]] = {}
    for seed in seeds:
        out = work / f"{name}-online" / f"seed_{seed}"
        if not (out / "policy").is_dir():
            finetune(
                work / name / f"seed_{seed}", out, dataset_dir=str(data), seed=seed, device="cpu", backend="auto",
                console=_Reporter(), progress=False, **ONLINE,
            )  # fmt: skip
        for line in (out / RECORDS).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for key, value in record.items():
                prefix, _, label = key.partition("/")
                if label and prefix == kind:
                    scores.setdefault(record["step"], {}).setdefault(label, []).append(factor * value)
    return {
        **_facts(f"{name} --online --data DIR"), "task": name, "metric": metric, "seeds": list(seeds),
        "data_command": TASKS[name]["data"], "settings": {**ONLINE, "offline": settings(name, Path("DIR"))},
        "scores": {
            str(step): {label: _with_interval(values) for label, values in by_label.items()}
            for step, by_label in scores.items()
        },
    }  # fmt: skip


def _facts(arguments: str) -> dict[str, Any]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": machine.cpu_name(), "torch": torch.__version__, "commit": machine.git_commit(),
        "command": f"python -m profiling.learning {arguments}",
    }  # fmt: skip


def _with_interval(scores: Sequence[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(scores, reproduce.CONFIDENCE, seed=0)
    return {"mean": float(np.mean(scores)), "low": low, "high": high, "scores": list(scores)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and record."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.learning", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data", metavar="DIR", type=Path, required=True, help="folder of the task's files")
    parser.add_argument("--work", metavar="DIR", type=Path, default=Path("runs") / "learning", help="of the runs")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS)
    parser.add_argument("--online", action="store_true", help="go on with the runs in the simulator")
    parser.add_argument("--seeds", default="0..2")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    run = measure_online if given.online else measure
    record = run(given.task, given.data.resolve(), given.work, reproduce.parse_seeds(given.seeds))
    path = given.out / f"{given.task}{'-online' if given.online else ''}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    sys.stdout.write(f"written: {path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
