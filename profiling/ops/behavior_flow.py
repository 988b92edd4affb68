"""Particles of the velocity field: all Euler steps from given noise."""

from __future__ import annotations

from torch import Tensor

from profiling.eager import EagerAgent, repeated
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from profiling.worker import Sizes
from vgf_fast import functional, reference
from vgf_fast.functional import Backend
from vgf_fast.networks import VelocityField


def _reference(inputs: Inputs) -> Outputs:
    velocity = inputs.policy.behavior.stacked().to(inputs.dtype)
    return {"particles": reference.behavior_flow(velocity, **inputs.data, steps=inputs.sizes.behavior_steps)}


@library
def _library(inputs: Inputs, backend: Backend) -> Outputs:
    velocity, steps = inputs.policy.behavior, inputs.sizes.behavior_steps
    assert isinstance(velocity, VelocityField)
    return {"particles": functional.behavior_flow(velocity, **inputs.data, steps=steps, backend=backend)}


@plain
def _plain(agent: EagerAgent, observations: Tensor, noise: Tensor) -> Outputs:
    return {"particles": agent.draw(repeated(observations, noise.shape[1]), noise)}


def _products(sizes: Sizes, needed: bool) -> int:
    steps = sizes.behavior_steps
    return work.velocity(sizes).at_particles(sizes, steps, 0, steps, needed)


OP = Op(
    name="behavior_flow",
    shapes=lambda sizes: work.at_particles(sizes, "noise"),
    networks={"behavior": 1},
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"particles": "behavior_flow"},
    matmul_flops=_products,
    written=lambda sizes: work.numbers(work.moving(sizes, "particles")),
)
