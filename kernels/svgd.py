"""Stein variational direction and particle step: one launch, one program per state.

For the N particles x_i of a state and the score G_j = grad Q(x_j):

    D_ij = |x_i - x_j|^2,  h = max(median of all N * N entries of D / (2 ln(N + 1)), 1e-12),  gamma = 1 / (1e-6 + 2 h)
    K_ij = exp(-gamma D_ij)
    phi_i = (1/N) [ (1/temperature) sum_j K_ij G_j + 2 gamma sum_j K_ij (x_i - x_j) + bandwidth term ]

The bandwidth term is what -d/dx_i of sum K(x_i, stop(x_j)) sends through the median: with T = sum_ij K_ij D_ij, the
middle entry (p, q) of the row-major D in stable order gives particle p alone -2 gamma^2 T / ln(N + 1) (x_p - x_q); if
N * N is even there are two middle entries with half of it each; nothing where h is at its lower bound.

All arithmetic is float32. Sums over j are taken of differences x_i - x_j, which do not cancel when particles clump.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .particles import bandwidth_term, direction, rbf_kernel, squared_distances

BETA1, BETA2, EPS = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)


# --- device helper ---------------------------------------------------------------------------------------------------


@triton.jit
def move_state(
    x_ptr: tl.tensor,  # [N, A] particles of the state, any strides, written
    score_ptr: tl.tensor,  # [N, A], any strides
    m_ptr: tl.tensor,  # [N, A] float32 first moment, any strides, written; unused by ascent
    v_ptr: tl.tensor,  # [N, A] float32 second moment, any strides, written; unused by ascent
    stride_xn: tl.tensor,
    stride_xa: tl.tensor,
    stride_gn: tl.tensor,
    stride_ga: tl.tensor,
    stride_mn: tl.tensor,
    stride_ma: tl.tensor,
    stride_vn: tl.tensor,
    stride_va: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    step_size: tl.tensor,  # divided by the first moment's bias correction if ADAM
    v_correction: tl.tensor,  # 1 - BETA2^step
    low: tl.tensor,
    high: tl.tensor,
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """Move the particles of one state along phi by one step of Adam or of plain ascent, then clip to [low, high]."""
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    # Padding reads the last particle or column again: its kernel entries are zero and it is not stored.
    safe_n = tl.minimum(offs_n, N - 1)
    offs_x = safe_n * stride_xn
    offs_g = safe_n * stride_gn
    distances = squared_distances(x_ptr, offs_x, stride_xa, N, A, BLOCK_N, UNROLL, PAIRED)
    kernel, gamma, slope, row_a, column_a, row_b, column_b = rbf_kernel(
        distances, N, log_n1, BLOCK_N, BANDWIDTH_GRADIENT
    )
    for first in range(0, A, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        safe_c = tl.minimum(offs_c, A - 1)
        is_real = in_n[:, None] & (offs_c < A)[None, :]
        x_ptrs = x_ptr + (offs_x[:, None] + safe_c[None, :] * stride_xa)  # [BLOCK_N, BLOCK_C]
        x = tl.load(x_ptrs).to(tl.float32)
        score = tl.load(score_ptr + (offs_g[:, None] + safe_c[None, :] * stride_ga)).to(tl.float32)
        phi = direction(kernel, gamma, x, score, inverse_temperature, REPULSION, PAIRED)
        if BANDWIDTH_GRADIENT:
            phi += bandwidth_term(x, x_ptr + column_a * stride_xn, safe_c * stride_xa, row_a, slope, BLOCK_N)
            phi += bandwidth_term(x, x_ptr + column_b * stride_xn, safe_c * stride_xa, row_b, slope, BLOCK_N)
        phi = tl.div_rn(phi, N.to(tl.float32))
        if ADAM:
            m_ptrs = m_ptr + (offs_n[:, None] * stride_mn + offs_c[None, :] * stride_ma)
            v_ptrs = v_ptr + (offs_n[:, None] * stride_vn + offs_c[None, :] * stride_va)
            m = BETA1 * tl.load(m_ptrs, mask=is_real, other=0.0) + (1.0 - BETA1) * phi
            v = BETA2 * tl.load(v_ptrs, mask=is_real, other=0.0) + (1.0 - BETA2) * phi * phi
            tl.store(m_ptrs, m, mask=is_real)
            tl.store(v_ptrs, v, mask=is_real)
            phi = tl.div_rn(m, tl.sqrt_rn(tl.div_rn(v, v_correction)) + EPS)
        x = tl.clamp(x + step_size * phi, low, high, propagate_nan=tl.PropagateNan.ALL)
        # Every thread has read these columns of every particle before any is overwritten.
        tl.debug_barrier()
        tl.store(x_ptrs, x, mask=is_real)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "A"])
def svgd_direction_kernel(
    x_ptr: tl.tensor,  # [B, N, A] particles, any strides
    score_ptr: tl.tensor,  # [B, N, A], any strides
    phi_ptr: tl.tensor,  # [B, N, A] float32, contiguous, written
    stride_xb: tl.tensor,
    stride_xn: tl.tensor,
    stride_xa: tl.tensor,
    stride_gb: tl.tensor,
    stride_gn: tl.tensor,
    stride_ga: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """phi of the module's docstring for state ``program_id(0)``."""
    state = tl.program_id(0).to(tl.int64)
    x_ptr += state * stride_xb
    score_ptr += state * stride_gb
    phi_ptr += state * N * A
    offs_n = tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    # Padding reads the last particle or column again: its kernel entries are zero and it is not stored.
    safe_n = tl.minimum(offs_n, N - 1)
    offs_x = safe_n * stride_xn
    offs_g = safe_n * stride_gn
    distances = squared_distances(x_ptr, offs_x, stride_xa, N, A, BLOCK_N, UNROLL, PAIRED)
    kernel, gamma, slope, row_a, column_a, row_b, column_b = rbf_kernel(
        distances, N, log_n1, BLOCK_N, BANDWIDTH_GRADIENT
    )
    for first in range(0, A, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        safe_c = tl.minimum(offs_c, A - 1)
        x = tl.load(x_ptr + (offs_x[:, None] + safe_c[None, :] * stride_xa)).to(tl.float32)  # [BLOCK_N, BLOCK_C]
        score = tl.load(score_ptr + (offs_g[:, None] + safe_c[None, :] * stride_ga)).to(tl.float32)
        phi = direction(kernel, gamma, x, score, inverse_temperature, REPULSION, PAIRED)
        if BANDWIDTH_GRADIENT:
            phi += bandwidth_term(x, x_ptr + column_a * stride_xn, safe_c * stride_xa, row_a, slope, BLOCK_N)
            phi += bandwidth_term(x, x_ptr + column_b * stride_xn, safe_c * stride_xa, row_b, slope, BLOCK_N)
        phi = tl.div_rn(phi, N.to(tl.float32))
        tl.store(phi_ptr + (offs_n[:, None] * A + offs_c[None, :]), phi, mask=in_n[:, None] & (offs_c < A)[None, :])


@triton.jit(do_not_specialize=["N", "A"])
def svgd_step_kernel(
    x_ptr: tl.tensor,  # [B, N, A] particles, any strides, written
    score_ptr: tl.tensor,  # [B, N, A], any strides
    m_ptr: tl.tensor,  # [B, N, A] float32 first moment, any strides, written; unused by ascent
    v_ptr: tl.tensor,  # [B, N, A] float32 second moment, any strides, written; unused by ascent
    stride_xb: tl.tensor,
    stride_xn: tl.tensor,
    stride_xa: tl.tensor,
    stride_gb: tl.tensor,
    stride_gn: tl.tensor,
    stride_ga: tl.tensor,
    stride_mb: tl.tensor,
    stride_mn: tl.tensor,
    stride_ma: tl.tensor,
    stride_vb: tl.tensor,
    stride_vn: tl.tensor,
    stride_va: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    step_size: tl.tensor,  # divided by the first moment's bias correction if ADAM
    v_correction: tl.tensor,  # 1 - BETA2^step
    low: tl.tensor,
    high: tl.tensor,
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr,
    PAIRED: tl.constexpr,
) -> None:
    """Move the particles of state ``program_id(0)`` along phi by one step of Adam or of plain ascent, then clip."""
    state = tl.program_id(0).to(tl.int64)
    x_ptr += state * stride_xb
    score_ptr += state * stride_gb
    m_ptr += state * stride_mb
    v_ptr += state * stride_vb
    move_state(
        x_ptr,
        score_ptr,
        m_ptr,
        v_ptr,
        stride_xn,
        stride_xa,
        stride_gn,
        stride_ga,
        stride_mn,
        stride_ma,
        stride_vn,
        stride_va,
        N,
        A,
        log_n1,
        inverse_temperature,
        step_size,
        v_correction,
        low,
        high,
        BANDWIDTH_GRADIENT,
        REPULSION,
        ADAM,
        BLOCK_N,
        BLOCK_C,
        UNROLL,
        PAIRED,
    )


# --- launchers and registered ops ------------------------------------------------------------------------------------


@torch.library.custom_op("vgf_fast::svgd_direction", mutates_args=())
def _svgd_direction(
    particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool, repulsion: bool
) -> Tensor:
    launch.check_device("particles", particles)
    batch, n, width = particles.shape
    phi = torch.empty((batch, n, width), dtype=torch.float32, device=particles.device)
    if batch == 0:
        return phi
    config = launch.svgd(n, amd=torch.version.hip is not None)
    with launch.on_device(particles):
        svgd_direction_kernel[(batch,)](
            particles,
            score,
            phi,
            *particles.stride(),
            *score.stride(),
            N=n,
            A=width,
            log_n1=math.log(n + 1.0),
            inverse_temperature=1.0 / temperature,
            BANDWIDTH_GRADIENT=bandwidth_gradient and repulsion,
            REPULSION=repulsion,
            **config.options(),
        )
    return phi


@_svgd_direction.register_fake
def _(particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool, repulsion: bool) -> Tensor:
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
    low: float,
    high: float,
) -> None:
    launch.check_device("particles", particles)
    batch, n, width = particles.shape
    if batch == 0:
        return
    adam = first_moment is not None and second_moment is not None
    # Ascent reads no moments: any pointer of their dtype does.
    m = particles if first_moment is None else first_moment
    v = particles if second_moment is None else second_moment
    config = launch.svgd(n, amd=torch.version.hip is not None)
    with launch.on_device(particles):
        svgd_step_kernel[(batch,)](
            particles,
            score,
            m,
            v,
            *particles.stride(),
            *score.stride(),
            *m.stride(),
            *v.stride(),
            N=n,
            A=width,
            log_n1=math.log(n + 1.0),
            inverse_temperature=1.0 / temperature,
            step_size=step_size / (1.0 - BETA1.value**step) if adam else step_size,
            v_correction=1.0 - BETA2.value**step,
            low=low,
            high=high,
            BANDWIDTH_GRADIENT=bandwidth_gradient and repulsion,
            REPULSION=repulsion,
            ADAM=adam,
            **config.options(),
        )


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
    low: float,
    high: float,
) -> None:
    return None


