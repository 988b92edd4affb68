"""How far each operation is from what the machine can do: ``python -m profiling.roofline``. See profiling/README.md.

The ceilings are measured first, then every operation at the paper's sizes is held against the lowest of them. Without a
GPU, the floors of an H200 are printed too, as estimates from published figures.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from profiling import bench, launches, machine
from profiling.bench import say
from profiling.ops import timing
from profiling.ops.op import GRIDS, Op
from profiling.ops.registry import OPS
from profiling.tables.speed import resources
from profiling.worker import Sizes
from vgf_fast.backends import native
from vgf_fast.common.progress import progress_bar

RESULTS = machine.REPOSITORY / "profiling" / "results"
REPEATS = 7
DEFAULT_SECONDS = 60.0
# Bytes of the weights that all programs of a flow read: two critics of the paper's, in bfloat16.
SHARED_BYTES = 2 * 3 * 512 * 512 * 2
# Rows for which a program of a product reads every weight once, at least; ``kernels.launch.product_tile``.
ROWS_PER_PROGRAM = 64
COLORS = ("#1b6ca8", "#d95f02", "#7f7f7f")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")


class Ceilings(NamedTuple):
    """What a machine can do at most, measured or published."""

    name: str
    memory: float  # bytes/s that a copy reads and writes
    cache: float  # bytes/s that all programs together read of weights they share: L2, or the CPU's caches
    launch: float  # seconds between two launches of a CUDA graph, or of one small operator on a CPU
    matrix: dict[str, float]  # FLOP/s of matrix products by dtype; float32 is TensorFloat-32 on a GPU

    def bounds(self, work: Work) -> dict[str, float]:
        """Seconds that each ceiling alone asks for."""
        return {
            "matrix": work.flops / self.matrix[work.dtype],
            "memory": work.bytes / self.memory,
            "cache": work.weight_bytes / self.cache,
            "launches": work.launches * self.launch,
        }


# NVIDIA's data sheet has 989 TFLOP/s dense bfloat16, half of it in TensorFloat-32, and 4.8 TB/s; well-tuned kernels
# reach 80 % and 90 % of those. L2 and the time of a graph's node are of public microbenchmarks of the H100.
H200 = Ceilings("H200, estimate", 0.9 * 4.8e12, 5.5e12, 1e-6, {"bfloat16": 0.8 * 989e12, "float32": 0.8 * 494e12})


class Work(NamedTuple):
    """What an operation asks of a machine."""

    dtype: str
    flops: float
    bytes: float  # with cold caches, each once
    weight_bytes: float  # that programs read of weights they share
    launches: int


class Placed(NamedTuple):
    """An operation under the ceilings."""

    op: str
    grid: str
    work: Work
    seconds: float | None  # None: not measured
    bounds: dict[str, float]

    @property
    def bound(self) -> str:
        """The ceiling that asks for most."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def fraction(self) -> float | None:
        """Part of what is possible that is reached: the bound by the time taken."""
        return None if self.seconds is None else self.bounds[self.bound] / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The entry of a record."""
        own = {"bound": self.bound, "fraction": self.fraction}
        return {
            "op": self.op,
            "grid": self.grid,
            **self.work._asdict(),
            "seconds": self.seconds,
            "bounds": self.bounds,
            **own,
        }


# --- ceilings --------------------------------------------------------------------------------------------------------


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call, after two that warm up."""
    for _ in range(2):
        call()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e-3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_rate(device: torch.device) -> float:
    """Bytes/s read and written by a copy far larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2.0 * size / _median_seconds(lambda: target.copy_(source), device)


def arithmetic_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a CPU that multiplies and adds in its registers alone; 0 where nothing is compiled to tell."""
    library = native.library()
    if library is None:
        return 0.0
    arguments = (500_000, dtype == torch.bfloat16, torch.get_num_threads())
    operations = float(library.vgf_peak(*arguments))
    return operations / _median_seconds(lambda: library.vgf_peak(*arguments), torch.device("cpu"))


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of some large products, or on a CPU of arithmetic without memory, which they may not reach."""
    cuda = device.type == "cuda"
    # The last is a layer of the paper's network for its 2,560 rows.
    shapes = [(8192, 8192, 8192), (16384, 4096, 4096)] if cuda else [(1024, 1024, 1024), (2560, 512, 512)]
    rates = []
    for m, n, k in shapes:
        x, y = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
        rates.append(2.0 * m * n * k / _median_seconds(lambda x=x, y=y: x @ y, device))  # type: ignore[misc]
    return max(*rates, 0.0 if cuda else arithmetic_rate(dtype))


def cache_rate(device: torch.device, size: int = SHARED_BYTES) -> float:
    """Bytes/s at which all processors together read ``size`` bytes that they share."""
    if device.type == "cuda":
        from profiling.stream_kernel import BLOCK, stream

        weights = torch.ones(max(size // 2 // BLOCK, 1) * BLOCK, dtype=torch.bfloat16, device=device)
        programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
        return programs * weights.numel() * 2 / _median_seconds(lambda: stream(weights, programs), device)
    side = max(int((size / 4) ** 0.5), 1)
    matrix, vector = torch.ones(side, side), torch.ones(side)
    calls = 64

    def read() -> None:
        for _ in range(calls):
            torch.mv(matrix, vector)

    return calls * 4.0 * side * side / _median_seconds(read, device)


def launch_seconds(device: torch.device) -> float:
    """Seconds a launch costs when nothing else does: a node of a CUDA graph, or a small operator on a CPU."""
    calls = 500
    x = torch.zeros(1, device=device)

    def launch() -> None:
        for _ in range(calls):
            x.add_(1.0)

    if device.type != "cuda":
        return _median_seconds(launch, device) / calls
    graph = torch.cuda.CUDAGraph()
    launch()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launch()
    return _median_seconds(graph.replay, device) / calls


def measured_ceilings(device: torch.device) -> Ceilings:
    """Measure the ceilings of the machine this runs on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else machine.cpu_name()
    matrix = {str(d).removeprefix("torch."): matrix_rate(d, device) for d in (torch.float32, torch.bfloat16)}
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        matrix["float32, ieee"] = matrix_rate(torch.float32, device)
        torch.set_float32_matmul_precision("high")
    return Ceilings(name, copy_rate(device), cache_rate(device), launch_seconds(device), matrix)


