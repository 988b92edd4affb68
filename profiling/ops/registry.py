"""All operations by name."""

from __future__ import annotations

from profiling.ops import (
    behavior_flow,
    critic_value_and_score,
    select_particle,
    svgd_direction,
    svgd_step,
    td_target,
    training_step,
    value_gradient_flow,
)

OPS = {
    op.name: op
    for op in (
        critic_value_and_score.OP,
        behavior_flow.OP,
        svgd_direction.OP,
        svgd_step.OP,
        value_gradient_flow.STEP,
        value_gradient_flow.FLOW,
        select_particle.OP,
        td_target.OP,
        training_step.CRITIC,
        training_step.BEHAVIOR,
    )
}
