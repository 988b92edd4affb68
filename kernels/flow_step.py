"""Flow step: critic forward and backward, particle update and selection, one launch a step.

    launch 0:      score of x_0
    launch l:      combine the members' gradients, x_l = step(x_{l-1}), score of x_l
    launch L:      the same, but only the values of x_L; then the choice of a particle or the TD target

One program a block of whole states and a member. Every member's program keeps its own copy of its states' particles and
moments and updates it itself, from what all members' programs left in the launch before: nothing is waited for inside a
launch, and nobody writes what another reads. The choice needs all members' values: a block's last program makes it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, ranges
from .critic import check_critic, check_rows, plan, state_share
from .mlp import critic_block
from .packing import PackedMLP
from .particle_block import move_particles
from .selection import aggregate_members, choose, reduce_particles
from .svgd import BETA1, BETA2

# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "N", "A", "E", "D", "STATES", "step"])
def flow_step_kernel(
    start_ptr: tl.tensor,  # [B, N, A] initial particles, any strides; read if FIRST
    x_ptr: tl.tensor,  # [E, B, N, A] float32, every member's copy of the particles, written
    m_ptr: tl.tensor,  # [E, B, N, A] float32 first moments, written if ADAM
    v_ptr: tl.tensor,  # [E, B, N, A] float32 second moments, written if ADAM
    trajectory_ptr: tl.tensor,  # [B, N, A] float32 copy of the new particles, written if TRAJECTORY
    old_q_ptr: tl.tensor,  # [E, B, N] float32 left by the launch before
    old_g_ptr: tl.tensor,  # [E, B, N, A] float32 left by the launch before
    q_ptr: tl.tensor,  # [E, B, N] float32, written
    g_ptr: tl.tensor,  # [E, B, N, A] float32, written if CRITIC is "score"
    share_ptr: tl.tensor,  # [E, B, HP] float32
    action_ptr: tl.tensor,  # [E, RP, HP]
    hidden_ptr: tl.tensor,  # [E, D - 1, HP, HP]
    head_ptr: tl.tensor,  # [E, HP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32
    head_bias_ptr: tl.tensor,  # [E] float32
    widths_ptr: tl.tensor,  # [D] int32
    scratch_ptr: tl.tensor,  # [E, blocks, slots, BLOCK_M, HP] of the weights' dtype
    counter_ptr: tl.tensor,  # [blocks] int32, zero; with an EPILOGUE the members that are done
    uniform_ptr: tl.tensor,  # [B] float32; EPILOGUE "select" unless SELECTION is "max"
    reward_ptr: tl.tensor,  # [B] any stride, EPILOGUE "td"
    mask_ptr: tl.tensor,  # [B] any stride, EPILOGUE "td"
    out_ptr: tl.tensor,  # [B, A] actions or [B] TD targets, float32, written by the EPILOGUE
    index_ptr: tl.tensor,  # [B] int64 chosen particles, EPILOGUE "select"
    stride_xb: tl.tensor,
    stride_xn: tl.tensor,
    stride_xa: tl.tensor,
    stride_reward: tl.tensor,
    stride_mask: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    E: tl.tensor,
    D: tl.tensor,
    STATES: tl.tensor,  # whole states a block
    step: tl.tensor,  # of the update, counted from 1
    log_n1: tl.tensor,
    inverse_temperature: tl.tensor,
    step_size: tl.tensor,
    v_correction: tl.tensor,
    discount: tl.tensor,
    selection_inverse_temperature: tl.tensor,
    FIRST: tl.constexpr,  # take the initial particles instead of an update
    CRITIC: tl.constexpr,  # "score", "values", or "none": only the update
    TRAJECTORY: tl.constexpr,
    EPILOGUE: tl.constexpr,  # "none", "select" or "td"
    SELECTION: tl.constexpr,  # "max", "softmax" or "random"
    VALUE_MINIMUM: tl.constexpr,  # aggregate members by their minimum for the epilogue
    LARGEST: tl.constexpr,  # TD target of the largest particle's value instead of the mean
    MINIMUM: tl.constexpr,  # aggregate members by their minimum for the score
    BANDWIDTH_GRADIENT: tl.constexpr,
    REPULSION: tl.constexpr,
    ADAM: tl.constexpr,
    HP: tl.constexpr,
    RP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_P: tl.constexpr,  # particles of a state, padded
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One launch of the module's docstring for the states of block ``program_id(0)`` and member ``program_id(1)``."""
    block = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1).to(tl.int64)
    first_state = block * STATES
    states = tl.minimum(STATES, B - first_state).to(tl.int32)
    rows = states * N
    first_row = first_state * N
    total_rows = B.to(tl.int64) * N
    own_x_ptr = x_ptr + (member * total_rows + first_row) * A
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RP)
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, rows - 1)
    offs_s = safe_m // N  # [BLOCK_M] each row's state
    in_a = tl.broadcast_to((offs_r < A)[None, :], [BLOCK_M, RP])
    is_real = (offs_m < rows)[:, None] & in_a
    if FIRST:
        start_rows = start_ptr + ((first_state + offs_s) * stride_xb + (safe_m % N).to(tl.int64) * stride_xn)
        x = tl.load(start_rows[:, None] + offs_r.to(tl.int64)[None, :] * stride_xa, mask=in_a, other=0.0)
        x = x.to(tl.float32)  # [BLOCK_M, RP]
        tl.store(own_x_ptr + (offs_m[:, None] * A + offs_r[None, :]), x, mask=is_real)
    else:
        move_particles(
            own_x_ptr,
            m_ptr + (member * total_rows + first_row) * A,
            v_ptr + (member * total_rows + first_row) * A,
            old_q_ptr + first_row,
            old_g_ptr + first_row * A,
            total_rows,
            total_rows * A,
            states,
            N,
            A,
            E,
            log_n1,
            inverse_temperature,
            step_size,
            v_correction,
            step,
            MINIMUM,
            BANDWIDTH_GRADIENT,
            REPULSION,
            ADAM,
            BLOCK_S,
            BLOCK_P,
        )
        x = tl.load(own_x_ptr + (safe_m[:, None] * A + offs_r[None, :]), mask=in_a, other=0.0)
    if TRAJECTORY:
        trajectory_rows = trajectory_ptr + first_row * A
        if member == 0:
            tl.store(trajectory_rows + (offs_m[:, None] * A + offs_r[None, :]), x, mask=is_real)
    if CRITIC != "none":
        slots = 3
        if CRITIC == "score":
            slots = 2 + D
        grad = critic_block(
            x.to(action_ptr.dtype.element_ty),
            share_ptr + (member * B + first_state) * HP,
            offs_s,
            action_ptr + member * RP * HP,
            hidden_ptr + member * (D - 1) * HP * HP,
            head_ptr + member * HP,
            vector_ptr + member * D * 3 * HP,
            head_bias_ptr + member,
            widths_ptr,
            scratch_ptr + (member * tl.num_programs(0) + block) * slots * BLOCK_M * HP,
            q_ptr + member * total_rows + first_row,
            rows,
            D,
            HP,
            RP,
            LAYER_NORM,
            ACTIVATION,
            CRITIC == "score",
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ROWS,
            PRECISION,
        )
        if CRITIC == "score":
            g_rows = g_ptr + (member * total_rows + first_row) * A
            tl.store(g_rows + (offs_m[:, None] * A + offs_r[None, :]), grad, mask=is_real)
    if EPILOGUE != "none":
        # All threads' values are stored before one of them counts this member as done.
        tl.debug_barrier()
        done = tl.atomic_add(counter_ptr + block, 1, sem="acq_rel")
        if done == E - 1:
            tl.debug_barrier()
            offs_b = tl.arange(0, BLOCK_S)
            offs_p = tl.arange(0, BLOCK_P)
            in_b = offs_b < states
            is_value = in_b[:, None] & (offs_p < N)[None, :]
            q_ptrs = q_ptr + first_row + (offs_b[:, None] * N + offs_p[None, :])
            q = aggregate_members(q_ptrs, total_rows, is_value, E, VALUE_MINIMUM, ".cg")  # [BLOCK_S, BLOCK_P]
            state = first_state + offs_b
            if EPILOGUE == "td":
                reward = tl.load(reward_ptr + state * stride_reward, mask=in_b, other=0.0).to(tl.float32)
                keep = tl.load(mask_ptr + state * stride_mask, mask=in_b, other=0.0).to(tl.float32)
                value = reduce_particles(q, N, LARGEST, BLOCK_P)
                tl.store(out_ptr + state, reward + discount * keep * value, mask=in_b)
            else:
                uniform = tl.zeros([BLOCK_S], tl.float32)
                if SELECTION != "max":
                    uniform = tl.load(uniform_ptr + state, mask=in_b, other=0.0)
                index = choose(q, uniform, N, selection_inverse_temperature, SELECTION, BLOCK_P)  # [BLOCK_S]
                tl.store(index_ptr + state, index.to(tl.int64), mask=in_b)
                chosen = own_x_ptr + tl.minimum(offs_b, states - 1) * N * A + index * A
                in_action = in_b[:, None] & (offs_r < A)[None, :]
                action = tl.load(chosen[:, None] + offs_r[None, :], mask=in_action)  # [BLOCK_S, RP]
                tl.store(out_ptr + (state[:, None] * A + offs_r[None, :]), action, mask=in_action)