# --- operations ------------------------------------------------------------------------------------------------------


def work(op: Op, sizes: Sizes, dtype: torch.dtype, count: int) -> Work:
    """What an operation asks for; on a CPU a product reads its weights from the caches for all rows at once.

    A program of the kernels reads a weight once for ``ROWS_PER_PROGRAM`` rows, two FLOPs a row.
    """
    shared = op.matmul_flops(sizes, True) / (2.0 * ROWS_PER_PROGRAM) * dtype.itemsize if op.networks else 0.0
    return Work(str(dtype).removeprefix("torch."), op.flops(sizes), op.bytes(sizes, dtype), shared, count)


def launches_of(op: Op, sizes: Sizes, dtype: torch.dtype, device: torch.device, implementation: str) -> int:
    """How many launches one call makes; none of Triton's is made."""
    generator = torch.Generator().manual_seed(0)
    # The number of launches does not depend on the number of states.
    prepared = op.prepare(implementation, op.build(dataclasses.replace(sizes, batch=2), dtype, device, generator))
    noting = launches.noting_launches() if machine.version("triton") else contextlib.nullcontext()
    with noting:
        prepared.run()
    return launches.count(prepared.run).total


def place(
    ceilings: Ceilings, device: torch.device, names: Sequence[str], grids: dict[str, Sizes], seconds: float, seed: int
) -> list[Placed]:
    """Measure operations by this library and hold them against the ceilings, as many as the time allows."""
    implementation = "triton" if device.type == "cuda" else "torch"
    todo = [
        (op, grid, sizes, dtype)
        for grid, sizes in grids.items()
        for op in (OPS[name] for name in names)
        for dtype in op.dtypes
    ]
    deadline = time.perf_counter() + seconds
    placed = []
    with progress_bar("roofline", total=len(todo)) as advance:
        for index, (op, grid, sizes, dtype) in enumerate(todo):
            advance()
            left = deadline - time.perf_counter()
            if left <= 0.0:
                say(f"{op.name} ({grid}, {dtype}): left out, no time left")
                continue
            record = timing.measure(
                *(op, grid, sizes, dtype, device, [implementation]),
                rounds=timing.DEFAULT_ROUNDS,
                seconds=left / (len(todo) - index) / 2.0,
                seed=seed,
            )[0]
            if record.fault is not None:
                say(f"{op.name} ({grid}, {dtype}): left out, {record.fault}")
                continue
            asked = work(op, sizes, dtype, launches_of(op, sizes, dtype, device, implementation))
            if device.type == "cpu":
                asked = asked._replace(weight_bytes=0.0)
            placed.append(Placed(op.name, grid, asked, record.p50, ceilings.bounds(asked)))
    return placed


def floors(names: Sequence[str]) -> list[Placed]:
    """The operations under an H200's estimated ceilings, at the paper's sizes; launches are counted without a GPU."""
    placed = []
    for op in (OPS[name] for name in names):
        dtype = op.dtypes[-1]
        asked = work(op, Sizes(), dtype, 0)
        placed.append(Placed(op.name, "paper", asked, None, H200.bounds(asked)))
    return placed


