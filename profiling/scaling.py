"""How the cost grows with each size: ``python -m profiling.bench scaling``. See profiling/README.md.

One size at a time is varied from the paper's. The library runs on the device's own backend; the points of a factor take
turns, so that a slow minute of the machine bends no curve. Two exponents are given: p of a + b x^p through all points,
where a is the overhead of a call, and the plain slope in logarithms of the upper half of the points, overhead and all.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from profiling import bench, machine, records
from profiling.ops import timing
from profiling.ops.op import Prepared
from profiling.ops.registry import OPS
from profiling.ops.timing import Timed
from profiling.records import Record
from profiling.torch_methods import configurations
from profiling.worker import Sizes, random_batch
from vgf_fast import Learner, VGFPolicy
from vgf_fast.common.progress import progress_bar

if TYPE_CHECKING:
    from profiling.bench import Plan

DEFAULT_SECONDS = 280.0
DEFAULT_ROUNDS = 15
MIN_ROUNDS = 3
# A call that is expected to take longer needs no untimed one before it.
UNTIMED_SECONDS = 0.3
EXPONENTS = np.arange(0.2, 3.0, 0.005)
UPDATE = "update"
SCALED = ("value_gradient_flow", "behavior_flow", UPDATE)


class Factor(NamedTuple):
    """A size that is varied: its values, and the field of ``Sizes`` that it is for each operation it matters to."""

    values: tuple[int, ...]
    fields: Mapping[str, str]


FACTORS = {
    "states": Factor((1, 4, 16, 64, 128, 256, 512, 1024, 4096, 16384, 65536), dict.fromkeys(SCALED, "batch")),
    "particles": Factor((1, 2, 4, 8, 16, 32, 64, 128), dict.fromkeys(SCALED, "particles")),
    "steps": Factor(
        (0, 1, 2, 4, 8, 16, 32),
        {"value_gradient_flow": "flow_steps", "behavior_flow": "behavior_steps", UPDATE: "flow_steps"},
    ),
    "width": Factor((64, 128, 256, 512, 1024), dict.fromkeys(SCALED, "hidden")),
    "members": Factor((1, 2, 4, 6, 8, 10), {"value_gradient_flow": "members", UPDATE: "members"}),
}
QUICK_POINTS = 3


# --- what is timed ---------------------------------------------------------------------------------------------------


def _prepare_update(sizes: Sizes, device: torch.device, seed: int) -> Prepared:
    """A training update as the learner does it, random numbers included."""
    config, train = configurations(sizes)
    learner = Learner(VGFPolicy(config, device=device, seed=seed), train)
    rng = np.random.default_rng(seed)
    batch = {name: torch.from_numpy(array).to(device) for name, array in random_batch(sizes, rng).items()}
    return Prepared(lambda: learner.update(batch))


def prepare(op: str, sizes: Sizes, device: torch.device, seed: int) -> Prepared:
    """An operation of the registry, or the update, on the library's backend for the device."""
    if op == UPDATE:
        return _prepare_update(sizes, device, seed)
    generator = torch.Generator().manual_seed(seed)
    return OPS[op].prepare(backend(device), OPS[op].build(sizes, torch.float32, device, generator))


def backend(device: torch.device) -> str:
    """The backend that the library chooses for a device."""
    return "triton" if device.type == "cuda" else "torch"


def flops(op: str, sizes: Sizes) -> int:
    """FLOPs that an operation needs; an update needs those of its parts."""
    if op != UPDATE:
        return OPS[op].flops(sizes)
    parts = ("behavior_flow", "value_gradient_flow", "td_target", "critic_training_step", "behavior_training_step")
    return sum(OPS[part].flops(sizes) for part in parts)


# --- exponents -------------------------------------------------------------------------------------------------------


