"""Reductions over members and particles: aggregated value, chosen particle, TD target. One launch each.

    Q_agg(b, n) = mean or min over members e of q[e, b, n]
    chosen n of state b: the first of the largest q; the first with cumsum(softmax(q / temperature)) > u; or floor(u N)
    y_b = r_b + discount * mask_b * (mean or max over n of Q_agg(b, n))

All arithmetic is float32. A value that is not a number stays one in what is aggregated from it, and counts as the
largest when the largest is chosen, as in PyTorch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

VALUE_DTYPES = launch.PARTICLE_DTYPES


# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def aggregate_members(
    q_ptrs: tl.tensor, stride_e: tl.tensor, mask: tl.tensor, E: tl.tensor, MINIMUM: tl.constexpr, CACHE: tl.constexpr
) -> tl.tensor:
    """Minimum or mean of E values each: ``q_ptrs`` to those of the first member, any shape; zero where masked.

    ``CACHE`` is "", or ".cg" to read values that other programs of the launch have written.
    """
    total = tl.load(q_ptrs, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
    for _ in range(1, E):
        q_ptrs += stride_e
        value = tl.load(q_ptrs, mask=mask, other=0.0, cache_modifier=CACHE).to(tl.float32)
        total = tl.minimum(total, value, propagate_nan=tl.PropagateNan.ALL) if MINIMUM else total + value
    return total if MINIMUM else tl.div_rn(total, E.to(tl.float32))


@triton.jit
def choose(
    q: tl.tensor,  # [BLOCK_B, BLOCK_N] float32
    uniform: tl.tensor,  # [BLOCK_B] float32 in [0, 1); unused by "max"
    N: tl.tensor,
    inverse_temperature: tl.tensor,
    MODE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """Index of the chosen particle of every state, int32 [BLOCK_B]; a value that is no number counts as the largest."""
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    in_n = offs_n < N
    if MODE == "random":
        index = (uniform * N.to(tl.float32)).to(tl.int32)
    else:
        q = tl.where(q == q, q, float("inf"))
        largest = tl.max(tl.where(in_n, q, float("-inf")), axis=1)[:, None]
        is_chosen = q == largest
        if MODE == "softmax":
            # The largest are exempt: infinity less infinity is not a number.
            below = tl.where(is_chosen, 0.0, q - largest)
            weight = tl.where(in_n, tl.exp(below * inverse_temperature), 0.0)
            cumulative = tl.cumsum(tl.div_rn(weight, tl.sum(weight, axis=1)[:, None]), axis=1)
            is_chosen = cumulative > uniform[:, None]
        index = tl.min(tl.where(is_chosen & in_n, offs_n, BLOCK_N), axis=1)
    # Rounding can leave the last cumulative probability at or below u, or u N at N.
    return tl.minimum(index, N - 1)


@triton.jit
def reduce_particles(q: tl.tensor, N: tl.tensor, LARGEST: tl.constexpr, BLOCK_N: tl.constexpr) -> tl.tensor:
    """Mean or largest of every state's values: q [BLOCK_B, BLOCK_N], zero in the padding, -> [BLOCK_B]."""
    if not LARGEST:
        return tl.div_rn(tl.sum(q, axis=1), N.to(tl.float32))
    in_n = (tl.arange(0, BLOCK_N) < N)[None, :]
    value = tl.max(tl.where(in_n, q, float("-inf")), axis=1)
    # The maximum passes over what is not a number; a broken critic must show in the target.
    return tl.where(tl.max((q != q).to(tl.int32), axis=1) > 0, float("nan"), value)


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["E", "B", "N"])
def aggregate_kernel(
    q_ptr: tl.tensor,  # [E, B, N], any strides
    out_ptr: tl.tensor,  # [B, N], contiguous, written
    stride_e: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    E: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Q_agg of the BLOCK entries of the flattened [B, N] that are this program's."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range = offs < B.to(tl.int64) * N
    q_ptrs = q_ptr + (offs // N) * stride_b + (offs % N) * stride_n
    tl.store(out_ptr + offs, aggregate_members(q_ptrs, stride_e, in_range, E, MINIMUM, ""), mask=in_range)


@triton.jit(do_not_specialize=["B", "N", "A"])
def select_kernel(
    x_ptr: tl.tensor,  # [B, N, A] particles, any strides
    q_ptr: tl.tensor,  # [B, N], any strides
    uniform_ptr: tl.tensor,  # [B] float32, any stride; unused by "max"
    action_ptr: tl.tensor,  # [B, A] of the particles' dtype, contiguous, written
    index_ptr: tl.tensor,  # [B] int64, contiguous, written
    strides: tl.tuple,  # of the particles, then q, then the uniform numbers
    B: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    inverse_temperature: tl.tensor,
    MODE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_A: tl.constexpr,
) -> None:
    """Index and action of the chosen particle of BLOCK_B states."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    in_b = offs_b < B
    in_n = (offs_n < N)[None, :]  # [1, BLOCK_N]
    uniform = tl.zeros([BLOCK_B], tl.float32)
    if MODE != "max":
        uniform = tl.load(uniform_ptr + offs_b * strides[5], mask=in_b, other=0.0)  # [BLOCK_B]
    q = tl.zeros([BLOCK_B, BLOCK_N], tl.float32)
    if MODE != "random":
        q_ptrs = q_ptr + (
            offs_b[:, None] * strides[3] + offs_n.to(tl.int64)[None, :] * strides[4]
        )  # [BLOCK_B, BLOCK_N]
        q = tl.load(q_ptrs, mask=in_b[:, None] & in_n, other=0.0).to(tl.float32)
    index = choose(q, uniform, N, inverse_temperature, MODE, BLOCK_N).to(tl.int64)  # [BLOCK_B]
    tl.store(index_ptr + offs_b, index, mask=in_b)
    x_rows = x_ptr + (offs_b * strides[0] + index * strides[1])
    for first in range(0, A, BLOCK_A):
        offs_a = first + tl.arange(0, BLOCK_A).to(tl.int64)
        mask = in_b[:, None] & (offs_a < A)[None, :]
        action = tl.load(x_rows[:, None] + offs_a[None, :] * strides[2], mask=mask)  # [BLOCK_B, BLOCK_A]
        tl.store(action_ptr + (offs_b[:, None] * A + offs_a[None, :]), action, mask=mask)


@triton.jit(do_not_specialize=["E", "B", "N"])
def td_target_kernel(
    q_ptr: tl.tensor,  # [E, B, N], any strides
    reward_ptr: tl.tensor,  # [B], any stride
    mask_ptr: tl.tensor,  # [B], any stride: 0 where the episode ended, else 1
    y_ptr: tl.tensor,  # [B] float32, contiguous, written
    strides: tl.tuple,  # of q, then the rewards, then the masks
    E: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    discount: tl.tensor,
    MINIMUM: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """y of BLOCK_B states."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_n = tl.arange(0, BLOCK_N)
    in_b = offs_b < B
    mask = in_b[:, None] & (offs_n < N)[None, :]
    q_ptrs = q_ptr + (offs_b[:, None] * strides[1] + offs_n.to(tl.int64)[None, :] * strides[2])  # [BLOCK_B, BLOCK_N]
    q = aggregate_members(q_ptrs, strides[0], mask, E, MINIMUM, "")
    value = reduce_particles(q, N, LARGEST, BLOCK_N)
    reward = tl.load(reward_ptr + offs_b * strides[3], mask=in_b, other=0.0).to(tl.float32)
    keep = tl.load(mask_ptr + offs_b * strides[4], mask=in_b, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_b, reward + discount * keep * value, mask=in_b)


# --- launchers and registered ops ------------------------------------------------------------------------------------


@torch.library.custom_op("vgf_fast::aggregate", mutates_args=())
def _aggregate(q: Tensor, aggregation: str) -> Tensor:
    launch.check_device("q", q)
    members, batch, n = q.shape
    out = torch.empty((batch, n), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    with launch.on_device(q):
        aggregate_kernel[(triton.cdiv(batch * n, launch.AGGREGATE_BLOCK),)](
            q,
            out,
            *q.stride(),
            E=members,
            B=batch,
            N=n,
            MINIMUM=aggregation == "min",
            BLOCK=launch.AGGREGATE_BLOCK,
            num_warps=launch.AGGREGATE_WARPS,
        )
    return out


@_aggregate.register_fake
def _(q: Tensor, aggregation: str) -> Tensor:
    return q.new_empty(q.shape[1:])


@torch.library.custom_op("vgf_fast::select_particle", mutates_args=())
def _select_particle(
    particles: Tensor, q: Tensor, mode: str, temperature: float, uniform: Tensor | None
) -> tuple[Tensor, Tensor]:
    launch.check_device("particles", particles)
    batch, n, width = particles.shape
    action = torch.empty((batch, width), dtype=particles.dtype, device=particles.device)
    index = torch.empty((batch,), dtype=torch.int64, device=particles.device)
    if batch == 0:
        return action, index
    config = launch.selection(n)
    with launch.on_device(particles):
        select_kernel[(triton.cdiv(batch, config.block_b),)](
            particles,
            q,
            q if uniform is None else uniform,
            action,
            index,
            (*particles.stride(), *q.stride(), 0 if uniform is None else uniform.stride(0)),
            B=batch,
            N=n,
            A=width,
            inverse_temperature=1.0 / temperature,
            MODE=mode,
            BLOCK_A=launch.ACTION_BLOCK,
            **launch.arguments(config),
        )
    return action, index


@_select_particle.register_fake
def _(particles: Tensor, q: Tensor, mode: str, temperature: float, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, _, width = particles.shape
    return particles.new_empty((batch, width)), particles.new_empty((batch,), dtype=torch.int64)


@torch.library.custom_op("vgf_fast::td_target", mutates_args=())
def _td_target(q: Tensor, rewards: Tensor, masks: Tensor, discount: float, aggregation: str, reduce: str) -> Tensor:
    launch.check_device("q", q)
    members, batch, n = q.shape
    y = torch.empty((batch,), dtype=torch.float32, device=q.device)
    if batch == 0:
        return y
    config = launch.selection(n)
    with launch.on_device(q):
        td_target_kernel[(triton.cdiv(batch, config.block_b),)](
            q,
            rewards,
            masks,
            y,
            (*q.stride(), rewards.stride(0), masks.stride(0)),
            E=members,
            B=batch,
            N=n,
            discount=discount,
            MINIMUM=aggregation == "min",
            LARGEST=reduce == "max",
            **launch.arguments(config),
        )
    return y


@_td_target.register_fake
def _(q: Tensor, rewards: Tensor, masks: Tensor, discount: float, aggregation: str, reduce: str) -> Tensor:
    return q.new_empty((q.shape[1],), dtype=torch.float32)


# --- public functions ------------------------------------------------------------------------------------------------


def _check_members(q: Tensor, aggregation: str) -> None:
    if q.ndim != 3 or q.shape[0] < 1 or q.shape[2] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected (E >= 1, B, N >= 1)")
    launch.check_dtype("q", q, VALUE_DTYPES)
    if aggregation not in ("mean", "min"):
        raise ValueError(f"aggregation is {aggregation!r}, expected 'mean' or 'min'")


def _check_candidates(n: int) -> None:
    if n > launch.MAX_CANDIDATES:
        raise ValueError(f"q has {n} particles a state, expected at most {launch.MAX_CANDIDATES}: the kernel's limit")


def aggregate(q: Tensor, aggregation: str = "mean") -> Tensor:
    """Mean or minimum over members: q [E, B, N] -> [B, N] of the same dtype.

    Float32, bfloat16 or float16 with any strides. Raises ``ValueError`` naming the argument that is wrong.
    """
    _check_members(q, aggregation)
    return _aggregate(q, aggregation)


def select_particle(
    particles: Tensor, q: Tensor, mode: str = "max", temperature: float = 1.0, uniform: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose one particle a state: particles [B, N, A], q [B, N] -> action [B, A], index [B] int64.

    "max" takes the first of the largest. "softmax" draws with probability proportional to exp(q / temperature), by
    inverting the cumulative sum at ``uniform`` [B], float32 in [0, 1); "random" takes floor(uniform * N). Float32,
    bfloat16 or float16 with any strides; N is 1 to 4096.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    if particles.ndim != 3 or particles.shape[1] < 1:
        raise ValueError(f"particles has shape {tuple(particles.shape)}, expected (B, N >= 1, A)")
    launch.check_shape("q", q, particles.shape[:2], "one value a particle")
    _check_candidates(q.shape[1])
    launch.check_dtype("particles", particles, launch.PARTICLE_DTYPES)
    launch.check_dtype("q", q, VALUE_DTYPES)
    launch.check_same_device("q", q, "particles", particles.device)
    if mode not in ("max", "softmax", "random"):
        raise ValueError(f"mode is {mode!r}, expected 'max', 'softmax' or 'random'")
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature!r}, expected a number > 0")
    if mode == "max":
        uniform = None
    elif uniform is None:
        raise ValueError(f"uniform is None, expected one float32 number in [0, 1) a state: mode={mode!r}")
    else:
        launch.check_shape("uniform", uniform, particles.shape[:1], "one number a state")
        launch.check_dtype("uniform", uniform, (torch.float32,))
        launch.check_same_device("uniform", uniform, "particles", particles.device)
    return _select_particle(particles, q, mode, float(temperature), uniform)


def td_target(
    q: Tensor, rewards: Tensor, masks: Tensor, discount: float, aggregation: str = "mean", reduce: str = "mean"
) -> Tensor:
    """y = rewards + discount * masks * reduce_n agg_e q: q [E, B, N], rewards [B], masks [B] -> y [B] float32.

    ``aggregation`` is "mean" or "min" over members, ``reduce`` "mean" or "max" over particles. q is float32, bfloat16
    or float16, rewards and masks any of these, float64 or bool; any strides; N is 1 to 4096.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    _check_members(q, aggregation)
    _check_candidates(q.shape[2])
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce is {reduce!r}, expected 'mean' or 'max'")
    for name, tensor in (("rewards", rewards), ("masks", masks)):
        launch.check_shape(name, tensor, q.shape[1:2], "one number a state")
        launch.check_dtype(name, tensor, launch.SIGNAL_DTYPES)
        launch.check_same_device(name, tensor, "q", q.device)
    return _td_target(q, rewards, masks, float(discount), aggregation, reduce)
