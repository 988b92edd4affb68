"""Time vgf_fast beside its peers: ``python -m profiling.bench update act memory``. See profiling/README.md.

Every method runs in a process of its own and is asked for one call at a time, by turns, while the others wait.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from profiling import machine, records
from profiling.records import Record
from profiling.worker import BENCHMARKS, Job, Sizes

JAX_METHOD, EAGER_METHOD = "jax-release", "eager-float32"
COMPILE_METHODS = {"float32": "compile-float32", "bfloat16": "compile-bfloat16"}
# On a CPU this library's backend is PyTorch already.
BACKEND_METHODS = ("torch-float32", "torch-bfloat16")
METHODS = ("ours-float32", "ours-bfloat16", *BACKEND_METHODS, EAGER_METHOD, *COMPILE_METHODS.values(), JAX_METHOD)
DEFAULT_ROUNDS = {"update": 20, "act": 200, "memory": 3}
# Measured after the others by these modules, most of which import torch into this process.
IN_PROCESS = {"busy": "busy", "ops": "ops.timing", "scaling": "scaling", "llm": "llm"}
QUICK_ROUNDS = 2
OWN_FACTS = ("dtype", "device", "threads", "matmul_precision")
# The second call may still compile or allocate what the first did not.
WARM_UP_CALLS = 3
# The threads of the method before go on spinning for some milliseconds.
SETTLE_SECONDS = 0.005


class WorkerError(RuntimeError):
    """A method's process could not be built or died; the message is one line."""


