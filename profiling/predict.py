"""Predicted times of an update and of an action on an H200, without a GPU: ``python -m profiling.predict``.

The launches of an update and an action at the paper's sizes are recorded, compiled for sm_90, and timed by a model of
their machine code (``sass``); the graph of all of them, with its two branches, by a fluid model (``graph_time``).
``--write`` keeps the record as ``profiling/results/predicted.json``. The models have not been compared with a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch

from profiling import launches, resources, sass
from profiling.bench import say
from profiling.graph_time import Node, graph_us
from profiling.resources import Launch

if TYPE_CHECKING:
    from vgf_fast.config import Precision

RESULTS = Path(__file__).parent / "results" / "predicted.json"
TARGET = "sm_90"
# Ranges of the branch that trains the behaviour model and then draws the next batch's particles.
BEHAVIOR_RANGES = ("vgf/behavior_flow", "vgf/behavior_loss")
# PyTorch's own launches, such as the gathering of a batch: small copies and sums.
TORCH_LAUNCH = sass.Time(1.3, 0.0, 20.0, 1e5)

Numbers = dict[str, Any]


def _flow_step(n: Numbers) -> sass.Trips:
    if n["PART"] in ("select", "td"):
        return [n["members"], 1, -(-n["action_dim"] // 16)]
    distances: sass.Trips = [n["action_dim"] // n["unroll"], n["action_dim"] % n["unroll"]]
    median = -(-(n["particles"] ** 2) // 32)
    return [*distances, median, (-(-n["action_dim"] // n["block_c"]), [n["members"] - 1])]


def _euler(n: Numbers) -> sass.Trips:
    head = [n["width"] // n["BLOCK_K"]] if n["MOVE"] else []
    return [*head, *([] if n["LAST"] else [n["columns"] // n["BLOCK_N"]])]


def _rows(n: Numbers) -> sass.Trips:
    return [n["action_dim"] // 4, n["action_dim"] % 4] if n["MODE"] == "first" else []


# Turns of a kernel's loops, by what it was launched with, in the order of their addresses; others are taken once.
TRIPS: dict[str, Callable[[Numbers], sass.Trips]] = {
    "product_kernel": lambda n: [n["K"] // n["BLOCK_K"]],
    "rows_kernel": _rows,
    "euler_kernel": _euler,
    "flow_step_kernel": _flow_step,
    "weight_gradient_kernel": lambda n: [1, 0, n["padded_rows"] // n["BLOCK_K"]],
}


# What they load beside copies: in loops the action's weights, or the bias: what all programs read, and L1 holds.
NEAR_LOOPS, NEAR = ("rows_kernel",), ("product_kernel",)


class Work(NamedTuple):
    """What is predicted: launches in their order, and PyTorch's beside them."""

    launches: list[Launch]
    torch_launches: int
    branched: bool  # whether part of it runs beside the rest


def _recorded(function: Callable[[], object]) -> list[Launch]:
    from vgf_fast.backends import choice
    from vgf_fast.backends.triton import TritonBackend

    with (
        resources.recorded(TARGET) as recorded,
        mock.patch.object(choice, "_kernel_obstacle", return_value=None),
        mock.patch.object(choice, "bound", lambda policy, dtype: TritonBackend(dtype)),
    ):
        function()
    return recorded


def works(precision: Precision = "bfloat16") -> dict[str, Work]:
    """An update and an action at the paper's sizes."""
    from vgf_fast import Learner, TrainConfig

    dataset = launches.paper_dataset()

    def policy() -> Any:
        return launches.paper_policy("auto")

    def update() -> None:
        learner = Learner(policy(), TrainConfig(precision=precision))
        learner.update(dataset.sample(256, learner.generator), check=False)

    def act() -> None:
        policy().to(getattr(torch, precision)).sample_actions(torch.zeros(1, 29))

    # PyTorch's launches are counted in the interpreter, in a process of its own; their number is committed.
    counted = json.loads(launches.RESULTS.read_text(encoding="utf-8"))
    return {
        "update": Work(_recorded(update), counted["one update"]["torch"], True),
        "act": Work(_recorded(act), counted["one action"]["torch"], False),
    }


class Row(NamedTuple):
    """A kernel as it is launched in a piece of work."""

    kernel: str
    flags: str
    launches: int
    programs: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    programs_per_processor: int
    microseconds: float  # of one launch, alone
    l2_mib: float  # it reads
    mix: dict[str, int]  # instructions of its hottest loop, by class


