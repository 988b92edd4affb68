"""Stein variational direction and particle step of given scores: one launch, one program per state.

The formulas are those at the top of ``formulas``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import launch
from .formulas import (
    ParticleKernel,
    bandwidth_term,
    direction,
    particle_kernel,
    particle_optimizer,
    particle_weights,
    squared_distances,
)

COUNTED = 16  # particles padded, up to which the median is found by counting, in memory of the program's own


class Strides(NamedTuple):
    """From state to state, particle to particle and column to column."""

    x: tuple[int, ...]
    score: tuple[int, ...]
    moments: tuple[tuple[int, ...], tuple[int, ...]]


class Numbers(NamedTuple):
    """What a step's arithmetic takes besides tensors."""

    log_n1: float  # ln(N + 1)
    inverse_temperature: float
    step_size: float  # divided by the first moment's bias correction
    v_correction: float  # of the second moment: 1 - BETA2^step
    low: float
    high: float


class Options(NamedTuple):
    """Constants of the compiled kernel."""

    kernel: ParticleKernel
    optimizer: JITFunction
    bandwidth_gradient: tl.constexpr
    repulsion: tl.constexpr


# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def move_state(
    x_ptr: tl.tensor,  # [N, A] particles of the state, any strides, written unless there is ``phi_ptr``
    score_ptr: tl.tensor,  # [N, A], any strides
    m_ptr: tl.tensor,  # [N, A] float32 first moment, any strides, written; None for an optimiser without
    v_ptr: tl.tensor,  # [N, A] float32 second moment, likewise
    phi_ptr: tl.tensor,  # [N, A] float32, contiguous, written; or None
    scratch_ptr: tl.tensor,  # [BLOCK_N, BLOCK_N] int32 of the program's own; or None
    strides: Strides,
    N: tl.tensor,
    A: tl.tensor,
    numbers: Numbers,
    options: Options,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """phi of one state; unless it is asked for, move the particles along it by the optimiser and clip them."""
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    # Padding reads the last particle or column again: its kernel entries are zero and it is not stored.
    safe_n = tl.minimum(offs_n, N - 1)
    offs_x = safe_n * strides.x[1]
    offs_g = safe_n * strides.score[1]
    share = 1.0 / N.to(tl.float32)
    distances = squared_distances(x_ptr, offs_x, strides.x[2], N, A, BLOCK_N, UNROLL, PAIRED)
    kernel, gamma, factor, row_a, column_a, row_b, column_b = particle_weights(
        distances, scratch_ptr, N, numbers.log_n1, options.kernel, BLOCK_N, options.bandwidth_gradient
    )
    for first in range(0, A, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        safe_c = tl.minimum(offs_c, A - 1)
        is_real = in_n[:, None] & (offs_c < A)[None, :]
        x_ptrs = x_ptr + (offs_x[:, None] + safe_c[None, :] * strides.x[2])  # [BLOCK_N, BLOCK_C]
        x = tl.load(x_ptrs).to(tl.float32)
        score = tl.load(score_ptr + (offs_g[:, None] + safe_c[None, :] * strides.score[2])).to(tl.float32)
        phi = direction(kernel, gamma, x, score, numbers.inverse_temperature, options.kernel, options.repulsion, PAIRED)
        if options.bandwidth_gradient:
            offs_b = safe_c * strides.x[2]
            phi += bandwidth_term(x, x_ptr + column_a * strides.x[1], offs_b, row_a, factor, BLOCK_N)
            phi += bandwidth_term(x, x_ptr + column_b * strides.x[1], offs_b, row_b, factor, BLOCK_N)
        phi *= share
        if phi_ptr is not None:
            tl.store(phi_ptr + (offs_n[:, None] * A + offs_c[None, :]), phi, mask=is_real)
        else:
            m = phi
            v = phi
            if m_ptr is not None:
                m_strides = strides.moments[0]
                v_strides = strides.moments[1]
                m_ptrs = m_ptr + (offs_n[:, None] * m_strides[1] + offs_c[None, :] * m_strides[2])
                v_ptrs = v_ptr + (offs_n[:, None] * v_strides[1] + offs_c[None, :] * v_strides[2])
                m = tl.load(m_ptrs, mask=is_real, other=0.0)
                v = tl.load(v_ptrs, mask=is_real, other=0.0)
            m, v, move = options.optimizer(phi, m, v, numbers.v_correction)
            if m_ptr is not None:
                tl.store(m_ptrs, m, mask=is_real)
                tl.store(v_ptrs, v, mask=is_real)
            x = tl.clamp(x + numbers.step_size * move, numbers.low, numbers.high, propagate_nan=tl.PropagateNan.ALL)
            # Every thread has read these columns of every particle before any is overwritten.
            tl.debug_barrier()
            tl.store(x_ptrs, x, mask=is_real)


@triton.jit(do_not_specialize=["N", "A"])
def svgd_kernel(
    x_ptr: tl.tensor,  # [B, N, A]; this and the rest as in ``move_state``, with states first
    score_ptr: tl.tensor,
    m_ptr: tl.tensor,
    v_ptr: tl.tensor,
    phi_ptr: tl.tensor,
    scratch_ptr: tl.tensor,  # [B, BLOCK_N, BLOCK_N]
    strides: Strides,
    N: tl.tensor,
    A: tl.tensor,
    numbers: Numbers,
    chosen: Options,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """``move_state`` of state ``program_id(0)``."""
    state = tl.program_id(0).to(tl.int64)
    x_ptr += state * strides.x[0]
    score_ptr += state * strides.score[0]
    if m_ptr is not None:
        m_ptr += state * strides.moments[0][0]
        v_ptr += state * strides.moments[1][0]
    if phi_ptr is not None:
        phi_ptr += state * N * A
    if scratch_ptr is not None:
        scratch_ptr += state * BLOCK_N * BLOCK_N
    move_state(
        x_ptr,
        score_ptr,
        m_ptr,
        v_ptr,
        phi_ptr,
        scratch_ptr,
        strides,
        N,
        A,
        numbers,
        chosen,
        BLOCK_N,
        BLOCK_C,
        UNROLL,
        PAIRED,
    )


# --- launcher and registered ops -------------------------------------------------------------------------------------


def _launch(
    particles: Tensor,
    score: Tensor,
    moments: tuple[Tensor, Tensor] | None,
    phi: Tensor | None,
    numbers: Numbers,
    options: Options,
) -> None:
    launch.check_device("particles", particles)
    batch, n, width = particles.shape
    if batch == 0:
        return
    config = launch.svgd(n, amd=torch.version.hip is not None)
    scratch = None
    if config.block_n <= COUNTED:
        scratch = torch.empty((batch, config.block_n, config.block_n), dtype=torch.int32, device=particles.device)
    m, v = moments or (None, None)
    none = particles.stride()
    with launch.on_device(particles):
        svgd_kernel[(batch,)](
            particles,
            score,
            m,
            v,
            phi,
            scratch,
            strides=Strides(
                particles.stride(),
                score.stride(),
                (none if m is None else m.stride(), none if v is None else v.stride()),
            ),
            N=n,
            A=width,
            numbers=numbers,
            chosen=options,
            **config.options(),
        )


def _numbers(n: int, temperature: float) -> Numbers:
    return Numbers(math.log(n + 1.0), 1.0 / temperature, 1.0, 1.0, -1.0, 1.0)


@torch.library.custom_op("vgf_fast::svgd_direction", mutates_args=())
def _svgd_direction(
    particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool, repulsion: bool, kernel: str
) -> Tensor:
    phi = torch.empty(particles.shape, dtype=torch.float32, device=particles.device)
    options = Options(
        particle_kernel(kernel),
        particle_optimizer("ascent").step,
        tl.constexpr(bandwidth_gradient and repulsion),
        tl.constexpr(repulsion),
    )
    _launch(particles, score, None, phi, _numbers(particles.shape[1], temperature), options)
    return phi


@_svgd_direction.register_fake
def _(
    particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool, repulsion: bool, kernel: str
) -> Tensor:
    return particles.new_empty(particles.shape, dtype=torch.float32)


@torch.library.custom_op("vgf_fast::svgd_step_", mutates_args=("particles", "first_moment", "second_moment"))
def _svgd_step_(
    particles: Tensor,
    score: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    step: int,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool,
    repulsion: bool,
    kernel: str,
    optimizer: str,
    low: float,
    high: float,
) -> None:
    chosen = particle_optimizer(optimizer)
    m_correction, v_correction = chosen.corrections(step)
    numbers = _numbers(particles.shape[1], temperature)._replace(
        step_size=step_size / m_correction, v_correction=v_correction, low=low, high=high
    )
    options = Options(
        particle_kernel(kernel), chosen.step, tl.constexpr(bandwidth_gradient and repulsion), tl.constexpr(repulsion)
    )
    moments = None if first_moment is None or second_moment is None else (first_moment, second_moment)
    _launch(particles, score, moments, None, numbers, options)


@_svgd_step_.register_fake
def _(
    particles: Tensor,
    score: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    step: int,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool,
    repulsion: bool,
    kernel: str,
    optimizer: str,
    low: float,
    high: float,
) -> None:
    return None


# --- public functions ------------------------------------------------------------------------------------------------


def _check(particles: Tensor, score: Tensor, temperature: float, kernel: str) -> None:
    if particles.ndim != 3:
        raise ValueError(f"particles has shape {tuple(particles.shape)}, expected (B, N, A)")
    _, n, width = particles.shape
    if not 1 <= n <= launch.MAX_PARTICLES:
        raise ValueError(f"particles is {n} a state, expected 1 to {launch.MAX_PARTICLES}: the kernel's limit")
    if not 1 <= width <= launch.MAX_ACTION_DIM:
        raise ValueError(f"particles has {width} columns, expected 1 to {launch.MAX_ACTION_DIM}: the kernel's limit")
    launch.check_shape("score", score, particles.shape, "the shape of particles")
    for name, tensor in (("particles", particles), ("score", score)):
        launch.check_dtype(name, tensor, launch.PARTICLE_DTYPES)
        launch.check_span(name, tensor)
    launch.check_same_device("score", score, "particles", particles.device)
    launch.check_positive("temperature", temperature)
    particle_kernel(kernel)


def svgd_direction(
    particles: Tensor,
    score: Tensor,
    temperature: float,
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    kernel: str = "rbf",
) -> Tensor:
    """Direction phi [B, N, A], float32, of the particles [B, N, A] under the score [B, N, A].

    Particles and score are float32, bfloat16 or float16 with any strides; N is 1 to 128, A is 1 to 64. ``kernel`` is
    "rbf" or "imq", the inverse multiquadric (1 + gamma D)^(-1/2) with the same median bandwidth.
    ``bandwidth_gradient`` adds the bandwidth term, as the public release does. ``repulsion=False`` gives the paper's
    simplified direction (1/N) sum_j K_ij G_j, without temperature, repulsion and bandwidth term. No autograd formula.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is outside these limits.
    """
    _check(particles, score, temperature, kernel)
    return _svgd_direction(particles, score, float(temperature), bandwidth_gradient, repulsion, kernel)


def svgd_step_(
    particles: Tensor,
    score: Tensor,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    step: int,
    step_size: float,
    temperature: float,
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    low: float = -1.0,
    high: float = 1.0,
    kernel: str = "rbf",
) -> None:
    """Move the particles one flow step, in place: direction, one step of the optimiser, clip to [low, high].

    Adam (b1 .9, b2 .999, eps 1e-8; ``step`` counts from 1) writes its moments [B, N, A], float32, zero before the first
    step: m <- b1 m + (1 - b1) phi, v <- b2 v + (1 - b2) phi^2, x <- x + step_size m_hat / (sqrt(v_hat) + eps).
    "ascent" is x <- x + step_size phi and takes ``None`` for the moments. The rest is as in ``svgd_direction``.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    _check(particles, score, temperature, kernel)
    launch.check_writable("particles", particles)
    if not particle_optimizer(optimizer).moments:
        first_moment = second_moment = None
    else:
        if step < 1:
            raise ValueError(f"step is {step}, expected an integer >= 1: the first step is 1")
        for name, moment in (("first_moment", first_moment), ("second_moment", second_moment)):
            if moment is None:
                raise ValueError(f"{name} is None, expected a float32 tensor: optimizer={optimizer!r}")
            launch.check_shape(name, moment, particles.shape, "the shape of particles")
            launch.check_dtype(name, moment, (torch.float32,))
            launch.check_same_device(name, moment, "particles", particles.device)
            launch.check_span(name, moment)
            launch.check_writable(name, moment)
    _svgd_step_(
        particles,
        score,
        first_moment,
        second_moment,
        step,
        float(step_size),
        float(temperature),
        bandwidth_gradient,
        repulsion,
        kernel,
        optimizer,
        float(low),
        float(high),
    )
