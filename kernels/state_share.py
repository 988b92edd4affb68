"""The states' share of a network's first layer, W_s s + b: once a state, whatever particles follow."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, ranges
from .packing import PackedMLP


class ShareShape(NamedTuple):
    """Sizes and strides."""

    states: int  # B
    observation_dim: int  # O
    padded_dim: int  # SP
    depth: int  # D
    stride_state: int
    stride_column: int


@triton.jit
def state_share_kernel(
    s_ptr: tl.tensor,  # [B, O] observations, any strides and dtype
    w_ptr: tl.tensor,  # [E, SP, HP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32, whose first row is the first layer's bias
    share_ptr: tl.tensor,  # [E, B, HP] float32, written
    shape: ShareShape,
    HP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """W_s s + b of BLOCK_M states and BLOCK_N columns of a member: programs (states, columns, member)."""
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    member = tl.program_id(2).to(tl.int64)
    in_b = (offs_b < shape.states)[:, None]
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + member * shape.padded_dim * HP + (offs_k[:, None] * HP + offs_n[None, :])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, shape.padded_dim, BLOCK_K):
        offs_o = first + offs_k
        s_ptrs = s_ptr + (offs_b[:, None] * shape.stride_state + offs_o.to(tl.int64)[None, :] * shape.stride_column)
        s = tl.load(s_ptrs, mask=in_b & (offs_o < shape.observation_dim)[None, :], other=0.0)
        total = tl.dot(s.to(w_ptr.dtype.element_ty), tl.load(w_ptrs), total, input_precision=PRECISION)
        w_ptrs += BLOCK_K * HP
    total += tl.load(vector_ptr + member * shape.depth * (3 * HP) + offs_n)[None, :]
    tl.store(share_ptr + (member * shape.states + offs_b)[:, None] * HP + offs_n[None, :], total, mask=in_b)


def state_share(mlp: PackedMLP, observations: Tensor, precision: str) -> Tensor:
    """W_s s + b of every member, bias included: observations [B, O] -> [E, B, HP] float32. One launch."""
    batch, hp = observations.shape[0], mlp.padded_width
    share = torch.empty((mlp.members, batch, hp), dtype=torch.float32, device=observations.device)
    if batch == 0:
        return share
    block_m, block_n, block_k = launch.share_tile(hp)
    shape = ShareShape(batch, mlp.observation_dim, mlp.state.shape[1], mlp.depth, *observations.stride())
    with launch.on_device(observations), ranges.span("vgf/state_share"):
        state_share_kernel[(triton.cdiv(batch, block_m), hp // block_n, mlp.members)](
            observations,
            mlp.state,
            mlp.vectors,
            share,
            shape,
            hp,
            block_m,
            block_n,
            block_k,
            precision,
            **launch.options(4, 3),
        )
    return share
