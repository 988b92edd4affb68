"""What the kernels are tested against and with.

The SVGD direction by automatic differentiation, in float64, literally as the public release defines it: its repulsion
is minus the gradient of sum_ij K(x_i, stop(x_j)), median included. And tensors in awkward places.
"""

import math
from typing import NamedTuple
from unittest import mock

import torch


class Direction(NamedTuple):
    phi: torch.Tensor  # [B, N, A]
    scale: torch.Tensor  # [B, 1, 1] largest sum of the absolute terms that phi is made of: what rounding is relative to
    gap: (
        torch.Tensor
    )  # [B] how far, relative to it, the median's entries are from a different value: inf if by no change


def svgd_direction(particles, score, temperature, bandwidth_gradient=False, repulsion=True, kernel="rbf"):
    """particles, score [B, N, A] of any dtype -> Direction in float64."""
    x = particles.detach().double().requires_grad_()
    g = score.detach().double()
    batch, n, _ = x.shape
    with torch.enable_grad():
        difference = x[:, :, None] - x.detach()[:, None]  # [B, N, N, A]
        distances = difference.square().sum(dim=3)
        flat = distances.reshape(batch, n * n)
        values, order = flat.detach().sort(dim=1, stable=True)
        middle = slice((n * n - 1) // 2, n * n // 2 + 1)
        median = flat.gather(1, order[:, middle]).mean(dim=1)
        gamma = 1.0 / (1e-6 + 2.0 * (median / (2.0 * math.log(n + 1.0))).clamp(min=1e-12))
        gamma = gamma.view(-1, 1, 1)
        scaled = (gamma if bandwidth_gradient else gamma.detach()) * distances
        matrix = torch.exp(-scaled) if kernel == "rbf" else (1.0 + scaled) ** -0.5
        (repulsive,) = torch.autograd.grad(-matrix.sum(), x)
    matrix, gamma = matrix.detach(), gamma.detach()
    # -2 dK / dD
    steep = 2.0 * gamma * matrix if kernel == "rbf" else gamma * matrix**3
    if repulsion:
        phi = (matrix @ g / temperature + repulsive) / n
    else:
        phi = matrix @ g / n
    terms = matrix @ g.abs() / (temperature if repulsion else 1.0)
    if repulsion:
        terms = terms + (steep.unsqueeze(3) * difference.detach().abs()).sum(dim=2)
        if bandwidth_gradient:
            total = (steep * distances.detach()).sum(dim=(1, 2)).view(-1, 1, 1)
            slope = gamma * total / math.log(n + 1.0)
            terms = terms + slope * (median.detach() > 0).view(-1, 1, 1) * median.detach().sqrt().view(-1, 1, 1)
    scale = terms.amax(dim=(1, 2), keepdim=True) / n if batch else terms.new_zeros(0, 1, 1)
    return Direction(phi, scale, _median_gap(values, middle))


def _median_gap(values, middle):
    """Relative distance from each middle entry to the nearest different value on either side of it, the smaller."""
    gap = values.new_full((values.shape[0],), math.inf)
    for k in {middle.start, middle.stop - 1}:
        v = values[:, k : k + 1]
        distance = ((values - v).abs() / v.clamp(min=1e-300)).masked_fill(values == v, math.inf)
        gap = torch.minimum(gap, distance.amin(dim=1))
    return gap


LAYOUTS = ("contiguous", "permuted", "columns", "misaligned")


def arrange(values, layout):
    """The values as a view of that layout into a larger buffer of NaN, and the buffer."""
    shape = values.shape
    if layout == "permuted":  # the outermost axis innermost but one
        buffer = values.new_full((*shape[1:-1], shape[0], shape[-1]), math.nan)
        view = buffer.movedim(-2, 0)
    elif layout == "columns":  # of a wider matrix, starting off any alignment
        buffer = values.new_full((*shape[:-1], shape[-1] + 3), math.nan)
        view = buffer[..., 1 : shape[-1] + 1]
    else:
        offset = 1 if layout == "misaligned" else 16
        buffer = values.new_full((values.numel() + 32,), math.nan)
        view = buffer[offset : offset + values.numel()].view(shape)
    view.copy_(values)
    return view, buffer


def nan_filled_empty():
    """While it lasts, torch.empty returns NaN, or for integers a value that is no index."""
    empty = torch.empty

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -(2**30))

    return mock.patch.object(torch, "empty", filled)
