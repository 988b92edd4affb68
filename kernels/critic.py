"""Ensemble critic: every member's value, and the gradient of the aggregated value with respect to the action only.

    share_e(s) = W_e^s s + b_e                                  once a state
    z_1 = share + W_e^a a,  h_i = act(LN(z_i)),  z_{i+1} = W h_i + b,  q_e = w . h_D + b
    score = grad_a of mean_e q_e, or of the smallest q_e, action by action (the first of equals)

One program a block of whole states and a member; nothing but q and the members' gradients leaves it but its scratch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, ranges
from .mlp import critic_block
from .packing import PackedMLP

# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "OBSERVATION", "C"])
def state_share_kernel(
    s_ptr: tl.tensor,  # [B, O] observations, any strides
    w_ptr: tl.tensor,  # [E, SP, HP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32, whose first row is the first layer's bias
    share_ptr: tl.tensor,  # [E, B, HP] float32, written
    counter_ptr: tl.tensor,  # [C] int32 with C <= B, zeroed
    stride_sb: tl.tensor,
    stride_so: tl.tensor,
    stride_we: tl.tensor,
    stride_ve: tl.tensor,
    B: tl.tensor,
    OBSERVATION: tl.tensor,  # O
    SP: tl.tensor,
    C: tl.tensor,
    HP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """W^s s + b of BLOCK_M states and BLOCK_N columns of a member: programs (states, columns, member)."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.program_id(2).to(tl.int64)
    in_b = offs_b < B
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + member * stride_we + (offs_k[:, None] * HP + offs_n[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, SP, BLOCK_K):
        offs_o = first + offs_k
        s_ptrs = s_ptr + (offs_b[:, None] * stride_sb + offs_o.to(tl.int64)[None, :] * stride_so)
        s = tl.load(s_ptrs, mask=in_b[:, None] & (offs_o < OBSERVATION)[None, :], other=0.0).to(w_ptr.dtype.element_ty)
        total = tl.dot(s, tl.load(w_ptrs), total, input_precision=PRECISION)
        w_ptrs += BLOCK_K * HP
    total += tl.load(vector_ptr + member * stride_ve + offs_n)[None, :]
    if (tl.program_id(1) == 0) & (member == 0):
        tl.store(counter_ptr + offs_b, 0, mask=offs_b < C)
    tl.store(share_ptr + (member * B + offs_b)[:, None] * HP + offs_n[None, :], total, mask=in_b[:, None])


@triton.jit(do_not_specialize=["B", "N", "A", "D", "STATES"])
def critic_kernel(
    x_ptr: tl.tensor,  # [B, N, A] actions, any strides
    share_ptr: tl.tensor,  # [E, B, HP] float32
    action_ptr: tl.tensor,  # [E, RP, HP]
    hidden_ptr: tl.tensor,  # [E, D - 1, HP, HP]
    head_ptr: tl.tensor,  # [E, HP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32
    head_bias_ptr: tl.tensor,  # [E] float32
    widths_ptr: tl.tensor,  # [D] int32
    scratch_ptr: tl.tensor,  # [E, blocks, 2 + D or 3, BLOCK_M, HP] of the weights' dtype
    q_ptr: tl.tensor,  # [E, B, N] float32, written
    g_ptr: tl.tensor,  # [E, B, N, A] float32, written if BACKWARD: the gradient of each member's value
    stride_xb: tl.tensor,
    stride_xn: tl.tensor,
    stride_xa: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    STATES: tl.tensor,  # whole states a block
    HP: tl.constexpr,
    RP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Values and action gradients of the states of block ``program_id(0)`` by member ``program_id(1)``."""
    block = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1).to(tl.int64)
    first_state = block * STATES
    rows = tl.minimum(STATES, B - first_state).to(tl.int32) * N
    offs_m = tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RP)
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, rows - 1)
    offs_s = safe_m // N  # [BLOCK_M]
    x_rows = x_ptr + ((first_state + offs_s) * stride_xb + (safe_m % N).to(tl.int64) * stride_xn)
    x = tl.load(
        x_rows[:, None] + offs_r.to(tl.int64)[None, :] * stride_xa,
        mask=(offs_m < rows)[:, None] & (offs_r < A)[None, :],
        other=0.0,
    ).to(action_ptr.dtype.element_ty)  # [BLOCK_M, RP]
    slots = 3
    if BACKWARD:
        slots = 2 + D
    first_row = (member * B + first_state) * N
    grad = critic_block(
        x,
        share_ptr + (member * B + first_state) * HP,
        offs_s,
        action_ptr + member * RP * HP,
        hidden_ptr + member * (D - 1) * HP * HP,
        head_ptr + member * HP,
        vector_ptr + member * D * 3 * HP,
        head_bias_ptr + member,
        widths_ptr,
        scratch_ptr + (member * tl.num_programs(0) + block) * slots * BLOCK_M * HP,
        q_ptr + first_row,
        rows,
        D,
        HP,
        RP,
        LAYER_NORM,
        ACTIVATION,
        BACKWARD,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        ROWS,
        PRECISION,
    )
    if BACKWARD:
        tl.store(
            g_ptr + first_row * A + offs_m[:, None] * A + offs_r[None, :],
            grad,
            mask=(offs_m < rows)[:, None] & (offs_r < A)[None, :],
        )


@triton.jit(do_not_specialize=["E", "R", "A"])
def combine_kernel(
    q_ptr: tl.tensor,  # [E, R] float32
    g_ptr: tl.tensor,  # [E, R, A] float32
    score_ptr: tl.tensor,  # [R, A] float32, written
    E: tl.tensor,
    R: tl.tensor,
    A: tl.tensor,
    MINIMUM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The members' gradients aggregated: their mean, or that of the member with the smallest value."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = R.to(tl.int64) * A
    in_range = offs < size
    q_ptrs = q_ptr + offs // A
    g_ptrs = g_ptr + offs
    smallest = tl.load(q_ptrs, mask=in_range, other=0.0)
    score = tl.load(g_ptrs, mask=in_range, other=0.0)
    for _ in range(1, E):
        q_ptrs += R
        g_ptrs += size
        grad = tl.load(g_ptrs, mask=in_range, other=0.0)
        if MINIMUM:
            q = tl.load(q_ptrs, mask=in_range, other=0.0)
            score = tl.where(q < smallest, grad, score)
            smallest = tl.minimum(smallest, q)
        else:
            score += grad
    if not MINIMUM:
        score = tl.div_rn(score, E.to(tl.float32))
    tl.store(score_ptr + offs, score, mask=in_range)


# --- launchers -------------------------------------------------------------------------------------------------------


def check_rows(mlp: PackedMLP, observations: Tensor, rows: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless observations [B, O] and the rows called ``name``, [B, N, A], suit the network."""
    launch.check_device(name, rows)
    launch.check_shape(
        "observations", observations, (observations.shape[0], mlp.observation_dim), "states, and the network's width"
    )
    launch.check_shape(
        name, rows, (observations.shape[0], *rows.shape[1:2], mlp.action_dim), "states, particles, the network's width"
    )
    if not 1 <= rows.shape[1] <= launch.MAX_PARTICLES:
        raise ValueError(f"{name} has {rows.shape[1]} particles a state, expected 1 to {launch.MAX_PARTICLES}")
    if mlp.action_dim > launch.MAX_ACTION_DIM:
        raise ValueError(f"{name} has {mlp.action_dim} columns, expected at most {launch.MAX_ACTION_DIM}")
    if mlp.padded_width > launch.MAX_WIDTH:
        raise ValueError(
            f"the widest hidden layer takes {mlp.padded_width} columns, expected {launch.MAX_WIDTH} or less"
        )
    for key, tensor in (("observations", observations), (name, rows)):
        launch.check_dtype(key, tensor, launch.PARTICLE_DTYPES)
        launch.check_same_device(key, tensor, "the network", mlp.state.device)


def check_critic(mlp: PackedMLP, name: str = "mlp") -> None:
    """Raise ``ValueError`` for a network that is no critic: of more outputs than one, or with a time."""
    if mlp.head.shape[2] != 1:
        raise ValueError(f"{name} has {mlp.output_dim} outputs in {mlp.head.shape[2]} columns, expected a critic's one")


def state_share(mlp: PackedMLP, observations: Tensor, precision: str, counter: Tensor | None = None) -> Tensor:
    """W^s s + b of every member, bias included: observations [B, O] -> [E, B, HP] float32. One launch.

    ``counter``, int32 of at most B entries, is zeroed on the way: it saves a later kernel a launch.
    """
    batch, hp = observations.shape[0], mlp.padded_width
    share = torch.empty((mlp.members, batch, hp), dtype=torch.float32, device=observations.device)
    if batch == 0:
        return share
    config = launch.state_share(hp)
    with launch.on_device(observations), ranges.span("vgf/state_share"):
        state_share_kernel[(triton.cdiv(batch, config.block_m), hp // config.block_n, mlp.members)](
            observations,
            mlp.state,
            mlp.vectors,
            share,
            share if counter is None else counter,
            *observations.stride(),
            mlp.state.stride(0),
            mlp.vectors.stride(0),
            B=batch,
            OBSERVATION=mlp.observation_dim,
            SP=mlp.state.shape[1],
            C=0 if counter is None else len(counter),
            HP=hp,
            PRECISION=precision,
            **config.options(),
        )
    return share


class CriticLaunch(NamedTuple):
    """The arguments of a block kernel that follow from the critic and the configuration."""

    config: launch.BlockLaunch
    states: int  # whole states a block
    blocks: int

    def scratch(self, mlp: PackedMLP, backward: bool) -> Tensor:
        """Scratch for a launch of all blocks and members, of no particular content."""
        slots = 2 + mlp.depth if backward else 3
        shape = (mlp.members, self.blocks, slots, self.config.block_m, mlp.padded_width)
        return torch.empty(shape, dtype=mlp.dtype, device=mlp.state.device)


def plan(mlp: PackedMLP, batch: int, particles: int, config: launch.BlockLaunch | None = None) -> CriticLaunch:
    """How ``batch`` states of ``particles`` rows each are cut into blocks of whole states."""
    config = config or launch.rows_block(particles, mlp.padded_width, mlp.dtype)
    states = config.block_m // particles
    return CriticLaunch(config, states, triton.cdiv(batch, states))


def member_values_and_gradients(
    mlp: PackedMLP,
    observations: Tensor,
    actions: Tensor,
    backward: bool = True,
    precision: str | None = None,
    config: launch.BlockLaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Every member's value q [E, B, N] and its action gradient [E, B, N, A] (None if not ``backward``), float32.

    Raises ``ValueError`` naming the argument that is wrong.
    """
    check_critic(mlp)
    check_rows(mlp, observations, actions, "actions")
    batch, n, width = actions.shape
    precision = precision or launch.precision(mlp.dtype)
    q = torch.empty((mlp.members, batch, n), dtype=torch.float32, device=actions.device)
    g = torch.empty((mlp.members, batch, n, width), dtype=torch.float32, device=actions.device) if backward else None
    if batch == 0:
        return q, g
    cut = plan(mlp, batch, n, config)
    share = state_share(mlp, observations, precision)
    with launch.on_device(actions):
        critic_kernel[(cut.blocks, mlp.members)](
            actions,
            share,
            mlp.action,
            mlp.hidden,
            mlp.head,
            mlp.vectors,
            mlp.head_bias,
            mlp.widths,
            cut.scratch(mlp, backward),
            q,
            q if g is None else g,
            *actions.stride(),
            B=batch,
            N=n,
            A=width,
            D=mlp.depth,
            STATES=cut.states,
            HP=mlp.padded_width,
            RP=mlp.action.shape[1],
            LAYER_NORM=mlp.layer_norm,
            ACTIVATION=mlp.activation,
            BACKWARD=backward,
            PRECISION=precision,
            **cut.config.options(),
        )
    return q, g


def values_and_score(
    mlp: PackedMLP,
    observations: Tensor,
    actions: Tensor,
    q_aggregation: str = "mean",
    precision: str | None = None,
    config: launch.BlockLaunch | None = None,
) -> tuple[Tensor, Tensor]:
    """q [E, B, N] and the score [B, N, A] of the aggregated value, float32: observations [B, O], actions [B, N, A].

    ``precision`` is that of float32 products: "tf32" (the default on a GPU) or "ieee". Three launches.
    Raises ``ValueError`` naming the argument that is wrong.
    """
    launch.check_choice("q_aggregation", q_aggregation, launch.AGGREGATIONS)
    q, g = member_values_and_gradients(mlp, observations, actions, True, precision, config)
    assert g is not None
    score = torch.empty(actions.shape, dtype=torch.float32, device=actions.device)
    if score.numel() > 0:
        with launch.on_device(actions):
            combine_kernel[(triton.cdiv(score.numel(), launch.AGGREGATE_BLOCK),)](
                q,
                g,
                score,
                E=mlp.members,
                R=q[0].numel(),
                A=actions.shape[2],
                MINIMUM=q_aggregation == "min",
                BLOCK=launch.AGGREGATE_BLOCK,
                num_warps=launch.AGGREGATE_WARPS,
            )
    return q, score
