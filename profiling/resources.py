"""What the kernels take on each architecture, without a GPU: registers, spills, shared memory, matrix instructions.

    python -m profiling.resources                      # compile everything, print the table
    python -m profiling.resources --write              # the same, and write profiling/results/resources.json
    python -m profiling.resources sm_90 --write profiling/results/resources-3.6.json      # with Triton 3.6 installed
    python -m profiling.resources sm_90 --scenario "flow bf16"

The launchers of the library run at real sizes, but every launch is written down instead of made; each is then compiled
ahead of time for the exact types, constants and options it was made with. The figures are the compiler's, no
measurement of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from profiling import machine

RESULTS = Path(__file__).parent / "results" / "resources.json"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Instructions of the matrix unit, and those of its full rate: in sm_90's machine code, where a wgmma that had to be
# serialised shows, and in the assembly handed to the assembler elsewhere, for disassembling takes as long as compiling.
MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bHG?MMA",
    "sm_100": r"\b(mma\.sync|tcgen05\.mma)",
    "gfx942": r"\bv_mfma",
}
FULL_RATE = {"sm_80": r"\bmma\.sync", "sm_90": r"\bHGMMA", "sm_100": r"\btcgen05\.mma", "gfx942": r"\bv_mfma"}
OBSERVATION_DIM, ACTION_DIM, WIDTHS, MEMBERS = 29, 8, (512, 512, 512, 512), 2
BATCH, PARTICLES, BEHAVIOR_STEPS, FLOW_STEPS = 256, 10, 10, 5
PROCESSORS = 132  # of an H200; the launch table asks for them
WRITTEN = ("out_ptr", "new_ptr", "q_ptr", "sums_ptr")  # arguments that kernels write, and do not read


class Launch(NamedTuple):
    """One launch as it would have been made, specialised for an architecture as Triton's own dispatch does."""

    kernel: Any  # triton's JITFunction
    arguments: tuple[Any, ...]  # tensors are replaced by what stands for their dtype
    keywords: dict[str, Any]
    signature: dict[str, Any]  # argument -> type, of a tuple those of its entries
    constants: dict[Any, Any]  # path to an argument, or on into a tuple -> its value, known when compiling
    attributes: dict[Any, Any]  # path -> what is known of the argument, such as a divisor
    options: dict[str, Any]  # warps, stages
    grid: tuple[int, ...]
    span: str  # the innermost range it was made in
    tensor_bytes: tuple[int, ...]  # of each distinct tensor that is read

    @property
    def key(self) -> str:
        """A text that is equal for equal machine code."""
        parts = (self.signature, self.constants, self.attributes, self.options)
        return repr((self.kernel.__name__, *(sorted(map(repr, part.items())) for part in parts)))

    def numbers(self) -> dict[str, Any]:
        """Every number and name the kernel gets, by its own name; of a tuple by those of its fields."""
        numbers: dict[str, Any] = {}
        for name, value in (*zip(self.kernel.arg_names, self.arguments, strict=False), *self.keywords.items()):
            parts = value._asdict() if hasattr(value, "_asdict") else {name: value}
            numbers |= {part: one for part, one in parts.items() if isinstance(one, (int, float, str))}
        return numbers

    def flags(self) -> list[str]:
        """Constants that choose what is computed, as a reader wants them."""
        chosen = {
            name: value
            for name, value in self.numbers().items()
            if name.isupper() and isinstance(value, (bool, str)) and value
        }
        return [name if value is True else f"{name}={value}" for name, value in chosen.items()]

    def warm_up(self) -> None:
        """Compile it for the GPU at hand, into Triton's cache."""
        self.kernel.warmup(*self.arguments, grid=self.grid, **self.keywords)


def _target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name[3:]), 32)


def _without_memory(value: Any) -> Any:
    """An argument with every tensor in it replaced by what stands for its dtype."""
    from triton.runtime.jit import MockTensor

    if torch.is_tensor(value):
        return MockTensor(value.dtype)
    if isinstance(value, tuple):
        parts = tuple(map(_without_memory, value))
        return type(value)(*parts) if hasattr(value, "_fields") else parts
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _describe(kernel: Any, target: str, grid: Any, span: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(_target(target))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    read = tuple(value for name, value in zip(kernel.arg_names, args, strict=False) if name not in WRITTEN)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(kwargs), bound, specialization, options)
    return Launch(
        kernel,
        _without_memory(args),
        {name: _without_memory(value) for name, value in kwargs.items()},
        signature,
        constants,
        attributes,
        {name: value for name, value in kwargs.items() if name not in kernel.arg_names},
        tuple(map(int, grid(bound) if callable(grid) else grid)),
        span,
        tuple({t.data_ptr(): t.numel() * t.element_size() for t in _tensors(read)}.values()),
    )


