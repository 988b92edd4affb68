"""Acting and one training update on the Triton backend, in as few launches as the kernels allow.

Nothing here waits for the device, copies from the host or depends on values, so that a CUDA graph can hold all of it.
Weights are packed afresh at the start: no stale copy of them can ever be used.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vgf_fast import functional, reference
from vgf_fast.config import TransportBudget
from vgf_fast.kernels import ranges
from vgf_fast.networks import EnsembleMLP, GaussianBehavior, ScoreField, VelocityField

if TYPE_CHECKING:
    from vgf_fast.kernels.flow_step import FlowOutput, Select, TDTarget
    from vgf_fast.kernels.packing import PackedMLP, Stack
    from vgf_fast.policy import VGFPolicy


def runs(policy: VGFPolicy, dtype: torch.dtype) -> bool:
    """Whether all of it runs in the Triton kernels for such a policy, with products of operands of ``dtype``.

    Raises ``ValueError`` naming the limit where ``policy.backend`` is "triton" and they cannot. In the interpreter,
    where products of bfloat16 are wrong, they are PyTorch's.
    """
    config = policy.config
    width = max(*config.hidden_dims, *config.behavior_hidden_dims)
    backend = functional.resolve_backend(
        policy.backend, policy.device, config.particles, config.action_dim, policy.particle_dtype, width
    )
    return backend == "triton" and (policy.device.type == "cuda" or dtype == torch.float32)


def stack(module: EnsembleMLP | VelocityField | ScoreField) -> Stack:
    """A network's parameters as the kernels take them."""
    from vgf_fast.kernels.packing import Stack

    return Stack(*module.stacked(), module.observation_dim, module.action_dim)


class Packed(NamedTuple):
    """A policy's networks packed for the kernels."""

    critic: PackedMLP
    behavior: PackedMLP | None  # None for the Gaussian behaviour model
    target_critic: PackedMLP | None  # None for acting


def pack(policy: VGFPolicy, dtype: torch.dtype, target: bool = False) -> Packed:
    """Pack critic, velocity field and, if ``target``, the target critic: one launch."""
    from vgf_fast.kernels.packing import pack_many

    modules: list[EnsembleMLP | VelocityField] = [policy.critic]
    if isinstance(policy.behavior, VelocityField):
        modules.append(policy.behavior)
    if target:
        modules.append(policy.target_critic)
    with ranges.span("vgf/pack"):
        packed = list(pack_many([stack(module) for module in modules], dtype))
    return Packed(
        packed.pop(0),
        packed.pop(0) if isinstance(policy.behavior, VelocityField) else None,
        packed.pop(0) if target else None,
    )


def draw_particles(policy: VGFPolicy, packed: Packed, observations: Tensor, noise: Tensor) -> Tensor:
    """Particles of the behaviour model: observations [B, O], noise [B, N, A] -> [B, N, A] float32."""
    behavior = policy.behavior
    with ranges.span("vgf/behavior_flow"):
        if isinstance(behavior, GaussianBehavior):
            mean = reference.mlp_forward(behavior.stacked().detach(), observations).squeeze(0).to(noise.dtype)
            return reference.gaussian_sample(mean, behavior.log_std.detach().to(noise.dtype), noise, behavior.tanh)
        from vgf_fast.kernels.behavior_flow import behavior_flow

        assert packed.behavior is not None
        return behavior_flow(packed.behavior, observations, noise, policy.config.behavior_steps)


def flow(
    policy: VGFPolicy,
    packed: Packed,
    observations: Tensor,
    particles: Tensor,
    budget: TransportBudget,
    epilogue: Select | TDTarget,
) -> FlowOutput:
    """Move particles by the critic, and end in a choice by it, or in the target by the target critic.

    An amortised policy's are moved by the score field: two launches a step for the field, and PyTorch's for the rest.
    """
    from vgf_fast.kernels.flow_step import TDTarget, value_gradient_flow

    config = policy.config
    steps = budget.steps
    if policy.score_field is not None:
        field = functools.partial(_field, policy.score_field, observations, packed.critic.dtype)
        per_state = not isinstance(epilogue, TDTarget)
        particles = reference.amortized_flow(field, particles, steps, budget.step_size, per_state).particles
        steps = 0
    return value_gradient_flow(
        packed.critic,
        observations,
        particles,
        steps,
        budget.step_size,
        budget.temperature,
        config.flow_q_aggregation,
        config.bandwidth_gradient,
        config.repulsion,
        config.particle_optimizer,
        evaluator=packed.target_critic,
        epilogue=epilogue,
    )


