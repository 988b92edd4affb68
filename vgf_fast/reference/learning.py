"""The TD target and the losses."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import aggregate, gaussian_log_std


@torch.no_grad()
def td_target(
    q: Tensor, rewards: Tensor, masks: Tensor, discount: float, aggregation: str = "min", reduce: str = "mean"
) -> Tensor:
    """y = r + discount * mask * reduce_n Q_agg(s', x_n): q [E, B, N], rewards [B], masks [B] -> [B]."""
    values = aggregate(q, aggregation)
    values = values.amax(dim=1) if reduce == "max" else values.mean(dim=1)
    return rewards + discount * masks * values


def td_loss(q: Tensor, target: Tensor) -> Tensor:
    """mean_b sum_e (y - Q_e)^2: q [E, B], target [B] -> scalar."""
    return (target - q).square().sum(dim=0).mean()


def expectile_loss(q: Tensor, target: Tensor, expectile: float) -> Tensor:
    """mean_b sum_e |expectile - 1[u < 0]| u^2 with u = y - Q_e (the release's ``iql-q``): [E, B], [B] -> scalar."""
    u = target - q
    return ((expectile - (u < 0).to(u.dtype)).abs() * u.square()).sum(dim=0).mean()


def sql_loss(q: Tensor, target: Tensor, alpha: float) -> Tensor:
    """mean_b sum_e alpha max(u/(2 alpha) + 1, 0)^2 - u, u = y - Q_e (the release's ``sql-q``): [E, B], [B] -> []."""
    u = target - q
    return (alpha * F.relu(u / (2.0 * alpha) + 1.0).square() - u).sum(dim=0).mean()


CRITIC_LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "td": lambda q, target, weight: td_loss(q, target),
    "expectile": expectile_loss,
    "sql": sql_loss,
}


def critic_loss(name: str, q: Tensor, target: Tensor, weight: float) -> Tensor:
    """The loss called ``name``; ``weight`` is the expectile, or SQL's alpha.

    Raises ``ValueError`` naming the known ones if there is none.
    """
    if name not in CRITIC_LOSSES:
        raise ValueError(f"critic_loss is {name!r}, expected one of {', '.join(map(repr, CRITIC_LOSSES))}")
    return CRITIC_LOSSES[name](q, target, weight)


def score_field_loss(prediction: Tensor, score: Tensor, normalize: bool = False) -> Tensor:
    """Mean square of prediction - score, [B, A] each; ``normalize`` takes the scores at length one (AVGF)."""
    return (prediction - score_target(score, normalize)).square().mean()


def score_target(score: Tensor, normalize: bool) -> Tensor:
    """What the score field learns: score [B, A] itself, or s / (|s| + 1e-8)."""
    if not normalize:
        return score
    return score / (torch.linalg.vector_norm(score, dim=-1, keepdim=True) + 1e-8)


def flow_matching_inputs(actions: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """x_t = (1 - t) x_0 + t a and the velocity a - x_0: actions, noise [B, A], time [B, 1] -> two of [B, A]."""
    return (1.0 - time) * noise + time * actions, actions - noise


def flow_matching_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """Mean over states and action entries of (v(s, x_t, t) - (a - x_0))^2: [B, A], [B, A] -> scalar."""
    return (prediction - velocity).square().mean()


def gaussian_log_likelihood(mean: Tensor, log_std: Tensor, actions: Tensor, tanh: bool) -> Tensor:
    """Log density of actions under the Gaussian behaviour model: mean [B, A], log_std [A], actions [B, A] -> [B]."""
    log_std = gaussian_log_std(log_std)
    # In float32 the arc tangent of an action of 1 is infinite; data are clipped to 1 - 1e-5 as in the release.
    x = actions.atanh() if tanh else actions
    normal = -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2.0 * math.pi)
    if tanh:
        normal = normal - 2.0 * (math.log(2.0) - x - F.softplus(-2.0 * x))
    return normal.sum(dim=-1)


@torch.no_grad()
def polyak_(target: list[Tensor], source: list[Tensor], tau: float) -> None:
    """target <- tau * source + (1 - tau) * target, in place."""
    torch._foreach_lerp_(target, source, tau)
