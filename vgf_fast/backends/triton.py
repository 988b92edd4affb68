"""The Triton backend: acting and one training update, in as few launches as the kernels allow.

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
from vgf_fast.backends import choice, graphs
from vgf_fast.backends import torch as torch_backend
from vgf_fast.backends.graphs import GraphCache
from vgf_fast.backends.torch import Target
from vgf_fast.config import TrainConfig, TransportBudget
from vgf_fast.kernels import ranges
from vgf_fast.networks import EnsembleMLP, GaussianBehavior, ScoreField, VelocityField

if TYPE_CHECKING:
    from vgf_fast.kernels.launch import Layers
    from vgf_fast.kernels.packing import PackedMLP, Stack
    from vgf_fast.kernels.sequence import FlowOutput, Select, TDTarget
    from vgf_fast.policy import VGFPolicy

MAX_GRAPH_STATES = 4096  # of a CUDA graph for acting; larger batches keep the GPU busy without


def stack(module: EnsembleMLP | VelocityField | ScoreField) -> Stack:
    """A network's parameters as the kernels take them."""
    from vgf_fast.kernels.packing import Stack

    return Stack(*module.stacked(), module.observation_dim, module.action_dim)


class Packed(NamedTuple):
    """A policy's networks packed for the kernels."""

    critic: PackedMLP
    behavior: PackedMLP | None  # None for the Gaussian behaviour model
    target_critic: PackedMLP | None  # None for acting