@contextlib.contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """While it lasts, kernels are not launched but listed, and launchers take tensors on the CPU for that GPU's."""
    import triton
    from vgf_fast.kernels import launch, packing, ranges

    launches: list[Launch] = []
    spans = [""]

    @contextlib.contextmanager
    def span(name: str) -> Iterator[None]:
        spans.append(name)
        yield
        spans.pop()

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_describe(self, target, grid, spans[-1], args, kwargs))

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", run),
        mock.patch.object(launch, "check_device"),
        mock.patch.object(packing, "_kernel_runs", return_value=True),
        mock.patch.object(launch, "interpreted", return_value=False),
        mock.patch.object(launch, "programmatic", return_value=target in ("sm_90", "sm_100")),
        mock.patch.object(launch, "precision", return_value="tf32"),
        mock.patch.object(launch, "processors", return_value=PROCESSORS),
        mock.patch.object(launch, "wide_tiles", return_value=target == "sm_90"),
        mock.patch.object(ranges, "span", span),
        mock.patch.object(torch.version, "hip", "6.0" if target.startswith("gfx") else None),
    ):
        yield launches


# --- what is launched ------------------------------------------------------------------------------------------------


def _policy(**overrides: Any) -> Any:
    from vgf_fast import VGFConfig, VGFPolicy

    return VGFPolicy(VGFConfig(OBSERVATION_DIM, ACTION_DIM, **overrides), seed=0)


def _packed(module: Any, dtype: torch.dtype) -> Any:
    from vgf_fast.kernels import packing

    groups = [[tensor.detach() for tensor in group] for group in module.stacked()[:4]]
    return packing.pack(*groups, module.activation, module.observation_dim, module.action_dim, dtype)


def flow(dtype: torch.dtype, particles: int = PARTICLES, bandwidth_gradient: bool = False) -> None:
    """Particles drawn, moved, chosen, and the TD target of others."""
    from vgf_fast.kernels import sequence

    policy = _policy()
    states, noise = torch.zeros(BATCH, OBSERVATION_DIM), torch.zeros(BATCH, particles, ACTION_DIM)
    rewards = torch.zeros(BATCH)
    online, velocity = _packed(policy.critic, dtype), _packed(policy.behavior, dtype)
    sequence.behavior_flow(velocity, states, noise, BEHAVIOR_STEPS)
    budget = (FLOW_STEPS, 0.1, 0.1, "mean", bandwidth_gradient)
    for epilogue in (sequence.Select(), sequence.TDTarget(rewards, rewards, 0.99)):
        sequence.value_gradient_flow(online, states, noise, *budget, epilogue=epilogue)
    sequence.values_and_score(online, states, noise)


def acting(dtype: torch.dtype, bandwidth_gradient: bool = False) -> None:
    """One action of one state, by all processors of a large GPU."""
    from vgf_fast.kernels import sequence

    policy = _policy()
    states, noise = torch.zeros(1, OBSERVATION_DIM), torch.zeros(1, PARTICLES, ACTION_DIM)
    critic, velocity = _packed(policy.critic, dtype), _packed(policy.behavior, dtype)
    budget = (BEHAVIOR_STEPS, FLOW_STEPS, 0.1, 0.1, "mean", bandwidth_gradient)
    sequence.act(velocity, critic, states, noise, *budget)


def sizes_of_one() -> None:
    """One state, particle, action entry, member, layer and unit, which Triton makes constants."""
    from vgf_fast.kernels import sequence

    from vgf_fast.networks import EnsembleMLP, VelocityField

    critic = _packed(EnsembleMLP(1, 1, (1,), 1), torch.float32)
    velocity = _packed(VelocityField(1, 1, (1,)), torch.float32)
    states, noise = torch.zeros(1, 1), torch.zeros(1, 1, 1)
    sequence.act(velocity, critic, states, noise, 2, 2, 0.1, 0.1, "mean", True)
    target = sequence.TDTarget(states[0], states[0], 0.9)
    sequence.value_gradient_flow(critic, states, noise, 1, 0.1, 0.1, epilogue=target)


