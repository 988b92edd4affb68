"""How cost grows: ``python -m profiling.bench scaling``. One factor at a time is varied from the given sizes.

Measured are this library's value gradient flow, behaviour flow and training update, on the device's own backend. The
law fitted to the medians of one curve is

    time = a + b x^p,    a >= 0 the overhead of a call, b >= 0, p the exponent.

It is least squares of *relative* errors, since times span orders of magnitude and err in proportion: for a given p the
best a and b are a linear problem of two unknowns, so p alone is searched. ``misfit`` is the largest relative error that
remains. An exponent says something where the largest cost is a multiple of the overhead.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from profiling import bench, machine, ops, records
from profiling.records import Record
from profiling.registry import OPS
from profiling.torch_methods import configurations
from profiling.worker import Sizes, random_batch
from vgf_fast import Learner, VGFPolicy
from vgf_fast.progress import progress_bar

if TYPE_CHECKING:
    from profiling.bench import Plan

BENCHMARK = "scaling"
FLOW, BEHAVIOR, UPDATE = "value_gradient_flow", "behavior_flow", "update"
SUBJECTS = (FLOW, BEHAVIOR, UPDATE)
VALUES = {
    "states": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536),
    "particles": (1, 2, 4, 8, 16, 32, 64, 128),
    "steps": (0, 1, 2, 4, 8, 16, 32),
    "width": (64, 128, 256, 512, 1024),
    "members": (1, 2, 3, 4, 6, 8, 10),
}
FIELDS = {"states": "batch", "particles": "particles", "steps": "flow_steps", "width": "hidden", "members": "members"}
GROWTH = {"width": 2.0}  # the exponent expected of what comes next: products of square weights; 1 of all else
DEFAULT_SECONDS = 280.0
MIN_ROUNDS, MAX_ROUNDS = 3, 25
QUICK_ROUNDS, QUICK_POINTS = 2, 4
MIN_FIT_POINTS = 4  # one more than the law has constants
SHORT_SECONDS = 0.02  # a shorter call is timed as the second of two


# --- curves and exponents of records ---------------------------------------------------------------------------------


class ScalingCurve(NamedTuple):
    """Median seconds of one operation against one factor, on one device."""

    op: str
    factor: str
    device: str
    dtype: str
    threads: int
    x: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]
    sizes: dict[str, int]  # all others


class Exponent(NamedTuple):
    """The law a + b x^p of a curve."""

    curve: ScalingCurve
    overhead: float  # a, seconds
    coefficient: float  # b, seconds
    exponent: float  # p
    misfit: float  # largest relative error


def field_of(op: str, factor: str) -> str | None:
    """The field of ``Sizes`` that a factor is for an operation, or None where its cost does not depend on it."""
    if op == BEHAVIOR:
        return {"steps": "behavior_steps", "members": None}.get(factor, FIELDS[factor])
    return FIELDS[factor]


def curves(found: Sequence[Record]) -> list[ScalingCurve]:
    """Every curve among records, by the newest record of each point; other benchmarks' records are passed over."""
    points: dict[tuple[Any, ...], dict[int, Record]] = {}
    for record in sorted(found, key=lambda record: record.date):
        benchmark, _, factor = record.benchmark.partition(" ")
        field = field_of(record.method, factor) if benchmark == BENCHMARK and factor in FIELDS else None
        if field is None or record.p50 is None:
            continue
        sizes = {name: value for name, value in record.sizes.items() if name != field}
        key = (record.method, factor, record.device, record.dtype, record.threads, tuple(sorted(sizes.items())))
        points.setdefault(key, {})[record.sizes[field]] = record
    found_curves = []
    for (op, factor, device, dtype, threads, sizes), by_value in points.items():
        x = tuple(sorted(by_value))
        seconds = tuple(float(by_value[value].p50 or 0.0) for value in x)
        found_curves.append(ScalingCurve(op, factor, device, dtype, threads, x, seconds, dict(sizes)))
    return found_curves


