"""The SVGD direction between whole responses: few particles of very many dimensions, in bounded memory.

The formulas are those of ``vgf_fast.reference.svgd_direction`` with the bandwidth held constant, for one set of
particles [N, D], D = T * d; blocked PyTorch over D, or the Triton kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.backends.choice import Backend, resolve_backend

_BLOCK = 2**19  # entries of particles that the torch backend works on at a time


def token_svgd_direction(
    particles: Tensor, score: Tensor, temperature: float, repulsion: bool = True, *, backend: Backend = "auto"
) -> Tensor:
    """phi_i = (1/N) [ (1/alpha) sum_j K_ij G_j + 2 gamma sum_j K_ij (x_i - x_j) ]: particles, score [N, D] -> [N, D].

    K is the RBF kernel of median bandwidth; ``repulsion=False`` is the paper's simplified direction
    (1/N) sum_j K_ij G_j, without temperature. Float32 at least; not differentiable. The Triton kernels take up to 128
    particles. Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong.
    """
    for name, tensor in (("particles", particles), ("score", score)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor of shape (N, D)")
        if tensor.ndim != 2 or len(tensor) < 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (N >= 1, D)")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if score.shape != particles.shape:
        raise ValueError(
            f"score has shape {tuple(score.shape)}, expected {tuple(particles.shape)}, the shape of particles"
        )
    if score.device != particles.device:
        raise ValueError(f"score is on {score.device}, but particles is on {particles.device}: move one of them")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature!r}, expected a number > 0")
    dtype = torch.promote_types(particles.dtype, score.dtype)
    if resolve_backend(backend, particles.device, len(particles), 1, dtype) == "triton":
        from vgf_fast.kernels import token_flow

        return token_flow.token_svgd_direction(particles.detach(), score.detach(), temperature, repulsion)
    return _blocked(particles, score, temperature, repulsion)


@torch.no_grad()
def _blocked(particles: Tensor, score: Tensor, temperature: float, repulsion: bool) -> Tensor:
    """Two passes over the dimensions: distances are summed, then the direction is written, block by block."""
    dtype = torch.promote_types(torch.promote_types(particles.dtype, score.dtype), torch.float32)
    n, width = particles.shape
    blocks = [slice(start, start + max(_BLOCK // n, 1)) for start in range(0, width, max(_BLOCK // n, 1))]
    distances = torch.zeros((1, n, n), dtype=dtype, device=particles.device)
    for block in blocks:
        distances += reference.squared_distances(particles[None, :, block].to(dtype))
    gamma = reference.median_bandwidth(distances, positions=False).gamma.squeeze()
    kernel = torch.exp(-gamma * distances[0])
    # Relative to the particle nearest to all others, and without itself, so that one far away costs no digits.
    center = kernel.sum(dim=1).argmax()
    others = kernel.clone().fill_diagonal_(0.0)
    weight = others.sum(dim=1, keepdim=True)
    phi = torch.empty((n, width), dtype=dtype, device=particles.device)
    for block in blocks:
        sums = kernel @ score[:, block].to(dtype)
        if repulsion:
            x = particles[:, block].to(dtype)
            x = x - x[center]
            sums = (sums / temperature).add_(2.0 * gamma * (x * weight - others @ x))
        phi[:, block] = sums.div_(n)
    return phi
