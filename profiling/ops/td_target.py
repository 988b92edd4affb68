"""The TD target of the values at the next states' particles."""

from __future__ import annotations

from torch import Tensor

from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from profiling.torch_methods import configurations
from profiling.worker import Sizes
from vgf_fast import functional, reference
from vgf_fast.functional import Backend


def _shapes(sizes: Sizes) -> work.Shapes:
    return {"q": (sizes.members, sizes.batch, sizes.particles), "rewards": (sizes.batch,), "masks": (sizes.batch,)}


def _discount(inputs: Inputs) -> float:
    return configurations(inputs.sizes)[1].discount


def _reference(inputs: Inputs) -> Outputs:
    return {"target": reference.td_target(**inputs.data, discount=_discount(inputs))}


@library
def _library(inputs: Inputs, backend: Backend) -> Outputs:
    return {"target": functional.td_target(**inputs.data, discount=_discount(inputs), backend=backend)}


@plain
def _plain(agent: EagerAgent, q: Tensor, rewards: Tensor, masks: Tensor) -> Outputs:
    return {"target": rewards + agent.train.discount * masks * q.amin(dim=0).mean(dim=1)}


OP = Op(
    name="td_target",
    shapes=_shapes,
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"target": "td_target"},
    other_flops=lambda sizes: sizes.members * sizes.batch * sizes.particles + 3 * sizes.batch,
    written=lambda sizes: sizes.batch,
)
