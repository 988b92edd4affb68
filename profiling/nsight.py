"""Run Nsight on one update or one kernel, and read what it wrote as one table. See profiling/README.md.

python -m profiling.nsight nsys [--out DIR]                  # make nsys: where the time of updates and acting goes
python -m profiling.nsight ncu [--kernel REGEX] [--out DIR]  # make ncu: one kernel from inside
python -m profiling.nsight read FILE.csv ... [--markdown]    # what either of them wrote
"""

from __future__ import annotations

import argparse
import csv
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from profiling import machine
from profiling.bench import say
from profiling.tables import table

RESULTS = machine.REPOSITORY / "profiling" / "results" / "nsight"
KERNEL = "flow_step_kernel"
UPDATES = 3
# nsys's reports: kernels by time, and NVTX ranges by the time of the kernels launched in them.
NSYS_REPORTS = ("cuda_gpu_kern_sum", "nvtx_gpu_proj_sum")

# ncu's metrics behind each column; the first that a file has counts, since they differ between architectures.
TIME = "gpu__time_duration.sum"
DRAM = ("dram__bytes.sum.per_second",)
L2 = ("lts__t_bytes.sum.per_second",)
MATRIX = (
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
)
OCCUPANCY = ("sm__warps_active.avg.pct_of_peak_sustained_active",)
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)(?:_not_issued)?_per_issue_active\.ratio")
STALLS = "regex:smsp__average_warps_issue_stalled_.*_per_issue_active"
METRICS = (TIME, *DRAM, *L2, *MATRIX, *OCCUPANCY)

SECONDS = {
    "ns": 1e-9,
    "nsecond": 1e-9,
    "us": 1e-6,
    "usecond": 1e-6,
    "ms": 1e-3,
    "msecond": 1e-3,
    "s": 1.0,
    "second": 1.0,
}
PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class Row(NamedTuple):
    """A kernel, or a range, as Nsight saw it; None is what a file does not say."""

    name: str
    launches: int
    seconds: float  # of all launches
    dram_bytes_per_second: float | None = None
    l2_bytes_per_second: float | None = None
    matrix_percent: float | None = None  # of the matrix units' peak
    occupancy_percent: float | None = None  # warps that were resident, of those that could be
    stall: str | None = None  # what an issued instruction's warp waited for longest


def read(path: str | Path) -> list[Row]:
    """The rows of a CSV of ``ncu --csv --page raw`` or ``nsys stats --format csv``, the longest first.

    Raises ``FileNotFoundError``, and ``ValueError`` for a file that is neither, or has a number in an unknown unit.
    """
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines()
    for start, line in enumerate(lines):
        # Both print messages of their own before the header.
        header = next(csv.reader([line]), [])
        if "Kernel Name" in header:
            rows = _ncu(path, list(csv.DictReader(lines[start:])))
            break
        name = "Name" if "Name" in header else "Range"
        if name in header and any(column.startswith(("Total Time", "Total Proj Time")) for column in header):
            rows = _nsys(path, name, list(csv.DictReader(lines[start:])))
            break
    else:
        raise ValueError(
            f"{path} has no header of Nsight's, expected the CSV of 'ncu --csv --page raw' or 'nsys stats --format csv'"
        )
    return sorted(rows, key=lambda row: -row.seconds)