def predict(work: Work) -> tuple[list[Row], dict[str, float]]:
    """The kernels by their share of the time, and the time of the whole in microseconds: in one chain, in branches."""
    kernels: dict[str, sass.Kernel] = {}
    times: dict[tuple[str, tuple[int, ...], str], sass.Time] = {}
    rows: dict[tuple[str, tuple[int, ...], str], Row] = {}
    keys = []
    for launch in work.launches:
        name, numbers = launch.kernel.__name__, launch.numbers()
        if launch.key not in kernels:
            compiled = resources.compile_launch(launch, TARGET)
            warps = launch.options.get("num_warps", 4)
            kernels[launch.key] = sass.read(
                compiled.asm["cubin"], compiled.metadata.shared, warps, name in NEAR_LOOPS, name in NEAR
            )
        kernel = kernels[launch.key]
        trips = TRIPS[name](numbers) if name in TRIPS else []
        key = (launch.key, launch.grid, repr(trips))
        keys.append(key)
        programs = 1
        for extent in launch.grid:
            programs *= extent
        if key not in times:
            times[key] = sass.launch_time(kernel, programs, trips, launch.tensor_bytes)
            rows[key] = Row(
                name,
                " ".join(launch.flags()),
                0,
                programs,
                kernel.registers,
                kernel.spilled_bytes,
                kernel.shared_bytes,
                kernel.programs_per_processor(),
                round(times[key].microseconds, 2),
                round(times[key].l2_bytes / 2**20, 2),
                kernel.mix(),
            )
        rows[key] = rows[key]._replace(launches=rows[key].launches + 1)
    spans = [(launch, times[key]) for launch, key in zip(work.launches, keys, strict=True)]
    ways = {"one chain": False} | ({"two branches": True} if work.branched else {})
    whole = {name: graph_us(dict(_chains(spans, work.torch_launches, branched))) for name, branched in ways.items()}
    ordered = sorted(rows.values(), key=lambda row: -row.launches * row.microseconds)
    return ordered, {name: round(us, 1) for name, us in whole.items()}


def _chains(timed: list[tuple[Launch, sass.Time]], torch_launches: int, branched: bool) -> Iterator[tuple[str, Node]]:
    """Nodes of the graph: PyTorch's launches first, then the launches as they come, on one branch or on two.

    On two, the behaviour model is trained and draws the next batch's particles beside the critic's flow and training,
    and its training comes first.
    """
    last: dict[str, str] = {}

    def node(name: str, time: sass.Time, branch: str, dependent: bool) -> tuple[str, Node]:
        before = last.get(branch)
        last[branch] = name
        return name, Node(time, branch, (before,) if before else (), dependent)

    # The next batch is gathered and its noise drawn beside the critic's flow.
    for n in range(torch_launches):
        yield node(f"torch {n}", TORCH_LAUNCH, "behavior" if branched else "critic", False)
    if branched:
        timed = sorted(timed, key=lambda one: one[0].span == BEHAVIOR_RANGES[0])
    for n, (launch, time) in enumerate(timed):
        branch = "behavior" if branched and launch.span in BEHAVIOR_RANGES else "critic"
        yield node(f"{launch.kernel.__name__} {n}", time, branch, bool(launch.options.get("launch_pdl")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; with ``--write`` keep them."""
    parser = argparse.ArgumentParser(prog="python -m profiling.predict", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(arguments)
    import triton

    record: dict[str, Any] = {
        "triton": triton.__version__,
        "target": TARGET,
        "precision": options.precision,
        "machine": sass.H200._asdict(),
        "measured": False,
    }
    for name, work in works(options.precision).items():
        rows, whole = predict(work)
        launched = len(work.launches) + work.torch_launches
        say(f"{name}: {launched} launches; " + ", ".join(f"{how} {us} us" for how, us in whole.items()))
        for row in rows:
            took = f"{row.launches:3d} x {row.microseconds:6.2f} us"
            held = f"{row.programs} programs, {row.programs_per_processor} a processor, {row.registers} registers"
            say(f"  {took}  {row.kernel} [{row.flags}] {held}, {row.spilled_bytes} B spilled")
        record[name] = {"launches": launched, **whole, "kernels": [row._asdict() for row in rows]}
    if options.write:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
