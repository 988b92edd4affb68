"""Facts of the machine, the interpreter and the checkout that every record carries. Standard library only."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """The processor's model."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limit_cores(threads: int) -> None:
    """Keep this process on its first ``threads`` cores: thread pools that take one thread a core obey nothing else."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def gpu_driver() -> str | None:
    """Version of the GPU's driver, or None."""
    commands = (
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        ["rocm-smi", "--showdriverversion", "--csv"],
    )
    for command in commands:
        lines = _output(command).splitlines()
        if lines:
            return lines[-1].rpartition(",")[2].strip()
    return None


def gpu_clocks() -> dict[str, int] | None:
    """Clocks in MHz as they are now, ``sm`` and ``mem``, or None."""
    lines = _output(["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]).splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return (
        dict(zip(("sm", "mem"), map(int, values), strict=True)) if all(v.isdigit() for v in values) and values else None
    )


def last_level_cache_bytes() -> int | None:
    """Size of the first core's largest cache, or None where the system does not say."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [
        int(text[:-1]) * units[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text(encoding="utf-8").strip())[-1:] in units
    ]
    return max(sizes, default=None)


def load_average() -> float | None:
    """Mean number of runnable processes over the last minute, or None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def version(distribution: str) -> str | None:
    """Version of an installed distribution, or None; imports nothing."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_resident_bytes() -> int:
    """Largest resident memory this process ever had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def git_commit() -> str | None:
    """The checkout's commit, or None without one."""
    return _output(["git", "rev-parse", "--verify", "HEAD"]).strip() or None


def git_dirty() -> bool | None:
    """Whether what is measured differs from the commit, or None where that cannot be told; records themselves do not
    count.
    """
    if git_commit() is None:
        return None
    measured = ["vgf_fast", "kernels", "profiling", "pyproject.toml", ":(exclude)profiling/results"]
    return bool(_output(["git", "status", "--porcelain", "--", *measured]).strip())


def _output(command: list[str]) -> str:
    """What a command prints; empty when it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
