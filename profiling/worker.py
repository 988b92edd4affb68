"""One method in one process, answering requests for single timed calls: a JSON object a line on stdin and stdout.

A process of its own keeps a method's memory and thread pools apart from the others', and lets the JAX release run in
its own interpreter. This module needs NumPy alone.

Requests: ``{"do": "call", "benchmark": "update" | "act", "untimed": n}`` does n calls and times one more ->
``{"seconds": s}``; ``{"do": "memory"}`` -> ``{"peak_bytes": n, "built_bytes": n}``. After ``{"error": text}`` no other
answer follows.
"""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
BENCHMARKS = ("update", "act")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is computed. Defaults are the paper's; every count is >= 1."""

    observation_dim: int = 29  # O
    action_dim: int = 8  # A
    batch: int = 256  # transitions an update
    particles: int = 10  # N, particles a state
    behavior_steps: int = 10  # K, Euler steps of the flow-matching sampler
    flow_steps: int = 5  # L, value-gradient steps, in training and in acting
    hidden: int = 512  # width of every hidden layer of every network
    layers: int = 4  # hidden layers of every network
    members: int = 2  # E, critics


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker is told when it is started."""

    method: str
    device: str  # "cpu" | "cuda"
    threads: int
    seed: int
    sizes: Sizes
    release: str | None = None  # folder of the public release, for the method that runs it
    cores: int | None = None  # that the process keeps to; None: as many as threads

    def to_json(self) -> str:
        """One line; ``Job.from_json`` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Inverse of ``to_json``."""
        values = json.loads(text)
        return cls(**{**values, "sizes": Sizes(**values["sizes"])})


class Method(abc.ABC):
    """One implementation of VGF: a training update, and an action for one observation."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """``dtype``, ``device``, ``threads``, ``matmul_precision`` and the versions of what computes."""

    @abc.abstractmethod
    def to_device(self, array: Array) -> Any:
        """An array as the method's own, on its device, ready to be used."""

    @abc.abstractmethod
    def update(self, batch: dict[str, Any]) -> Any:
        """One training update; the result is what ``wait`` waits for."""

    @abc.abstractmethod
    def act(self, observation: Any) -> Any:
        """An action [A] for one observation [O]; the result is what ``wait`` waits for."""

    @abc.abstractmethod
    def wait(self, result: Any) -> None:
        """Return when the device has finished computing ``result``."""

    @abc.abstractmethod
    def memory(self) -> int:
        """Largest memory used so far in bytes: the device's for a GPU, the process's for a CPU."""


def random_batch(sizes: Sizes, rng: np.random.Generator) -> dict[str, Array]:
    """Fresh transitions: (next_)observations [B, O], actions [B, A] in (-1, 1), rewards and masks [B]."""
    return {
        "observations": rng.standard_normal((sizes.batch, sizes.observation_dim), dtype=np.float32),
        "actions": np.tanh(rng.standard_normal((sizes.batch, sizes.action_dim), dtype=np.float32)),
        "next_observations": rng.standard_normal((sizes.batch, sizes.observation_dim), dtype=np.float32),
        "rewards": -rng.integers(0, 2, sizes.batch).astype(np.float32),
        "masks": rng.integers(0, 2, sizes.batch).astype(np.float32),
    }


def random_weights(sizes: Sizes, seed: int) -> dict[str, Array]:
    """The weights every method of a run begins with, under the release's flat names: of its "critic" and its "bc".

    critic/value_net/Dense_i/kernel [E, in, out] and bias [E, out], critic/value_net/LayerNorm_i/scale and bias [E, H];
    bc/mlp/Dense_i/kernel [in, out] and bias [out].
    """
    rng = np.random.default_rng(seed)
    width = sizes.observation_dim + sizes.action_dim
    hidden = [sizes.hidden] * sizes.layers
    arrays: dict[str, Array] = {}
    for name, lead, into, out in (
        ("critic/value_net", (sizes.members,), width, 1),
        ("bc/mlp", (), width + 1, sizes.action_dim),
    ):
        for index, (fan_in, fan_out) in enumerate(zip([into, *hidden], [*hidden, out], strict=True)):
            kernel = rng.standard_normal((*lead, fan_in, fan_out), dtype=np.float32)
            arrays[f"{name}/Dense_{index}/kernel"] = kernel * np.float32(fan_in**-0.5)
            arrays[f"{name}/Dense_{index}/bias"] = np.zeros((*lead, fan_out), np.float32)
            if lead and index < sizes.layers:
                arrays[f"{name}/LayerNorm_{index}/scale"] = np.ones((*lead, fan_out), np.float32)
                arrays[f"{name}/LayerNorm_{index}/bias"] = np.zeros((*lead, fan_out), np.float32)
    return arrays


def timed_call(method: Method, benchmark: str, sizes: Sizes, rng: np.random.Generator) -> float:
    """Seconds of one call on fresh data, until its result is there. Making and moving the data is not counted."""
    data: Any
    call: Callable[[Any], Any]
    if benchmark == "update":
        data, call = {name: method.to_device(a) for name, a in random_batch(sizes, rng).items()}, method.update
    elif benchmark == "act":
        data, call = method.to_device(rng.standard_normal(sizes.observation_dim, dtype=np.float32)), method.act
    else:
        raise ValueError(f"benchmark is {benchmark!r}, expected one of {', '.join(map(repr, BENCHMARKS))}")
    start = time.perf_counter()
    method.wait(call(data))
    return time.perf_counter() - start


def serve(make: Callable[[Job], Method]) -> None:
    """Build the method for the job in ``sys.argv[1]``, say its facts, then answer requests until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not reach the answers

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        job = Job.from_json(sys.argv[1])
        method = make(job)
        rng = np.random.default_rng(job.seed)
        built = method.memory()
        answer({"facts": method.facts()})
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "call":
                for _ in range(request["untimed"]):
                    timed_call(method, request["benchmark"], job.sizes, rng)
                answer({"seconds": timed_call(method, request["benchmark"], job.sizes, rng)})
            elif request["do"] == "memory":
                answer({"peak_bytes": method.memory(), "built_bytes": built})
            else:
                raise ValueError(f"request is {request['do']!r}, expected 'call' or 'memory'")
    except Exception as error:  # the process ends here, and its parent reports the one line
        answer({"error": f"{type(error).__name__}: {error}"})
        raise
