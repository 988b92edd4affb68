"""The torch backend: ``reference``'s formulas, and on a CPU the forms of them that are faster, chosen by their sizes.

A network with a C compiler is ``native``'s; without one, many rows are ``blocked``'s; all else is ``reference``'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends import blocked, native
from vgf_fast.backends.graphs import GraphCache
from vgf_fast.checks import check_range, check_result
from vgf_fast.config import TrainConfig, TransportBudget
from vgf_fast.flow import Flow
from vgf_fast.kernels import ranges
from vgf_fast.networks import GaussianBehavior, VelocityField
from vgf_fast.reference import FlowResult, MLPWeights

if TYPE_CHECKING:
    from vgf_fast.policy import VGFPolicy


def critic_at_states(
    critic: MLPWeights, observations: Tensor, particles: int, backward: bool = True
) -> reference.CriticAtStates | native.NativeCriticAtStates | blocked.BlockedCriticAtStates:
    """A critic bound to states, N ``particles`` each; ``backward`` if scores are wanted, not values alone."""
    rows = observations.shape[0] * particles
    if native.supports(critic, rows, observations):
        return native.NativeCriticAtStates(critic, observations, particles, backward)
    if not blocked.supports(critic, rows):
        return reference.CriticAtStates(critic, observations)
    rows = min(rows, blocked.chunk_rows(critic))
    return blocked.BlockedCriticAtStates(blocked.block(critic, observations.shape[1], rows, backward), observations)


@torch.no_grad()
def behavior_flow(velocity: MLPWeights, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """``reference.behavior_flow``: observations [B, O], noise [B, N, A] -> particles [B, N, A]."""
    rows = noise.shape[0] * noise.shape[1]
    if native.supports(velocity, rows, observations):
        return native.behavior_flow(velocity, observations, noise, steps)
    if not blocked.supports(velocity, rows):
        return reference.behavior_flow(velocity, observations, noise, steps)
    rows = min(rows, blocked.chunk_rows(velocity))
    laid_out = blocked.block(velocity, observations.shape[1], rows, backward=False)
    return blocked.behavior_flow(laid_out, observations, noise, steps)


def _svgd_steps(x: Tensor, flow: Flow) -> Callable[[Tensor], None]:
    """``reference.svgd_step_`` of particles x along a score, step after step."""
    if native.supports_particles(x):
        return native.FlowSteps(x, flow).step
    moments = reference.zero_moments(x, flow.optimizer)
    numbers = itertools.count(1)

    def move(score: Tensor) -> None:
        reference.svgd_step_(
            x,
            score,
            *moments,
            next(numbers),
            flow.step_size,
            flow.temperature,
            flow.bandwidth_gradient,
            flow.repulsion,
            flow.optimizer,
            flow.kernel,
        )

    return move


@torch.no_grad()
def value_gradient_flow(
    critic: MLPWeights,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    flow: Flow,
    *,
    return_trajectory: bool = False,
    evaluate: bool = True,
) -> FlowResult:
    """``reference.value_gradient_flow`` of observations [B, O] and particles [B, N, A]."""
    at_states = critic_at_states(critic, observations, particles.shape[1], backward=steps > 0)
    x = particles.clone(memory_format=torch.contiguous_format)
    move_along = _svgd_steps(x, flow)

    def move(step: int) -> None:
        with ranges.span(f"vgf/flow_step/{step - 1}"):
            move_along(at_states.score(x, flow.q_aggregation))

    trajectory = reference.repeated(x, steps, move, return_trajectory)
    q = None
    if evaluate:
        with ranges.span("vgf/values"):
            q = at_states.values(x)
    return FlowResult(x, q, trajectory)


@torch.no_grad()
def amortized_flow(
    field: Callable[[Tensor], Tensor],
    particles: Tensor,
    steps: int,
    step_size: float,
    per_state: bool,
    return_trajectory: bool = False,
) -> FlowResult:
    """Steps of ``reference.amortized_step_`` by a score ``field``: [B, N, A] -> [B, N, A]. There are no values."""
    x = particles.clone()
    moments = (torch.zeros_like(x), torch.zeros_like(x))

    def move(step: int) -> None:
        with ranges.span(f"vgf/flow_step/{step - 1}"):
            reference.amortized_step_(x, field(x), *moments, step, step_size, per_state)

    return FlowResult(x, None, reference.repeated(x, steps, move, return_trajectory))


# --- a policy's networks ---------------------------------------------------------------------------------------------


class Weights(NamedTuple):
    """A policy's networks in the dtype of their products; gradients flow back to the parameters."""

    critic: MLPWeights
    behavior: MLPWeights
    target_critic: MLPWeights | None  # None for acting
    score_field: MLPWeights | None  # None for a policy that is not amortised


