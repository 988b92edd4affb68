"""Stein variational direction of few particles in very many dimensions, such as whole responses' embeddings.

The formulas are those of ``svgd``, for one set of N particles x_i [N, D], with the bandwidth held constant:

    D_ij = |x_i - x_j|^2,  h = max(median of all N * N entries of D / (2 ln(N + 1)), 1e-12),  gamma = 1 / (1e-6 + 2 h)
    phi_i = (1/N) [ (1/temperature) sum_j K_ij G_j + 2 gamma sum_j K_ij (x_i - x_j) ],  K_ij = exp(-gamma D_ij)

Dimensions are divided between programs. Two launches: one sums D over each program's dimensions, and PyTorch adds these
sums up, in an order that does not change; in the other every program finds the median for itself and goes over its
dimensions once, reading particles and scores and writing phi.

All arithmetic is float32, and all sums are of differences x_i - x_j, which do not cancel when particles clump.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .formulas import ParticleKernel, direction, particle_kernel, particle_weights, squared_distances

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "D", "SPAN", "CHUNK"])
def token_distances_kernel(
    x_ptr: tl.tensor,  # [N, D] particles, any strides
    partial_ptr: tl.tensor,  # [programs, N, N] float32, contiguous, written
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    SPAN: tl.tensor,  # dimensions of a program
    CHUNK: tl.tensor,  # dimensions whose squares are summed by themselves
    PAIRS: tl.constexpr,  # a ``launch.SvgdLaunch``
) -> None:
    """Squared distances in the dimensions of program ``program_id(0)``."""
    BLOCK_N: tl.constexpr = PAIRS.block_n
    program = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    # Padding reads the last particle again; its distances are not stored.
    offs_x = tl.minimum(offs_n, N - 1).to(tl.int64) * stride_n
    first = program * SPAN
    end = tl.minimum(first + SPAN, D)
    x_ptr += first.to(tl.int64) * stride_d
    distances = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    # Sums of sums: one long one would lose digits.
    for start in range(first, end, CHUNK):
        count = tl.minimum(CHUNK, end - start)
        distances += squared_distances(x_ptr, offs_x, stride_d, N, count, BLOCK_N, PAIRS.unroll, PAIRS.paired)
        x_ptr += CHUNK * stride_d
    in_n = offs_n < N
    offs = program.to(tl.int64) * N * N + offs_n[:, None] * N + offs_n[None, :]
    tl.store(partial_ptr + offs, distances, mask=in_n[:, None] & in_n[None, :])


@triton.jit(do_not_specialize=["N", "D", "SPAN"])
def token_direction_kernel(
    x_ptr: tl.tensor,  # [N, D] particles, any strides
    score_ptr: tl.tensor,  # [N, D], any strides
    distances_ptr: tl.tensor,  # [N, N] float32, contiguous
    phi_ptr: tl.tensor,  # [N, D] float32, contiguous, written
    strides: tl.tuple,  # of the particles, then the score
    N: tl.tensor,
    D: tl.tensor,
    SPAN: tl.tensor,  # dimensions of a program
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    KERNEL: ParticleKernel,
    REPULSION: tl.constexpr,
    PAIRS: tl.constexpr,  # a ``launch.SvgdLaunch``
) -> None:
    """phi of the module's docstring in the dimensions of program ``program_id(0)``."""
    BLOCK_N: tl.constexpr = PAIRS.block_n
    BLOCK_C: tl.constexpr = PAIRS.block_c
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    in_pair = in_n[:, None] & in_n[None, :]
    distances = tl.load(distances_ptr + (offs_n[:, None] * N + offs_n[None, :]), mask=in_pair, other=float("inf"))
    kernel, gamma, _, _, _, _, _ = particle_weights(distances, None, N, log_n1, KERNEL, BLOCK_N, False)
    # Padding reads the last particle or dimension again: its kernel entries are zero and it is not stored.
    safe_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_x = safe_n[:, None] * strides[0]
    offs_g = safe_n[:, None] * strides[2]
    offs_phi = offs_n.to(tl.int64)[:, None] * D
    share = 1.0 / N.to(tl.float32)
    first = tl.program_id(0) * SPAN
    end = tl.minimum(first + SPAN, D)
    for start in range(first, end, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C)
        safe_c = tl.minimum(offs_c, D - 1).to(tl.int64)[None, :]
        x = tl.load(x_ptr + (offs_x + safe_c * strides[1])).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        score = tl.load(score_ptr + (offs_g + safe_c * strides[3])).to(tl.float32)
        phi = direction(kernel, gamma, x, score, inverse_temperature, KERNEL, REPULSION, PAIRS.paired) * share
        tl.store(phi_ptr + (offs_phi + offs_c[None, :]), phi, mask=in_n[:, None] & (offs_c < end)[None, :])


