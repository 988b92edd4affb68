"""Value Gradient Flow in one file of plain PyTorch, with autograd and without options.

A dot in the plane shall reach a goal. The data come from a controller whose velocity is drowned in noise, so that few
actions in them are good. Training and evaluation take a minute or two on a CPU: ``python vgf_in_one_file.py``.

Shapes: B states, N particles (actions of one state), A action, O observation, E critics, L flow steps, K Euler steps.
"""

from __future__ import annotations

import argparse
import copy
import math

import torch
from torch import Tensor, nn

N, K, E = 4, 10, 2  # few particles, so that the best of them leaves something to gain
STEPS, STEP_SIZE, TEMPERATURE = 5, 0.1, 0.1  # the transport budget: L, eps, alpha
DISCOUNT, TAU, BATCH, LEARNING_RATE, WIDTH = 0.9, 0.01, 128, 1e-3, 64
LENGTH = 10  # steps of an episode

# --- the task: state (position, goal) in [-1, 1]^4, action a velocity in [-1, 1]^2 ------------------------------------


def step(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """States [B, 4], actions [B, 2] -> the next states [B, 4]; rewards [B], ten times how much nearer the goal is."""
    position, goal = state.split(2, dim=1)
    following = (position + 0.1 * action).clamp(-1, 1)
    return torch.cat([following, goal], 1), 10 * ((position - goal).norm(dim=1) - (following - goal).norm(dim=1))


def noisy_controller(state: Tensor) -> Tensor:
    """Actions [B, 2] of the data: towards the goal, with noise of standard deviation 3."""
    return (5 * (state[:, 2:] - state[:, :2]) + 3 * torch.randn(len(state), 2)).clamp(-1, 1)


def episodes(actor, count: int, seed: int) -> tuple[dict[str, Tensor], float]:
    """All transitions of ``count`` episodes side by side, and their mean return; ``seed`` says where they start."""
    state, rows = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1, []
    for _ in range(LENGTH):
        action = actor(state)
        following, reward = step(state, action)
        rows.append((state, action, reward, following))
        state = following
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    return dict(zip(("s", "a", "r", "next_s"), columns, strict=True)), columns[2].sum().item() / count


# --- networks ---------------------------------------------------------------------------------------------------------


def mlp(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    """Two hidden layers; LayerNorm before the activation keeps a critic's values from running away."""
    layers: list[nn.Module] = []
    for width in (inputs, WIDTH):
        layers += [nn.Linear(width, WIDTH), *([nn.LayerNorm(WIDTH)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, outputs))


def values(critics: nn.ModuleList, s: Tensor, a: Tensor) -> Tensor:
    """Every critic's Q(s, a) [E, ...] of states [..., O] and actions [..., A]."""
    return torch.stack([critic(torch.cat([s, a], -1)).squeeze(-1) for critic in critics])


# --- the three parts of VGF -------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(velocity: nn.Module, s: Tensor) -> Tensor:
    """Particles [B, N, A] that look like the data's actions: K Euler steps along the velocity field, from noise."""
    x, s = torch.randn(len(s), N, 2), s[:, None].expand(-1, N, -1)
    for k in range(K):
        t = torch.full((len(s), N, 1), k / K)
        x = x + velocity(torch.cat([s, x, t], -1)) / K
    return x.clamp(-1, 1)


def direction(x: Tensor, score: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """SVGD's direction [B, N, A]: attraction up the value, shared with the neighbours, and repulsion between particles.

    phi_i = (1/N) sum_j [ K_ij score_j / alpha + 2 gamma K_ij (x_i - x_j) ], K_ij = exp(-gamma |x_i - x_j|^2).
    """
    count = x.shape[1]
    difference = x[:, :, None] - x[:, None]  # x_i - x_j [B, N, N, A]
    distance = difference.square().sum(-1)
    median = distance.flatten(1).quantile(0.5, dim=1)[:, None, None]
    gamma = 1 / (1e-6 + 2 * (median / (2 * math.log(count + 1))).clamp(min=1e-12))
    kernel = torch.exp(-gamma * distance)
    attraction = kernel @ score / temperature
    repulsion = 2 * gamma * (kernel[..., None] * difference).sum(2)
    return (attraction + repulsion) / count


def flow(critics: nn.ModuleList, s: Tensor, x: Tensor, steps: int = STEPS) -> Tensor:
    """Particles [B, N, A] moved up the critics' mean value: L steps of Adam along SVGD's direction, clipped."""
    s = s[:, None].expand(-1, x.shape[1], -1)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for i in range(1, steps + 1):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (score,) = torch.autograd.grad(values(critics, s, x).mean(0).sum(), x)
        phi = direction(x.detach(), score)
        first, second = 0.9 * first + 0.1 * phi, 0.999 * second + 0.001 * phi.square()
        move = first / (1 - 0.9**i) / ((second / (1 - 0.999**i)).sqrt() + 1e-8)
        x = (x.detach() + STEP_SIZE * move).clamp(-1, 1)
    return x.detach()


@torch.no_grad()
def act(critics: nn.ModuleList, velocity: nn.Module, s: Tensor, steps: int = STEPS) -> Tensor:
    """Actions [B, A]: draw, move, take the particle whose least value is largest. Zero steps is the best of N."""
    x = flow(critics, s, draw(velocity, s), steps)
    best = values(critics, s[:, None].expand(-1, N, -1), x).amin(0).argmax(1)
    return x[torch.arange(len(s)), best]


# --- training ---------------------------------------------------------------------------------------------------------


def train(data: dict[str, Tensor], updates: int) -> tuple[nn.ModuleList, nn.Module]:
    """Critics and velocity field, from transitions alone."""
    critics = nn.ModuleList(mlp(4 + 2, 1, norm=True) for _ in range(E))
    target, velocity = copy.deepcopy(critics), mlp(4 + 2 + 1, 2, norm=False)
    optimizer = torch.optim.Adam([*critics.parameters(), *velocity.parameters()], lr=LEARNING_RATE)
    for update in range(1, updates + 1):
        index = torch.randint(len(data["r"]), (BATCH,))
        s, a, r, next_s = (data[name][index] for name in ("s", "a", "r", "next_s"))
        # The target is the value of the particles after they have flowed: the policy that will act is evaluated. The
        # episodes end by a time limit alone; otherwise the discount would be 0 where one ends.
        x = flow(critics, next_s, draw(velocity, next_s))
        with torch.no_grad():
            y = r + DISCOUNT * values(target, next_s[:, None].expand(-1, N, -1), x).amin(0).mean(1)
        critic_loss = (values(critics, s, a) - y).square().sum(0).mean()
        # Flow matching: on the straight line from noise to an action of the data, the velocity is their difference.
        noise, t = torch.randn_like(a), torch.rand(BATCH, 1)
        prediction = velocity(torch.cat([s, (1 - t) * noise + t * a, t], 1))
        behavior_loss = (prediction - (a - noise)).square().mean()
        optimizer.zero_grad()
        (critic_loss + behavior_loss).backward()
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(target.parameters(), critics.parameters(), strict=True):
                old.lerp_(new, TAU)
        if update % 500 == 0:
            print(f"update {update}: critic loss {critic_loss:.3f}, behaviour loss {behavior_loss:.3f}")
    return critics, velocity


def main() -> None:
    """Collect, train, and evaluate the data's controller, behaviour cloning, and several budgets."""
    parser = argparse.ArgumentParser(description="Value Gradient Flow in one file")
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--episodes", type=int, default=300)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, _ = episodes(noisy_controller, options.episodes, seed=0)
    critics, velocity = train(data, options.updates)
    actors = {"the data's controller": noisy_controller, "behaviour cloning": lambda s: draw(velocity, s)[:, 0]}
    for steps in (0, 1, 3, 5, 10):
        actors[f"{steps} flow steps"] = lambda s, steps=steps: act(critics, velocity, s, steps)
    for name, actor in actors.items():
        print(f"{name}: return {episodes(actor, options.episodes, seed=1)[1]:.2f}")


if __name__ == "__main__":
    main()