class Worker:
    """A method's process, as ``running`` starts it; ``facts`` are what it says of itself once built."""

    def __init__(self, method: str, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self.method = method
        self.facts: dict[str, Any] = {}
        self._process = process
        self._errors = errors

    def built(self) -> None:
        """Wait until the method is ready. Raises ``WorkerError``."""
        self.facts = self._answer()["facts"]

    def call(self, benchmark: str, untimed: int = 0) -> float:
        """Seconds of one call, after ``untimed`` others. Raises ``WorkerError``."""
        time.sleep(SETTLE_SECONDS)
        return float(self._ask({"do": "call", "benchmark": benchmark, "untimed": untimed})["seconds"])

    def memory(self) -> dict[str, Any]:
        """``peak_bytes`` so far and ``built_bytes`` before the first call. Raises ``WorkerError``."""
        return self._ask({"do": "memory"})

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        # A process that died says why below.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended without an answer: {self._last_words()}"}
        if "error" in answer:
            raise WorkerError(f"{self.method}: {answer['error']}")
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else f"exit status {code}"


@contextlib.contextmanager
def running(job: Job, python: str, settings: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """Start a method's process in an interpreter, and end it on leaving. Raises ``OSError`` without the interpreter.

    ``settings`` are environment variables for it alone.
    """
    module = "profiling.jax_release" if job.method == JAX_METHOD else "profiling.torch_methods"
    threads = str(job.threads)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [python, "-m", module, job.to_json()],
            cwd=machine.REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | dict(settings or {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield Worker(job.method, process, errors)
        finally:
            process.kill()
            process.communicate()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    benchmarks: tuple[str, ...]
    methods: tuple[str, ...]
    jax_release: str | None
    jax_python: str
    device: str
    threads: int
    rounds: int | None
    seconds: float | None
    seed: int
    quick: bool
    sizes: Sizes
    out: str | None
    # Of "ops" and "scaling", None for all:
    ops: tuple[str, ...] | None = None
    grid: tuple[str, ...] | None = None
    implementations: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    factors: tuple[str, ...] | None = None
    plot: str | None = None


def parse(arguments: Sequence[str] | None) -> Plan:
    """The plan of a command line; exits with a message when it cannot be carried out."""
    parser = argparse.ArgumentParser(prog="python -m profiling.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("benchmarks", nargs="+", choices=(*DEFAULT_ROUNDS, *IN_PROCESS), help="what to measure")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all")
    parser.add_argument("--jax-release", metavar="DIR", help="checkout of the public JAX release; without it, skipped")
    parser.add_argument("--jax-python", metavar="PYTHON", default=sys.executable, help="interpreter that has jax")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument("--threads", type=int, default=machine.usable_cores(), help="CPU threads of every method")
    parser.add_argument("--rounds", type=int, help="timed calls of every method; default: 20, 200, 3")
    parser.add_argument("--seconds", type=float, help="begin no round after this long in one benchmark")
    parser.add_argument("--out", metavar="FILE.jsonl", help="append the records to this file")
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds and one warm-up call: a smoke test"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="operations of profiling/ops; default: all")
    parser.add_argument("--grid", nargs="+", metavar="NAME", help="shapes of ops; default: all, or the sizes given")
    parser.add_argument("--implementations", nargs="+", metavar="NAME", help="of ops; default: all")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32"], help="of ops")
    parser.add_argument("--factors", nargs="+", metavar="NAME", help="of scaling; default: all")
    parser.add_argument("--plot", metavar="FILE.png", help="draw scaling")
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    options = parser.parse_args(arguments)
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
    counts = {**dataclasses.asdict(sizes), "rounds": options.rounds, "threads": options.threads}
    for name, value in counts.items():
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}, expected an integer >= 1")
    if options.threads > machine.usable_cores():
        parser.error(f"--threads is {options.threads}, expected at most {machine.usable_cores()}: the cores there are")
    device = options.device or ("cuda" if _has_cuda() else "cpu")
    methods = tuple(dict.fromkeys(options.methods or METHODS))
    if not options.methods and device == "cpu":
        methods = tuple(method for method in methods if method not in BACKEND_METHODS)
    return Plan(
        benchmarks=tuple(dict.fromkeys(options.benchmarks)),
        methods=methods,
        jax_release=os.path.abspath(options.jax_release) if options.jax_release else None,
        jax_python=os.path.abspath(options.jax_python) if os.sep in options.jax_python else options.jax_python,
        device=device,
        threads=options.threads,
        rounds=options.rounds,
        seconds=options.seconds,
        seed=options.seed,
        quick=options.quick,
        sizes=sizes,
        out=options.out,
        ops=_tuple(options.ops),
        grid=_tuple(options.grid),
        implementations=_tuple(options.implementations),
        dtypes=tuple(dict.fromkeys(options.dtypes)),
        factors=_tuple(options.factors),
        plot=options.plot,
    )


def _tuple(names: Sequence[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(dict.fromkeys(names))


def _has_cuda() -> bool:
    """Asked in another process: a fat parent would count towards the peak memory of the processes it starts."""
    command = [sys.executable, "-c", "import torch; raise SystemExit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def start(plan: Plan, stack: contextlib.ExitStack) -> list[Worker]:
    """One process for each method that can run here, ended with ``stack``; says which cannot, and why."""
    started: list[Worker] = []
    for method in plan.methods:
        if method == JAX_METHOD and plan.jax_release is None:
            say(f"{JAX_METHOD}: skipped, --jax-release was not given")
            continue
        job = Job(method, plan.device, plan.threads, plan.seed, plan.sizes, plan.jax_release)
        try:
            python = plan.jax_python if method == JAX_METHOD else sys.executable
            started.append(stack.enter_context(running(job, python)))
        except OSError as error:
            say(f"{method}: skipped, {error}")
    workers = []
    for worker in started:
        try:
            worker.built()
            workers.append(worker)
        except WorkerError as error:
            say(f"{worker.method}: skipped, {str(error).partition(': ')[2]}")
    return workers


def _progress_bar(label: str, total: int) -> contextlib.AbstractContextManager[Any]:
    """``vgf_fast.common.progress.progress_bar``, without the package around it, which would import torch here."""
    path = machine.REPOSITORY / "vgf_fast" / "common" / "progress.py"
    spec = importlib.util.spec_from_file_location("profiling_progress", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    bar: contextlib.AbstractContextManager[Any] = module.progress_bar(label, total)
    return bar


def take_turns(
    workers: list[Worker], benchmark: str, rounds: int, warm_up: int, untimed: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every method's call in every round; each round begins with another method."""
    begin = time.perf_counter()
    times: dict[str, list[float]] = {worker.method: [] for worker in workers}
    with _progress_bar(f"{benchmark}, rounds", warm_up + rounds) as advance:
        for _ in range(warm_up):
            for worker in workers:
                worker.call(benchmark)
            advance()
        for index in range(rounds):
            if index and time.perf_counter() - begin > seconds:
                break
            for turn in range(len(workers)):
                worker = workers[(index + turn) % len(workers)]
                times[worker.method].append(worker.call(benchmark, untimed))
            advance()
    return times


def shared_facts(plan: Plan, workers: Sequence[Worker]) -> dict[str, Any]:
    """What the records of all methods of a run have in common: machine, versions, checkout, sizes."""
    versions = {name: value for worker in workers for name, value in worker.facts.items()}
    return {
        "driver": machine.gpu_driver() if plan.device == "cuda" else None,
        "clocks": machine.gpu_clocks() if plan.device == "cuda" else None,
        "python": platform.python_version(),
        "commit": machine.git_commit(),
        "dirty": machine.git_dirty(),
        "sizes": dataclasses.asdict(plan.sizes),
        **{name: versions.get(name) for name in ("torch", "triton", "jax")},
    }


def measure(plan: Plan, kind: str, benchmark: str) -> list[Record]:
    """Records of one benchmark; ``kind`` is "memory", or the benchmark itself when it is for its time."""
    load = machine.load_average()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    memory_only = kind == "memory"
    with contextlib.ExitStack() as stack:
        workers = start(plan, stack)
        if not workers:
            return []
        # What is short is timed with its weights in the caches, as the second of two calls.
        untimed = 1 if not memory_only and (benchmark == "act" or plan.device == "cuda") else 0
        times = take_turns(
            workers,
            benchmark,
            rounds=plan.rounds or (QUICK_ROUNDS if plan.quick else DEFAULT_ROUNDS[kind]),
            warm_up=1 if plan.quick or memory_only else WARM_UP_CALLS,
            untimed=untimed,
            seconds=plan.seconds or float("inf"),
        )
        shared = shared_facts(plan, workers) | {
            "date": date,
            "benchmark": f"memory {benchmark}" if memory_only else benchmark,
            "timer": None if memory_only else "perf_counter",
            "load_average": load,
        }
        measured = []
        for worker in workers:
            seconds = times[worker.method]
            timed = [] if memory_only else seconds
            p20, p50, p80 = records.quantiles(timed)
            own: dict[str, Any] = {name: worker.facts[name] for name in OWN_FACTS}
            measured.append(
                Record(
                    **shared,
                    **own,
                    **worker.memory(),
                    method=worker.method,
                    rounds=len(seconds),
                    p20=p20,
                    p50=p50,
                    p80=p80,
                    ratio_to_jax=records.paired_ratio(timed, times.get(JAX_METHOD, [])),
                    ratio_to_eager=records.paired_ratio(timed, times.get(EAGER_METHOD, [])),
                    ratio_to_compile=records.paired_ratio(timed, times.get(COMPILE_METHODS.get(own["dtype"], ""), [])),
                )
            )
        return measured


def show(measured: Sequence[Record]) -> None:
    """Print a table of one benchmark's records."""
    first = measured[0]
    threads = f"{first.threads} thread" + "s" * (first.threads != 1)
    rounds = f"{first.rounds} round" + "s" * (first.rounds != 1)
    say(f"{first.benchmark}: {first.device}, {threads}, {rounds}")
    columns = {
        "method": [record.method for record in measured],
        **{
            f"{name} ms": [cell(getattr(record, name), 1e3, 2) for record in measured] for name in ("p20", "p50", "p80")
        },
        "x JAX": [cell(record.ratio_to_jax, 1.0, 2) for record in measured],
        "x eager": [cell(record.ratio_to_eager, 1.0, 2) for record in measured],
        "x compile": [cell(record.ratio_to_compile, 1.0, 2) for record in measured],
        "peak MiB": [cell(record.peak_bytes, 2.0**-20, 0) for record in measured],
        "built MiB": [cell(record.built_bytes, 2.0**-20, 0) for record in measured],
    }
    print_table(columns)


def print_table(columns: dict[str, list[str]]) -> None:
    """Columns by name, the first one of names, without those that are empty."""
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    if importlib.util.find_spec("rich") is not None:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in columns:
            table.add_column(name, justify="right" if table.columns else "left", no_wrap=True)
        for row in zip(*columns.values(), strict=True):
            table.add_row(*row)
        Console(width=140).print(table)
        return
    widths = [max(map(len, (name, *cells))) for name, cells in columns.items()]
    for row in (tuple(columns), *zip(*columns.values(), strict=True)):
        say("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


def cell(value: float | None, scale: float, digits: int) -> str:
    """A number for a table; empty for None."""
    return "" if value is None else f"{value * scale:.{digits}f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show and record; the exit status is 1 when no method could run."""
    plan = parse(arguments)
    for kind in (name for name in plan.benchmarks if name not in IN_PROCESS):
        for benchmark in BENCHMARKS if kind == "memory" else (kind,):
            try:
                measured = measure(plan, kind, benchmark)
            except WorkerError as error:
                say(f"{kind} was given up, {error}")
                return 1
            if not measured:
                say(f"{kind}: no method can run here")
                return 1
            if plan.out is not None:
                records.append(plan.out, measured)
            show(measured)
    for kind in (name for name in IN_PROCESS if name in plan.benchmarks):
        if not importlib.import_module(f"profiling.{IN_PROCESS[kind]}").run(plan):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