# --- launchers and registered op -------------------------------------------------------------------------------------


@torch.library.custom_op("vgf_fast::token_svgd_direction", mutates_args=())
def _token_svgd_direction(particles: Tensor, score: Tensor, temperature: float, repulsion: bool) -> Tensor:
    launch.check_device("particles", particles)
    n, width = particles.shape
    phi = torch.empty((n, width), dtype=torch.float32, device=particles.device)
    if width == 0:
        return phi
    processors = launch.processors(particles.device)
    config = launch.token_flow(n, width, processors, amd=torch.version.hip is not None)
    programs = triton.cdiv(width, config.span)
    partial = torch.empty((programs, n, n), dtype=torch.float32, device=particles.device)
    with launch.on_device(particles):
        token_distances_kernel[(programs,)](
            particles,
            partial,
            *particles.stride(),
            N=n,
            D=width,
            SPAN=config.span,
            CHUNK=launch.TOKEN_FLOW_CHUNK,
            PAIRS=config.step,
            num_warps=config.step.num_warps,
        )
        token_direction_kernel[(programs,)](
            particles,
            score,
            partial.sum(dim=0),
            phi,
            (*particles.stride(), *score.stride()),
            N=n,
            D=width,
            SPAN=config.span,
            log_n1=math.log(n + 1.0),
            inverse_temperature=1.0 / temperature,
            KERNEL=particle_kernel("rbf"),
            REPULSION=repulsion,
            PAIRS=config.step,
            num_warps=config.step.num_warps,
        )
    return phi


_token_svgd_direction.register_fake(lambda particles, *_: particles.new_empty(particles.shape, dtype=torch.float32))


# --- public function -------------------------------------------------------------------------------------------------


def token_svgd_direction(particles: Tensor, score: Tensor, temperature: float, repulsion: bool = True) -> Tensor:
    """Direction phi [N, D], float32, of the particles [N, D] under the score [N, D]; formula at the top.

    Particles and score are float32, bfloat16 or float16 with any strides; N is 1 to 128, D anything up to 2**31 - 1.
    ``repulsion=False`` gives the paper's simplified direction (1/N) sum_j K_ij G_j, without temperature. Runs of the
    same input are equal to the bit. No autograd formula.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is outside these limits.
    """
    if particles.ndim != 2:
        raise ValueError(f"particles has shape {tuple(particles.shape)}, expected (N, D)")
    n, width = particles.shape
    if not 1 <= n <= launch.MAX_PARTICLES:
        raise ValueError(f"particles is {n} of them, expected 1 to {launch.MAX_PARTICLES}: the kernel's limit")
    if width >= 2**31:
        raise ValueError(f"particles has {width} columns, expected less than 2**31: the kernel's limit")
    launch.check_shape("score", score, particles.shape, "the shape of particles")
    for name, tensor in (("particles", particles), ("score", score)):
        launch.check_dtype(name, tensor, launch.PARTICLE_DTYPES)
    launch.check_same_device("score", score, "particles", particles.device)
    launch.check_positive("temperature", temperature)
    return _token_svgd_direction(particles, score, float(temperature), repulsion)
