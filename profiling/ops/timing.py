"""Time single operations over a grid of shapes: ``python -m profiling.bench ops``. See profiling/README.md.

One process times all implementations of an operation by turns. Each has copies of the inputs of its own, together
larger than the last-level cache where that takes no more than ``MAX_COPIES``; else the cache is overwritten between
calls. An implementation that differs from the reference is not timed.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import platform
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from profiling import bench, machine, records
from profiling.ops.check import check
from profiling.ops.op import GRIDS, IMPLEMENTATIONS, Inputs, Op, Prepared, obstacle
from profiling.ops.registry import OPS
from profiling.records import Record
from profiling.worker import Sizes
from vgf_fast.common.progress import progress_bar

if TYPE_CHECKING:
    from profiling.bench import Plan

DEFAULT_SECONDS = 240.0
DEFAULT_ROUNDS = 30
MIN_ROUNDS = 3
MAX_COPIES = 16
# As PyTorch is used without a compiler: every kernel launched by the host.
LAUNCHED_BY_THE_HOST = ("eager",)
# The truth is computed for so many operations at most, else at fewer states: float64 is slow.
CHECK_FLOPS = {"cpu": 2e10, "cuda": 1e13}
CHECK_SEED = 2**20


# --- one implementation ----------------------------------------------------------------------------------------------


class Timed:
    """An implementation with its copies of the inputs, ready to be called and timed."""

    def __init__(self, prepared: Sequence[Prepared], flush: Tensor | None, graphs: bool) -> None:
        self._calls: list[Callable[[], Any]] = [one.run for one in prepared]
        self._flush = flush
        self._next = 0
        self.timer = "perf_counter"
        self._cuda = flush is not None and flush.device.type == "cuda"
        if self._cuda:
            self._warm_up()
            self.timer = "graph replay" if graphs and self._capture() else "events"

    def _warm_up(self) -> None:
        """What compiles or allocates, on a stream of its own as a capture asks for."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in self._calls:
                for _ in range(2):
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()

    def _capture(self) -> bool:
        """Record every call as a CUDA graph, if that is possible."""
        graphs = []
        pool = torch.cuda.graph_pool_handle()
        try:
            for call in self._calls:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    call()
                graphs.append(graph)
        except RuntimeError:
            torch.cuda.synchronize()
            return False
        self._calls = [graph.replay for graph in graphs]
        return True

    def seconds(self) -> float:
        """Time of one call, on the next copy of the inputs."""
        call = self._calls[self._next]
        self._next = (self._next + 1) % len(self._calls)
        if self._flush is not None:
            self._flush.zero_()
        if not self._cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        # While the cache is overwritten the host launches ahead: its delays are not in between the events.
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3


def take_turns(timed: dict[str, Timed], rounds: int, deadline: float) -> dict[str, list[float]]:
    """Seconds of every implementation in every round; each begins with another, none after ``deadline`` but the first.

    One untimed round comes first.
    """
    names = list(timed)
    for name in names:
        timed[name].seconds()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            times[name].append(timed[name].seconds())
    return times


# --- one operation at one shape --------------------------------------------------------------------------------------


def cache_bytes(device: torch.device) -> int:
    """Bytes of a GPU's L2 or of the CPU's last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return machine.last_level_cache_bytes() or 2**25


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Copies of inputs, each of other random numbers, and what is written between calls if they fit into the cache."""

    inputs: list[Inputs]
    rotated_bytes: int
    flush: Tensor | None

    @classmethod
    def make(cls, op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int) -> Rotation:
        """Enough copies to exceed the cache, at most ``MAX_COPIES``, at least two."""
        generator = torch.Generator().manual_seed(seed)
        first = op.build(sizes, dtype, device, generator)
        each, cache = op.bytes_of(first), cache_bytes(device)
        copies = min(max(math.ceil(1.25 * cache / each), 2), MAX_COPIES)
        inputs = [first, *(op.build(sizes, dtype, device, generator) for _ in range(copies - 1))]
        # On a GPU always: it keeps the device busy while the host launches what is timed.
        flush = None
        if device.type == "cuda" or copies * each < cache:
            flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
        return cls(inputs, copies * each, flush)