def _number(path: Path, column: str, text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        raise ValueError(f"{path} has {text!r} in column {column!r}, expected a number") from None


def _unit(path: Path, column: str, unit: str) -> float:
    """What a number in this unit is to be multiplied by: seconds, bytes a second, or per cent."""
    if unit in SECONDS:
        return SECONDS[unit]
    if unit in ("%", "", "inst"):
        return 1.0
    matched = re.fullmatch(r"([KMGT]?)byte/(\w+)", unit)
    if matched is None or matched[2] not in SECONDS:
        raise ValueError(f"{path} has unit {unit!r} in column {column!r}, expected a time, bytes a time, or %")
    return PREFIXES[matched[1]] / SECONDS[matched[2]]


def _ncu(path: Path, lines: list[dict[str, str]]) -> list[Row]:
    """One row a kernel: launches are added up, rates are means weighted by time."""
    if not lines or TIME not in lines[0]:
        raise ValueError(f"{path} lacks {TIME}, expected it among the metrics: 'make ncu' asks for what is needed")
    units, lines = lines[0], lines[1:]
    kernels: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        kernels.setdefault(line["Kernel Name"].partition("(")[0], []).append(line)
    rows = []
    for name, launches in kernels.items():
        weights = [_number(path, TIME, line[TIME]) * _unit(path, TIME, units[TIME]) for line in launches]
        total = sum(weights)

        def mean(
            columns: Sequence[str],
            launches: list[dict[str, str]] = launches,
            weights: list[float] = weights,
            total: float = total,
        ) -> float | None:
            for column in columns:
                if launches[0].get(column):
                    scale = _unit(path, column, units[column])
                    values = [_number(path, column, line[column]) * scale for line in launches]
                    return sum(w * v for w, v in zip(weights, values, strict=True)) / total
            return None

        stalls = {matched[1]: mean([column]) for column in units if (matched := STALL.fullmatch(column))}
        known = {reason: value for reason, value in stalls.items() if value is not None and reason != "selected"}
        stall = max(known, key=lambda reason: known[reason]).replace("_", " ") if known else None
        rows.append(
            Row(name, len(launches), total, mean(DRAM), mean(L2), mean(MATRIX), mean(OCCUPANCY), stall),
        )
    return rows


def _nsys(path: Path, name: str, lines: list[dict[str, str]]) -> list[Row]:
    rows = []
    for line in lines:
        (time,) = (c for c in line if c.startswith(("Total Time", "Total Proj Time")))
        count = next((c for c in ("Instances", "Range Instances", "Proj Instances") if c in line), None)
        if count is None:
            raise ValueError(f"{path} has no column of instances, expected a summary such as {NSYS_REPORTS[0]}")
        unit = time.partition("(")[2].rstrip(")")
        seconds = _number(path, time, line[time]) * _unit(path, time, unit)
        # A range is shown behind its domain; a kernel may have arguments and colons of its own.
        label = line[name].rpartition(":")[2] if name == "Range" else line[name].partition("(")[0]
        rows.append(Row(label, int(_number(path, count, line[count])), seconds))
    return rows


def shown(rows: Sequence[Row], markdown: bool = False) -> str:
    """The rows as one table; a blank is what was not measured."""

    def cell(value: float | None, scale: float, digits: int) -> str:
        return "" if value is None else f"{value * scale:.{digits}f}"

    header = ["name", "launches", "us each", "DRAM GB/s", "L2 GB/s", "matrix %", "occupancy %", "top stall"]
    cells = [
        [
            row.name,
            str(row.launches),
            cell(row.seconds / row.launches, 1e6, 2),
            cell(row.dram_bytes_per_second, 1e-9, 0),
            cell(row.l2_bytes_per_second, 1e-9, 0),
            cell(row.matrix_percent, 1.0, 1),
            cell(row.occupancy_percent, 1.0, 1),
            row.stall or "",
        ]
        for row in rows
    ]
    if markdown:
        return table(header, cells)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [header, *cells]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def nsys_commands(out: Path) -> list[list[str]]:
    """Profile some updates and actions with ranges, outside of CUDA graphs, then write the CSVs."""
    report = out / "updates"
    profile = [
        *("nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--force-overwrite=true"),
        *("--output", str(report), sys.executable, "-m", "profiling.nsight", "work"),
    ]
    reports = [text for name in NSYS_REPORTS for text in ("--report", name)]
    stats = ["nsys", "stats", *reports, "--format", "csv", "--force-export=true", "--force-overwrite=true"]
    return [profile, [*stats, "--output", str(report), f"{report}.nsys-rep"]]


def ncu_commands(out: Path, kernel: str) -> list[list[str]]:
    """Replay the launches of one kernel in one update: the clocks stay as they are, and so do the weights.

    ncu saves and restores the memory that a kernel writes around every replay, so that a kernel that updates weights in
    place does it once.
    """
    report = out / re.sub(r"\W+", "_", kernel)
    return [
        [
            *("ncu", "--clock-control", "none", "--replay-mode", "kernel", "--profile-from-start", "off"),
            *("--kernel-name", f"regex:{kernel}", "--metrics", ",".join([*METRICS, STALLS]), "--force-overwrite"),
            *("--export", str(report), sys.executable, "-m", "profiling.nsight", "work", "--updates", "1"),
        ],
        ["ncu", "--import", f"{report}.ncu-rep", "--csv", "--page", "raw", "--log-file", f"{report}.csv"],
    ]


def work(updates: int) -> int:
    """What is profiled: updates and one action at the paper's sizes, warmed up, without CUDA graphs."""
    import torch
    from vgf_fast.kernels import ranges

    from profiling import timeline

    update, act = timeline.update("auto", "cuda"), timeline.act("auto", "cuda", 1)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    with ranges.switched_on("nvtx"):
        for _ in range(updates):
            update()
        act()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    return 0


def _run(commands: list[list[str]], out: Path) -> int:
    tool = commands[0][0]
    if shutil.which(tool) is None:
        say(f"no {tool} on the path: nothing to do (Nsight comes with the CUDA toolkit)")
        return 0
    import torch

    if not torch.cuda.is_available():
        say(f"no GPU that torch {torch.__version__} can use: nothing to do")
        return 0
    out.mkdir(parents=True, exist_ok=True)
    for command in commands:
        status = subprocess.run(command, cwd=machine.REPOSITORY, check=False).returncode
        if status != 0:
            say(f"error: {' '.join(command[:2])} ended with status {status}")
            return 1
    for path in sorted(out.glob("*.csv")):
        say(f"{path.name}\n{shown(read(path))}\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Profile or read; the exit status is 0 without a GPU or Nsight, which is said, and 2 for a file that is none."""
    parser = argparse.ArgumentParser(prog="python -m profiling.nsight", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("nsys", "ncu"):
        command = commands.add_parser(name)
        command.add_argument(
            "--out", metavar="DIR", type=Path, default=RESULTS, help="default: profiling/results/nsight"
        )
        if name == "ncu":
            command.add_argument("--kernel", metavar="REGEX", default=KERNEL, help=f"default: {KERNEL}")
    command = commands.add_parser("read")
    command.add_argument("files", nargs="+", metavar="FILE.csv")
    command.add_argument("--markdown", action="store_true")
    command = commands.add_parser("work", help="what the other two profile")
    command.add_argument("--updates", type=int, default=UPDATES)
    options = parser.parse_args(arguments)
    if options.command == "read":
        try:
            for path in options.files:
                say(shown(read(path), options.markdown))
        except (OSError, ValueError) as error:
            say(f"error: {error}")
            return 2
        return 0
    if options.command == "work":
        return work(options.updates)
    if options.command == "nsys":
        return _run(nsys_commands(options.out.resolve()), options.out.resolve())
    return _run(ncu_commands(options.out.resolve(), options.kernel), options.out.resolve())


if __name__ == "__main__":
    sys.exit(main())
