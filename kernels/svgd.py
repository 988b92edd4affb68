"""Stein variational direction and particle step of given scores: a flow step whose gradients are one member's.

The formulas are those at the top of ``formulas``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import launch
from .arguments import Flow, Particles, Shape, Step
from .flow_step import flow_functions, flow_step, median_scratch
from .formulas import particle_kernel, particle_optimizer

# --- registered ops --------------------------------------------------------------------------------------------------


def _launch(
    part: str,
    particles: Particles,
    score: Tensor,
    step: Step,
    bandwidth_gradient: bool,
    repulsion: bool,
    kernel: str,
    optimizer: str,
) -> None:
    x = particles.old
    launch.check_device("particles", x)
    batch, n, width = x.shape
    moments = part == "move" and particle_optimizer(optimizer).moments
    flow_step(
        Flow(part, False, bandwidth_gradient and repulsion, repulsion, moments),
        Shape(batch * n, n, width, 1, 1, 1),
        flow_functions(kernel, optimizer),
        step._replace(log_n1=math.log(n + 1.0)),
        particles._replace(scratch=median_scratch(batch, n, x.device)),
        q=x,
        grad=score.contiguous(),
    )


@torch.library.custom_op("vgf_fast::svgd_direction", mutates_args=())
def _svgd_direction(
    particles: Tensor, score: Tensor, temperature: float, bandwidth_gradient: bool, repulsion: bool, kernel: str
) -> Tensor:
    phi = torch.empty(particles.shape, dtype=torch.float32, device=particles.device)
    given = Particles(particles.contiguous(), phi, phi, phi, None)
    step = Step(inverse_temperature=1.0 / temperature)
    _launch("direction", given, score, step, bandwidth_gradient, repulsion, kernel, "ascent")
    return phi


_svgd_direction.register_fake(lambda particles, *_: particles.new_empty(particles.shape, dtype=torch.float32))


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
    m_correction, v_correction = particle_optimizer(optimizer).corrections(step)
    written = (particles, first_moment, second_moment)
    x, m, v = (None if tensor is None else tensor.contiguous() for tensor in written)
    numbers = Step(float(step), 0.0, 1.0 / temperature, step_size / m_correction, v_correction, low, high)
    _launch("move", Particles(x, x, m, v, None), score, numbers, bandwidth_gradient, repulsion, kernel, optimizer)
    for tensor, moved in zip(written, (x, m, v), strict=True):
        if tensor is not None and moved is not None and moved is not tensor:
            tensor.copy_(moved)


_svgd_step_.register_fake(lambda *_: None)


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