# --- launcher --------------------------------------------------------------------------------------------------------


class Select(NamedTuple):
    """Last act of a flow: choose a particle by the aggregated value."""

    mode: str = "max"  # "max", "softmax" or "random"
    temperature: float = 1.0
    uniform: Tensor | None = None  # [B] float32, for "softmax" and "random"
    q_aggregation: str = "min"


class TDTarget(NamedTuple):
    """Last act of a flow: the TD target of the values of the last particles."""

    rewards: Tensor  # [B]
    masks: Tensor  # [B]
    discount: float
    q_aggregation: str = "min"
    reduce: str = "mean"


class FlowOutput(NamedTuple):
    """What ``value_gradient_flow`` returns, all float32."""

    particles: Tensor  # [B, N, A]
    q: Tensor | None  # [E, B, N] of the last particles, by the critic or the one asked for
    trajectory: Tensor | None  # [L + 1, B, N, A]
    chosen: Tensor | None  # [B, A] actions of ``Select``, or [B] targets of ``TDTarget``
    chosen_index: Tensor | None  # [B] int64, of ``Select``


def _check_epilogue(epilogue: Select | TDTarget, batch: int, device: torch.device) -> None:
    """Raise ``ValueError`` naming what is wrong of it, for ``batch`` states on a device."""
    launch.check_choice("epilogue.q_aggregation", epilogue.q_aggregation, launch.AGGREGATIONS)
    if isinstance(epilogue, TDTarget):
        launch.check_choice("epilogue.reduce", epilogue.reduce, launch.REDUCTIONS)
        for name, tensor in (("rewards", epilogue.rewards), ("masks", epilogue.masks)):
            launch.check_shape(name, tensor, (batch,), "one number a state")
            launch.check_dtype(name, tensor, launch.SIGNAL_DTYPES)
            launch.check_same_device(name, tensor, "particles", device)
        return
    launch.check_choice("epilogue.mode", epilogue.mode, launch.SELECTIONS)
    launch.check_positive("epilogue.temperature", epilogue.temperature)
    if epilogue.mode != "max":
        if epilogue.uniform is None:
            raise ValueError(f"uniform is None, expected one number a state: mode={epilogue.mode!r}")
        launch.check_shape("uniform", epilogue.uniform, (batch,), "one number a state")
        launch.check_dtype("uniform", epilogue.uniform, (torch.float32,))
        launch.check_same_device("uniform", epilogue.uniform, "particles", device)