# --- what is shown ---------------------------------------------------------------------------------------------------


def show_ceilings(ceilings: Ceilings) -> None:
    """Print a line for each ceiling."""
    say(ceilings.name)
    for dtype, rate in ceilings.matrix.items():
        say(f"  matrix products, {dtype}: {rate * 1e-12:.3g} TFLOP/s")
    say(f"  copy: {ceilings.memory * 1e-9:.4g} GB/s")
    say(f"  shared weights from the cache: {ceilings.cache * 1e-9:.4g} GB/s")
    say(f"  launch: {ceilings.launch * 1e6:.3g} us")


def show(placed: Sequence[Placed]) -> None:
    """Print a table of operations under their ceilings."""
    columns = {
        "operation": [p.op for p in placed],
        "sizes": [p.grid for p in placed],
        "dtype": [p.work.dtype for p in placed],
        "GFLOP": [bench.cell(p.work.flops, 1e-9, 3) for p in placed],
        "MB": [bench.cell(p.work.bytes, 1e-6, 2) for p in placed],
        "launches": [str(p.work.launches) if p.work.launches else "" for p in placed],
        "bound us": [bench.cell(p.bounds[p.bound], 1e6, 1) for p in placed],
        "by": [p.bound for p in placed],
        "us": [bench.cell(p.seconds, 1e6, 1) for p in placed],
        "% of bound": [bench.cell(p.fraction, 100.0, 0) for p in placed],
    }
    bench.print_table(columns)


def draw(path: Path, ceilings: Ceilings, placed: Sequence[Placed]) -> None:
    """FLOP/s against FLOPs a byte, under the ceilings; needs matplotlib."""
    from matplotlib.figure import Figure

    shown = [p for p in placed if p.seconds is not None and p.work.flops > 0.0]
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    axes = figure.add_subplot()
    intensity = [p.work.flops / p.work.bytes for p in shown]
    low, high = 0.5 * min(intensity), 2.0 * max(intensity)
    mark = {name: MARKS[index % len(MARKS)] for index, name in enumerate(OPS)}
    for color, (dtype, rate) in zip(COLORS, ceilings.matrix.items(), strict=False):
        knee = rate / ceilings.memory
        right = max(high, 2.0 * knee)
        axes.plot([low, max(knee, low), right], [min(low * ceilings.memory, rate), rate, rate], color=color, lw=1.2)
        text = f"{dtype}: {rate * 1e-12:.3g} TFLOP/s"
        axes.annotate(text, (right, rate), ha="right", va="bottom", fontsize=8, color=color)
        for x, p in zip(intensity, shown, strict=True):
            if p.work.dtype == dtype and p.seconds:
                filled = color if p.grid == shown[0].grid else "none"
                axes.plot(x, p.work.flops / p.seconds, mark[p.op], color=color, mfc=filled, ms=6)
    for name in dict.fromkeys(p.op for p in shown):
        axes.plot([], [], mark[name], color="black", ms=5, label=name.replace("_", " "))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs a byte that must be moved")
    axes.set_ylabel("FLOP/s")
    axes.set_title(f"{ceilings.name}; slope: copy at {ceilings.memory * 1e-9:.3g} GB/s", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, format="png", dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, record and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.roofline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", metavar="DIR", type=Path, default=RESULTS, help="default: profiling/results/")
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help="for the operations")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--threads", type=int, default=machine.usable_cores())
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    given = parser.parse_args(arguments)
    sizes = Sizes(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Sizes)})
    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    machine.limit_cores(given.threads)
    torch.set_num_threads(given.threads)
    if cuda:
        torch.set_float32_matmul_precision("high")
    ceilings = measured_ceilings(device)
    show_ceilings(ceilings)
    grids = {"paper" if sizes == Sizes() else "given": sizes}
    if cuda and sizes == Sizes():
        grids["64k rows"] = GRIDS["64k rows"]
    placed = place(ceilings, device, given.ops, grids, given.seconds, seed=0)
    show(placed)
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / f"roofline-{device.type}.json"
    record = {
        **timing.facts(device),
        "sizes": dataclasses.asdict(sizes),
        "ceilings": ceilings._asdict(),
        "ops": [one.to_dict() for one in placed],
    }
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    say(f"record: {path}")
    if placed and machine.version("matplotlib"):
        draw(path.with_suffix(".png"), ceilings, placed)
    if not cuda:
        say("\nNot yet measured on a GPU. Estimates: the floors of an H200 by published figures")
        show_ceilings(H200)
        show(floors(given.ops))
        say("\nand what the compiler gives the kernels, without a run:")
        say(resources(RESULTS / "resources.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
