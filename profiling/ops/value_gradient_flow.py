"""The flow of the particles by the critic: one step of it, and all steps with the values at their end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from profiling.eager import EagerAgent, repeated
from profiling.ops import work
from profiling.ops.op import Inputs, Op, Outputs, library, plain
from profiling.worker import Sizes
from vgf_fast import functional, reference
from vgf_fast.functional import Backend


def _outputs(particles: Tensor, q: Tensor | None) -> Outputs:
    return {"particles": particles} | ({} if q is None else {"q": q})


def _op(name: str, steps: Callable[[Sizes], int], evaluate: bool, in_plain: Callable[..., Outputs]) -> Op:
    def in_reference(inputs: Inputs) -> Outputs:
        budget = inputs.policy.config.train_budget
        result = reference.value_gradient_flow(
            inputs.policy.critic.stacked().to(inputs.dtype),
            **inputs.data,
            steps=steps(inputs.sizes),
            step_size=budget.step_size,
            temperature=budget.temperature,
            evaluate=evaluate,
        )
        return _outputs(result.particles, result.q)

    @library
    def in_library(inputs: Inputs, backend: Backend) -> Outputs:
        budget = dataclasses.replace(inputs.policy.config.train_budget, steps=steps(inputs.sizes))
        result = functional.value_gradient_flow(
            inputs.policy.critic, **inputs.data, budget=budget, evaluate=evaluate, backend=backend
        )
        return _outputs(result.particles, result.q)

    def products(sizes: Sizes, needed: bool) -> int:
        count = steps(sizes)
        moved = work.critic(sizes).at_particles(sizes, count + evaluate, count, int(evaluate), needed)
        return moved + count * work.svgd_products(sizes)

    return Op(
        name=name,
        shapes=lambda sizes: work.at_particles(sizes, "particles"),
        uniform=("particles",),
        networks={"critic": 1},
        reference=in_reference,
        library=in_library,
        plain=plain(in_plain),
        bounds={"particles": "flow_step"} | ({"q": "flow_step"} if evaluate else {}),
        matmul_flops=products,
        other_flops=lambda sizes: steps(sizes) * work.svgd_pairs(sizes),
        written=lambda sizes: sizes.batch * sizes.particles * (sizes.action_dim + evaluate * sizes.members),
    )


def _one_step(agent: EagerAgent, observations: Tensor, particles: Tensor) -> Outputs:
    budget = dataclasses.replace(agent.config.train_budget, steps=1)
    return {"particles": agent.flow(repeated(observations, particles.shape[1]), particles, budget)[-1]}


def _all_steps(agent: EagerAgent, observations: Tensor, particles: Tensor) -> Outputs:
    states = repeated(observations, particles.shape[1])
    x = agent.flow(states, particles, agent.config.train_budget)[-1]
    return {"particles": x, "q": agent.critic(states, x).float()}


STEP = _op("flow_step", lambda sizes: 1, False, _one_step)
FLOW = _op("value_gradient_flow", lambda sizes: sizes.flow_steps, True, _all_steps)
