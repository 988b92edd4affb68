"""Time and memory of the nearest-token search beside plain PyTorch: ``python -m profiling.bench llm``.

Every method has a process of its own, for its peak memory; then they take turns in rounds. What is timed is one call
for queries [R, d] and a table [V, d] of random normal numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling import machine, records
from profiling.records import Record

if TYPE_CHECKING:
    from profiling.bench import Plan

OURS, CDIST, MATMUL = "ours", "cdist", "matmul"
METHODS = (OURS, CDIST, MATMUL)
DEFAULT_ROUNDS = 15
WARM_UP_CALLS = 2


class Search(NamedTuple):
    """Sizes of one search."""

    rows: int
    vocabulary: int
    width: int
    k: int


SEARCHES = {
    "cpu": (Search(512, 30_000, 384, 1), Search(128, 30_000, 384, 20)),
    "cuda": (Search(4096, 128_256, 4096, 1),),
}
QUICK = Search(16, 500, 8, 1)


# --- in the method's own process -------------------------------------------------------------------------------------


def prepare(method: str, search: Search, device: str, seed: int) -> Callable[[], Any]:
    """One call of a method on fresh inputs."""
    import torch

    from vgf_fast.llm.nearest import nearest_token

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    queries, table = (
        torch.empty(rows, search.width, device=device, dtype=dtype).normal_(generator=generator)
        for rows in (search.rows, search.vocabulary)
    )
    k = search.k

    def cdist() -> Any:
        # Not there for bfloat16.
        distances = torch.cdist(queries.float(), table.float())
        return distances.argmin(1) if k == 1 else distances.topk(k, largest=False).indices

    def matmul() -> Any:
        # 2 q . E - |E|^2: what cdist computes, without |q|^2 and the root.
        scores = torch.addmm(table.square().sum(1), queries, table.T, beta=-1.0, alpha=2.0)
        return scores.argmax(1) if k == 1 else scores.topk(k).indices

    return {OURS: lambda: nearest_token(queries, table, k).tokens, CDIST: cdist, MATMUL: matmul}[method]


def serve(method: str, search: Search, device: str, threads: int, seed: int) -> None:
    """Answer every line on standard input with the seconds of one call, or with memory and facts."""
    import torch

    torch.set_num_threads(threads)
    # What libraries take when they are first called is not the method's; small sizes go other ways through them.
    prepare(method, search._replace(rows=64, vocabulary=min(search.vocabulary, 2000)), device, seed)()
    call = prepare(method, search, device, seed)
    cuda = device == "cuda"
    built = torch.cuda.memory_allocated() if cuda else machine.peak_resident_bytes()
    for line in sys.stdin:
        if line.strip() == "facts":
            peak = torch.cuda.max_memory_allocated() if cuda else machine.peak_resident_bytes()
            answer: dict[str, Any] = {
                "built_bytes": built,
                "peak_bytes": peak,
                "device": torch.cuda.get_device_name() if cuda else machine.cpu_name(),
                "dtype": "bfloat16" if cuda else "float32",
                "torch": torch.__version__,
                "triton": machine.version("triton"),
                "matmul_precision": torch.get_float32_matmul_precision(),
            }
        else:
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            answer = {"seconds": time.perf_counter() - begin}
        print(json.dumps(answer), flush=True)


# --- in the benchmark's process --------------------------------------------------------------------------------------


class Server:
    """A method's process, which answers one line with another."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ask(self, request: str) -> dict[str, Any]:
        """The answer. Raises ``RuntimeError`` if the process has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a method's process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def serving(method: str, search: Search, plan: Plan) -> Iterator[Server]:
    """A process that serves one method, ended on leaving."""
    sizes = [str(size) for size in search]
    arguments = [method, plan.device, str(plan.threads), str(plan.seed), *sizes]
    threads = str(plan.threads)
    process = subprocess.Popen(
        [sys.executable, "-m", "profiling.llm", *arguments],
        cwd=machine.REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Server(process)
    finally:
        process.kill()
        process.communicate()


def measure(search: Search, plan: Plan) -> list[Record]:
    """Records of all methods for one search, taken in turns."""
    load = machine.load_average()
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rounds = plan.rounds or (2 if plan.quick else DEFAULT_ROUNDS)
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    with contextlib.ExitStack() as stack:
        servers = {method: stack.enter_context(serving(method, search, plan)) for method in METHODS}
        for server in servers.values():
            for _ in range(WARM_UP_CALLS):
                server.ask("call")
        begin = time.perf_counter()
        for index in range(rounds):
            if index and time.perf_counter() - begin > (plan.seconds or float("inf")):
                break
            for turn in range(len(METHODS)):
                method = METHODS[(index + turn) % len(METHODS)]
                times[method].append(servers[method].ask("call")["seconds"])
        facts = {method: server.ask("facts") for method, server in servers.items()}
    measured = []
    for method in METHODS:
        p20, p50, p80 = records.quantiles(times[method])
        measured.append(
            Record(
                date=date,
                benchmark="llm",
                method=method,
                driver=machine.gpu_driver() if plan.device == "cuda" else None,
                threads=plan.threads,
                load_average=load,
                python=platform.python_version(),
                jax=None,
                commit=machine.git_commit(),
                dirty=machine.git_dirty(),
                sizes=search._asdict(),
                rounds=len(times[method]),
                p20=p20,
                p50=p50,
                p80=p80,
                ratio_to_jax=None,
                # The eager peer is what one would write: cdist and argmin.
                ratio_to_eager=records.paired_ratio(times[method], times[CDIST]),
                op="nearest_token",
                flops=2 * search.rows * search.vocabulary * search.width,
                timer="perf_counter",
                **facts[method],
            )
        )
    return measured


def run(plan: Plan) -> bool:
    """Measure every search, show and record it; whether all went well."""
    from profiling.bench import show

    for search in (QUICK,) if plan.quick else SEARCHES[plan.device]:
        measured = measure(search, plan)
        if plan.out is not None:
            records.append(plan.out, measured)
        print(", ".join(f"{name} {size}" for name, size in search._asdict().items()))
        show(measured)
    return True


def main() -> None:
    """Serve one method, as ``serving`` starts it."""
    parser = argparse.ArgumentParser(prog="python -m profiling.llm", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("device", choices=tuple(SEARCHES))
    parser.add_argument("threads", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("sizes", type=int, nargs=len(Search._fields))
    options = parser.parse_args()
    serve(options.method, Search(*options.sizes), options.device, options.threads, options.seed)


if __name__ == "__main__":
    main()
