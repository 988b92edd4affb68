"""The PyTorch methods as workers: this library in float32 and bfloat16, and the eager baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from profiling import machine
from profiling.eager import EagerAgent
from profiling.worker import Array, Job, Method, Sizes, serve
from vgf_fast import Learner, TrainConfig, TransportBudget, VGFConfig, VGFPolicy


def configurations(sizes: Sizes, precision: str = "float32") -> tuple[VGFConfig, TrainConfig]:
    """The library's configuration of given sizes; all else is the library's default."""
    budget = TransportBudget(steps=sizes.flow_steps)
    hidden = (sizes.hidden,) * sizes.layers
    policy = VGFConfig(
        observation_dim=sizes.observation_dim,
        action_dim=sizes.action_dim,
        hidden_dims=hidden,
        behavior_hidden_dims=hidden,
        members=sizes.members,
        behavior_steps=sizes.behavior_steps,
        particles=sizes.particles,
        train_budget=budget,
        test_budget=budget,
    )
    return policy, TrainConfig(batch_size=sizes.batch, precision="bfloat16" if precision == "bfloat16" else "float32")


class TorchMethod(Method):
    """What the PyTorch methods share: the device and its memory."""

    dtype = "float32"

    def __init__(self, job: Job) -> None:
        machine.limit_cores(job.threads)
        torch.set_num_threads(job.threads)
        self.device = torch.device(job.device)

    def facts(self) -> dict[str, Any]:
        """See ``Method.facts``."""
        cuda = self.device.type == "cuda"
        return {
            "dtype": self.dtype,
            "device": torch.cuda.get_device_name(self.device) if cuda else machine.cpu_name(),
            "threads": torch.get_num_threads(),
            "matmul_precision": torch.get_float32_matmul_precision(),
            "torch": torch.__version__,
            "triton": machine.version("triton"),
        }

    def to_device(self, array: Array) -> Tensor:
        """See ``Method.to_device``."""
        tensor = torch.from_numpy(array).to(self.device)
        self._synchronize()
        return tensor

    def wait(self, result: Any) -> None:
        """See ``Method.wait``."""
        self._synchronize()

    def memory(self) -> int:
        """See ``Method.memory``."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return machine.peak_resident_bytes()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Ours(TorchMethod):
    """This library: weights, optimiser and particles in float32; matrix products in ``precision``."""

    def __init__(self, job: Job, precision: str) -> None:
        super().__init__(job)
        self.dtype = precision
        config, train = configurations(job.sizes, precision)
        self.learner = Learner(VGFPolicy(config, device=self.device), train)
        self.acting = VGFPolicy(config, device=self.device).to(getattr(torch, precision))

    def update(self, batch: dict[str, Tensor]) -> Any:
        """See ``Method.update``."""
        return self.learner.update(batch)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Method.act``."""
        return self.acting.sample_actions(observation)


class Eager(TorchMethod):
    """The straightforward implementation, in float32."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        config, train = configurations(job.sizes)
        self.agent = EagerAgent(VGFPolicy(config, device=self.device), train)

    def update(self, batch: dict[str, Tensor]) -> Any:
        """See ``Method.update``."""
        return self.agent.update(batch)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Method.act``."""
        return self.agent.sample_actions(observation)


def make(job: Job) -> Method:
    """The method of that name. Raises ``ValueError`` for an unknown one."""
    if job.method == "ours-float32":
        return Ours(job, "float32")
    if job.method == "ours-bfloat16":
        return Ours(job, "bfloat16")
    if job.method == "eager-float32":
        return Eager(job)
    raise ValueError(f"method is {job.method!r}, expected 'ours-float32', 'ours-bfloat16' or 'eager-float32'")


if __name__ == "__main__":
    serve(make)