class Target(NamedTuple):
    """TD target of a batch, and the particles it is the value of."""

    target: Tensor  # [B]
    moved: Tensor  # [B, N, A]


def gaussian_particles(behavior: GaussianBehavior, weights: MLPWeights, observations: Tensor, noise: Tensor) -> Tensor:
    """Draws of a Gaussian behaviour model: observations [B, O], noise [B, N, A] -> particles [B, N, A]."""
    mean = reference.mlp_forward(weights.detach(), observations).squeeze(0).to(noise.dtype)
    return reference.gaussian_sample(mean, behavior.log_std.detach().to(noise.dtype), noise, behavior.tanh)


def behavior_loss(
    behavior: VelocityField | GaussianBehavior, weights: MLPWeights, data: dict[str, Tensor], draws: dict[str, Tensor]
) -> Tensor:
    """The behaviour model's loss on a batch and its noise, differentiable: a scalar."""
    if isinstance(behavior, VelocityField):
        x, velocity = reference.flow_matching_inputs(data["actions"], draws["bc_x0"], draws["bc_t"])
        inputs = torch.cat([data["observations"], x, draws["bc_t"]], dim=-1)
        return reference.flow_matching_loss(reference.mlp_forward(weights, inputs).squeeze(0).to(x.dtype), velocity)
    mean = reference.mlp_forward(weights, data["observations"]).squeeze(0).to(data["actions"].dtype)
    return -reference.gaussian_log_likelihood(mean, behavior.log_std, data["actions"], behavior.tanh).mean()


