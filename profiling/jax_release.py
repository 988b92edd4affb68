"""The public JAX release as a worker: builds its agent from a folder of the release and times its jitted functions.

Runs in an interpreter that has jax, flax, optax, distrax and ml_collections; it needs no PyTorch.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from profiling import machine
from profiling.worker import Array, Job, Method, random_weights, serve


class JaxRelease(Method):
    """``VGFAgent.update`` and ``VGFAgent.sample_actions`` of the release, both under jit as the release has them."""

    def __init__(self, job: Job) -> None:
        sizes = job.sizes
        if job.release is None or not (Path(job.release) / "agents" / "vgf.py").is_file():
            raise FileNotFoundError(f"no agents/vgf.py in {job.release}: expected a checkout of the public release")
        if sizes.members != 2:
            raise ValueError(f"members is {sizes.members}, expected 2: the release has no other number of critics")
        # XLA's CPU pool has one thread a core, counted when jax is imported.
        machine.limit_cores(job.threads)
        os.environ["JAX_PLATFORMS"] = job.device
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        sys.path.insert(0, job.release)
        import jax

        self.jax = jax
        self.sizes = sizes
        self.threads = job.threads
        release = importlib.import_module("agents.vgf")
        config = release.get_config()
        hidden = (sizes.hidden,) * sizes.layers
        config.batch_size = sizes.batch
        config.value_hidden_dims = hidden
        config.actor_hidden_dims = hidden
        config.bc_flow_steps = sizes.behavior_steps
        config.vgf_particles = sizes.particles
        config.train_vgf_steps = sizes.flow_steps
        config.vgf_alpha = 0.1
        observations = np.zeros((1, sizes.observation_dim), np.float32)
        actions = np.zeros((1, sizes.action_dim), np.float32)
        self.agent = self._with_weights(release.VGFAgent.create(job.seed, observations, actions, config), job)
        self.key = jax.random.PRNGKey(job.seed)

    def _with_weights(self, agent: Any, job: Job) -> Any:
        """The agent with the weights that every method of the run begins with."""
        trees: dict[str, Any] = {}
        for name, array in random_weights(job.sizes, job.seed).items():
            *path, leaf = name.split("/")
            tree = trees
            for part in path:
                tree = tree.setdefault(part, {})
            tree[leaf] = self.jax.device_put(array)
        parts = {"critic": "critic", "target_critic": "critic", "actor_bc": "bc"}
        states = {}
        for part, network in parts.items():
            state = getattr(agent, part)
            shapes, expected = (self.jax.tree_util.tree_map(np.shape, tree) for tree in (trees[network], state.params))
            if shapes != expected:
                raise ValueError(f"the release's {part} has parameters {expected}, expected {shapes}")
            states[part] = state.replace(params=trees[network])
        return agent.replace(**states)

    def facts(self) -> dict[str, Any]:
        """See ``Method.facts``."""
        device = self.jax.devices()[0]
        return {
            "dtype": "float32",
            "device": machine.cpu_name() if device.platform == "cpu" else device.device_kind,
            "threads": self.threads,
            "matmul_precision": self.jax.config.jax_default_matmul_precision or "default",
            "jax": self.jax.__version__,
        }

    def to_device(self, array: Array) -> Any:
        """See ``Method.to_device``."""
        # The key of the next action is made here too: splitting it is not part of acting.
        self.key, self.next_key = self.jax.random.split(self.key)
        return self.jax.block_until_ready((self.jax.device_put(array), self.next_key))[0]

    def update(self, batch: dict[str, Any]) -> Any:
        """See ``Method.update``."""
        self.agent, info = self.agent.update(batch)
        return self.agent, info

    def act(self, observation: Any) -> Any:
        """See ``Method.act``."""
        return self.agent.sample_actions(observation, seed=self.next_key, eval_vgf_steps=self.sizes.flow_steps)

    def wait(self, result: Any) -> None:
        """See ``Method.wait``."""
        self.jax.block_until_ready(result)

    def memory(self) -> int:
        """See ``Method.memory``."""
        device = self.jax.devices()[0]
        if device.platform == "cpu":
            return machine.peak_resident_bytes()
        return int(device.memory_stats()["peak_bytes_in_use"])


if __name__ == "__main__":
    serve(JaxRelease)
