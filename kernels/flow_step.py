"""One step of the value gradient flow in one kernel, a program a state.

    score_i = grad_a of mean_e q_e, or of the smallest q_e, particle by particle (the first of equals)
    x <- clip(x + step of the optimiser along phi(x, score)),  phi of ``formulas``
    after the last step: the choice of a particle or the TD target, of ``selection``

The kernel takes what the critic's passes leave, every member's values and action gradients, and aggregates the members;
distances, median, direction, optimiser and clip follow, or at the end of a flow what is made of the values. All of it
is local to a state, so nothing is waited for inside. One warp suffices for the pairs of a state's particles; the eight
that its rows of a layer would take leave room for one state a processor, and cost more than the launch they save.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import launch
from .arguments import Choice, Flow, Particles, Shape, Step, tensor_of
from .formulas import (
    COUNTED,
    ParticleKernel,
    bandwidth_term,
    direction,
    particle_kernel,
    particle_optimizer,
    particle_weights,
    squared_distances,
)
from .product import release, wait
from .selection import aggregate_members, choose, reduce_particles

# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def gradient_rows(
    q_ptr: tl.tensor,  # float32, to the state's values by the first member; read if MINIMUM
    row: tl.tensor,  # [BLOCK_N] int32, each particle's
    shape: Shape,
    RP: tl.constexpr,
    MINIMUM: tl.constexpr,
) -> tl.tensor:
    """Offsets [BLOCK_N] of each particle's gradient by the first member, or if MINIMUM by that of smallest value."""
    best = row * RP
    if MINIMUM:
        best = best.to(tl.int64)
        rows = tl.full([], shape.rows, tl.int64)
        smallest = tl.load(q_ptr + row)
        for e in range(1, shape.members):
            place = rows * e + row
            q = tl.load(q_ptr + place)
            # The first of equals.
            best = tl.where(q < smallest, place * RP, best)
            smallest = tl.minimum(smallest, q)
    return best


@triton.jit
def score_of(
    grad_ptr: tl.tensor,  # to the state's gradients by the first member
    grad_offs: tl.tensor,  # [BLOCK_N] of ``gradient_rows``
    offs_c: tl.tensor,  # [BLOCK_C] columns
    shape: Shape,
    RP: tl.constexpr,
    MINIMUM: tl.constexpr,
) -> tl.tensor:
    """Some columns of the score [BLOCK_N, BLOCK_C]."""
    ptrs = grad_ptr + (grad_offs[:, None] + offs_c[None, :])
    score = tl.load(ptrs).to(tl.float32)
    if not MINIMUM:
        stride = tl.full([], shape.rows, tl.int64) * RP
        for _ in range(1, shape.members):
            ptrs += stride
            score += tl.load(ptrs)
        score = score / tensor_of(shape.members).to(tl.float32)
    return score


