"""Every critic's value at every particle, and the gradient of their mean by the action."""

from __future__ import annotations

import torch
from torch import Tensor

from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent, repeated
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from profiling.worker import Sizes
from vgf_fast import functional, reference
from vgf_fast.functional import Backend


def _reference(inputs: Inputs) -> Outputs:
    critic = inputs.policy.critic.stacked().to(inputs.dtype)
    q, score = reference.CriticAtStates(critic, inputs.data["observations"]).values_and_score(inputs.data["actions"])
    return {"q": q, "score": score}


@library
def _library(inputs: Inputs, backend: Backend) -> Outputs:
    q, score = functional.critic_value_and_score(inputs.policy.critic, **inputs.data, backend=backend)
    return {"q": q, "score": score}


@plain
def _plain(agent: EagerAgent, observations: Tensor, actions: Tensor) -> Outputs:
    states = repeated(observations, actions.shape[1])

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        q = agent.critic(states, x)
        return q.mean(dim=0).sum(), q

    if isinstance(agent, CompiledAgent):
        score, q = torch.func.grad(total, has_aux=True)(actions)
        return {"q": q.float(), "score": score}
    with torch.enable_grad():
        x = actions.detach().requires_grad_()
        value, q = total(x)
        return {"q": q.detach().float(), "score": torch.autograd.grad(value, x)[0]}


def _written(sizes: Sizes) -> int:
    return sizes.batch * sizes.particles * (sizes.action_dim + sizes.members)


OP = Op(
    name="critic_value_and_score",
    shapes=lambda sizes: work.at_particles(sizes, "actions"),
    uniform=("actions",),
    networks={"critic": 1},
    reference=_reference,
    library=_library,
    plain=_plain,
    bounds={"q": "critic_value", "score": "critic_score"},
    matmul_flops=lambda sizes, needed: work.critic(sizes).at_particles(sizes, 1, 1, 1, needed),
    written=_written,
)
