"""How particles move: the one set of options of a flow step, from the configuration to the backends."""

from __future__ import annotations

from typing import NamedTuple


class Flow(NamedTuple):
    """What a step of the value gradient flow does; how many steps there are is not part of it."""

    step_size: float
    temperature: float  # alpha
    q_aggregation: str = "mean"  # "mean" | "min" over the critic's members
    bandwidth_gradient: bool = False  # whether the particle kernel's bandwidth is differentiated too
    repulsion: bool = True
    optimizer: str = "adam"  # "adam" | "ascent"
    kernel: str = "rbf"  # "rbf" | "imq", of particles
