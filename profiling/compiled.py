"""The eager baseline as torch.compile makes it: what a user of PyTorch would do next. One graph for the particles and
the TD target, one for the losses and their gradients, PyTorch's fused Adam for the optimisers.

The score is taken by ``torch.func.grad`` and the particles' Adam is written out, since the compiler takes no autograd
tape and no optimiser inside a graph; the tests hold it to the eager baseline's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from profiling.eager import EagerAgent, repeated
from vgf_fast import TrainConfig, TransportBudget, VGFPolicy

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def svgd_direction(particles: Tensor, score: Tensor, temperature: float) -> Tensor:
    """``profiling.eager.svgd_direction`` with the repulsion written out; particles, score [B, N, A] -> [B, N, A]."""
    n = particles.shape[1]
    difference = particles.unsqueeze(2) - particles.unsqueeze(1)
    distances = difference.square().sum(dim=-1)
    ordered = distances.flatten(1).sort(dim=1).values
    median = 0.5 * (ordered[:, (n * n - 1) // 2] + ordered[:, n * n // 2]).view(-1, 1, 1)
    gamma = 1.0 / (1e-6 + 2.0 * (median / (2.0 * math.log(n + 1))).clamp(min=1e-12))
    kernel = torch.exp(-gamma * distances)
    repulsion = 2.0 * gamma * (kernel.unsqueeze(-1) * difference).sum(dim=2)
    return (kernel @ score / temperature + repulsion) / n


class CompiledAgent(EagerAgent):
    """Learns and acts as ``EagerAgent`` does. ``mode`` and ``backend`` are ``torch.compile``'s.

    ``autocast`` names the dtype of matrix products under ``torch.autocast``. Raises ``ValueError`` for options the
    eager baseline does not compute.
    """

    def __init__(
        self,
        policy: VGFPolicy,
        train: TrainConfig,
        *,
        mode: str | None = None,
        backend: str = "inductor",
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__(policy, train)
        self.autocast = autocast
        options: dict[str, Any] = {"mode": mode, "backend": backend, "fullgraph": True, "dynamic": False}
        self._target = torch.compile(self.td_target, **options)
        self._losses = torch.compile(self.losses, **options)
        self._act = torch.compile(self.act, **options)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=train.critic_learning_rate, fused=True)
        self.behavior_optimizer = torch.optim.Adam(
            self.behavior.parameters(), lr=train.behavior_learning_rate, fused=True
        )

    def score(self, states: Tensor, particles: Tensor) -> Tensor:
        """See ``EagerAgent.score``."""

        def total(x: Tensor) -> Tensor:
            return self._aggregate(self.critic(states, x), self.config.flow_q_aggregation).sum()

        return torch.func.grad(total)(particles)

    def flow(self, states: Tensor, particles: Tensor, budget: TransportBudget) -> list[Tensor]:
        """See ``EagerAgent.flow``."""
        x, first, second = particles, torch.zeros_like(particles), torch.zeros_like(particles)
        trajectory = [x]
        for step in range(1, budget.steps + 1):
            phi = svgd_direction(x, self.score(states, x).to(x.dtype), budget.temperature)
            first = BETA1 * first + (1.0 - BETA1) * phi
            second = BETA2 * second + (1.0 - BETA2) * phi.square()
            root = (second / (1.0 - BETA2**step)).sqrt() + EPS
            x = (x + budget.step_size * (first / (1.0 - BETA1**step)) / root).clamp(-1.0, 1.0)
            trajectory.append(x)
        return trajectory

    def td_target(self, batch: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """TD target [B] from noise [B, N, A]."""
        states = repeated(batch["next_observations"], self.config.particles)
        moved = self.flow(states, self.draw(states, noise), self.config.train_budget)[-1]
        next_q = self._aggregate(self.target_critic(states, moved), self.config.target_q_aggregation).mean(dim=1)
        return batch["rewards"] + self.train.discount * batch["masks"] * next_q

    def losses(self, batch: Mapping[str, Tensor], target: Tensor, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of the critic and of the behaviour model; differentiable."""
        observations, actions = batch["observations"], batch["actions"]
        critic_loss = (target - self.critic(observations, actions)).square().sum(dim=0).mean()
        velocity = self.behavior(observations, (1.0 - t) * x0 + t * actions, t)
        return critic_loss, (velocity - (actions - x0)).square().mean()

    def update(self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """See ``EagerAgent.update``."""
        noise = self.draws(batch) if noise is None else noise
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            with torch.no_grad():
                # A replayed graph's output lies in memory that the next replay may use.
                target = self._target(batch, noise["particles"]).clone()
            critic_loss, behavior_loss = self._losses(batch, target, noise["bc_x0"], noise["bc_t"])
        self.critic_optimizer.zero_grad()
        self.behavior_optimizer.zero_grad()
        (critic_loss + behavior_loss).backward()
        self.move_target()
        self.critic_optimizer.step()
        self.behavior_optimizer.step()
        return {"critic_loss": critic_loss.detach(), "bc_loss": behavior_loss.detach()}

    def act(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Action [A] for one observation [O] from noise [N, A]."""
        states = observation.expand(1, self.config.particles, -1)
        x = self.flow(states, self.draw(states, noise.unsqueeze(0)), self.config.test_budget)[-1]
        q = self._aggregate(self.critic(states, x), self.config.target_q_aggregation)
        return x[0].index_select(0, q[0].argmax(dim=0, keepdim=True))[0]

    @torch.no_grad()
    def sample_actions(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """See ``EagerAgent.sample_actions``."""
        noise = self.acting_noise() if noise is None else noise
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            return self._act(observation, noise)