def check_sizes(op: Op, sizes: Sizes, device: torch.device) -> Sizes:
    """Sizes at which an implementation is compared with the truth: the same, or with fewer states."""
    limit = CHECK_FLOPS[device.type]
    while sizes.batch > 1 and op.flops(sizes) > limit:
        sizes = dataclasses.replace(sizes, batch=sizes.batch // 2)
    return sizes


def facts(device: torch.device) -> dict[str, Any]:
    """What records say of machine and versions; torch's threads and precision as they are set now."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else machine.cpu_name(),
        "driver": machine.gpu_driver() if cuda else None,
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "load_average": machine.load_average(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": machine.version("triton"),
        "jax": None,
        "commit": machine.git_commit(),
        "dirty": machine.git_dirty(),
    }


def memory(device: torch.device) -> int:
    """Peak so far: of a GPU's allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_resident_bytes()


def measure(
    op: Op,
    grid: str,
    sizes: Sizes,
    dtype: torch.dtype,
    device: torch.device,
    implementations: Sequence[str],
    *,
    rounds: int,
    seconds: float,
    seed: int,
) -> list[Record]:
    """Check the implementations, time those that pass for about ``seconds``, and give each a record."""
    dtype_name = str(dtype).removeprefix("torch.")
    shared: dict[str, Any] = {
        **facts(device),
        "benchmark": f"op {op.name}",
        "op": op.name,
        "grid": grid,
        "dtype": dtype_name,
        "sizes": dataclasses.asdict(sizes),
        "flops": op.flops(sizes),
        "moved_bytes": op.bytes(sizes, dtype),
        "cache_bytes": cache_bytes(device),
        "ratio_to_jax": None,
    }
    wrong = check(op, implementations, check_sizes(op, sizes, device), dtype, device, seed + CHECK_SEED)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    built = memory(device)
    rotation = Rotation.make(op, sizes, dtype, device, seed)
    timed = {
        name: Timed(
            [op.prepare(name, inputs.clone()) for inputs in rotation.inputs],
            rotation.flush,
            graphs=name not in LAUNCHED_BY_THE_HOST,
        )
        for name in implementations
        if wrong[name] is None
    }
    times = take_turns(timed, rounds, time.perf_counter() + seconds)
    measured = []
    clocks = machine.gpu_clocks() if device.type == "cuda" else None
    for name in implementations:
        own = times.get(name, [])
        p20, p50, p80 = records.quantiles(own)
        measured.append(
            Record(
                **shared,
                method=f"{name}-{dtype_name}",
                rounds=len(own),
                p20=p20,
                p50=p50,
                p80=p80,
                ratio_to_eager=records.paired_ratio(own, times.get("eager", [])),
                ratio_to_compile=records.paired_ratio(own, times.get("compile", [])),
                peak_bytes=memory(device),
                built_bytes=built,
                fault=wrong[name],
                copies=len(rotation.inputs),
                rotated_bytes=rotation.rotated_bytes,
                flushed_bytes=None if rotation.flush is None else rotation.flush.numel(),
                timer=timed[name].timer if name in timed else None,
                clocks=clocks,
            )
        )
    return measured


# --- the command -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Point:
    """An operation at a shape, in a dtype, by some implementations."""

    op: Op
    grid: str
    sizes: Sizes
    dtype: torch.dtype
    implementations: tuple[str, ...]

    @property
    def name(self) -> str:
        """Operation, grid and dtype as a reader is told."""
        return f"{self.op.name} ({self.grid}, {str(self.dtype).removeprefix('torch.')})"


def chosen(flag: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """The given names, or all. Raises ``SystemExit`` naming one that is not known."""
    for name in given or ():
        if name not in known:
            raise SystemExit(f"error: {flag} is {name!r}, expected one of {', '.join(map(repr, known))}")
    return list(dict.fromkeys(given)) if given else list(known)


def points(plan: Plan, device: torch.device) -> list[Point]:
    """What to measure, the most telling first; the compiler, which needs minutes, when all else is done."""
    grids = {name: GRIDS[name] for name in chosen("--grid", plan.grid, list(GRIDS))}
    if plan.grid is None and plan.sizes != Sizes():
        grids = {"given": plan.sizes}
    ops = [OPS[name] for name in chosen("--ops", plan.ops, list(OPS))]
    able = []
    for name in chosen("--implementations", plan.implementations, IMPLEMENTATIONS):
        if why := obstacle(name, device):
            bench.say(f"{name}: skipped, {why}")
        else:
            able.append(name)
    dtypes = [getattr(torch, name) for name in plan.dtypes]
    without = tuple(name for name in able if name != "compile")
    passes = [group for group in (without, tuple(able) if "compile" in able else ()) if group]
    return [
        Point(op, grid, sizes, dtype, group)
        for group in passes
        for grid, sizes in grids.items()
        for dtype in dtypes
        for op in ops
        if dtype in op.dtypes
    ]


def flop_rate(device: torch.device) -> float:
    """FLOP/s of a large product in float32: what tells beforehand whether a shape fits into the time left."""
    n = 768 if device.type == "cpu" else 8192
    x = torch.ones(n, n, device=device)
    for _ in range(2):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds = time.perf_counter() - start
    return 2.0 * n**3 / seconds


def _expected_seconds(point: Point, rate: float) -> float:
    """Seconds expected of ``MIN_ROUNDS`` rounds and one untimed, at the rate of large products."""
    return (MIN_ROUNDS + 1) * len(point.implementations) * point.op.matmul_flops(point.sizes, False) / rate


def set_up(plan: Plan) -> torch.device:
    """Threads and precision as the other benchmarks have them; the device."""
    machine.limit_cores(plan.threads)
    torch.set_num_threads(plan.threads)
    device = torch.device(plan.device)
    if device.type == "cuda":
        # As JAX does by default, and this library's kernels.
        torch.set_float32_matmul_precision("high")
    return device


def show(measured: Sequence[Record]) -> None:
    """Print a table of the records of one operation and shape."""
    first = measured[0]
    timed = [record for record in measured if record.fault is None]
    for record in measured:
        if record.fault is not None:
            bench.say(f"{first.op} ({first.grid}): {record.method} is not timed, {record.fault}")
    if not timed:
        return
    cache = "flushed" if first.flushed_bytes is not None else "exceeded"
    bench.say(
        f"{first.op} ({first.grid}): {timed[0].rounds} rounds, {first.copies} copies "
        f"of the inputs, {(first.rotated_bytes or 0) / 2**20:.1f} MiB, cache of {(first.cache_bytes or 0) / 2**20:.0f} "
        f"MiB {cache}"
    )
    bench.print_table(
        {
            "implementation": [record.method for record in timed],
            **{f"{q} us": [bench.cell(getattr(record, q), 1e6, 1) for record in timed] for q in ("p20", "p50", "p80")},
            "GFLOP/s": [bench.cell(record.flop_rate, 1e-9, 1) for record in timed],
            "GB/s": [bench.cell(record.byte_rate, 1e-9, 2) for record in timed],
            "x eager": [bench.cell(record.ratio_to_eager, 1.0, 2) for record in timed],
            "x compile": [bench.cell(record.ratio_to_compile, 1.0, 2) for record in timed],
        }
    )


def run(plan: Plan) -> bool:
    """Measure, show and record every point that the time allows; whether anything was timed."""
    device = set_up(plan)
    todo = points(plan, device)
    if not todo:
        bench.say("ops: no implementation can run here")
        return False
    deadline = time.perf_counter() + (plan.seconds or DEFAULT_SECONDS)
    rounds = plan.rounds or (bench.QUICK_ROUNDS if plan.quick else DEFAULT_ROUNDS)
    rate = flop_rate(device)
    left_out = []
    anything = False
    with progress_bar("operations", total=len(todo)) as advance:
        for index, point in enumerate(todo):
            remaining = deadline - time.perf_counter()
            if remaining <= 0.0 or _expected_seconds(point, rate) > remaining:
                left_out.append(point)
            else:
                measured = measure(
                    point.op,
                    point.grid,
                    point.sizes,
                    point.dtype,
                    device,
                    point.implementations,
                    rounds=rounds,
                    seconds=remaining / (len(todo) - index),
                    seed=plan.seed,
                )
                show(measured)
                if plan.out is not None:
                    records.append(plan.out, measured)
                anything |= any(record.p50 is not None for record in measured)
            advance()
    for point in left_out:
        bench.say(f"{point.name}: left out with {', '.join(point.implementations)}, no time left")
    return anything
