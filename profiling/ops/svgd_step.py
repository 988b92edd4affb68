"""One step of the particles in place, from a given score and moments: direction, Adam and clip."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from profiling import compiled
from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, Prepared, plain
from profiling.ops.svgd_direction import direction
from vgf_fast import reference
from vgf_fast.functional import Backend

STEP = 3  # of Adam, as after some steps: the moments are not zero
STATE = ("particles", "first_moment", "second_moment")


def _state(inputs: Inputs) -> Outputs:
    return {name: inputs.data[name] for name in STATE}


def _in_place(inputs: Inputs, step: Callable[..., None]) -> None:
    budget = inputs.policy.config.train_budget
    step(**inputs.data, step=STEP, step_size=budget.step_size, temperature=budget.temperature)


def _reference(inputs: Inputs) -> Outputs:
    _in_place(inputs, reference.svgd_step_)
    return _state(inputs)


def _library(inputs: Inputs, backend: Backend) -> Prepared:
    if backend == "triton":
        from vgf_fast.kernels.svgd import svgd_step_ as step
    else:
        step = reference.svgd_step_

    def run() -> Outputs:
        _in_place(inputs, step)
        return {}

    return Prepared(torch.no_grad()(run), lambda: _state(inputs))


@plain
def _plain(agent: EagerAgent, particles: Tensor, score: Tensor, first_moment: Tensor, second_moment: Tensor) -> Outputs:
    """Out of place."""
    phi = direction(agent, particles, score)
    m = compiled.BETA1 * first_moment + (1.0 - compiled.BETA1) * phi
    v = compiled.BETA2 * second_moment + (1.0 - compiled.BETA2) * phi.square()
    root = (v / (1.0 - compiled.BETA2**STEP)).sqrt() + compiled.EPS
    change = agent.config.train_budget.step_size * (m / (1.0 - compiled.BETA1**STEP)) / root
    return dict(zip(STATE, ((particles + change).clamp(-1.0, 1.0), m, v), strict=True))


OP = Op(
    name="svgd_step",
    shapes=lambda sizes: work.moving(sizes, "particles", "score", "first_moment", "second_moment"),
    uniform=("particles",),
    squared=("second_moment",),
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"particles": "svgd_step", "first_moment": "svgd_moment", "second_moment": "svgd_moment"},
    matmul_flops=lambda sizes, needed: work.svgd_products(sizes),
    other_flops=work.svgd_pairs,
    written=lambda sizes: work.numbers(work.moving(sizes, *STATE)),
)
