"""The public JAX release training on data it is given, a few updates at a time: the peer of ``profiling.reacher``.

Runs in an interpreter that has jax, flax, optax, distrax and ml_collections; it needs no PyTorch and no simulator.

Requests, a JSON object a line on stdin: ``{"updates": n}`` -> ``{"seconds": s}``; ``{"save": folder}`` writes
params_0.pkl there, as the release does, -> ``{"saved": path}``. After ``{"error": text}`` no other answer follows.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from profiling import machine


class Training:
    """``VGFAgent`` and ``Dataset`` of the release, used as its main.py uses them."""

    def __init__(self, release: str, data: str, settings: dict[str, Any], seed: int, threads: int) -> None:
        # XLA's CPU pool has one thread a core, counted when jax is imported.
        machine.limit_cores(threads)
        os.environ["JAX_PLATFORMS"] = "cpu"
        sys.path.insert(0, release)
        import jax

        self.jax = jax
        agents = importlib.import_module("agents.vgf")
        self.files = importlib.import_module("utils.flax_utils")
        config = agents.get_config()
        for name, value in settings.items():
            config[name] = tuple(value) if isinstance(value, list) else value
        with np.load(data) as arrays:
            self.dataset = importlib.import_module("utils.datasets").Dataset.create(**dict(arrays))
        self.batch_size = int(config.batch_size)
        # The release draws its batches from NumPy's global generator.
        np.random.seed(seed)  # noqa: NPY002
        example = self.dataset.sample(1)
        self.agent = agents.VGFAgent.create(seed, example["observations"], example["actions"], config)

    def update(self, updates: int) -> float:
        """Seconds of so many updates, each on a batch of its own."""
        start = time.perf_counter()
        for _ in range(updates):
            self.agent, _ = self.agent.update(self.dataset.sample(self.batch_size))
        self.jax.block_until_ready(self.agent)
        return time.perf_counter() - start

    def save(self, folder: str) -> str:
        """Write the release's own checkpoint."""
        self.files.save_agent(self.agent, folder, 0)
        return os.path.join(folder, "params_0.pkl")


def serve() -> None:
    """Build what the JSON in ``sys.argv[1]`` says, tell the version of jax, then answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not reach the answers

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        training = Training(**json.loads(sys.argv[1]))
        answer({"jax": training.jax.__version__})
        for line in sys.stdin:
            request = json.loads(line)
            if "updates" in request:
                answer({"seconds": training.update(request["updates"])})
            else:
                answer({"saved": training.save(request["save"])})
    except Exception as error:  # the process ends here, and its parent reports the one line
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    serve()
