"""Everything worth knowing of a GPU in under nine minutes: ``python -m profiling.gpu``. See profiling/README.md.

Runs the tests that need a GPU, then the benchmarks, each in a process of its own with a time limit; what is known is on
disk before the next part begins. Needs torch, triton, numpy, safetensors and pytest alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from profiling import machine
from profiling.bench import BACKEND_METHODS, COMPILE_METHODS, METHODS, say

TOTAL_SECONDS = 520.0
TEST_SECONDS = 180.0
MARKED_SECONDS = 120.0
# After this a part that was asked to end is ended.
GRACE_SECONDS = 10.0
# Side by side tests wait for the compiler on as many cores; each process takes about half a GiB of the GPU.
TEST_PROCESSES = 8
RECORDS_FILE = "gpu.jsonl"
# The compiler needs minutes, so what it does not take part in comes first.
WITHOUT_COMPILER = [method for method in METHODS if method not in COMPILE_METHODS.values()]
# Ratios are within a run, so the run with the compiler has the others too.
WITH_COMPILER = [method for method in METHODS if method not in BACKEND_METHODS]


class Part(NamedTuple):
    """A measurement: its module and arguments, when its last round may begin, and when it is ended."""

    name: str
    command: list[str]
    round_seconds: float
    limit_seconds: float


PARTS = (
    Part("update", ["bench", "update", "--methods", *WITHOUT_COMPILER], 20.0, 100.0),
    Part("act", ["bench", "act", "--methods", *WITHOUT_COMPILER], 20.0, 80.0),
    Part("update, compiled", ["bench", "update", "--methods", *WITH_COMPILER], 80.0, 120.0),
    Part("act, compiled", ["bench", "act", "--methods", *WITH_COMPILER], 60.0, 90.0),
    Part("ops", ["bench", "ops"], 45.0, 70.0),
    Part("llm", ["bench", "llm"], 15.0, 40.0),
    Part("memory", ["bench", "memory", "--methods", *WITHOUT_COMPILER], 10.0, 60.0),
)
ROOFLINE_SECONDS = 60.0


def gpu_tests() -> tuple[list[str], list[str]]:
    """Test files of the kernels, and test files that have tests marked ``gpu``; relative to the repository."""
    kernels, marked = [], []
    for path in sorted((machine.REPOSITORY / "tests").glob("test_*.py")):
        name = str(path.relative_to(machine.REPOSITORY))
        if "mark.gpu" in path.read_text(encoding="utf-8"):
            marked.append(name)
        # Compiling for other architectures needs no GPU, and takes minutes.
        if path.name.startswith("test_kernel") and path.name != "test_kernel_compile.py":
            kernels.append(name)
    return kernels, marked


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all it started: it is interrupted, so that tests say what has failed so far, then killed."""
    os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(timeout=GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # What it started may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: list[str], seconds: float, log: Path | None = None) -> int | None:
    """Exit status of a command, or None when it ran out of time; its output goes to the terminal, or to ``log``.

    The command and all it started end with the time limit, and a few seconds for its last words.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONUNBUFFERED"] = "1"
    beside = None if log is None else log.with_name(log.name + ".part")
    output = None if beside is None else beside.open("w", encoding="utf-8")
    try:
        process = subprocess.Popen(
            command,
            cwd=machine.REPOSITORY,
            env=environment,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                end(process)
    finally:
        if output is not None and beside is not None and log is not None:
            output.close()
            os.replace(beside, log)


def run_tests(results: Path, deadline: float) -> bool:
    """Run the tests that apply, their output in ``results``; whether none failed."""
    kernels, marked = gpu_tests()
    common = ["-v", "--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        common += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    passed = True
    for name, files, marks, seconds in (
        ("marked", marked, "gpu", MARKED_SECONDS),
        ("kernels", kernels, "not gpu", TEST_SECONDS),
    ):
        log = results / f"tests-{name}.txt"
        command = [sys.executable, "-m", "pytest", *common, "-m", marks, *files]
        status = run(command, min(seconds, deadline - time.monotonic()), log)
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        summary = lines[-1].strip("= ") if lines else f"exit status {status}"
        say(f"tests, {name}: {'out of time; ' if status is None else ''}{summary} ({log})")
        passed = passed and status == 0
    return passed


def measure(name: str, command: list[str], seconds: float) -> bool:
    """Run one of this folder's programs; whether it went well."""
    status = run([sys.executable, "-m", f"profiling.{command[0]}", *command[1:]], seconds)
    if status != 0:
        say(f"{name}: {'out of time' if status is None else f'exit status {status}'}")
    return status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Test and measure; the exit status is 1 when a test failed or a benchmark gave nothing, 0 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m profiling.gpu", description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", metavar="DIR", type=Path, default=default, help="default: profiling/results/")
    parser.add_argument("--jax-release", metavar="DIR", help="checkout of the public JAX release, for the benchmarks")
    given = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        say(f"no GPU that torch {torch.__version__} can use: nothing to do")
        return 0
    if importlib.util.find_spec("vgf_fast.kernels") is None:
        say("vgf_fast is not installed: pip install --no-deps --no-build-isolation -e .")
        return 1
    start = time.monotonic()
    results = given.out.resolve()
    results.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name()
    say(f"{name}, driver {machine.gpu_driver()}, torch {torch.__version__}, triton {machine.version('triton')}")
    passed = run_tests(results, start + TEST_SECONDS)
    deadline = start + TOTAL_SECONDS
    release = ["--jax-release", given.jax_release] if given.jax_release else []
    for part in PARTS:
        options = ["--device", "cuda", "--seconds", str(part.round_seconds), "--out", str(results / RECORDS_FILE)]
        options += release
        passed &= measure(part.name, [*part.command, *options], min(part.limit_seconds, deadline - time.monotonic()))
    passed &= measure(
        "roofline", ["roofline", "--out", str(results)], min(ROOFLINE_SECONDS, deadline - time.monotonic())
    )
    say(f"records: {results / RECORDS_FILE}; {time.monotonic() - start:.0f} s")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
