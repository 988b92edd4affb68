"""VGF as one would write it from the paper: nn.Linear, concatenated inputs, gradients by autograd. The eager baseline.

It computes what ``vgf_fast`` computes with its default options, in the dtype of the policy it is made from, and shares
no code with it. Shapes: B states, N particles, A action, O observation, E members.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vgf_fast import TrainConfig, TransportBudget, VGFPolicy
from vgf_fast.networks import StackedMLP

POLICY_OPTIONS = {
    "activation": "relu",
    "behavior": "flow",
    "particle_optimizer": "adam",
    "repulsion": True,
    "kernel": "rbf",
    "bandwidth_gradient": False,
    "selection": "max",
}
TRAIN_OPTIONS = {"critic_loss": "td", "target_reduce": "mean", "precision": "float32"}


class MLP(nn.Module):
    """Linear, LayerNorm (optional) and relu for each hidden layer; linear at the end."""

    def __init__(self, source: StackedMLP, member: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (weight, bias) in enumerate(zip(source.weights, source.biases, strict=True)):
            linear = nn.Linear(weight.shape[1], weight.shape[2], dtype=weight.dtype, device=weight.device)
            linear.weight.data.copy_(weight.detach()[member].T)
            linear.bias.data.copy_(bias.detach()[member])
            layers.append(linear)
            if i + 1 == len(source.weights):
                break
            if len(source.norm_scales):
                norm = nn.LayerNorm(weight.shape[2], eps=1e-6, dtype=weight.dtype, device=weight.device)
                norm.weight.data.copy_(source.norm_scales[i].detach()[member])
                norm.bias.data.copy_(source.norm_biases[i].detach()[member])
                layers.append(norm)
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Inputs [..., width each] -> [..., out]."""
        return self.layers(torch.cat(inputs, dim=-1))


class Critic(nn.Module):
    """E values of a state and an action."""

    def __init__(self, source: StackedMLP) -> None:
        super().__init__()
        self.members = nn.ModuleList(MLP(source, e) for e in range(source.weights[0].shape[0]))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """States [..., O], actions [..., A] -> [E, ...]."""
        return torch.stack([member(states, actions).squeeze(-1) for member in self.members])


def repeated(observations: Tensor, count: int) -> Tensor:
    """States beside each of ``count`` particles: [B, O] -> [B, count, O]."""
    return observations.unsqueeze(1).expand(-1, count, -1)


def svgd_direction(particles: Tensor, score: Tensor, temperature: float) -> Tensor:
    """phi_i = (1/N) [ (1/alpha) sum_j K_ij G_j - grad_i sum_j K_ij ], K an RBF kernel of median bandwidth.

    particles, score [B, N, A] -> [B, N, A]; the bandwidth is held constant.
    """
    n = particles.shape[1]
    with torch.enable_grad():
        x = particles.detach().requires_grad_()
        distances = (x.unsqueeze(2) - particles.detach().unsqueeze(1)).square().sum(dim=-1)
        median = torch.quantile(distances.detach().flatten(1), 0.5, dim=1).view(-1, 1, 1)
        gamma = 1.0 / (1e-6 + 2.0 * (median / (2.0 * math.log(n + 1))).clamp(min=1e-12))
        kernel = torch.exp(-gamma * distances)
        repulsion = -torch.autograd.grad(kernel.sum(), x)[0]
    return (kernel.detach() @ score / temperature + repulsion) / n