def particle_step(dtype: torch.dtype) -> None:
    """The SVGD kernels by themselves, and the reductions over particles and members."""
    from vgf_fast.kernels import selection, svgd

    for particles, gradient in ((10, True), (10, False), (40, True), (128, False)):
        x = torch.zeros(BATCH, particles, ACTION_DIM, dtype=dtype)
        m = torch.zeros(BATCH, particles, ACTION_DIM)
        svgd.svgd_step_(x, x.clone(), m, m.clone(), 1, 0.1, 0.1, gradient)
        svgd.svgd_direction(x, x, 0.1, gradient)
    q = torch.zeros(MEMBERS, BATCH, PARTICLES, dtype=dtype)
    x = torch.zeros(BATCH, PARTICLES, ACTION_DIM, dtype=dtype)
    uniform = torch.zeros(BATCH)
    selection.aggregate(q, "min")
    selection.select_particle(x, q[0], "max", 1.0, None)
    selection.select_particle(x, q[0], "softmax", 1.0, uniform)
    selection.td_target(q, uniform, uniform, 0.99, "min", "mean")
    selection.td_target(q, uniform, uniform, 0.99, "mean", "max")


def training(dtype: torch.dtype) -> None:
    """Weights packed; a training step of the critic and of the velocity field; gradients by themselves."""
    from vgf_fast.kernels import packing, training

    policy = _policy()
    states, actions = torch.zeros(BATCH, OBSERVATION_DIM), torch.zeros(BATCH, ACTION_DIM)
    time, target = torch.zeros(BATCH, 1), torch.zeros(BATCH, 1)
    stacks = []
    for module in (policy.critic, policy.behavior):
        groups = [list(group) for group in module.stacked()[:4]]
        stacks.append(packing.Stack(*groups, module.activation, OBSERVATION_DIM, ACTION_DIM))
    packed = packing.pack_many(stacks, dtype)
    targets = [torch.zeros_like(parameter) for parameter in stacks[0].parameters]
    batches = (
        training.Batch(states, actions, None, None, target),
        training.Batch(states, actions, time, actions, None),
    )
    for stack, weights, batch, polyak in zip(stacks, packed, batches, (targets, ()), strict=True):
        adam = torch.optim.Adam(list(stack.parameters), lr=3e-4)
        training.training_step_(stack, weights, batch, adam, targets=polyak, tau=0.005)
    loss, _ = training.mlp_loss(stacks[0], states, actions, target, dtype=dtype)
    loss.backward()


def nearest(dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> None:
    """The nearest tokens of so many rows, and of few."""
    from vgf_fast.kernels import nearest_token

    queries, table = torch.empty(rows, width, dtype=dtype), torch.empty(vocabulary, width, dtype=dtype)
    mask = torch.ones(vocabulary, dtype=torch.bool)
    for k in (1, 20):
        nearest_token.nearest_token(queries, table, k, "l2", mask)
    nearest_token.nearest_token(queries, table, 1, "cosine", log_prior=torch.zeros(vocabulary))
    nearest_token.nearest_token(queries[:8], table, 20, "l2", mask)


def token_flow() -> None:
    """The direction between responses of 128 tokens of 768 dimensions."""
    from vgf_fast.kernels import token_flow

    for particles in (8, 32, 128):
        x = torch.empty(particles, 128 * 768)
        token_flow.token_svgd_direction(x, x, 0.1)


SCENARIOS: dict[str, tuple[Callable[[], None], bool]] = {
    # name: what to run, and whether it is of the paper's sizes, where nothing may spill
    "flow bf16": (lambda: flow(torch.bfloat16), True),
    "acting bf16": (lambda: acting(torch.bfloat16), True),
    "sizes of one": (sizes_of_one, False),
    "training bf16": (lambda: training(torch.bfloat16), True),
    "particles float32": (lambda: particle_step(torch.float32), True),
    "nearest bf16": (lambda: nearest(torch.bfloat16, 4096, 128_256, 4096), True),
    "token flow": (token_flow, True),
    "flow tf32": (lambda: flow(torch.float32), True),
    "flow bf16, median differentiated": (lambda: flow(torch.bfloat16, bandwidth_gradient=True), True),
    "flow bf16, 128 particles": (lambda: flow(torch.bfloat16, 128), False),
    "acting tf32": (lambda: acting(torch.float32), True),
    "acting bf16, median differentiated": (lambda: acting(torch.bfloat16, bandwidth_gradient=True), True),
    "training tf32": (lambda: training(torch.float32), True),
    "particles bf16": (lambda: particle_step(torch.bfloat16), True),
    "nearest tf32": (lambda: nearest(torch.float32, 512, 30_522, 384), True),
}


# --- compiling -------------------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> Any:
    """Machine code of a launch recorded for an architecture."""
    import triton
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=_target(target), options=launch.options)


