"""Acting and one training update on the Triton backend, in as few launches as the kernels allow.

Nothing here waits for the device, copies from the host or depends on values, so that a CUDA graph can hold all of it.
Weights are packed afresh at the start: no stale copy of them can ever be used.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends import torch as torch_backend
from vgf_fast.backends.choice import resolve_backend
from vgf_fast.config import TransportBudget
from vgf_fast.kernels import ranges
from vgf_fast.networks import EnsembleMLP, GaussianBehavior, ScoreField, VelocityField

if TYPE_CHECKING:
    from vgf_fast.kernels.launch import Layers
    from vgf_fast.kernels.packing import PackedMLP, Stack
    from vgf_fast.kernels.sequence import FlowOutput, Select, TDTarget
    from vgf_fast.policy import VGFPolicy


def runs(policy: VGFPolicy, dtype: torch.dtype) -> bool:
    """Whether all of it runs in the Triton kernels for such a policy, with products of operands of ``dtype``.

    Raises ``ValueError`` naming the limit where ``policy.backend`` is "triton" and they cannot. In the interpreter,
    where products of bfloat16 are wrong, they are PyTorch's.
    """
    config = policy.config
    width = max(*config.hidden_dims, *config.behavior_hidden_dims)
    backend = resolve_backend(
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


def pack_networks(modules: Sequence[EnsembleMLP | VelocityField], dtype: torch.dtype) -> tuple[PackedMLP, ...]:
    """Pack networks as they are now: one launch."""
    from vgf_fast.kernels.packing import pack_many

    with ranges.span("vgf/pack"):
        return pack_many([stack(module) for module in modules], dtype)


def pack(policy: VGFPolicy, dtype: torch.dtype, target: bool = False) -> Packed:
    """Pack critic, velocity field and, if ``target``, the target critic: one launch."""
    modules: list[EnsembleMLP | VelocityField] = [policy.critic]
    if isinstance(policy.behavior, VelocityField):
        modules.append(policy.behavior)
    if target:
        modules.append(policy.target_critic)
    packed = list(pack_networks(modules, dtype))
    return Packed(
        packed.pop(0),
        packed.pop(0) if isinstance(policy.behavior, VelocityField) else None,
        packed.pop(0) if target else None,
    )


@torch.no_grad()
def draw_particles(
    policy: VGFPolicy, packed: PackedMLP | None, observations: Tensor, noise: Tensor, layers: Layers | None = None
) -> Tensor:
    """Particles of the behaviour model, ``packed``: observations [B, O], noise [B, N, A] -> [B, N, A] float32."""
    behavior = policy.behavior
    with ranges.span("vgf/behavior_flow"):
        if isinstance(behavior, GaussianBehavior):
            mean = reference.mlp_forward(behavior.stacked().detach(), observations).squeeze(0).to(noise.dtype)
            return reference.gaussian_sample(mean, behavior.log_std.detach().to(noise.dtype), noise, behavior.tanh)
        from vgf_fast.kernels.sequence import behavior_flow

        assert packed is not None
        return behavior_flow(packed, observations, noise, policy.config.behavior_steps, layers=layers)


def flow(
    policy: VGFPolicy,
    packed: Packed,
    observations: Tensor,
    particles: Tensor,
    budget: TransportBudget,
    epilogue: Select | TDTarget,
    layers: Layers | None = None,
) -> FlowOutput:
    """Move particles by the critic, and end in a choice by it, or in the target by the target critic.

    An amortised policy's are moved by the score field: two launches a step for the field, and PyTorch's for the rest.
    """
    from vgf_fast.kernels.sequence import TDTarget, value_gradient_flow

    config = policy.config
    steps = budget.steps
    if policy.score_field is not None:
        field = functools.partial(_field, policy.score_field, observations, packed.critic.dtype)
        per_state = not isinstance(epilogue, TDTarget)
        particles = torch_backend.amortized_flow(field, particles, steps, budget.step_size, per_state).particles
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
        kernel=config.kernel,
        evaluator=packed.target_critic,
        epilogue=epilogue,
        layers=layers,
    )


def _field(field: ScoreField, observations: Tensor, dtype: torch.dtype, particles: Tensor) -> Tensor:
    """The score field at observations [B, O] and particles [B, N, A] -> [B, N, A]."""
    from vgf_fast.kernels import training

    batch, count, width = particles.shape
    states = observations.unsqueeze(1).expand(-1, count, -1).reshape(batch * count, -1)
    return training.mlp(stack(field), states, particles.reshape(-1, width), dtype=dtype)[0].view_as(particles)


@torch.no_grad()
def act(
    policy: VGFPolicy,
    observations: Tensor,
    noise: Tensor,
    budget: TransportBudget,
    selection: str,
    uniform: Tensor | None,
    few: bool | None = None,
) -> Tensor:
    """Actions [B, A] float32 at observations [B, O] from noise [B, N, A]; ``uniform`` [B] unless ``selection`` is max.

    Weights, the states' shares, behaviour flow, flow steps with the choice at their end. ``few`` says whether layers
    are spread over as many programs as there are; by default the number of rows does.
    """
    from vgf_fast.kernels.launch import Layers
    from vgf_fast.kernels.sequence import Select

    config = policy.config
    packed = pack(policy, policy.dtype)
    layers = None if few is None else Layers(few)
    particles = draw_particles(policy, packed.behavior, observations, noise, layers)
    choice = Select(selection, config.selection_temperature, uniform, config.target_q_aggregation)
    chosen = flow(policy, packed, observations, particles, budget, choice, layers).chosen
    assert chosen is not None
    return chosen


class Target(NamedTuple):
    """TD target of a batch, and the particles it is the value of."""

    target: Tensor  # [B]
    moved: Tensor  # [B, N, A]


@torch.no_grad()
def td_target(
    policy: VGFPolicy,
    packed: Packed,
    data: dict[str, Tensor],
    drawn: Tensor,
    discount: float,
    reduce: str,
) -> Target:
    """Particles ``drawn`` at the next states, moved by the critic in the training budget, valued by the target one."""
    from vgf_fast.kernels.sequence import TDTarget

    config = policy.config
    epilogue = TDTarget(data["rewards"], data["masks"], discount, config.target_q_aggregation, reduce)
    moved = flow(policy, packed, data["next_observations"], drawn, config.train_budget, epilogue)
    assert moved.chosen is not None
    return Target(moved.chosen, moved.particles)
