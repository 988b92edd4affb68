"""The particle of the largest value becomes the action."""

from __future__ import annotations

from torch import Tensor

from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from vgf_fast import functional, reference
from vgf_fast.functional import Backend


def _reference(inputs: Inputs) -> Outputs:
    action, index = reference.select_particle(**inputs.data)
    return {"action": action, "index": index}


@library
def _library(inputs: Inputs, backend: Backend) -> Outputs:
    action, index = functional.select_particle(**inputs.data, backend=backend)
    return {"action": action, "index": index}


@plain
def _plain(agent: EagerAgent, particles: Tensor, q: Tensor) -> Outputs:
    index = q.argmax(dim=1)
    return {"action": particles.take_along_dim(index.view(-1, 1, 1), dim=1).squeeze(1), "index": index}


OP = Op(
    name="select_particle",
    shapes=lambda sizes: {**work.moving(sizes, "particles"), "q": (sizes.batch, sizes.particles)},
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"action": "aggregate", "index": "aggregate"},
    # An index of 64 bits is as two numbers.
    written=lambda sizes: sizes.batch * (sizes.action_dim + 2),
)
