"""The torch backend: ``reference``'s formulas, and on a CPU the forms of them that are faster, chosen by their sizes.

A network with a C compiler is ``native``'s; without one, many rows are ``blocked``'s; all else is ``reference``'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends import blocked, native
from vgf_fast.kernels import ranges
from vgf_fast.reference import FlowResult, MLPWeights


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


def _svgd_steps(
    x: Tensor,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool,
    repulsion: bool,
    optimizer: str,
    kernel: str,
) -> Callable[[Tensor], None]:
    """``reference.svgd_step_`` of particles x along a score, step after step."""
    budget, modes = (step_size, temperature), (bandwidth_gradient, repulsion, optimizer, kernel)
    if native.supports_particles(x):
        return native.FlowSteps(x, *budget, *modes).step
    moments = reference.zero_moments(x, optimizer)
    numbers = itertools.count(1)
    return lambda score: reference.svgd_step_(x, score, *moments, next(numbers), *budget, *modes)


@torch.no_grad()
def value_gradient_flow(
    critic: MLPWeights,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    return_trajectory: bool = False,
    evaluate: bool = True,
    kernel: str = "rbf",
) -> FlowResult:
    """``reference.value_gradient_flow`` of observations [B, O] and particles [B, N, A]."""
    at_states = critic_at_states(critic, observations, particles.shape[1], backward=steps > 0)
    x = particles.clone(memory_format=torch.contiguous_format)
    move_along = _svgd_steps(x, step_size, temperature, bandwidth_gradient, repulsion, optimizer, kernel)

    def move(step: int) -> None:
        with ranges.span(f"vgf/flow_step/{step - 1}"):
            move_along(at_states.score(x, q_aggregation))

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
