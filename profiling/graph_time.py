"""Time of a graph of launches on several branches, by a fluid model.

Launches that run at once share the processors and L2's bandwidth: each runs at the rate at which neither is asked
for more than there is. Between two launches of a branch lies a gap, a longer one where a launch waits for another
branch. A launch made ahead does what it may before its wait beside the one ahead of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from profiling.sass import H200, Machine, Time


class Node(NamedTuple):
    """A launch in the graph: its time alone, the branch it is on, and the nodes it waits for."""

    time: Time
    branch: str
    after: tuple[str, ...] = ()
    dependent: bool = False  # launched ahead of the end of the one before (programmatic dependent launch)


def graph_us(nodes: Mapping[str, Node], machine: Machine = H200) -> float:
    """Microseconds from the first launch to the end of the last."""
    waiting = dict(nodes)
    begins: dict[str, float] = {}
    running: dict[str, float] = {}
    done: dict[str, float] = {}
    alone = {
        name: max(node.time.microseconds - (node.time.ahead_us if node.dependent else 0.0), 1e-3)
        for name, node in nodes.items()
    }
    now = 0.0
    while waiting or begins or running:
        for name, node in list(waiting.items()):
            if all(one in done for one in node.after):
                begins[name] = max((done[one] + _gap(node, nodes[one], machine) for one in node.after), default=now)
                del waiting[name]
        for name in [name for name, begin in begins.items() if begin <= now + 1e-9]:
            running[name] = 1.0  # what is left of it
            del begins[name]
        if not running:
            if not begins:
                raise ValueError(f"nodes wait for each other: {', '.join(waiting)}")
            now = min(begins.values())
            continue
        rate = _rate([(alone[name], nodes[name].time) for name in running], machine)
        step = min(left * alone[name] / rate for name, left in running.items())
        if begins:
            step = min(step, max(min(begins.values()) - now, 1e-6))
        now += step
        for name in list(running):
            running[name] -= step * rate / alone[name]
            if running[name] <= 1e-9:
                done[name] = now
                del running[name]
    return now


def _gap(node: Node, before: Node, machine: Machine) -> float:
    if node.branch != before.branch:
        return machine.join_us
    return machine.dependent_launch_us if node.dependent else machine.launch_us


def _rate(running: list[tuple[float, Time]], machine: Machine) -> float:
    """The part of its own speed at which each of several launches runs beside the others."""
    l2 = sum(time.l2_bytes / alone for alone, time in running)
    processors = sum(time.processor_us / alone for alone, time in running)
    limits = [1.0]
    limits += [machine.l2_bytes_per_s / 1e6 / l2] if l2 else []
    limits += [machine.processors / processors] if processors else []
    return min(limits)
