"""The library beside busy processes: ``python -m profiling.bench busy``. See profiling/README.md.

An update and an action are timed with every way in which OpenMP's threads may wait, first alone, then while two loops a
core run beside them. The processes take turns, and are held to no core: they share the machine as a user's would.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling import bench, machine, records
from profiling.records import Record
from profiling.worker import BENCHMARKS, Job

if TYPE_CHECKING:
    from profiling.bench import Plan, Worker

LOOPS_PER_CORE = 2
DEFAULT_ROUNDS = 50
ONE_THREAD = "one thread"
# Until whoever started it is gone, however that came about.
_LOOP = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


class Setting(NamedTuple):
    """How threads wait: environment variables of a method's process, and its threads, None for all."""

    environment: Mapping[str, str]
    threads: int | None = None


# The benchmarks' processes import torch before the library, which therefore leaves the first as libgomp has it.
SETTINGS = {
    "libgomp's default": Setting({}),
    ONE_THREAD: Setting({}, threads=1),
    "GOMP_SPINCOUNT=10000": Setting({"GOMP_SPINCOUNT": "10000"}),
    "GOMP_SPINCOUNT=50000": Setting({"GOMP_SPINCOUNT": "50000"}),
    "OMP_WAIT_POLICY=passive": Setting({"OMP_WAIT_POLICY": "passive"}),
}


@contextlib.contextmanager
def loops(count: int) -> Iterator[None]:
    """So many processes that do nothing but run."""
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            process = subprocess.Popen([sys.executable, "-c", _LOOP])
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def measure(plan: Plan, workers: Mapping[str, Worker], benchmark: str, count: int) -> list[Record]:
    """Records of one benchmark beside ``count`` loops, one for each setting."""
    load = machine.load_average()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    with loops(count):
        times = bench.take_turns(
            list(workers.values()),
            benchmark,
            rounds=plan.rounds or (bench.QUICK_ROUNDS if plan.quick else DEFAULT_ROUNDS),
            warm_up=1 if plan.quick else bench.WARM_UP_CALLS,
            untimed=1 if benchmark == "act" else 0,
            seconds=plan.seconds or float("inf"),
        )
    shared = bench.shared_facts(plan, list(workers.values())) | {
        "date": date,
        "benchmark": f"busy {benchmark}",
        "timer": "perf_counter",
        "load_average": load,
        "busy_loops": count,
    }
    measured = []
    for name, worker in workers.items():
        p20, p50, p80 = records.quantiles(times[name])
        own: dict[str, Any] = {fact: worker.facts[fact] for fact in bench.OWN_FACTS}
        # Totals and not medians: one call that waits for a time slice is what makes a run slow.
        total = sum(times[name])
        ratio = total / sum(times[ONE_THREAD])
        measured.append(
            Record(
                **shared, **own, **worker.memory(), method=name, rounds=len(times[name]), p20=p20, p50=p50,
                p80=p80, ratio_to_jax=None, ratio_to_eager=None, total=total, ratio_to_one_thread=ratio,
            )
        )  # fmt: skip
    return measured


def show(measured: list[Record]) -> None:
    """Print a table of one benchmark's records."""
    first = measured[0]
    bench.say(f"{first.benchmark}: {first.device}, {first.busy_loops} busy loops beside, {first.rounds} rounds")
    columns = {
        "threads wait": [record.method for record in measured],
        "threads": [str(record.threads) for record in measured],
        **{
            f"{name} ms": [bench.cell(getattr(record, name), 1e3, 2) for record in measured]
            for name in ("p20", "p50", "p80", "total")
        },
        "x one thread": [bench.cell(record.ratio_to_one_thread, 1.0, 2) for record in measured],
    }
    bench.print_table(columns)


def run(plan: Plan) -> bool:
    """Measure, show and record; False when there is nothing to compare."""
    if plan.device != "cpu":
        bench.say("busy: skipped, it is about the CPU's threads: give --device cpu")
        return False
    # The user's own would be every process's.
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    cores = machine.usable_cores()
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, setting in SETTINGS.items():
            job = Job("ours-float32", "cpu", setting.threads or plan.threads, plan.seed, plan.sizes, cores=cores)
            worker = stack.enter_context(bench.running(job, sys.executable, setting.environment))
            worker.method = name
            workers[name] = worker
        try:
            for worker in workers.values():
                worker.built()
            for count in (0, LOOPS_PER_CORE * cores):
                for benchmark in BENCHMARKS:
                    measured = measure(plan, workers, benchmark, count)
                    if plan.out is not None:
                        records.append(plan.out, measured)
                    show(measured)
        except bench.WorkerError as error:
            bench.say(f"busy was given up, {error}")
            return False
    return True