def _dump(cubin: bytes, option: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(compiled: Any, target: str) -> dict[str, int]:
    """Registers a thread, bytes spilled, bytes of shared memory, and matrix instructions of machine code."""
    if target.startswith("gfx"):
        assembly = compiled.asm["amdgcn"]
        keys = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        counts = {key: int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1)) for key in keys}  # type: ignore[union-attr]
        registers = counts["vgpr_count"]
        spilled = counts["private_segment_fixed_size"] + counts["vgpr_spill_count"]
    else:
        cubin = compiled.asm["cubin"]
        report = _dump(cubin, "--dump-resource-usage")
        registers, stack, local = (
            int(re.search(rf"{key}:(\d+)", report).group(1))  # type: ignore[union-attr]
            for key in ("REG", "STACK", "LOCAL")
        )
        spilled = stack + local
        assembly = _dump(cubin, "-sass") if target == "sm_90" else compiled.asm["ptx"]
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "matrix_instructions": len(re.findall(MATRIX_INSTRUCTIONS[target], assembly)),
        "full_rate": len(re.findall(FULL_RATE[target], assembly)),
    }


def _has_product(function: Any) -> bool:
    """Whether a kernel, or a device function it calls, multiplies matrices."""
    body = function.src.partition("(")[2]  # behind its own name
    called = (function.fn.__globals__.get(name) for name in set(re.findall(r"\b(\w+)\(", body)))
    return "tl.dot(" in body or any(_has_product(one) for one in called if isinstance(one, type(function)))


_WORK: list[tuple[str, str, bool, Launch]] = []  # of the processes that compile


def _row(number: int) -> dict[str, Any]:
    target, scenario, is_paper_size, launch = _WORK[number]
    numbers = launch.numbers()
    return {
        "target": target,
        "scenario": scenario,
        "kernel": launch.kernel.__name__,
        "flags": " ".join(launch.flags()),
        "num_warps": launch.options.get("num_warps", 4),
        "paper_size": is_paper_size,
        "has_product": _has_product(launch.kernel),
        "tile": [numbers[name] for name in ("BLOCK_M", "BLOCK_N") if name in numbers],
        **resources(compile_launch(launch, target), target),
    }


def rows(targets: tuple[str, ...] = TARGETS, scenarios: tuple[str, ...] = tuple(SCENARIOS)) -> Iterator[dict[str, Any]]:
    """One row a distinct kernel of a scenario and an architecture, in a fixed order; compiled on all cores."""
    _WORK.clear()
    for target in targets:
        seen: set[str] = set()
        for name, (make, is_paper_size) in SCENARIOS.items():
            if name not in scenarios:
                continue
            with recorded(target) as launches:
                make()
            for launch in launches:
                if launch.key not in seen:
                    seen.add(launch.key)
                    _WORK.append((target, name, is_paper_size, launch))
    # Forked: a launch holds functions that cannot be sent.
    with multiprocessing.get_context("fork").Pool(machine.usable_cores()) as pool:
        yield from pool.imap(_row, range(len(_WORK)))


def main(argv: list[str] | None = None) -> int:
    """Print one JSON object a line, or with ``--write`` the file."""
    parser = argparse.ArgumentParser(prog="python -m profiling.resources", description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="target", help=" ".join(TARGETS))
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="only this one; may be repeated")
    parser.add_argument(
        "--write", nargs="?", const=RESULTS, type=Path, metavar="FILE", help=f"write FILE, by default {RESULTS.name}"
    )
    arguments = parser.parse_args(argv)
    unknown = [target for target in arguments.targets if target not in TARGETS]
    if unknown:
        parser.error(f"unknown target {', '.join(unknown)}: expected some of {', '.join(TARGETS)}")
    import triton

    table = []
    for row in rows(tuple(arguments.targets), tuple(arguments.scenario or SCENARIOS)):
        print(json.dumps(row), flush=True)
        table.append(row)
    if arguments.write is not None:
        body = ",\n".join(json.dumps(row) for row in table)
        arguments.write.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{body}\n]}}\n', encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