class Fit(NamedTuple):
    """time = overhead + scale * x ** exponent."""

    overhead: float
    scale: float
    exponent: float

    def __call__(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds at x."""
        return self.overhead + self.scale * x**self.exponent


def fit(x: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """The best a + b x^p with a >= 0, by relative error: for every p of a fine grid a and b are linear least squares.

    None with fewer than four points, which three numbers would always fit.
    """
    if len(x) < 4:
        return None
    values, times = np.asarray(x, float), np.asarray(seconds, float)
    best: tuple[float, Fit] | None = None
    for p in EXPONENTS:
        rows = np.stack([np.ones_like(values), values**p], axis=1) / times[:, None]
        (a, b), *_ = np.linalg.lstsq(rows, np.ones_like(times), rcond=None)
        if a < 0.0:
            a, (b, *_) = 0.0, np.linalg.lstsq(rows[:, 1:], np.ones_like(times), rcond=None)[0]
        fitted = Fit(float(a), float(b), float(p))
        error = float(np.square(fitted(values) / times - 1.0).sum())
        if best is None or error < best[0]:
            best = (error, fitted)
    assert best is not None
    return best[1]


def upper_slope(x: Sequence[float], seconds: Sequence[float]) -> float | None:
    """d log(time) / d log(x) by least squares over the upper half of the points, at least two; zeros are left out."""
    kept = [(value, time) for value, time in zip(x, seconds, strict=True) if value > 0]
    kept = kept[min(len(kept) // 2, max(len(kept) - 2, 0)) :]
    if len(kept) < 2:
        return None
    values, times = np.log(np.asarray(kept, float)).T
    return float(np.polyfit(values, times, 1)[0])


# --- measuring -------------------------------------------------------------------------------------------------------


def points(factor: Factor, op: str, base: Sizes, seconds: float, rate: float) -> tuple[dict[int, Sizes], list[int]]:
    """Sizes by value as many as fit into the time, smallest first, and the values left out."""
    chosen: dict[int, Sizes] = {}
    left = seconds
    # A field of counts may be 0 for the flow's steps alone.
    values = [value for value in factor.values if value > 0 or factor.fields[op] == "flow_steps"]
    for value in values:
        sizes = dataclasses.replace(base, **{factor.fields[op]: value})
        call = flops(op, sizes) / rate
        left -= call * (MIN_ROUNDS + (call < UNTIMED_SECONDS))
        if left < 0.0:
            break
        chosen[value] = sizes
    return chosen, values[len(chosen) :]


def take_turns(timed: Mapping[int, Timed], rounds: int, deadline: float) -> dict[int, list[float]]:
    """Seconds of every point in every round, as ``timing.take_turns``; slow points need no untimed round."""
    times: dict[int, list[float]] = {}
    for value, point in timed.items():
        first = point.seconds()
        times[value] = [first] if first > UNTIMED_SECONDS else []
    for index in range(rounds):
        if index >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for value, point in timed.items():
            if len(times[value]) <= index:
                times[value].append(point.seconds())
    return times


def measure(
    name: str, op: str, sizes: Mapping[int, Sizes], device: torch.device, rounds: int, seconds: float, seed: int
) -> list[Record]:
    """Measure one factor and operation: a record for each point."""
    deadline = time.perf_counter() + seconds
    # On a GPU what is overwritten keeps the device busy while the host launches what is timed.
    flush = None
    if device.type == "cuda":
        flush = torch.empty(2 * timing.cache_bytes(device), dtype=torch.uint8, device=device)
    # The learner replays CUDA graphs of its own.
    timed = {
        value: Timed([prepare(op, given, device, seed)], flush, graphs=op != UPDATE) for value, given in sizes.items()
    }
    times = take_turns(timed, rounds, deadline)
    shared: dict[str, Any] = {
        **timing.facts(device),
        "benchmark": f"scaling {name}",
        "op": op,
        "method": f"{backend(device)}-float32",
        "dtype": "float32",
        "ratio_to_jax": None,
        "ratio_to_eager": None,
        "peak_bytes": timing.memory(device),
        "built_bytes": timing.memory(device),
        "copies": 1,
        "cache_bytes": timing.cache_bytes(device),
        "flushed_bytes": None if flush is None else flush.numel(),
        "clocks": machine.gpu_clocks() if device.type == "cuda" else None,
    }
    measured = []
    for value, own in times.items():
        p20, p50, p80 = records.quantiles(own)
        measured.append(
            Record(
                **shared,
                sizes=dataclasses.asdict(sizes[value]),
                rounds=len(own),
                p20=p20,
                p50=p50,
                p80=p80,
                flops=flops(op, sizes[value]),
                moved_bytes=None if op == UPDATE else OPS[op].bytes(sizes[value], torch.float32),
                timer=timed[value].timer,
            )
        )
    return measured


# --- what a reader sees ----------------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """The points of one factor and operation, by x."""

    factor: str
    op: str
    x: list[int]
    records: list[Record]

    @property
    def seconds(self) -> list[float]:
        """Median seconds of every point."""
        return [record.p50 for record in self.records if record.p50 is not None]


def curves(measured: Sequence[Record]) -> list[Curve]:
    """The scaling records as curves, in the order of the first records; of equal points the newest."""
    newest: dict[tuple[str, str], dict[int, Record]] = {}
    for record in sorted(measured, key=lambda record: record.date):
        name = record.benchmark.removeprefix("scaling ")
        if name == record.benchmark or name not in FACTORS or record.op is None or record.p50 is None:
            continue
        newest.setdefault((name, record.op), {})[record.sizes[FACTORS[name].fields[record.op]]] = record
    return [Curve(name, op, sorted(by_x), [by_x[x] for x in sorted(by_x)]) for (name, op), by_x in newest.items()]


def show(measured: Sequence[Record]) -> None:
    """Print a table of exponents."""
    rows = []
    for curve in curves(measured):
        fitted = fit(curve.x, curve.seconds)
        rows.append(
            (
                curve.op,
                curve.factor,
                f"{curve.x[0]} .. {curve.x[-1]}",
                f"{curve.seconds[0] * 1e3:.3f} .. {curve.seconds[-1] * 1e3:.3f}",
                bench.cell(None if fitted is None else fitted.exponent, 1.0, 2),
                bench.cell(None if fitted is None else fitted.overhead, 1e3, 3),
                bench.cell(upper_slope(curve.x, curve.seconds), 1.0, 2),
            )
        )
    names = ("operation", "varied", "values", "ms", "p of a + b x^p", "a, ms", "slope, upper half")
    bench.print_table({name: [row[i] for row in rows] for i, name in enumerate(names)})


def plot(measured: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Draw time against each factor, a panel each; needs matplotlib. Raises ``ValueError`` without scaling records."""
    from matplotlib.figure import Figure

    drawn = curves(measured)
    if not drawn:
        raise ValueError("there are no scaling records, expected some of `python -m profiling.bench scaling`")
    names = list(dict.fromkeys(curve.factor for curve in drawn))
    operations = list(dict.fromkeys(curve.op for curve in drawn))
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for curve in (curve for curve in drawn if curve.factor == name):
            color = f"C{operations.index(curve.op)}"
            milliseconds = 1e3 * np.asarray(curve.seconds)
            spread = [
                [
                    1e3 * abs((record.p50 or 0.0) - (edge or 0.0))
                    for record, edge in zip(curve.records, edges, strict=True)
                ]
                for edges in ([r.p20 for r in curve.records], [r.p80 for r in curve.records])
            ]
            label = curve.op.replace("_", " ")
            panel.errorbar(curve.x, milliseconds, yerr=spread, fmt="o", ms=3, color=color, label=label)
            if fitted := fit(curve.x, curve.seconds):
                grid = np.geomspace(max(curve.x[0], 0.5), curve.x[-1], 100)
                panel.plot(grid, 1e3 * fitted(grid), lw=1, color=color)
        # Linear below 1: the flow may have no steps.
        panel.set_xscale("symlog", base=2, linthresh=1)
        panel.set_yscale("log")
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms a call")
    panels[0].legend(fontsize=8)
    first = drawn[0].records[0]
    figure.suptitle(f"{first.device}, {first.method}; other sizes the paper's; lines: a + b x^p", fontsize=10)
    figure.savefig(path, dpi=150)


# --- the command -----------------------------------------------------------------------------------------------------


def run(plan: Plan) -> bool:
    """Measure, show, record and draw; whether anything was timed."""
    device = timing.set_up(plan)
    chosen = timing.chosen("--factors", plan.factors, list(FACTORS))
    wanted = timing.chosen("--ops", plan.ops, SCALED)
    todo: list[tuple[str, str]] = [(name, op) for name in chosen for op in wanted if op in FACTORS[name].fields]
    deadline = time.perf_counter() + (plan.seconds or DEFAULT_SECONDS)
    rounds = plan.rounds or (bench.QUICK_ROUNDS if plan.quick else DEFAULT_ROUNDS)
    rate = timing.flop_rate(device)
    measured: list[Record] = []
    left_out = []
    with progress_bar("scaling", total=len(todo)) as advance:
        for index, (name, op) in enumerate(todo):
            seconds = max(deadline - time.perf_counter(), 0.0) / (len(todo) - index)
            sizes, missing = points(FACTORS[name], op, plan.sizes, seconds, rate)
            if plan.quick:
                sizes = dict(list(sizes.items())[:QUICK_POINTS])
            if sizes:
                new = measure(name, op, sizes, device, rounds, seconds, plan.seed)
                measured += new
                if plan.out is not None:
                    records.append(plan.out, new)
            if missing:
                left_out.append(f"{op}, {name}: {', '.join(map(str, missing))} left out, no time left")
            advance()
    for line in left_out:
        bench.say(line)
    if not measured:
        bench.say("scaling: no point fits into the time")
        return False
    bench.say(f"scaling: {measured[0].device}, {measured[0].threads} threads, {measured[0].method}")
    show(measured)
    if plan.plot is not None:
        try:
            plot(measured, plan.plot)
        except ImportError as error:
            bench.say(f"no drawing: {error}")
    return True
