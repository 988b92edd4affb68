"""Everything worth knowing of a GPU in under nine minutes: ``python -m profiling.gpu``. See profiling/README.md.

What is worth most comes first, each part in a process of its own with a time limit, every line on disk as soon as it is
known: a crash, a hang or the end of the machine's time loses one part at most. Needs torch, triton, numpy, safetensors;
pytest for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from profiling import machine
from profiling.bench import EAGER_METHOD, JAX_METHOD, say

TOTAL_SECONDS = 530.0
# After this a part that was asked to end is ended.
GRACE_SECONDS = 8.0
# Side by side tests wait for the compiler on as many cores; each process takes about half a GiB of the GPU.
TEST_PROCESSES = 8
RECORDS_FILE = "gpu.jsonl"
PEERS = ["ours-bfloat16", "ours-float32", "compile-bfloat16", "compile-float32", EAGER_METHOD, JAX_METHOD]


class Part(NamedTuple):
    """A part of the run: what is called, and the seconds after which it is ended."""

    name: str
    command: list[str]  # behind the interpreter
    seconds: float


def parts(out: Path, jax_release: str | None = None, dry: bool = False) -> list[Part]:
    """All parts in order. ``dry`` computes tiny sizes on the CPU and leaves the peers and the tests away."""
    first = ["-m", "profiling.first_minutes", *(["--tiny"] if dry else [])]
    chosen = [
        Part("compile", [*first, "compile"], 60.0),
        Part("accuracy", [*first, "accuracy"], 60.0),
        Part("running", [*first, "running"], 45.0),
        Part("kernels", [*first, "kernels"], 40.0),
        Part("questions", [*first, "questions"], 60.0),
    ]
    if dry:
        # Interpreted on a busy machine they take their time.
        return [part._replace(seconds=TOTAL_SECONDS) for part in chosen]
    options = ["--device", "cuda", "--out", str(out / RECORDS_FILE), "--methods", *PEERS]
    options += ["--jax-release", jax_release] if jax_release else []
    bench = ["-m", "profiling.bench"]
    chosen += [
        Part("update beside its peers", [*bench, "update", "--seconds", "70", *options], 85.0),
        Part("act beside its peers", [*bench, "act", "--seconds", "50", *options], 65.0),
    ]
    kernels, marked = gpu_tests()
    pytest = ["-m", "pytest", "-v", "--tb=short", "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", str(min(TEST_PROCESSES, os.cpu_count() or 1))]
    chosen += [
        Part("tests, marked", [*pytest, "-m", "gpu", "-k", "not sanitizer", *marked], 60.0),
        Part("tests, kernels", [*pytest, "-m", "not gpu", *kernels], 90.0),
        Part("sanitizer", [*pytest, "-m", "gpu", "-k", "sanitizer", *marked], 60.0),
    ]
    return chosen


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


def end(process: subprocess.Popen[str]) -> None:
    """End a command and all it started: it is interrupted, so that tests say what has failed so far, then killed."""
    with contextlib.suppress(ProcessLookupError):
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


def run(command: list[str], seconds: float, log: Path, interpret: bool = False) -> int | None:
    """Exit status of a command, or None when it ran out of time; its lines go to the terminal and to ``log`` at once.

    The command and all it started end with the time limit, and a few seconds for its last words. ``interpret`` has
    Triton interpret its kernels on the CPU.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONUNBUFFERED": "1"} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    process = subprocess.Popen(
        command,
        cwd=machine.REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        end(process)

    limit = threading.Timer(max(seconds, 1.0), expire)
    limit.start()
    try:
        assert process.stdout is not None
        with log.open("a", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                say(line.rstrip("\n"))
        status = process.wait()
        return None if expired.is_set() else status
    finally:
        limit.cancel()
        if process.poll() is None:
            end(process)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts; the exit status is 1 when one of them failed, 0 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m profiling.gpu", description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", metavar="DIR", type=Path, default=default, help="default: profiling/results/")
    parser.add_argument("--jax-release", metavar="DIR", help="checkout of the public JAX release, for the benchmarks")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to see that every part runs")
    given = parser.parse_args(arguments)

    import torch

    if not given.dry_run and not torch.cuda.is_available():
        say(f"no GPU that torch {torch.__version__} can use: nothing to do")
        return 0
    if importlib.util.find_spec("vgf_fast.kernels") is None:
        say("vgf_fast is not installed: pip install --no-deps --no-build-isolation -e .")
        return 1
    results = given.out.resolve()
    results.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    failed = []
    for part in parts(results, given.jax_release, given.dry_run):
        left = start + TOTAL_SECONDS - time.monotonic()
        if left < 1.0:
            say(f"{part.name}: no time left")
            failed.append(part.name)
            continue
        begun = time.monotonic()
        log = results / f"gpu-{part.name.replace(', ', '-').replace(' ', '-')}.txt"
        # The compiler's part compiles: for an architecture that is not there when nothing is.
        interpret = given.dry_run and part.name != "compile"
        status = run([sys.executable, *part.command], min(part.seconds, left), log, interpret)
        how = {0: "done", None: "out of time"}.get(status, f"exit status {status}")
        say(f"{part.name}: {how}, {time.monotonic() - begun:.0f} s ({log.name})")
        if status != 0:
            failed.append(part.name)
    say(f"{time.monotonic() - start:.0f} s; " + (f"not well: {'; '.join(failed)}" if failed else "all parts done"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