def _field(field: ScoreField, observations: Tensor, dtype: torch.dtype, particles: Tensor) -> Tensor:
    """The score field at observations [B, O] and particles [B, N, A] -> [B, N, A]."""
    from vgf_fast.kernels import mlp_training

    batch, count, width = particles.shape
    states = observations.unsqueeze(1).expand(-1, count, -1).reshape(batch * count, -1)
    return mlp_training.mlp(stack(field), states, particles.reshape(-1, width), dtype=dtype)[0].view_as(particles)


@torch.no_grad()
def act(
    policy: VGFPolicy,
    observations: Tensor,
    noise: Tensor,
    budget: TransportBudget,
    selection: str,
    uniform: Tensor | None,
    one_launch: bool | None = None,
) -> Tensor:
    """Actions [B, A] float32 at observations [B, O] from noise [B, N, A]; ``uniform`` [B] unless ``selection`` is max.

    L + 5 launches with the flow behaviour model: weights, two shares of states, behaviour flow, L + 1 flow steps. Or
    two for at most 16 states: weights, and all the rest at once; ``one_launch`` overrides the choice between them.
    """
    from vgf_fast.kernels import acting, launch
    from vgf_fast.kernels.flow_step import Select

    config = policy.config
    packed = pack(policy, policy.dtype)
    critic = packed.critic
    few = packed.behavior if len(observations) <= launch.MAX_ACTING_STATES and not config.amortized else None
    if few is not None and one_launch is None:
        one_launch = launch.acts_in_one_launch(
            len(observations),
            noise.shape[1],
            critic.members,
            few.padded_width,
            critic.padded_width,
            critic.dtype,
            launch.processors(observations.device),
            noise.shape[2],
            torch.version.hip is not None,
        )
    if few is not None and one_launch:
        with ranges.span("vgf/act_in_one_launch"):
            return acting.act(
                few,
                critic,
                observations,
                noise,
                config.behavior_steps,
                budget.steps,
                budget.step_size,
                budget.temperature,
                config.flow_q_aggregation,
                config.bandwidth_gradient,
                config.repulsion,
                config.particle_optimizer,
                selection,
                config.selection_temperature,
                config.target_q_aggregation,
                uniform=uniform,
            ).action
    particles = draw_particles(policy, packed, observations, noise)
    choice = Select(selection, config.selection_temperature, uniform, config.target_q_aggregation)
    chosen = flow(policy, packed, observations, particles, budget, choice).chosen
    assert chosen is not None
    return chosen


class Target(NamedTuple):
    """TD target of a batch, and the particles it came from."""

    target: Tensor  # [B]
    drawn: Tensor  # [B, N, A]
    moved: Tensor  # [B, N, A]


@torch.no_grad()
def td_target(
    policy: VGFPolicy,
    packed: Packed,
    data: dict[str, Tensor],
    noise: Tensor,
    discount: float,
    reduce: str,
) -> Target:
    """Particles of the next states, moved by the critic within the training budget and valued by the target critic."""
    from vgf_fast.kernels.flow_step import TDTarget

    config = policy.config
    drawn = draw_particles(policy, packed, data["next_observations"], noise)
    epilogue = TDTarget(data["rewards"], data["masks"], discount, config.target_q_aggregation, reduce)
    moved = flow(policy, packed, data["next_observations"], drawn, config.train_budget, epilogue)
    assert moved.chosen is not None
    return Target(moved.chosen, drawn, moved.particles)