# --- public functions ------------------------------------------------------------------------------------------------


def _check(particles: Tensor, score: Tensor, temperature: float) -> None:
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
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature!r}, expected a number > 0")


def svgd_direction(
    particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool = False, repulsion: bool = True
) -> Tensor:
    """Direction phi [B, N, A], float32, of the particles [B, N, A] under the score [B, N, A]; formula at the top.

    Particles and score are float32, bfloat16 or float16 with any strides; N is 1 to 128, A is 1 to 64.
    ``bandwidth_gradient`` adds the bandwidth term, as the public release does. ``repulsion=False`` gives the paper's
    simplified direction (1/N) sum_j K_ij G_j, without temperature, repulsion and bandwidth term. No autograd formula.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is outside these limits.
    """
    _check(particles, score, temperature)
    return _svgd_direction(particles, score, float(temperature), bandwidth_gradient, repulsion)


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
) -> None:
    """Move the particles one flow step, in place: direction, one ascent step, clip to [low, high].

    Adam (b1 .9, b2 .999, eps 1e-8; ``step`` counts from 1) writes its moments [B, N, A], float32, zero before the first
    step: m <- b1 m + (1 - b1) phi, v <- b2 v + (1 - b2) phi^2, x <- x + step_size m_hat / (sqrt(v_hat) + eps).
    "ascent" is x <- x + step_size phi and takes ``None`` for the moments. The rest is as in ``svgd_direction``.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    _check(particles, score, temperature)
    launch.check_writable("particles", particles)
    if optimizer not in ("adam", "ascent"):
        raise ValueError(f"optimizer is {optimizer!r}, expected 'adam' or 'ascent'")
    if optimizer == "ascent":
        first_moment = second_moment = None
    else:
        if step < 1:
            raise ValueError(f"step is {step}, expected an integer >= 1: the first step is 1")
        for name, moment in (("first_moment", first_moment), ("second_moment", second_moment)):
            if moment is None:
                raise ValueError(f"{name} is None, expected a float32 tensor: optimizer='adam'")
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
        float(low),
        float(high),
    )