def fit(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, float, float]:
    """a, b, p and misfit of time = a + b x^p by least squares of relative errors.

    Raises ``ValueError`` with fewer than four points, or times that are not positive.
    """
    if len(x) != len(seconds) or len(x) < MIN_FIT_POINTS:
        raise ValueError(f"{len(x)} points and {len(seconds)} times, expected the same number, at least 4")
    t, base = np.asarray(seconds, dtype=np.float64), np.asarray(x, dtype=np.float64)
    if not (t > 0.0).all() or not (base >= 0.0).all():
        raise ValueError("seconds has an entry <= 0 or x one < 0, expected positive times")
    base = base / base.max()

    def constants(p: float) -> tuple[float, float, float]:
        """The best a and b for an exponent, and the sum of squares they leave."""
        columns = np.stack([np.ones_like(t), base**p], axis=1) / t[:, None]
        # Of two unknowns bounded below by zero, the best is inside, or on one of the axes.
        candidates = [np.linalg.lstsq(columns, np.ones_like(t), rcond=None)[0]]
        for k in range(2):
            alone = np.zeros(2)
            alone[k] = columns[:, k].sum() / (columns[:, k] ** 2).sum()
            candidates.append(alone)
        squares = [(float(((columns @ c - 1.0) ** 2).sum()), c) for c in candidates if (c >= 0.0).all()]
        error, (a, b) = min(squares, key=lambda pair: pair[0])
        return float(a), float(b), error

    low, high = 0.05, 4.0
    for _ in range(4):
        grid = np.linspace(low, high, 81)
        best = int(np.argmin([constants(p)[2] for p in grid]))
        low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, 80)])
    p = float(grid[best])
    a, b, _ = constants(p)
    misfit = float(np.abs((a + b * base**p) / t - 1.0).max())
    return a, b / float(max(x)) ** p, p, misfit


