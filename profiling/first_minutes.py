"""The first minutes on a GPU, a part a call: ``python -m profiling.first_minutes PART``, one JSON object a line.

    compile    versions and clocks; every kernel of the paper's sizes compiled, on all cores, into Triton's cache
    accuracy   bfloat16 beside PyTorch's against float64, and twenty runs that must be equal to the bit
    running    actions and updates, launch by launch and then as CUDA graphs; why a graph could not be recorded
    kernels    time by kernel of an update and of an action, and of their replays
    questions  what decides between designs: products beside cuBLAS's, gaps between launches, two branches at once

``--tiny`` computes tiny sizes, without a GPU in Triton's interpreter, to see that every part runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from profiling import machine
from profiling.torch_methods import configurations
from profiling.worker import Sizes
from vgf_fast import Learner, VGFPolicy, functional
from vgf_fast.data.dataset import Dataset
from vgf_fast.reference import MLPWeights

TINY = Sizes(observation_dim=3, action_dim=2, batch=2, particles=3, behavior_steps=1, flow_steps=1, hidden=16, layers=2)


def emit(**row: Any) -> None:
    """Print one line of the record at once."""
    print(json.dumps(row), flush=True)


class Bench:
    """Sizes, device and random inputs of a part."""

    def __init__(self, tiny: bool) -> None:
        self.tiny = tiny
        self.sizes = TINY if tiny else Sizes()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu" and not tiny:
            raise SystemExit("there is no GPU that torch can use: --tiny runs without")
        self.graphs = (False, True) if self.device.type == "cuda" else (False,)  # whether CUDA graphs are recorded
        # The interpreter's arithmetic in bfloat16 is wrong.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        self.generator = torch.Generator().manual_seed(0)

    def calls(self, number: int) -> int:
        """So many calls, or one where they are only tried."""
        return 1 if self.tiny else number

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers on the device."""
        return torch.randn(shape, generator=self.generator).to(self.device)

    def policy(self, **options: Any) -> VGFPolicy:
        """A policy of these sizes on the Triton backend."""
        config, _ = configurations(self.sizes)
        return VGFPolicy(config, device=self.device, backend="triton", **options)

    def learner(self, policy: VGFPolicy, **options: Any) -> Learner:
        """A learner of such a policy."""
        return Learner(policy, configurations(self.sizes, self.precision)[1], **options)

    def batch(self) -> dict[str, Tensor]:
        """A batch of transitions on the device."""
        sizes = self.sizes
        states = self.normal(sizes.batch, sizes.observation_dim)
        ones = torch.ones(sizes.batch, device=self.device)
        return {
            "observations": states,
            "actions": self.normal(sizes.batch, sizes.action_dim).clamp(-1.0, 1.0),
            "next_observations": states.roll(1, 0),
            "rewards": ones,
            "masks": ones,
        }

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, function: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call among ``calls``; the device is waited for before and after."""
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        self.synchronize()
        return (time.perf_counter() - begin) / calls


# --- compile ---------------------------------------------------------------------------------------------------------


def compile_everything(bench: Bench) -> None:
    """Every kernel that the paper's sizes need, by as many processes as there are cores."""
    import triton

    from profiling import resources

    ptxas = triton.knobs.nvidia.ptxas.path
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True, check=False).stdout.split()
    emit(
        gpu=torch.cuda.get_device_name() if bench.device.type == "cuda" else None,
        driver=machine.gpu_driver(),
        clocks_mhz=machine.gpu_clocks(),
        torch=torch.__version__,
        triton=triton.__version__,
        ptxas=said[-1] if said else None,
        cores=machine.usable_cores(),
        commit=machine.git_commit(),
    )
    launches: dict[str, resources.Launch] = {}
    target = "sm_90" if bench.device.type == "cpu" else "sm_{}{}".format(*torch.cuda.get_device_capability())
    # Described on the CPU: a process that has used the GPU cannot be forked.
    scenarios = ["token flow"] if bench.tiny else list(resources.SCENARIOS)
    for name in scenarios:
        with resources.recorded(target) as recorded:
            resources.SCENARIOS[name][0]()
        launches |= {launch.key: launch for launch in recorded}
    count = machine.usable_cores()
    begin = time.perf_counter()
    fork = multiprocessing.get_context("fork")
    work = list(launches.values())
    processes = [fork.Process(target=_warm_up, args=(work[part::count],)) for part in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    emit(
        kernels=len(work), seconds=round(time.perf_counter() - begin, 1), failed=sum(p.exitcode != 0 for p in processes)
    )


def _warm_up(launches: list[Any]) -> None:
    from profiling import resources

    failed = 0
    for launch in launches:
        try:
            if torch.cuda.is_available():
                launch.warm_up()
            else:
                resources.compile_launch(launch, "sm_90")
        except Exception as error:
            # One kernel that does not compile must not keep the others from being compiled.
            emit(kernel=launch.kernel.__name__, error=repr(error).splitlines()[0][:300])
            failed += 1
    sys.exit(min(failed, 1))


# --- accuracy --------------------------------------------------------------------------------------------------------


def _rms(value: Tensor, truth: Tensor) -> float:
    return (value.double() - truth).square().mean().sqrt().item()


def accuracy(bench: Bench) -> None:
    """Root mean square errors of the kernels and of PyTorch in the same dtype, against float64; bits of repetitions."""
    policy, sizes = bench.policy(), bench.sizes
    states = bench.normal(sizes.batch, sizes.observation_dim)
    noise = bench.normal(sizes.batch, sizes.particles, sizes.action_dim)
    particles = noise.clamp(-1.0, 1.0)

    def behavior(weights: MLPWeights, dtype: torch.dtype, backend: functional.Backend) -> Tensor:
        return functional.behavior_flow(
            weights, states.to(dtype), noise.to(dtype), sizes.behavior_steps, backend=backend
        )

    def flow(weights: MLPWeights, dtype: torch.dtype, backend: functional.Backend) -> Tensor:
        budget = policy.config.train_budget
        return functional.value_gradient_flow(
            *(weights, states.to(dtype), particles.to(dtype), budget), optimizer="ascent", backend=backend
        ).particles

    for name, function, module in (("behaviour flow", behavior, policy.behavior), ("flow", flow, policy.critic)):
        stacked = module.stacked().detach()
        narrow = stacked.to(bench.dtype)
        truth = function(stacked.to(torch.float64), torch.float64, "torch")
        ours = function(narrow, torch.float32, "triton")
        plain = function(narrow, torch.float32, "torch")
        repeats = 1 if bench.tiny else 20
        equal = all(torch.equal(function(narrow, torch.float32, "triton"), ours) for _ in range(repeats))
        emit(what=name, error=_rms(ours, truth), pytorch=_rms(plain, truth), repeats=repeats, bit_equal=equal)
    losses: dict[str, list[float]] = {}
    batch = bench.batch()
    for backend in ("triton", "torch"):
        learner = bench.learner(VGFPolicy(policy.config, device=bench.device, backend=backend))
        losses[backend] = [learner.update(batch)["critic_loss"].item() for _ in range(bench.calls(3))]
    emit(what="training steps", critic_loss=losses)


# --- running ---------------------------------------------------------------------------------------------------------


class _Lines(logging.Handler):
    """Warnings of the library as lines of the record: why a graph could not be recorded."""

    def emit(self, record: logging.LogRecord) -> None:
        emit(warning=record.getMessage())


def running(bench: Bench) -> None:
    """Actions, updates and ``fit``, with and without CUDA graphs."""
    logging.getLogger("vgf_fast").addHandler(_Lines())
    state = bench.normal(1, bench.sizes.observation_dim)
    for graph in bench.graphs:
        acting = bench.policy(cuda_graph=graph).to(bench.dtype)
        seconds = [bench.seconds(lambda: acting.sample_actions(state)) for _ in range(bench.calls(5))]  # noqa: B023
        emit(what="act", cuda_graph=graph, milliseconds=[round(1e3 * s, 4) for s in seconds])
    batch = bench.batch()
    arrays: dict[str, Any] = {name: value.cpu() for name, value in batch.items()}
    dataset = Dataset.from_arrays(**arrays).to(bench.device)
    for graph in bench.graphs:
        learner = bench.learner(bench.policy(), cuda_graph=graph)
        seconds = [bench.seconds(lambda: learner.update(batch)) for _ in range(bench.calls(5))]  # noqa: B023
        emit(what="update", cuda_graph=graph, milliseconds=[round(1e3 * s, 4) for s in seconds])
        steps = bench.calls(30)
        fits = [bench.seconds(lambda: learner.fit(dataset, steps, progress=False)) for _ in range(bench.calls(2))]  # noqa: B023
        emit(what="fit", cuda_graph=graph, steps=steps, milliseconds_an_update=[1e3 * s / steps for s in fits])


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernel_times(bench: Bench) -> None:
    """Microseconds by kernel, of launches one by one; then of replays, between events."""
    batch, state = bench.batch(), bench.normal(1, bench.sizes.observation_dim)
    work: dict[str, dict[bool, Callable[[], object]]] = {"update": {}, "act": {}}
    for graph in bench.graphs:
        learner = bench.learner(bench.policy(), cuda_graph=graph)
        acting = bench.policy(cuda_graph=graph).to(bench.dtype)
        work["update"][graph] = functools.partial(learner.update, batch, check=False)
        work["act"][graph] = functools.partial(acting.sample_actions, state)
    cuda = bench.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    calls = bench.calls(10)
    for name, function in work.items():
        for _ in range(0 if bench.tiny else 3):
            function[False]()
        bench.synchronize()
        with torch.profiler.profile(activities=[activity]) as profiled:
            for _ in range(calls):
                function[False]()
            bench.synchronize()
        rows = sorted(profiled.key_averages(), key=lambda row: -row.self_device_time_total)[: 3 if bench.tiny else 40]
        for row in rows:
            emit(work=name, kernel=row.key, launches=row.count / calls, microseconds=row.self_device_time_total / calls)
        replay = function[bench.graphs[-1]]
        for _ in range(0 if bench.tiny else 5):
            replay()
        times = [bench.seconds(replay, bench.calls(20)) for _ in range(bench.calls(20))]
        emit(work=name, what="replay", milliseconds=1e3 * statistics.median(times))


# --- questions -------------------------------------------------------------------------------------------------------


def questions(bench: Bench) -> None:
    """Ask what ``profiling.questions`` asks."""
    from profiling.questions import ask

    ask(bench.device, bench.dtype, bench.tiny, emit)


PARTS: dict[str, Callable[[Bench], None]] = {
    "compile": compile_everything,
    "accuracy": accuracy,
    "running": running,
    "kernels": kernel_times,
    "questions": questions,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a part."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.first_minutes", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, without a GPU in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.part == "compile":
        # Counting devices would start CUDA, and what has started it cannot be forked.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    PARTS[options.part](Bench(options.tiny))
    return 0


if __name__ == "__main__":
    sys.exit(main())
