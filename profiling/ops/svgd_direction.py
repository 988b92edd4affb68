"""SVGD's direction at the particles, of a given score."""

from __future__ import annotations

from torch import Tensor

from profiling import compiled, eager
from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from vgf_fast import functional, reference
from vgf_fast.functional import Backend


def _reference(inputs: Inputs) -> Outputs:
    temperature = inputs.policy.config.train_budget.temperature
    return {"phi": reference.svgd_direction(**inputs.data, temperature=temperature)}


@library
def _library(inputs: Inputs, backend: Backend) -> Outputs:
    temperature = inputs.policy.config.train_budget.temperature
    return {"phi": functional.svgd_direction(**inputs.data, temperature=temperature, backend=backend)}


def direction(agent: EagerAgent, particles: Tensor, score: Tensor) -> Tensor:
    """The plain implementation of the agent's kind: particles, score [B, N, A] -> [B, N, A]."""
    module = compiled if isinstance(agent, CompiledAgent) else eager
    return module.svgd_direction(particles, score, agent.config.train_budget.temperature)


@plain
def _plain(agent: EagerAgent, particles: Tensor, score: Tensor) -> Outputs:
    return {"phi": direction(agent, particles, score)}


OP = Op(
    name="svgd_direction",
    shapes=lambda sizes: work.moving(sizes, "particles", "score"),
    uniform=("particles",),
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"phi": "svgd_direction"},
    matmul_flops=lambda sizes, needed: work.svgd_products(sizes),
    other_flops=work.svgd_pairs,
    written=lambda sizes: work.numbers(work.moving(sizes, "phi")),
)