def value_gradient_flow(
    mlp: PackedMLP,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    return_trajectory: bool = False,
    evaluate: bool = True,
    *,
    evaluator: PackedMLP | None = None,
    epilogue: Select | TDTarget | None = None,
    precision: str | None = None,
    config: launch.BlockLaunch | None = None,
) -> FlowOutput:
    """Move particles [B, N, A] of observations [B, O] ``steps`` times by the critic: L + 1 launches and the share's.

    ``evaluator`` is the critic whose values of the last particles are returned, and go into ``epilogue``: of the same
    sizes as ``mlp``, its default. Particles and moments are float32.
    Raises ``ValueError`` naming the argument that is wrong.
    """
    check_critic(mlp)
    check_rows(mlp, observations, particles, "particles")
    if evaluator is not None:
        check_critic(evaluator, "evaluator")
        for ours, theirs in zip(mlp[:8], evaluator[:8], strict=True):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype or ours.device != theirs.device:
                raise ValueError(
                    f"evaluator has weights of shape {tuple(theirs.shape)} and dtype {theirs.dtype} where mlp has "
                    f"{tuple(ours.shape)} and {ours.dtype}, expected the same"
                )
    launch.check_choice("q_aggregation", q_aggregation, launch.AGGREGATIONS)
    launch.check_choice("optimizer", optimizer, launch.OPTIMIZERS)
    launch.check_positive("temperature", temperature)
    steps = launch.check_integer("steps", steps, 0)
    batch, n, width = particles.shape
    members, device = mlp.members, particles.device
    if epilogue is not None:
        _check_epilogue(epilogue, batch, device)
    precision = precision or launch.precision(mlp.dtype)
    evaluate = evaluate or epilogue is not None
    evaluator = evaluator or mlp
    new = torch.empty if batch else torch.zeros
    copies = new((members, batch, n, width), dtype=torch.float32, device=device)
    trajectory = new((steps + 1, batch, n, width), dtype=torch.float32, device=device) if return_trajectory else None
    values = new((2, members, batch, n), dtype=torch.float32, device=device)
    chosen = index = None
    if isinstance(epilogue, Select):
        chosen = torch.empty((batch, width), dtype=torch.float32, device=device)
        index = torch.empty((batch,), dtype=torch.int64, device=device)
    elif epilogue is not None:
        chosen = torch.empty((batch,), dtype=torch.float32, device=device)
    last = steps % 2
    result = FlowOutput(copies[0], values[last] if evaluate else None, trajectory, chosen, index)
    if batch == 0:
        return result
    cut = plan(mlp, batch, n, config)
    counter = torch.empty((cut.blocks,), dtype=torch.int32, device=device)
    shares = {}
    if steps > 0:
        shares["score"] = state_share(mlp, observations, precision, counter)
    if evaluate:
        same = evaluator is mlp and steps > 0
        shares["values"] = shares["score"] if same else state_share(evaluator, observations, precision, counter)
    gradients = torch.empty((2, *copies.shape) if steps else (2, 1), dtype=torch.float32, device=device)
    adam = optimizer == "adam"
    moments = torch.empty((2, *copies.shape) if adam and steps else (2, 1), dtype=torch.float32, device=device)
    scratch = cut.scratch(mlp, backward=steps > 0)
    unused = copies
    with launch.on_device(particles):
        for step in range(steps + 1):
            critic = "score" if step < steps else "values" if evaluate else "none"
            if critic == "none" and step == 0:
                copies[0].copy_(particles)
                if trajectory is not None:
                    trajectory[0].copy_(particles)
                continue
            weights = mlp if critic != "values" else evaluator
            now, before = step % 2, (step + 1) % 2
            # Only the last launch ends in a choice: all others are one kernel, whatever follows.
            ending = epilogue if step == steps else None
            select = ending if isinstance(ending, Select) else Select()
            td = ending if isinstance(ending, TDTarget) else None
            with ranges.span(f"vgf/flow_step/{step}" if step < steps else "vgf/values"):
                flow_step_kernel[(cut.blocks, members if critic != "none" else 1)](
                    particles,
                    copies,
                    moments[0],
                    moments[1],
                    unused if trajectory is None else trajectory[step],
                    values[before],
                    gradients[before],
                    values[now],
                    gradients[now],
                    shares.get(critic, unused),
                    weights.action,
                    weights.hidden,
                    weights.head,
                    weights.vectors,
                    weights.head_bias,
                    weights.widths,
                    scratch,
                    counter,
                    unused if select.uniform is None else select.uniform.contiguous(),
                    unused if td is None else td.rewards,
                    unused if td is None else td.masks,
                    unused if chosen is None or ending is None else chosen,
                    counter if index is None or ending is None else index,
                    *particles.stride(),
                    0 if td is None else td.rewards.stride(0),
                    0 if td is None else td.masks.stride(0),
                    B=batch,
                    N=n,
                    A=width,
                    E=members,
                    D=mlp.depth,
                    STATES=cut.states,
                    step=step,
                    log_n1=math.log(n + 1.0),
                    inverse_temperature=1.0 / temperature,
                    step_size=step_size / (1.0 - BETA1.value ** max(step, 1)) if adam else step_size,
                    v_correction=1.0 - BETA2.value ** max(step, 1),
                    discount=0.0 if td is None else float(td.discount),
                    selection_inverse_temperature=1.0 / select.temperature,
                    FIRST=step == 0,
                    CRITIC=critic,
                    TRAJECTORY=trajectory is not None,
                    EPILOGUE="none" if ending is None else "select" if td is None else "td",
                    SELECTION=select.mode,
                    VALUE_MINIMUM=(select.q_aggregation if td is None else td.q_aggregation) == "min",
                    LARGEST=td is not None and td.reduce == "max",
                    MINIMUM=q_aggregation == "min",
                    BANDWIDTH_GRADIENT=bandwidth_gradient and repulsion,
                    REPULSION=repulsion,
                    ADAM=adam,
                    HP=mlp.padded_width,
                    RP=mlp.action.shape[1],
                    LAYER_NORM=mlp.layer_norm,
                    ACTIVATION=mlp.activation,
                    BLOCK_S=launch.padded(cut.states),
                    BLOCK_P=launch.padded(n),
                    PRECISION=precision,
                    **cut.config.options(),
                )
    return result