@triton.jit
def end(
    particles: Particles,
    q_ptr: tl.tensor,
    choice: Choice,
    state: tl.tensor,
    shape: Shape,
    step: Step,
    FLOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The state's chosen particle, or its TD target, from all members' values."""
    SELECTION: tl.constexpr = FLOW.SELECTION
    N = tensor_of(shape.particles)
    A = shape.action_dim
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    q_ptrs = q_ptr + state * N + offs_n
    q = aggregate_members(q_ptrs, shape.rows, offs_n < N, tensor_of(shape.members), FLOW.MINIMUM, "")  # [1, BLOCK_N]
    state = state + tl.arange(0, 1)  # [1]
    if FLOW.PART == "td":
        reward = tl.load(choice.rewards + state * step.stride_rewards).to(tl.float32)
        keep = tl.load(choice.masks + state * step.stride_masks).to(tl.float32)
        value = reduce_particles(q, N, FLOW.LARGEST, BLOCK_N)
        tl.store(choice.result + state, reward + step.discount * keep * value)
    else:
        uniform = tl.zeros([1], tl.float32)
        if SELECTION != "max":
            uniform = tl.load(choice.uniform + state)
        index = choose(q, uniform, N, step.inverse_choice_temperature, SELECTION, BLOCK_N)  # [1]
        tl.store(choice.index + state, index.to(tl.int64))
        for first in range(0, A, 16):
            offs_c = first + tl.arange(0, 16)[None, :]
            x = tl.load(particles.old + (state * N + index)[:, None] * A + offs_c, mask=offs_c < A, other=0.0)
            tl.store(choice.result + state[:, None] * A + offs_c, x, mask=offs_c < A)


# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def flow_step_kernel(
    grad_ptr: tl.tensor,  # [E, B * N, RP], every member's action gradient; but for PART "select" and "td"
    q_ptr: tl.tensor,  # [E, B * N] float32, every member's values
    particles: Particles,
    choice: Choice,
    shape: Shape,
    step: Step,
    kernel: ParticleKernel,
    OPTIMIZER: tl.constexpr,
    RP: tl.constexpr,
    FLOW: tl.constexpr,
    PAIRS: tl.constexpr,  # a ``launch.SvgdLaunch``
    PDL: tl.constexpr,
) -> None:
    """Part ``FLOW.PART`` of the module's docstring for state ``program_id(0)``."""
    BLOCK_N: tl.constexpr = PAIRS.block_n
    BLOCK_C: tl.constexpr = PAIRS.block_c
    state = tl.program_id(0).to(tl.int64)
    if FLOW.PART == "select" or FLOW.PART == "td":
        wait(PDL)
        release(PDL)
        end(particles, q_ptr, choice, state, shape, step, FLOW, BLOCK_N)
    else:
        N = tensor_of(shape.particles)
        A = tensor_of(shape.action_dim)
        offs_n = tl.arange(0, BLOCK_N)
        # Padding reads the last particle or column again: it is not stored, and its kernel entries are zero.
        safe_n = tl.minimum(offs_n, N - 1)
        if FLOW.PART != "score":
            # Particles are older than the kernel before this one: distances and their median need not wait for it.
            distances = squared_distances(
                particles.old + state * N * A, safe_n * A, 1, N, A, BLOCK_N, PAIRS.unroll, PAIRS.paired
            )
            scratch_ptr = particles.scratch
            if scratch_ptr is not None:
                scratch_ptr += state * (BLOCK_N * BLOCK_N)
            weights, gamma, factor, row_a, column_a, row_b, column_b = particle_weights(
                distances, scratch_ptr, N, step.log_n1, kernel, BLOCK_N, FLOW.BANDWIDTH_GRADIENT
            )
        wait(PDL)
        release(PDL)
        grad_ptr += state * N * RP
        grad_offs = gradient_rows(q_ptr + state * N, safe_n, shape, RP, FLOW.MINIMUM)
        if FLOW.PART == "score":
            for first in range(0, A, BLOCK_C):
                offs_c = first + tl.arange(0, BLOCK_C)
                score = score_of(grad_ptr, grad_offs, tl.minimum(offs_c, A - 1), shape, RP, FLOW.MINIMUM)
                score_ptrs = particles.new + state * N * A + (offs_n[:, None] * A + offs_c[None, :])
                tl.store(score_ptrs, score, mask=(offs_n < N)[:, None] & (offs_c < A)[None, :])
        else:
            place = state * N * A
            in_n = offs_n < N
            offs_x = safe_n * A
            old_ptr = particles.old + place
            for first in range(0, A, BLOCK_C):
                offs_c = first + tl.arange(0, BLOCK_C)
                safe_c = tl.minimum(offs_c, A - 1)
                safe = offs_x[:, None] + safe_c[None, :]
                is_real = in_n[:, None] & (offs_c < A)[None, :]
                x = tl.load(old_ptr + safe).to(tl.float32)  # [BLOCK_N, BLOCK_C]
                score = score_of(grad_ptr, grad_offs, safe_c, shape, RP, FLOW.MINIMUM)
                phi = direction(
                    weights, gamma, x, score, step.inverse_temperature, kernel, FLOW.REPULSION, PAIRS.paired
                )
                if FLOW.BANDWIDTH_GRADIENT:
                    phi += bandwidth_term(x, old_ptr + column_a * A, safe_c, row_a, factor, BLOCK_N)
                    phi += bandwidth_term(x, old_ptr + column_b * A, safe_c, row_b, factor, BLOCK_N)
                phi = phi / N.to(tl.float32)
                offs = offs_n[:, None] * A + offs_c[None, :]
                if FLOW.PART == "direction":
                    tl.store(particles.new + place + offs, phi, mask=is_real)
                else:
                    m = phi
                    v = phi
                    if FLOW.MOMENTS:
                        # Zero before the first step, and not read there.
                        has_moments = (offs_n < tl.where(step.number > 1.0, N, 0))[:, None] & (offs_c < A)[None, :]
                        m = tl.load(particles.first_moment + place + offs, mask=has_moments, other=0.0)
                        v = tl.load(particles.second_moment + place + offs, mask=has_moments, other=0.0)
                    m, v, change = OPTIMIZER(phi, m, v, step.v_correction)
                    if FLOW.MOMENTS:
                        tl.store(particles.first_moment + place + offs, m, mask=is_real)
                        tl.store(particles.second_moment + place + offs, v, mask=is_real)
                    x = tl.clamp(x + step.step_size * change, step.low, step.high, propagate_nan=tl.PropagateNan.ALL)
                    # Every thread has read these columns of every particle before any is overwritten.
                    tl.debug_barrier()
                    tl.store(particles.new + place + offs, x, mask=is_real)


# --- launcher --------------------------------------------------------------------------------------------------------


class FlowFunctions(NamedTuple):
    """Device functions of a flow step, as their tables name them."""

    kernel: ParticleKernel
    optimizer: JITFunction


def flow_functions(kernel: str, optimizer: str) -> FlowFunctions:
    """The functions of these names. Raises ``ValueError`` naming the known ones for another."""
    return FlowFunctions(particle_kernel(kernel), particle_optimizer(optimizer).step)


def median_scratch(batch: int, particles: int, device: torch.device) -> Tensor | None:
    """``Particles.scratch``, where the median is found by counting."""
    block_n = launch.svgd(particles, launch.amd()).block_n
    return torch.empty((batch, block_n**2), dtype=torch.int32, device=device) if block_n <= COUNTED else None


def flow_step(
    flow: Flow,
    shape: Shape,
    functions: FlowFunctions,
    step: Step,
    particles: Particles,
    *,
    q: Tensor,
    grad: Tensor | None = None,
    choice: Choice | None = None,
    pdl: bool = False,
) -> None:
    """One launch for all B states: values q [E, B * N], gradients grad [E, B * N, RP]; ``flow`` says what is done."""
    if shape.rows == 0:
        return
    pairs = launch.svgd(shape.particles, launch.amd())
    with launch.on_device(q):
        flow_step_kernel[(shape.rows // shape.particles,)](
            q if grad is None else grad,
            q,
            particles,
            Choice(q, q, q, q, q) if choice is None else choice,
            shape,
            step,
            *functions,
            0 if grad is None else grad.shape[2],
            flow,
            pairs,
            pdl,
            **launch.options(pairs.num_warps, 1, pdl),
        )