class EagerAgent:
    """Learns and acts as the policy it copies the weights of. Raises ``ValueError`` for options it does not compute."""

    def __init__(self, policy: VGFPolicy, train: TrainConfig) -> None:
        config = policy.config
        for owner, fields in ((config, POLICY_OPTIONS), (train, TRAIN_OPTIONS)):
            for name, expected in fields.items():
                if getattr(owner, name) != expected:
                    raise ValueError(
                        f"{type(owner).__name__}.{name} is {getattr(owner, name)!r}, expected {expected!r}: the eager "
                        "baseline computes no other"
                    )
        self.config, self.train = config, train
        self.critic, self.target_critic = Critic(policy.critic), Critic(policy.target_critic)
        self.behavior = MLP(policy.behavior, 0)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=train.critic_learning_rate)
        self.behavior_optimizer = torch.optim.Adam(self.behavior.parameters(), lr=train.behavior_learning_rate)
        self.device, self.dtype = policy.device, policy.dtype

    def _aggregate(self, q: Tensor, aggregation: str) -> Tensor:
        return q.amin(dim=0) if aggregation == "min" else q.mean(dim=0)

    @torch.no_grad()
    def draw(self, states: Tensor, noise: Tensor) -> Tensor:
        """States repeated for every particle [B, N, O], noise [B, N, A] -> particles [B, N, A]."""
        steps = self.config.behavior_steps
        x = noise
        for k in range(steps):
            time = torch.full_like(x[..., :1], k / steps)
            x = x + self.behavior(states, x, time) / steps
        return x.clamp(-1.0, 1.0)

    def score(self, states: Tensor, particles: Tensor) -> Tensor:
        """Gradient of the aggregated value with respect to the particles: [B, N, O], [B, N, A] -> [B, N, A]."""
        with torch.enable_grad():
            x = particles.detach().requires_grad_()
            q = self._aggregate(self.critic(states, x), self.config.flow_q_aggregation)
            return torch.autograd.grad(q.sum(), x)[0]

    @torch.no_grad()
    def flow(self, states: Tensor, particles: Tensor, budget: TransportBudget) -> list[Tensor]:
        """Particles [B, N, A] before, between and after the value-gradient steps; states [B, N, O]."""
        x = particles.clone()
        optimizer = torch.optim.Adam([x], lr=budget.step_size)
        trajectory = [particles]
        for _ in range(budget.steps):
            x.grad = -svgd_direction(x, self.score(states, x), budget.temperature)
            optimizer.step()
            x.clamp_(-1.0, 1.0)
            trajectory.append(x.clone())
        return trajectory

    def draws(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The random numbers of one update, as ``vgf_fast.Learner.update`` takes them."""
        size, width = batch["actions"].shape
        return {
            "particles": torch.randn(size, self.config.particles, width, device=self.device, dtype=self.dtype),
            "bc_x0": torch.randn_like(batch["actions"]),
            "bc_t": torch.rand(size, 1, device=self.device, dtype=self.dtype),
        }

    def acting_noise(self) -> Tensor:
        """The random numbers [N, A] of one action."""
        return torch.randn(self.config.particles, self.config.action_dim, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def move_target(self) -> None:
        """Move the target critic a part of the way to the critic."""
        for target, parameter in zip(self.target_critic.parameters(), self.critic.parameters(), strict=True):
            target.mul_(1.0 - self.train.tau).add_(parameter, alpha=self.train.tau)

    def update(self, batch: Mapping[str, Tensor], noise: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """One training update; ``batch`` and ``noise`` as ``vgf_fast.Learner.update`` takes them."""
        observations, actions = batch["observations"], batch["actions"]
        noise = self.draws(batch) if noise is None else noise
        states = repeated(batch["next_observations"], self.config.particles)
        moved = self.flow(states, self.draw(states, noise["particles"]), self.config.train_budget)[-1]
        with torch.no_grad():
            next_q = self._aggregate(self.target_critic(states, moved), self.config.target_q_aggregation).mean(dim=1)
            target = batch["rewards"] + self.train.discount * batch["masks"] * next_q
        critic_loss = (target - self.critic(observations, actions)).square().sum(dim=0).mean()

        x0, t = noise["bc_x0"], noise["bc_t"]
        velocity = self.behavior(observations, (1.0 - t) * x0 + t * actions, t)
        behavior_loss = (velocity - (actions - x0)).square().mean()

        self.critic_optimizer.zero_grad()
        self.behavior_optimizer.zero_grad()
        (critic_loss + behavior_loss).backward()
        self.move_target()
        self.critic_optimizer.step()
        self.behavior_optimizer.step()
        return {"critic_loss": critic_loss.detach(), "bc_loss": behavior_loss.detach()}

    @torch.no_grad()
    def sample_actions(self, observation: Tensor, noise: Tensor | None = None) -> Tensor:
        """Action [A] for one observation [O]; ``noise`` [N, A] are the numbers the particles start from."""
        noise = self.acting_noise() if noise is None else noise
        states = observation.expand(1, self.config.particles, -1)
        x = self.flow(states, self.draw(states, noise.unsqueeze(0)), self.config.test_budget)[-1]
        q = self._aggregate(self.critic(states, x), self.config.target_q_aggregation)
        return x[0, q[0].argmax()]
