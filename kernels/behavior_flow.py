"""Behaviour flow: all Euler steps of the flow-matching sampler in one launch.

    x <- x + v(s, x, k / K) / K  for k = 0 .. K - 1,  then clip to [-1, 1]

One program a block of rows (particles of any states); particles stay in registers over all steps, activations in the
program's scratch. The noise is given, or drawn inside by Philox from a seed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .critic import check_rows, state_share
from .mlp import activate_rows, first_layer, hidden_layers, product
from .packing import PackedMLP

# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R", "N", "A", "D", "K"])
def behavior_flow_kernel(
    noise_ptr: tl.tensor,  # [R, A] any strides; with SEEDED one int64, the seed
    x_ptr: tl.tensor,  # [R, A] float32, contiguous, written
    share_ptr: tl.tensor,  # [B, HP] float32
    action_ptr: tl.tensor,  # [RP, HP]
    time_ptr: tl.tensor,  # [HP] float32
    hidden_ptr: tl.tensor,  # [D - 1, HP, HP]
    head_ptr: tl.tensor,  # [HP, RP]
    vector_ptr: tl.tensor,  # [D, 3, HP] float32
    head_bias_ptr: tl.tensor,  # [RP] float32
    widths_ptr: tl.tensor,  # [D] int32
    scratch_ptr: tl.tensor,  # [programs, 3, BLOCK_M, HP] of the weights' dtype
    stride_nr: tl.tensor,
    stride_na: tl.tensor,
    R: tl.tensor,  # B * N rows
    N: tl.tensor,
    A: tl.tensor,
    D: tl.tensor,
    K: tl.tensor,  # Euler steps
    step: tl.tensor,  # 1 / K
    HP: tl.constexpr,
    RP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SEEDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Draw the particles of rows program_id(0) * BLOCK_M and on."""
    block = tl.program_id(0).to(tl.int64)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, RP)
    # Rows past the last read it again, so that they stay finite; they are not stored.
    safe_m = tl.minimum(offs_m, R - 1)
    offs_s = safe_m // N  # [BLOCK_M] each row's state
    is_real = (offs_m < R)[:, None] & (offs_r < A)[None, :]
    in_a = tl.broadcast_to((offs_r < A)[None, :], [BLOCK_M, RP])
    if SEEDED:
        # Every entry its own counter, whatever the blocks.
        counter = (safe_m[:, None] * A + offs_r[None, :]).to(tl.int32)
        x = tl.where(in_a, tl.randn(tl.load(noise_ptr), counter), 0.0)
    else:
        noise_ptrs = noise_ptr + (safe_m[:, None] * stride_nr + offs_r.to(tl.int64)[None, :] * stride_na)
        x = tl.load(noise_ptrs, mask=in_a, other=0.0).to(tl.float32)  # [BLOCK_M, RP]
    scratch_ptr += block * 3 * BLOCK_M * HP
    z_ptr = scratch_ptr + 2 * BLOCK_M * HP
    head_bias = tl.load(head_bias_ptr + offs_r)[None, :]
    last_width = tl.load(widths_ptr + D - 1)
    for k in range(K):
        first_layer(
            x.to(action_ptr.dtype.element_ty),
            share_ptr,
            offs_s,
            action_ptr,
            time_ptr,
            k * step,
            z_ptr,
            scratch_ptr,
            HP,
            RP,
            True,
            LAYER_NORM,
            ACTIVATION,
            False,
            BLOCK_M,
            BLOCK_N,
            PRECISION,
        )
        h_ptr, _ = hidden_layers(
            z_ptr,
            scratch_ptr,
            scratch_ptr + BLOCK_M * HP,
            hidden_ptr,
            vector_ptr,
            widths_ptr,
            D,
            HP,
            LAYER_NORM,
            ACTIVATION,
            False,
            False,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ROWS,
            PRECISION,
        )
        if LAYER_NORM:
            activate_rows(z_ptr, h_ptr, vector_ptr + (D - 1) * 3 * HP, last_width, HP, ACTIVATION, BLOCK_M, ROWS)
        velocity = product(h_ptr, head_ptr, HP, RP, 1, HP, BLOCK_M, RP, BLOCK_K, PRECISION) + head_bias
        x += step * velocity
        # The next step overwrites what other threads may still be reading.
        tl.debug_barrier()
    x = tl.clamp(x, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x_ptr + (offs_m[:, None] * A + offs_r[None, :]), x, mask=is_real)


# --- launcher --------------------------------------------------------------------------------------------------------


def behavior_flow(
    mlp: PackedMLP,
    observations: Tensor,
    noise: Tensor | None,
    steps: int,
    *,
    particles: int | None = None,
    seed: Tensor | None = None,
    precision: str | None = None,
    config: launch.BlockLaunch | None = None,
) -> Tensor:
    """Particles [B, N, A] float32 of the velocity field: observations [B, O], noise [B, N, A]. Two launches.

    Without ``noise``, ``particles`` says how many a state, and ``seed``, one int64 on the device, fixes the standard
    normal numbers that Philox draws inside.
    Raises ``ValueError`` if neither or both of noise and seed are given, and naming any argument that is wrong.
    """
    if (noise is None) == (seed is None):
        raise ValueError("noise and seed are both given or both None, expected one of them")
    batch, width = observations.shape[0], mlp.action_dim
    if noise is not None:
        particles = noise.shape[1]
    elif particles is None:
        raise ValueError("particles is None, expected a number: without noise it says how many a state")
    if mlp.output_dim != mlp.action_dim or mlp.head.shape[2] != mlp.action.shape[1]:
        raise ValueError(
            f"mlp has {mlp.output_dim} outputs, expected one an action entry, {mlp.action_dim}, and a time"
        )
    x = torch.empty((batch, particles, width), dtype=torch.float32, device=observations.device)
    check_rows(mlp, observations, x if noise is None else noise, "noise")
    steps = launch.check_integer("steps", steps, 1)
    if seed is not None:
        launch.check_shape("seed", seed, (1,), "one number")
        launch.check_dtype("seed", seed, (torch.int64,))
        launch.check_same_device("seed", seed, "observations", observations.device)
    precision = precision or launch.precision(mlp.dtype)
    if x.numel() == 0:
        return x
    config = config or launch.rows_block(1, mlp.padded_width, mlp.dtype)
    share = state_share(mlp, observations, precision)
    rows = batch * particles
    blocks = triton.cdiv(rows, config.block_m)
    scratch = torch.empty((blocks, 3, config.block_m, mlp.padded_width), dtype=mlp.dtype, device=observations.device)
    # [B, N, A] as rows of one stride where it can be: a copy otherwise.
    start = seed if noise is None else noise.reshape(rows, width)
    assert start is not None
    with launch.on_device(observations):
        behavior_flow_kernel[(blocks,)](
            start,
            x,
            share,
            mlp.action,
            mlp.time,
            mlp.hidden,
            mlp.head,
            mlp.vectors,
            mlp.head_bias,
            mlp.widths,
            scratch,
            *(start.stride() if noise is not None else (0, 0)),
            R=rows,
            N=particles,
            A=width,
            D=mlp.depth,
            K=steps,
            step=1.0 / steps,
            HP=mlp.padded_width,
            RP=mlp.action.shape[1],
            LAYER_NORM=mlp.layer_norm,
            ACTIVATION=mlp.activation,
            SEEDED=noise is None,
            PRECISION=precision,
            **config.options(),
        )
    return x
