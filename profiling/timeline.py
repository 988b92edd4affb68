"""Ranges, launches and times of an update and of acting, in order: ``python -m profiling.timeline``.

    python -m profiling.timeline --trace trace.json          # for chrome://tracing or ui.perfetto.dev
    TRITON_INTERPRET=1 python -m profiling.timeline --backend triton

Needs no GPU. Without one, launches of the Triton backend are noted where they are made, and not made: their ranges then
hold the host's work alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from vgf_fast.kernels import ranges

from profiling import launches, machine
from profiling.bench import say
from vgf_fast import Learner
from vgf_fast.functional import Backend

PREFIX = "vgf/"


class Span(NamedTuple):
    """One range of a timeline."""

    name: str
    depth: int  # 0 for an outermost range
    milliseconds: float  # on the host
    kernels: tuple[str, ...]  # Triton's launches in it and in no range within it, in order
    operators: int  # PyTorch's launches likewise


def record(function: Callable[[], object], trace: str | os.PathLike[str] | None = None) -> list[Span]:
    """Call ``function`` and list its ranges in the order they begin; ``trace`` is a file for the chrome trace."""
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    noting = launches.noting_launches(make=cuda) if machine.version("triton") else contextlib.nullcontext()
    with noting, ranges.switched_on("profiler"), profile(activities=activities) as profiled:
        function()
        if cuda:
            torch.cuda.synchronize()
    if trace is not None:
        beside = f"{trace}.part"
        profiled.export_chrome_trace(beside)
        os.replace(beside, trace)
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    held: dict[int, list[str]] = {}
    for event in events:
        launch, around = launches.launch_of(event), _enclosing(event)
        if launch is not None and around is not None:
            held.setdefault(around.id, []).append(launch)
    spans = []
    for event in events:
        if event.name.startswith(PREFIX) and event.device_type == DeviceType.CPU:
            names = held.get(event.id, [])
            kernels = tuple(name.removeprefix(launches.PREFIX) for name in names if name.startswith(launches.PREFIX))
            operators = len(names) - len(kernels)
            spans.append(Span(event.name, _depth(event), event.cpu_time_total / 1e3, kernels, operators))
    return spans


def _enclosing(event: Any) -> Any:
    """The innermost range around an event, or None."""
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(PREFIX):
        parent = parent.cpu_parent
    return parent


def _depth(event: Any) -> int:
    around = _enclosing(event)
    return 0 if around is None else 1 + _depth(around)


def update(backend: Backend, device: str) -> Callable[[], object]:
    """A function that does one update at the paper's sizes; it ran once already, which fills caches."""
    learner = Learner(launches.paper_policy(backend).to(device), cuda_graph=False)
    dataset = launches.paper_dataset().to(device)

    def one() -> None:
        learner.fit(dataset, 1, progress=False)

    return _warm(one)


def act(backend: Backend, device: str, states: int) -> Callable[[], object]:
    """A function that acts in so many states; it ran once already."""
    policy = launches.paper_policy(backend).to(device)
    policy.cuda_graph = False
    observations = torch.randn(states, policy.config.observation_dim, device=device)
    return _warm(lambda: policy.sample_actions(observations))


def _warm(function: Callable[[], object]) -> Callable[[], object]:
    noting = launches.noting_launches(make=torch.cuda.is_available())
    with noting if machine.version("triton") else contextlib.nullcontext():
        function()
    return function


def table(spans: Sequence[Span]) -> str:
    """One line a range."""
    width = max(2 * span.depth + len(span.name) for span in spans)
    lines = [f"{'range':<{width}}  {'host ms':>8}  {'torch':>5}  triton"]
    for span in spans:
        name = "  " * span.depth + span.name
        kernels = ", ".join(span.kernels)
        lines.append(f"{name:<{width}}  {span.milliseconds:8.3f}  {span.operators or '':>5}  {kernels}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the timelines of one update and of acting; with ``--trace`` write the update's chrome trace."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.timeline", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--trace", metavar="FILE.json", help="chrome trace of the update")
    parser.add_argument("--states", type=int, default=1, help="to act in (default: 1)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.backend == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        say("error: --backend triton without a GPU needs TRITON_INTERPRET=1 in the environment")
        return 2
    if options.states < 1:
        say(f"error: --states is {options.states}, expected an integer >= 1")
        return 2
    say("one update")
    say(table(record(update(options.backend, device), options.trace)))
    say(f"\nacting, {options.states} states")
    say(table(record(act(options.backend, device, options.states))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