class TorchBackend:
    """A policy's flows and losses in PyTorch; products have operands in bfloat16 where ``dtype`` is."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def weights(self, policy: VGFPolicy, target: bool = False) -> Weights:
        """The networks as they are now, the target critic among them if asked."""
        return Weights(
            self.cast(policy.critic.stacked()),
            self.cast(policy.behavior.stacked()),
            self.cast(policy.target_critic.stacked()) if target else None,
            None if policy.score_field is None else self.cast(policy.score_field.stacked()),
        )

    def cast(self, weights: MLPWeights) -> MLPWeights:
        """A network in the dtype of its products; gradients flow back to its parameters."""
        return weights.to(torch.bfloat16) if self.dtype == torch.bfloat16 else weights

    def draw(self, policy: VGFPolicy, behavior: MLPWeights, observations: Tensor, noise: Tensor) -> Tensor:
        """Particles of the behaviour model: observations [B, O], noise [B, N, A] -> [B, N, A]."""
        model = policy.behavior
        with ranges.span("vgf/behavior_flow"), torch.no_grad():
            if isinstance(model, GaussianBehavior):
                return gaussian_particles(model, behavior, observations, noise)
            return behavior_flow(behavior, observations, noise, policy.config.behavior_steps)

    def flow(
        self,
        policy: VGFPolicy,
        weights: Weights,
        observations: Tensor,
        particles: Tensor,
        budget: TransportBudget,
        *,
        per_state: bool,
        evaluate: bool,
    ) -> FlowResult:
        """Move particles by the critic or, if there is one, by the score field, clipped ``per_state`` or in all."""
        if weights.score_field is None:
            flow = policy.config.flow(budget)
            return value_gradient_flow(weights.critic, observations, particles, budget.steps, flow, evaluate=evaluate)
        with torch.no_grad():
            field = reference.FieldAtStates(weights.score_field, observations)
            moved = amortized_flow(field, particles, budget.steps, budget.step_size, per_state)
        return moved._replace(q=self.values(weights.critic, observations, moved.particles)) if evaluate else moved

    @torch.no_grad()
    def values(self, critic: MLPWeights, observations: Tensor, particles: Tensor) -> Tensor:
        """Q of every member: observations [B, O], particles [B, N, A] -> [E, B, N]."""
        with ranges.span("vgf/values"):
            return critic_at_states(critic, observations, particles.shape[1], backward=False).values(particles)

    def select(
        self, policy: VGFPolicy, result: FlowResult, selection: str, generator: torch.Generator | None
    ) -> Tensor:
        """One particle a state [B, A], by the values of a flow's particles."""
        assert result.q is not None
        config = policy.config
        with ranges.span("vgf/select"):
            uniform = None
            if selection != "max":
                size, device = len(result.particles), result.particles.device
                uniform = torch.rand(size, device=device, dtype=torch.float32, generator=generator)
            q = reference.aggregate(result.q, config.target_q_aggregation)
            return reference.select_particle(result.particles, q, selection, config.selection_temperature, uniform)[0]

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
        """Actions [B, A] at observations [B, O] from noise [B, N, A]; there are no ``recordings`` of PyTorch.

        On a CPU, raises ``ValueError`` naming the input or network that makes a result that is not finite.
        """
        weights = self.weights(policy)
        critic, behavior, field = weights.critic, weights.behavior, weights.score_field
        check_range("observations", observations, critic)
        check_range("observations", observations, behavior)
        check_range("noise", noise, behavior)
        drawn = self.draw(policy, behavior, observations, noise)
        if isinstance(policy.behavior, VelocityField):
            check_result(drawn, ("velocity", behavior), observations=observations, noise=noise)
        result = self.flow(policy, weights, observations, drawn, budget, per_state=True, evaluate=True)
        assert result.q is not None
        if field is not None:
            check_result(result.particles, ("score_field", field), observations=observations, particles=drawn)
        check_result(result.q, ("critic", critic), observations=observations, particles=drawn)
        return self.select(policy, result, selection, generator)

    def td_target(
        self, policy: VGFPolicy, weights: Weights, data: dict[str, Tensor], drawn: Tensor, config: TrainConfig
    ) -> Target:
        """Particles ``drawn`` at the next states, moved by the critic in the training budget, valued by the target."""
        assert weights.target_critic is not None
        states = data["next_observations"]
        moved = self.flow(
            policy, weights, states, drawn, policy.config.train_budget, per_state=False, evaluate=False
        ).particles
        next_q = self.values(weights.target_critic, states, moved)
        with ranges.span("vgf/td_target"):
            aggregation = policy.config.target_q_aggregation
            return Target(
                reference.td_target(
                    next_q, data["rewards"], data["masks"], config.discount, aggregation, config.target_reduce
                ),
                moved,
            )

    def losses(
        self,
        policy: VGFPolicy,
        weights: Weights,
        data: dict[str, Tensor],
        draws: dict[str, Tensor],
        target: Tensor,
        config: TrainConfig,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by network, differentiable, and the critic's values [E, B]."""
        states, actions = data["observations"], data["actions"]
        with ranges.span("vgf/td_loss"):
            q = reference.member_values(weights.critic, states, actions)
            losses = {"critic": reference.critic_loss(config.critic_loss, q, target, config.expectile)}
        with ranges.span("vgf/behavior_loss"):
            losses["behavior"] = behavior_loss(policy.behavior, weights.behavior, data, draws)
        if weights.score_field is not None:
            with ranges.span("vgf/score_loss"):
                inputs = torch.cat([states, actions], dim=-1)
                prediction = reference.mlp_forward(weights.score_field, inputs).squeeze(0).to(inputs.dtype)
                with torch.no_grad():
                    at_states = critic_at_states(weights.critic, states, 1)
                    _, score = at_states.values_and_score(actions.unsqueeze(1), "mean")
                losses["score"] = reference.score_field_loss(prediction, score.squeeze(1), config.normalize_score)
        return losses, q
