"""The PyTorch methods as workers: this library on either backend, the eager baseline, and that compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from profiling import machine
from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent
from profiling.worker import Array, Job, Method, Sizes, random_weights, serve
from vgf_fast import Learner, TrainConfig, TransportBudget, VGFConfig, VGFPolicy
from vgf_fast.functional import Backend
from vgf_fast.reference_checkpoint import load_mlp


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


def make_policy(job: Job, config: VGFConfig, device: torch.device, backend: Backend = "auto") -> VGFPolicy:
    """A policy with the weights that every method of the run begins with."""
    policy = VGFPolicy(config, device=device, backend=backend)
    arrays = random_weights(job.sizes, job.seed)
    load_mlp(policy.critic, arrays, "critic")
    load_mlp(policy.behavior, arrays, "bc")
    policy.target_critic.load_state_dict(policy.critic.state_dict())
    return policy


class TorchMethod(Method):
    """What the PyTorch methods share: the device and its memory."""

    dtype = "float32"

    def __init__(self, job: Job) -> None:
        machine.limit_cores(job.cores or job.threads)
        torch.set_num_threads(job.threads)
        self.device = torch.device(job.device)
        if self.device.type == "cuda":
            # As JAX does by default, and this library's kernels.
            torch.set_float32_matmul_precision("high")

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

    def __init__(self, job: Job, precision: str, backend: Backend) -> None:
        super().__init__(job)
        self.dtype = precision
        config, train = configurations(job.sizes, precision)
        self.learner = Learner(make_policy(job, config, self.device, backend), train)
        self.acting = make_policy(job, config, self.device, backend).to(getattr(torch, precision))

    def update(self, batch: dict[str, Tensor]) -> Any:
        """See ``Method.update``."""
        return self.learner.update(batch)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Method.act``."""
        return self.acting.sample_actions(observation)


class Baseline(TorchMethod):
    """The straightforward implementation: eager in float32, or compiled, in bfloat16 by autocast."""

    def __init__(self, job: Job, precision: str, compiled: bool) -> None:
        super().__init__(job)
        self.dtype = precision
        config, train = configurations(job.sizes)
        policy = make_policy(job, config, self.device)
        self.agent = EagerAgent(policy, train)
        if compiled:
            cuda_graphs = self.device.type == "cuda"
            self.agent = CompiledAgent(
                policy,
                train,
                mode="max-autotune" if cuda_graphs else "max-autotune-no-cudagraphs",
                autocast=torch.bfloat16 if precision == "bfloat16" else None,
            )

    def update(self, batch: dict[str, Tensor]) -> Any:
        """See ``Method.update``."""
        return self.agent.update(batch)

    def act(self, observation: Tensor) -> Tensor:
        """See ``Method.act``."""
        return self.agent.sample_actions(observation)


def make(job: Job) -> Method:
    """The method of that name. Raises ``ValueError`` for an unknown one."""
    implementation, _, precision = job.method.partition("-")
    if precision in ("float32", "bfloat16"):
        if implementation in ("ours", "torch"):
            return Ours(job, precision, "auto" if implementation == "ours" else "torch")
        if implementation == "compile" or job.method == "eager-float32":
            return Baseline(job, precision, compiled=implementation == "compile")
    raise ValueError(
        f"method is {job.method!r}, expected ours-, torch- or compile- with float32 or bfloat16, or eager-float32"
    )


if __name__ == "__main__":
    serve(make)