def exponents(found: Sequence[Record]) -> list[Exponent]:
    """The law of every curve among records that has enough points."""
    return [Exponent(curve, *fit(curve.x, curve.seconds)) for curve in curves(found) if len(curve.x) >= MIN_FIT_POINTS]


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Point:
    """One size of one curve, ready to be called."""

    x: int
    sizes: Sizes
    call: Callable[[], None]  # one call on fresh data, returning when its result is there
    prepare: Callable[[], None]  # draws the data
    built_bytes: int
    peak_bytes: int = 0
    first: float = 0.0  # seconds of the second call, which plans the rounds
    times: list[float] = dataclasses.field(default_factory=list)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_point(subject: str, x: int, sizes: Sizes, device: torch.device, seed: int) -> Point:
    """A subject at given sizes with weights and data of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if subject == UPDATE:
        config, train = configurations(sizes)
        learner = Learner(VGFPolicy(config, device=device, seed=seed), train)
        rng = np.random.default_rng(seed)
        batch: dict[str, torch.Tensor] = {}

        def draw_batch() -> None:
            batch.update({name: torch.from_numpy(a).to(device) for name, a in random_batch(sizes, rng).items()})
            _synchronize(device)

        def update() -> None:
            learner.update(batch)
            _synchronize(device)

        return Point(x, sizes, update, draw_batch, ops._memory(device))
    generator = torch.Generator(device).manual_seed(seed)
    inputs = OPS[subject].build(sizes, torch.float32, device, generator)
    prepared = OPS[subject].prepare("triton" if device.type == "cuda" else "torch", inputs)

    def draw() -> None:
        for name, tensor in inputs.data.items():
            if name == "particles":
                tensor.uniform_(-1.0, 1.0, generator=generator)
            else:
                tensor.normal_(generator=generator)
        _synchronize(device)

    def run() -> None:
        prepared.run()
        _synchronize(device)

    return Point(x, sizes, run, draw, ops._memory(device))


def timed(point: Point) -> float:
    """Seconds of one call on fresh data."""
    point.prepare()
    start = time.perf_counter()
    point.call()
    return time.perf_counter() - start


def measure_curve(
    subject: str, factor: str, base: Sizes, device: torch.device, seed: int, seconds: float, quick: bool
) -> tuple[list[Point], str | None]:
    """Time a curve within about ``seconds``: its points, and why larger ones were left out."""
    field = field_of(subject, factor)
    assert field is not None
    begin = time.perf_counter()
    left_out = None
    points: list[Point] = []
    values = VALUES[factor] if subject != BEHAVIOR else tuple(value for value in VALUES[factor] if value > 0)
    rounds = QUICK_ROUNDS if quick else MIN_ROUNDS
    for x in values[:QUICK_POINTS] if quick else values:
        planned = sum(point.first for point in points) * rounds
        if points:
            growth = (x / max(points[-1].x, 1)) ** GROWTH.get(factor, 1.0)
            cost = points[-1].first * growth * (2 + rounds)
            if time.perf_counter() - begin + planned + cost > seconds:
                left_out = f"from {x} on: no time for {rounds} rounds of about {cost / (2 + rounds):.1f} s"
                break
        sizes = dataclasses.replace(base, **{field: x})
        try:
            point = build_point(subject, x, sizes, device, seed)
            timed(point)
            point.first = timed(point)
        except torch.OutOfMemoryError:
            left_out = f"from {x} on: out of memory"
            break
        points.append(point)
    for index in range(QUICK_ROUNDS if quick else MAX_ROUNDS):
        if index >= rounds and time.perf_counter() - begin > seconds:
            break
        for turn in range(len(points)):
            point = points[(index + turn) % len(points)]
            if point.first < SHORT_SECONDS:
                timed(point)
            point.times.append(timed(point))
    for point in points:
        point.peak_bytes = ops._memory(device)
    return points, left_out


def to_records(
    subject: str, factor: str, points: Sequence[Point], device: torch.device, shared: dict[str, Any]
) -> list[Record]:
    """One record a point."""
    found = []
    for point in points:
        p20, p50, p80 = records.quantiles(point.times)
        op = OPS.get(subject)
        found.append(
            Record(
                **shared,
                benchmark=f"{BENCHMARK} {factor}",
                method=subject,
                sizes=dataclasses.asdict(point.sizes),
                rounds=len(point.times),
                p20=p20,
                p50=p50,
                p80=p80,
                ratio_to_jax=None,
                ratio_to_eager=None,
                peak_bytes=point.peak_bytes,
                built_bytes=point.built_bytes,
                op=subject,
                flops=None if op is None else op.flops(point.sizes),
                moved_bytes=None if op is None else op.bytes(point.sizes, torch.float32),
                timer="perf_counter",
                clocks=machine.gpu_clocks() if device.type == "cuda" else None,
            )
        )
    return found


# --- showing ---------------------------------------------------------------------------------------------------------


def show(found: Sequence[Record]) -> None:
    """The laws of the curves among records, as a table."""
    laws = exponents(found)
    if not laws:
        bench.say(f"no curve has the {MIN_FIT_POINTS} points that a law needs")
        return
    bench.say("time = a + b x^p: overhead a, exponent p, and the largest relative error that the law leaves")
    bench.print_table(
        {
            "operation": [law.curve.op for law in laws],
            "factor": [law.curve.factor for law in laws],
            "range": [f"{law.curve.x[0]} .. {law.curve.x[-1]}" for law in laws],
            "overhead ms": [bench.cell(law.overhead, 1e3, 2) for law in laws],
            "largest ms": [bench.cell(law.curve.seconds[-1], 1e3, 2) for law in laws],
            "exponent": [bench.cell(law.exponent, 1.0, 2) for law in laws],
            "misfit %": [bench.cell(law.misfit, 100.0, 0) for law in laws],
        }
    )


def plot(found: Sequence[Record], path: str) -> None:
    """A panel a factor, both axes logarithmic: measured points, and the laws as lines. Raises ``ImportError``."""
    from matplotlib.figure import Figure

    laws = {(law.curve.op, law.curve.factor): law for law in exponents(found)}
    by_factor: dict[str, list[ScalingCurve]] = {}
    for curve in curves(found):
        by_factor.setdefault(curve.factor, []).append(curve)
    figure = Figure(figsize=(4.0 * len(by_factor), 3.6), layout="constrained")
    for axes, (factor, group) in zip(
        figure.subplots(1, len(by_factor), squeeze=False)[0], by_factor.items(), strict=True
    ):
        for curve in group:
            law = laws.get((curve.op, factor))
            label = curve.op if law is None else f"{curve.op}, p = {law.exponent:.2f}"
            (line,) = axes.plot(curve.x, curve.seconds, "o", markersize=4, label=label)
            if law is not None:
                x = np.linspace(curve.x[0], curve.x[-1], 200)
                axes.plot(x, law.overhead + law.coefficient * x**law.exponent, color=line.get_color(), linewidth=1.0)
        # No steps at all are a point of their own.
        axes.set_xscale("symlog", linthresh=1.0)
        axes.set_yscale("log")
        axes.set_xlabel(factor)
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


# --- the command -----------------------------------------------------------------------------------------------------


def run(plan: Plan) -> bool:
    """Measure, record and show every curve, each in its share of the time; whether anything was timed."""
    subjects = ops._chosen("--ops", plan.ops, SUBJECTS)
    factors = ops._chosen("--factors", plan.factors, list(VALUES))
    device = ops.set_up(plan)
    shared = {**ops.facts(device), "dtype": "float32"}
    todo = [(subject, factor) for factor in factors for subject in subjects if field_of(subject, factor)]
    end = time.perf_counter() + (plan.seconds or DEFAULT_SECONDS)
    found: list[Record] = []
    with progress_bar("scaling", total=len(todo)) as advance:
        for index, (subject, factor) in enumerate(todo):
            # What a curve leaves over is shared by those after it.
            share = max(end - time.perf_counter(), 0.0) / (len(todo) - index)
            points, left_out = measure_curve(subject, factor, plan.sizes, device, plan.seed, share, plan.quick)
            if left_out is not None:
                bench.say(f"{subject}, {factor}: left out {left_out}")
            measured = to_records(subject, factor, points, device, shared)
            if plan.out is not None:
                records.append(plan.out, measured)
            found += measured
            advance()
    show(found)
    if plan.plot is not None:
        plot(found, plan.plot)
    return bool(found)