class TritonBackend:
    """A policy's flows and steps in the Triton kernels; ``dtype`` is that of the operands of products."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def pack(self, modules: Sequence[EnsembleMLP | VelocityField]) -> tuple[PackedMLP, ...]:
        """Pack networks as they are now: one launch."""
        from vgf_fast.kernels.packing import pack_many

        with ranges.span("vgf/pack"):
            return pack_many([stack(module) for module in modules], self.dtype)

    def weights(self, policy: VGFPolicy, target: bool = False) -> Packed:
        """Pack critic, velocity field and, if ``target``, the target critic: one launch."""
        modules: list[EnsembleMLP | VelocityField] = [policy.critic]
        if isinstance(policy.behavior, VelocityField):
            modules.append(policy.behavior)
        if target:
            modules.append(policy.target_critic)
        packed = list(self.pack(modules))
        return Packed(
            packed.pop(0),
            packed.pop(0) if isinstance(policy.behavior, VelocityField) else None,
            packed.pop(0) if target else None,
        )

    @torch.no_grad()
    def draw(
        self,
        policy: VGFPolicy,
        behavior: PackedMLP | None,
        observations: Tensor,
        noise: Tensor,
        layers: Layers | None = None,
    ) -> Tensor:
        """Particles of the behaviour model: observations [B, O], noise [B, N, A] -> [B, N, A] float32."""
        model = policy.behavior
        with ranges.span("vgf/behavior_flow"):
            if isinstance(model, GaussianBehavior):
                return torch_backend.gaussian_particles(model, model.stacked(), observations, noise)
            from vgf_fast.kernels.sequence import behavior_flow

            assert behavior is not None
            return behavior_flow(behavior, observations, noise, policy.config.behavior_steps, layers=layers)

    def flow(
        self,
        policy: VGFPolicy,
        weights: Packed,
        observations: Tensor,
        particles: Tensor,
        budget: TransportBudget,
        epilogue: Select | TDTarget,
        layers: Layers | None = None,
    ) -> FlowOutput:
        """Move particles by the critic, and end in a choice by it, or in the target by the target critic.

        An amortised policy's are moved by the score field: two launches a step for the field, PyTorch's for the rest.
        """
        from vgf_fast.kernels.sequence import TDTarget, value_gradient_flow

        flow = policy.config.flow(budget)
        steps = budget.steps
        if policy.score_field is not None:
            field = functools.partial(_field, policy.score_field, observations, weights.critic.dtype)
            per_state = not isinstance(epilogue, TDTarget)
            particles = torch_backend.amortized_flow(field, particles, steps, budget.step_size, per_state).particles
            steps = 0
        return value_gradient_flow(
            weights.critic,
            observations,
            particles,
            steps,
            *flow[:6],
            kernel=flow.kernel,
            evaluator=weights.target_critic,
            epilogue=epilogue,
            layers=layers,
        )

    def act(
        self,
        policy: VGFPolicy,
        observations: Tensor,
        noise: Tensor,
        budget: TransportBudget,
        selection: str,
        generator: torch.Generator,
        recordings: GraphCache | None = None,
    ) -> Tensor:
        """Actions [B, A] float32 at observations [B, O] from noise [B, N, A], replayed if there are ``recordings``."""
        inputs: tuple[Tensor, ...] = (observations, noise)
        if selection != "max":
            size, device = len(observations), observations.device
            with ranges.span("vgf/noise"):
                inputs += (torch.rand(size, device=device, dtype=torch.float32, generator=generator),)

        def act(*tensors: Tensor) -> tuple[Tensor, ...]:
            observations, noise, *uniform = tensors
            return (self.choose(policy, observations, noise, budget, selection, uniform[0] if uniform else None),)

        batch = len(observations)
        bucket = 1 << (batch - 1).bit_length()
        if recordings is None or bucket > MAX_GRAPH_STATES:
            return act(*inputs)[0]
        key = (
            *(bucket, budget, selection, observations.dtype, policy.config, policy.one_launch),
            graphs.addresses(list(policy.parameters())),
        )
        return recordings.run(key, act, inputs, rows=bucket)[0][:batch]

    @torch.no_grad()
    def choose(
        self,
        policy: VGFPolicy,
        observations: Tensor,
        noise: Tensor,
        budget: TransportBudget,
        selection: str,
        uniform: Tensor | None,
    ) -> Tensor:
        """Actions [B, A] float32; ``uniform`` [B] chooses, unless ``selection`` is max.

        Weights, the states' shares, behaviour flow, flow steps with the choice at their end.
        """
        from vgf_fast.kernels.launch import Layers
        from vgf_fast.kernels.sequence import Select

        config = policy.config
        weights = self.weights(policy)
        layers = None if policy.one_launch is None else Layers(policy.one_launch)
        particles = self.draw(policy, weights.behavior, observations, noise, layers)
        choice = Select(selection, config.selection_temperature, uniform, config.target_q_aggregation)
        chosen = self.flow(policy, weights, observations, particles, budget, choice, layers).chosen
        assert chosen is not None
        return chosen

    @torch.no_grad()
    def td_target(
        self, policy: VGFPolicy, weights: Packed, data: dict[str, Tensor], drawn: Tensor, config: TrainConfig
    ) -> Target:
        """Particles ``drawn`` at the next states, moved by the critic in the training budget, valued by the target."""
        from vgf_fast.kernels.sequence import TDTarget

        aggregation = policy.config.target_q_aggregation
        epilogue = TDTarget(data["rewards"], data["masks"], config.discount, aggregation, config.target_reduce)
        states, budget = data["next_observations"], policy.config.train_budget
        moved = self.flow(policy, weights, states, drawn, budget, epilogue)
        assert moved.chosen is not None
        return Target(moved.chosen, moved.particles)

    def losses(
        self,
        policy: VGFPolicy,
        weights: Packed,
        data: dict[str, Tensor],
        draws: dict[str, Tensor],
        target: Tensor,
        config: TrainConfig,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by network, differentiable, and the critic's values [E, B]."""
        from vgf_fast.kernels import training

        states, actions = data["observations"], data["actions"]
        with ranges.span("vgf/td_loss"):
            critic_loss, q = training.mlp_loss(
                stack(policy.critic), states, actions, target.unsqueeze(1), *_critic_loss(config), dtype=self.dtype
            )
        with ranges.span("vgf/behavior_loss"):
            if isinstance(policy.behavior, VelocityField):
                x, velocity = reference.flow_matching_inputs(actions, draws["bc_x0"], draws["bc_t"])
                behavior_loss, _ = training.mlp_loss(
                    stack(policy.behavior), states, x, velocity, time=draws["bc_t"], dtype=self.dtype
                )
            else:
                behavior_loss = self.plain_behavior_loss(policy, data, draws)
        losses = {"critic": critic_loss, "behavior": behavior_loss}
        if policy.score_field is not None:
            _, score = choice.critic_value_and_score(
                policy.critic.stacked(), states, actions.unsqueeze(1), "mean", policy.backend
            )
            goal = reference.score_target(score.squeeze(1), config.normalize_score)
            with ranges.span("vgf/score_loss"):
                losses["score"] = training.mlp_loss(stack(policy.score_field), states, actions, goal, dtype=self.dtype)[
                    0
                ]
        return losses, q.squeeze(2)

    def plain_behavior_loss(self, policy: VGFPolicy, data: dict[str, Tensor], draws: dict[str, Tensor]) -> Tensor:
        """The behaviour model's loss in PyTorch, differentiable."""
        weights = torch_backend.TorchBackend(self.dtype).cast(policy.behavior.stacked())
        return torch_backend.behavior_loss(policy.behavior, weights, data, draws)

    @torch.no_grad()
    def td_step(
        self,
        policy: VGFPolicy,
        packed: PackedMLP,
        data: dict[str, Tensor],
        target: Tensor,
        optimizer: torch.optim.Adam,
        config: TrainConfig,
    ) -> Tensor:
        """The critic's step of Adam, and the target critic's: loss, mean value and mean target [3]."""
        from vgf_fast.kernels.training import Batch, training_step_

        with ranges.span("vgf/td_loss"):
            return training_step_(
                stack(policy.critic),
                packed,
                Batch(data["observations"], data["actions"], target=target.unsqueeze(1)),
                optimizer,
                *_critic_loss(config),
                stack(policy.target_critic).parameters,
                config.tau,
            )

    @torch.no_grad()
    def behavior_step(
        self,
        policy: VGFPolicy,
        packed: PackedMLP | None,
        data: dict[str, Tensor],
        draws: dict[str, Tensor],
        optimizer: torch.optim.Adam,
    ) -> Tensor:
        """The behaviour model's step of Adam, in kernels where it is a flow; returns its loss."""
        from vgf_fast.kernels.training import Batch, training_step_

        with ranges.span("vgf/behavior_loss"):
            if isinstance(policy.behavior, VelocityField):
                assert packed is not None
                batch = Batch(data["observations"], data["actions"], draws["bc_t"], draws["bc_x0"])
                return training_step_(stack(policy.behavior), packed, batch, optimizer)[0]
            with torch.enable_grad():
                loss = self.plain_behavior_loss(policy, data, draws)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            optimizer.step()
            return loss.detach()


def _critic_loss(config: TrainConfig) -> tuple[str, float]:
    """The critic's loss by the kernels' name, and its weight."""
    return "squared" if config.critic_loss == "td" else config.critic_loss, config.expectile


def _field(field: ScoreField, observations: Tensor, dtype: torch.dtype, particles: Tensor) -> Tensor:
    """The score field at observations [B, O] and particles [B, N, A] -> [B, N, A]."""
    from vgf_fast.kernels import training

    batch, count, width = particles.shape
    states = observations.unsqueeze(1).expand(-1, count, -1).reshape(batch * count, -1)
    return training.mlp(stack(field), states, particles.reshape(-1, width), dtype=dtype)[0].view_as(particles)
