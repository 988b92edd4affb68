"""The demo's task, learnt here and by the public JAX release: ``python -m profiling.reacher --jax-release DIR``.

Both train on the same transitions with the demo's settings, by turns of ``TURN`` updates, so that what else the machine
does slows both. The release's policy is then read from its own checkpoint (``VGFPolicy.from_reference_checkpoint``) and
evaluated on the same episodes with the same noise. Writes ``profiling/results/demo/release_seedN.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from profiling import machine, records
from profiling.bench import say
from vgf_fast import VGFPolicy
from vgf_fast.common.files import write_text
from vgf_fast.config import TrainConfig, VGFConfig
from vgf_fast.envs.evaluation import EvaluationResult, evaluate
from vgf_fast.experiments import demo

RESULTS = machine.REPOSITORY / "profiling" / "results" / "demo"
TURN = 50  # updates
FIELDS = ("observations", "actions", "next_observations", "rewards", "masks", "terminals")


def release_settings(policy: VGFConfig, train: TrainConfig) -> dict[str, Any]:
    """The demo's settings under the release's own names; what is not named is equal by default."""
    budget = policy.train_budget
    return {
        "value_hidden_dims": list(policy.hidden_dims),
        "actor_hidden_dims": list(policy.behavior_hidden_dims),
        "layer_norm": policy.layer_norm,
        "actor_layer_norm": policy.behavior_layer_norm,
        "activations": policy.activation,
        "bc_flow_steps": policy.behavior_steps,
        "vgf_particles": policy.particles,
        "vgf_q_agg": policy.flow_q_aggregation,
        "train_q_agg": policy.target_q_aggregation,
        "train_vgf_steps": budget.steps,
        "vgf_lr": budget.step_size,
        "vgf_alpha": budget.temperature,
        "train_particle_select": train.target_reduce,
        "value_lr": train.critic_learning_rate,
        "actor_lr": train.behavior_learning_rate,
        "batch_size": train.batch_size,
        "discount": train.discount,
        "tau": train.tau,
    }


@contextlib.contextmanager
def release(python: str, job: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The release's process: a function from request to answer, of which the first, for ``{}``, is its version.

    Raises ``OSError`` without the interpreter, ``RuntimeError`` when it fails.
    """
    command = [python, "-m", "profiling.reacher_release", json.dumps(job)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=machine.REPOSITORY, text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(request: dict[str, Any]) -> dict[str, Any]:
        if request:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        line = stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"it ended with status {process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"the release failed: {answer['error']}")
        return answer

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def compare(config: demo.DemoConfig, jax_release: str, jax_python: str, threads: int) -> dict[str, Any]:
    """The record of one seed. Raises as ``release``."""
    machine.limit_cores(threads)
    torch.set_num_threads(threads)
    load = machine.load_average()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    say(f"collecting {config.episodes} episodes")
    dataset, returns = demo.collect(config.episodes, config.seed)
    learner = demo.make_learner(config, "cpu")
    settings = release_settings(learner.policy.config, learner.config)

    def ours(updates: int) -> float:
        start = time.perf_counter()
        learner.fit(dataset, updates, log_interval=config.updates + 1, progress=False)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        data = f"{folder}/data.npz"
        np.savez(data, **{name: getattr(dataset, name).numpy() for name in FIELDS})
        job = {
            "release": jax_release,
            "data": data,
            "settings": settings,
            "seed": config.seed,
            "threads": threads,
        }
        with release(jax_python, job) as ask:
            version = ask({})["jax"]
            methods: dict[str, Callable[[int], float]] = {
                "ours": ours,
                "release": lambda updates: float(ask({"updates": updates})["seconds"]),
            }
            # The first update compiles, or fills caches.
            first = {name: method(1) for name, method in methods.items()}
            turns: dict[str, list[float]] = {name: [] for name in methods}
            done, order = 1, list(methods)
            say(f"training for {config.updates:,} updates each, by turns of {TURN}")
            while done < config.updates:
                updates = min(TURN, config.updates - done)
                for name in order:
                    turns[name].append(methods[name](updates))
                done += updates
                order.reverse()
            path = ask({"save": folder})["saved"]
        flags = {**settings, "ob_dims": [dataset.observation_dim], "action_dim": dataset.action_dim}
        policies = {"ours": learner.policy, "release": VGFPolicy.from_reference_checkpoint(path, flags, "cpu")}

    say(f"evaluating {config.eval_episodes} episodes for each number of flow steps")
    evaluations = {name: _evaluated(policy, config) for name, policy in policies.items()}
    return {
        "date": date,
        "commit": machine.git_commit(),
        "dirty": machine.git_dirty(),
        "device": machine.cpu_name(),
        "threads": threads,
        "load_average": load,
        "torch": torch.__version__,
        "jax": version,
        "environment": demo.ENVIRONMENT,
        "demo": dataclasses.asdict(config),
        "release_settings": settings,
        "data_return": float(returns.mean()),
        # Median over turns of our time by the release's in the same turn.
        "ratio": records.paired_ratio(turns["ours"], turns["release"]),
        "methods": {
            name: {
                "first_update_seconds": first[name],
                "other_updates_seconds": sum(turns[name]),
                "results": [result.to_dict() for result in evaluations[name]],
            }
            for name in methods
        },
    }


def _evaluated(policy: VGFPolicy, config: demo.DemoConfig) -> list[EvaluationResult]:
    """Evaluate as the demo does, on the same episodes."""
    return evaluate(
        policy,
        demo.make_env,
        episodes=config.eval_episodes,
        flow_steps=config.flow_steps,
        seed=config.seed + 1,
        num_envs=config.eval_episodes,
        behavior_cloning=True,
        confidence=demo.CONFIDENCE,
        progress=False,
    )


def show(record: dict[str, Any]) -> None:
    """The returns side by side, and the time."""
    pairs = zip(*(record["methods"][name]["results"] for name in ("ours", "release")), strict=True)
    for ours, theirs in pairs:
        say(f"{ours['label']:>5}  ours {_mean_and_interval(ours):<26} release {_mean_and_interval(theirs)}")
    for name, method in record["methods"].items():
        say(
            f"{name}: {method['other_updates_seconds']:.1f} s, and {method['first_update_seconds']:.1f} s before for "
            "the first update"
        )
    say(f"time of ours by the release's: {record['ratio']:.2f}")


def _mean_and_interval(result: dict[str, Any]) -> str:
    return f"{result['return_mean']:.1f} ({result['return_low']:.1f} to {result['return_high']:.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, show and record; the exit status is 1 when the release cannot run."""
    parser = argparse.ArgumentParser(prog="python -m profiling.reacher", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jax-release", metavar="DIR", required=True, help="checkout of the public JAX release")
    parser.add_argument("--jax-python", metavar="PYTHON", default=sys.executable, help="interpreter that has jax")
    parser.add_argument("--seed", type=int, default=0, help="of data, weights, training and evaluation")
    parser.add_argument("--updates", type=int, default=demo.DemoConfig.updates, help="of each")
    parser.add_argument("--episodes", type=int, default=demo.DemoConfig.episodes, help="of data")
    parser.add_argument("--eval-episodes", type=int, default=demo.DemoConfig.eval_episodes, help="for each setting")
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="CPU threads of either")
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="default: profiling/results/demo/")
    options = parser.parse_args(arguments)
    config = demo.DemoConfig(options.seed, options.episodes, options.updates, options.eval_episodes).checked()
    try:
        record = compare(config, str(Path(options.jax_release).resolve()), options.jax_python, options.threads)
    except (OSError, RuntimeError) as error:
        say(f"error: {error}")
        return 1
    show(record)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"release_seed{config.seed}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
