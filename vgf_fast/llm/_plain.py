"""Nearest tokens and SVGD between responses, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nearest_token(
    queries: Tensor, vocabulary: Tensor, metric: str = "l2", k: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    values, indices = [], []
    squares = vocabulary.float().square().sum(-1)
    for rows in queries.split(512):
        distance = squares - 2 * rows.float() @ vocabulary.float().T
        if mask is not None:
            distance = distance.masked_fill(~mask, torch.inf)
        v, i = distance.topk(k, dim=1, largest=False)
        values.append(v + rows.float().square().sum(-1, keepdim=True))
        indices.append(i)
    return torch.cat(values), torch.cat(indices)


def token_svgd_direction(particles: Tensor, score: Tensor, temperature: float, repulsion: bool = True) -> Tensor:
    n = len(particles)
    d = torch.cdist(particles, particles).square()
    flat = d.flatten().sort().values
    median = 0.5 * (flat[(n * n - 1) // 2] + flat[n * n // 2])
    h = (median / (2 * math.log(n + 1))).clamp_min(1e-12)
    gamma = 1 / (1e-6 + 2 * h)
    kernel = torch.exp(-gamma * d)
    phi = kernel @ score / temperature
    if repulsion:
        phi = phi + 2 * gamma * (kernel.sum(1, keepdim=True) * particles - kernel @ particles)
    return phi / n
