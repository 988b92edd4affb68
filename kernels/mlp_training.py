"""Training of an ensemble of perceptrons: forward, loss and backward pass, with weight gradients.

    h_0 = [s, a, t],  z_i = h_{i-1} W_i + b_i,  y_i = scale_i normal(z_i) + shift_i or z_i,  h_i = act(y_i)
    out = h_D W + b,  u = target - out
    loss = (1 / (B OUT)) sum of  u^2 | |weight - 1[u < 0]| u^2 | weight max(u / (2 weight) + 1, 0)^2 - u
    dW_i = h_{i-1}^T dz_i,  db_i = sum dz_i,  dscale_i = sum dy_i normal(z_i),  dshift_i = sum dy_i   (sums over rows)

One program a block of rows and a member walks all layers forward and, in the same launch or another, backward. It
leaves h, dz and its rows' share of the sums; ``optimizer`` turns them into weight gradients, or at once into a step of
Adam. No atomics: every sum has one order. Statistics, accumulators, gradients and master weights are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, optimizer, packing
from .activations import activate, activation_slope, normalise_backward
from .mlp import affine_rows, product
from .packing import Layout, PackedMLP, Stack

LOSSES = ("squared", "expectile", "sql")

# --- kernel ----------------------------------------------------------------------------------------------------------


@triton.jit
def store_inputs(
    s_ptr: tl.tensor,
    a_ptr: tl.tensor,
    t_ptr: tl.tensor,
    noise_ptr: tl.tensor,
    x_ptr: tl.tensor,  # [BLOCK_M, IP], written: states, actions and times, each padded with zeros
    stride_sb: tl.tensor,
    stride_so: tl.tensor,
    stride_ab: tl.tensor,
    stride_aa: tl.tensor,
    stride_tb: tl.tensor,
    stride_nb: tl.tensor,
    stride_na: tl.tensor,
    offs_b: tl.tensor,  # [BLOCK_M] int64
    in_b: tl.tensor,  # [BLOCK_M]
    O: tl.tensor,  # noqa: E741
    A: tl.tensor,
    IP: tl.constexpr,
    SP: tl.constexpr,
    RP: tl.constexpr,
    HAS_TIME: tl.constexpr,
    INTERPOLATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """The first layer's inputs of the block's rows, in the dtype of the weights."""
    offs_x = tl.arange(0, BLOCK_M)[:, None] * IP
    dtype = x_ptr.dtype.element_ty
    for first in range(0, SP, 64):
        offs_o = first + tl.arange(0, 64)
        s_ptrs = s_ptr + (offs_b[:, None] * stride_sb + offs_o.to(tl.int64)[None, :] * stride_so)
        s = tl.load(s_ptrs, mask=in_b[:, None] & (offs_o < O)[None, :], other=0.0)
        tl.store(x_ptr + offs_x + offs_o[None, :], s.to(dtype))
    offs_r = tl.arange(0, RP)
    in_a = in_b[:, None] & (offs_r < A)[None, :]
    a = tl.load(a_ptr + (offs_b[:, None] * stride_ab + offs_r.to(tl.int64)[None, :] * stride_aa), mask=in_a, other=0.0)
    if HAS_TIME:
        t = tl.load(t_ptr + offs_b * stride_tb, mask=in_b, other=0.0)[:, None]
        if INTERPOLATE:
            noise_ptrs = noise_ptr + (offs_b[:, None] * stride_nb + offs_r.to(tl.int64)[None, :] * stride_na)
            a = (1.0 - t) * tl.load(noise_ptrs, mask=in_a, other=0.0) + t * a
        offs_t = tl.arange(0, 16)
        tl.store(x_ptr + offs_x + SP + RP + offs_t[None, :], tl.where((offs_t == 0)[None, :], t, 0.0).to(dtype))
    tl.store(x_ptr + offs_x + SP + offs_r[None, :], a.to(dtype))


@triton.jit
def loss_of(u: tl.tensor, weight: tl.tensor, LOSS: tl.constexpr) -> tl.tensor:
    """The loss of u = target - out, and its derivative with respect to out; both of the shape of ``u``."""
    if LOSS == "squared":
        return u * u, -2.0 * u
    if LOSS == "expectile":
        share = tl.where(u < 0.0, tl.abs(weight - 1.0), weight)
        return share * u * u, -2.0 * share * u
    r = tl.maximum(tl.div_rn(u, 2.0 * weight) + 1.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return weight * r * r - u, 1.0 - r


@triton.jit
def count_steps(steps_ptr: tl.tensor, steps: tl.tensor, is_first: tl.tensor) -> None:
    """Increase Adam's step counters by one, in one of the programs."""
    if is_first:
        for i in range(steps):
            step_ptr = tl.load(steps_ptr + i).to(tl.pointer_type(tl.float32))
            tl.store(step_ptr, tl.load(step_ptr) + 1.0)


@triton.jit(
    do_not_specialize=["B", "O", "A", "D", "OUT", "width_bound", "stride_tb", "stride_yb", "stride_yo", "steps"]
)
def mlp_training_kernel(
    s_ptr: tl.tensor,  # [B, O] float32 observations, any strides, as the next four
    a_ptr: tl.tensor,  # [B, A] actions
    t_ptr: tl.tensor,  # [B, 1] times; unused without HAS_TIME
    noise_ptr: tl.tensor,  # [B, A] what INTERPOLATE starts from
    target_ptr: tl.tensor,  # [B, OUT]; unused without LOSS and by INTERPOLATE
    state_ptr: tl.tensor,  # [E, SP, HP] the packed weights, as the next seven
    action_ptr: tl.tensor,  # [E, RP, HP]
    time_ptr: tl.tensor,  # [E, HP] float32
    hidden_ptr: tl.tensor,  # [E, D - 1, HP, HP]
    head_ptr: tl.tensor,  # [E, HP, OP]
    vector_ptr: tl.tensor,  # [E, D, 3, HP] float32
    head_bias_ptr: tl.tensor,  # [E, OP] float32
    widths_ptr: tl.tensor,  # [D] int32
    x_ptr: tl.tensor,  # [E, BP, IP] of the weights' dtype; BP rows, B padded to whole blocks. Written by FORWARD, as
    h_ptr: tl.tensor,  # [E, D, BP, HP] of the weights' dtype
    z_ptr: tl.tensor,  # [E, D, BP, HP] float32
    out_ptr: tl.tensor,  # [E, B, OUT] float32
    dout_ptr: tl.tensor,  # [E, B, OUT] float32, d loss / d out: written by LOSS, else read by BACKWARD
    g_ptr: tl.tensor,  # [E, D, BP, HP] of the weights' dtype, dz. Written by BACKWARD, as
    head_g_ptr: tl.tensor,  # [E, BP, GO] of the weights' dtype, dout
    sums_ptr: tl.tensor,  # [blocks, E, D, 3, HP] float32, the block's share of dbias, dscale and dshift
    head_sums_ptr: tl.tensor,  # [blocks, E, GO] float32, of the head's dbias
    scratch_ptr: tl.tensor,  # [E, BP, HP] float32
    dx_ptr: tl.tensor,  # [E, B, O + A + 1 or O + A] float32, written if INPUT_GRADIENT
    metrics_ptr: tl.tensor,  # [blocks, E, 4] float32: sums over the block of loss, out and target; written by LOSS
    steps_ptr: tl.tensor,  # [steps] int64, addresses of Adam's step counters, which COUNT increases by one
    stride_sb: tl.tensor,
    stride_so: tl.tensor,
    stride_ab: tl.tensor,
    stride_aa: tl.tensor,
    stride_tb: tl.tensor,
    stride_nb: tl.tensor,
    stride_na: tl.tensor,
    stride_yb: tl.tensor,
    stride_yo: tl.tensor,
    B: tl.tensor,
    O: tl.tensor,  # noqa: E741
    A: tl.tensor,
    D: tl.tensor,
    OUT: tl.tensor,
    width_bound: tl.tensor,  # HP, as a run-time value
    steps: tl.tensor,
    weight: tl.tensor,  # of the loss
    IP: tl.constexpr,
    SP: tl.constexpr,
    RP: tl.constexpr,
    HP: tl.constexpr,
    OP: tl.constexpr,
    GO: tl.constexpr,  # OP, at least 16
    HAS_TIME: tl.constexpr,
    INTERPOLATE: tl.constexpr,  # the network's action is (1 - t) noise + t action, its target action - noise
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr,
    FORWARD: tl.constexpr,
    BACKWARD: tl.constexpr,
    INPUT_GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of the sums over the action's columns
    ROWS: tl.constexpr,
    GRADIENT_ROWS: tl.constexpr,  # whole rows at a time going backward, where sums over rows are kept in registers
    PRECISION: tl.constexpr,
) -> None:
    """Block ``program_id(0)`` of member ``program_id(1)``: forward, loss, backward, as far as the constants say."""
    block = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1).to(tl.int64)
    members = tl.num_programs(1)
    padded_rows = tl.num_programs(0) * BLOCK_M  # BP
    offs_b = block * BLOCK_M + tl.arange(0, BLOCK_M)
    in_b = offs_b < B
    offs_o = tl.arange(0, GO)
    in_out = in_b[:, None] & (offs_o < OUT)[None, :]
    dtype = x_ptr.dtype.element_ty
    # To this member's weights and this block's rows.
    state_ptr += member * SP * HP
    action_ptr += member * RP * HP
    time_ptr += member * HP
    hidden_ptr += member * (D - 1) * HP * HP
    head_ptr += member * HP * OP
    vector_ptr += member * D * 3 * HP
    x_ptr += (member * padded_rows + block * BLOCK_M) * IP
    stack = (member * D * padded_rows + block * BLOCK_M) * HP
    layer_size = padded_rows.to(tl.int64) * HP
    h_ptr += stack
    z_ptr += stack
    offs_tile = tl.arange(0, BLOCK_M)[:, None] * HP + tl.arange(0, BLOCK_N)[None, :]
    offs_rows = tl.arange(0, ROWS)[:, None] * HP + tl.arange(0, HP)[None, :]
    offs_grad = tl.arange(0, GRADIENT_ROWS)[:, None] * HP + tl.arange(0, HP)[None, :]
    offs_out = (member * B + offs_b)[:, None] * OUT + offs_o[None, :]

    if COUNT:
        count_steps(steps_ptr, steps, (block == 0) & (member == 0))

    if FORWARD:
        store_inputs(
            s_ptr,
            a_ptr,
            t_ptr,
            noise_ptr,
            x_ptr,
            stride_sb,
            stride_so,
            stride_ab,
            stride_aa,
            stride_tb,
            stride_nb,
            stride_na,
            offs_b,
            in_b,
            O,
            A,
            IP,
            SP,
            RP,
            HAS_TIME,
            INTERPOLATE,
            BLOCK_M,
        )
        tl.debug_barrier()
        for layer in range(D):
            for first in range(0, width_bound, BLOCK_N):
                if layer == 0:
                    y = product(x_ptr, state_ptr + first, IP, HP, 1, SP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
                    y += product(x_ptr + SP, action_ptr + first, IP, HP, 1, RP, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION)
                    if HAS_TIME:
                        t = tl.load(t_ptr + offs_b * stride_tb, mask=in_b, other=0.0)[:, None]
                        y += t * tl.load(time_ptr + first + tl.arange(0, BLOCK_N))[None, :]
                else:
                    y = product(
                        h_ptr + (layer - 1) * layer_size,
                        hidden_ptr + (layer - 1) * HP * HP + first,
                        HP,
                        HP,
                        1,
                        width_bound,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        PRECISION,
                    )
                y += tl.load(vector_ptr + layer * 3 * HP + first + tl.arange(0, BLOCK_N))[None, :]
                tl.store(z_ptr + layer * layer_size + first + offs_tile, y)
            tl.debug_barrier()
            width = tl.load(widths_ptr + layer)
            for row in range(0, BLOCK_M, ROWS):
                place = layer * layer_size + row * HP
                y, _, _, _ = affine_rows(z_ptr + place, vector_ptr + layer * 3 * HP, width, HP, LAYER_NORM, ROWS)
                tl.store(h_ptr + place + offs_rows, activate(y, ACTIVATION).to(dtype))
            tl.debug_barrier()
        out = tl.zeros([BLOCK_M, GO], tl.float32)
        last_ptr = h_ptr + (D - 1) * layer_size
        for first in range(0, width_bound, BLOCK_K):
            offs_k = first + tl.arange(0, BLOCK_K)
            h = tl.load(last_ptr + tl.arange(0, BLOCK_M)[:, None] * HP + offs_k[None, :])
            w = tl.load(head_ptr + offs_k[:, None] * OP + offs_o[None, :], mask=(offs_o < OP)[None, :], other=0.0)
            out = tl.dot(h, w, out, input_precision=PRECISION)
        out += tl.load(head_bias_ptr + member * OP + offs_o, mask=offs_o < OP, other=0.0)[None, :]
        tl.store(out_ptr + offs_out, out, mask=in_out)
        if LOSS != "none":
            offs_wide = offs_o.to(tl.int64)[None, :]
            if INTERPOLATE:
                target = tl.load(a_ptr + (offs_b[:, None] * stride_ab + offs_wide * stride_aa), mask=in_out, other=0.0)
                noise_ptrs = noise_ptr + (offs_b[:, None] * stride_nb + offs_wide * stride_na)
                target -= tl.load(noise_ptrs, mask=in_out, other=0.0)
            else:
                target_ptrs = target_ptr + (offs_b[:, None] * stride_yb + offs_wide * stride_yo)
                target = tl.load(target_ptrs, mask=in_out, other=0.0)
            value, slope = loss_of(target - out, weight, LOSS)
            dout = tl.where(in_out, tl.div_rn(slope, (B * OUT).to(tl.float32)), 0.0)
            tl.store(dout_ptr + offs_out, dout, mask=in_out)
            metrics_ptr += (block * members + member) * 4
            tl.store(metrics_ptr, tl.sum(tl.sum(tl.where(in_out, value, 0.0), axis=1), axis=0))
            tl.store(metrics_ptr + 1, tl.sum(tl.sum(tl.where(in_out, out, 0.0), axis=1), axis=0))
            tl.store(metrics_ptr + 2, tl.sum(tl.sum(target, axis=1), axis=0))

    if BACKWARD:
        if not FORWARD:
            dout = tl.load(dout_ptr + offs_out, mask=in_out, other=0.0)
        g_ptr += stack
        head_g_ptr += (member * padded_rows + block * BLOCK_M) * GO
        sums_ptr += (block * members + member) * D * 3 * HP
        scratch_ptr += (member * padded_rows + block * BLOCK_M) * HP
        dout_low = dout.to(dtype)
        tl.store(head_g_ptr + tl.arange(0, BLOCK_M)[:, None] * GO + offs_o[None, :], dout_low)
        tl.store(head_sums_ptr + (block * members + member) * GO + offs_o, tl.sum(dout, axis=0))
        for first in range(0, width_bound, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            w = tl.load(head_ptr + offs_o[:, None] + offs_n[None, :] * OP, mask=(offs_o < OP)[:, None], other=0.0)
            tl.store(scratch_ptr + first + offs_tile, tl.dot(dout_low, w, input_precision=PRECISION))
        for step in range(D):
            layer = D - 1 - step
            tl.debug_barrier()
            width = tl.load(widths_ptr + layer)
            dbias = tl.zeros([GRADIENT_ROWS, HP], tl.float32)
            dscale = tl.zeros([GRADIENT_ROWS, HP], tl.float32)
            dshift = tl.zeros([GRADIENT_ROWS, HP], tl.float32)
            for row in range(0, BLOCK_M, GRADIENT_ROWS):
                place = layer * layer_size + row * HP
                y, normal, rstd, scale = affine_rows(
                    z_ptr + place, vector_ptr + layer * 3 * HP, width, HP, LAYER_NORM, GRADIENT_ROWS
                )
                grad = tl.load(scratch_ptr + row * HP + offs_grad) * activation_slope(y, ACTIVATION)
                if LAYER_NORM:
                    dscale += grad * normal
                    dshift += grad
                    grad = normalise_backward(grad * scale, normal, rstd, width)
                    grad = tl.where((tl.arange(0, HP) < width)[None, :], grad, 0.0)
                dbias += grad
                tl.store(g_ptr + place + offs_grad, grad.to(dtype))
            sum_ptrs = sums_ptr + layer * 3 * HP + tl.arange(0, HP)
            tl.store(sum_ptrs, tl.sum(dbias, axis=0))
            if LAYER_NORM:
                tl.store(sum_ptrs + HP, tl.sum(dscale, axis=0))
                tl.store(sum_ptrs + 2 * HP, tl.sum(dshift, axis=0))
            tl.debug_barrier()
            if layer > 0:
                for first in range(0, width_bound, BLOCK_N):
                    # The transposed weights: sums over their columns.
                    w_ptr = hidden_ptr + (layer - 1) * HP * HP + first * HP
                    grad = product(
                        g_ptr + layer * layer_size,
                        w_ptr,
                        HP,
                        1,
                        HP,
                        width_bound,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                        PRECISION,
                    )
                    tl.store(scratch_ptr + first + offs_tile, grad)
        if INPUT_GRADIENT:
            inputs = O + A
            if HAS_TIME:
                inputs += 1
            dx_ptrs = dx_ptr + ((member * B + offs_b) * inputs)[:, None]
            for first in range(0, SP, 64):
                offs_s = first + tl.arange(0, 64)
                grad = product(g_ptr, state_ptr + first * HP, HP, 1, HP, width_bound, BLOCK_M, 64, BLOCK_K, PRECISION)
                tl.store(dx_ptrs + offs_s[None, :], grad, mask=in_b[:, None] & (offs_s < O)[None, :])
            offs_r = tl.arange(0, RP)
            grad = product(g_ptr, action_ptr, HP, 1, HP, width_bound, BLOCK_M, RP, BLOCK_K, PRECISION)
            tl.store(dx_ptrs + (O + offs_r)[None, :], grad, mask=in_b[:, None] & (offs_r < A)[None, :])
            if HAS_TIME:
                w = tl.load(time_ptr + tl.arange(0, HP))[None, :]
                for row in range(0, BLOCK_M, ROWS):
                    offs_r = block * BLOCK_M + row + tl.arange(0, ROWS)
                    grad = tl.sum(tl.load(g_ptr + row * HP + offs_rows).to(tl.float32) * w, axis=1)
                    tl.store(dx_ptr + (member * B + offs_r) * inputs + O + A, grad, mask=offs_r < B)


# --- launchers and registered ops ------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """A batch on the device: float32, any strides, B rows."""

    observations: Tensor  # [B, O]
    actions: Tensor  # [B, A]
    time: Tensor | None = None  # [B, 1], of networks that take it
    noise: Tensor | None = None  # [B, A]: the network's action is (1 - t) noise + t action, its target action - noise
    target: Tensor | None = None  # [B, OUT]


class Pass(NamedTuple):
    """What the forward pass leaves for the backward pass, and the two leave for the weights' gradients."""

    out: Tensor  # [E, B, OUT]
    dout: Tensor  # [E, B, OUT]
    left: Tensor  # x [E, BP, IP], then h [E, D, BP, HP], in the weights' dtype
    z: Tensor  # [E, D, BP, HP]
    right: Tensor  # dz [E, D, BP, HP], then dout [E, BP, GO], in the weights' dtype
    sums: Tensor  # [blocks, E, D, 3, HP], then [blocks, E, GO]
    dx: Tensor  # [E, B, inputs]
    losses: Tensor  # [blocks, E, 4]


def _empty(size: int | Sequence[int], dtype: torch.dtype, device: torch.device, wanted: bool = True) -> Tensor:
    return torch.empty(size if wanted else 0, dtype=dtype, device=device)


def _config(layout: Layout, dtype: torch.dtype, forward: bool = True) -> launch.TrainingLaunch:
    return launch.training_block(layout.padded_width, dtype, forward, amd=torch.version.hip is not None)


def _extents(layout: Layout, batch: int, config: launch.TrainingLaunch) -> optimizer.Extents:
    return optimizer.Extents(layout, -(-batch // config.block_m), config.block_m)


def _run(
    mlp: PackedMLP,
    layout: Layout,
    batch: Batch,
    config: launch.TrainingLaunch,
    precision: str | None,
    loss: str = "none",
    weight: float = 0.0,
    saved: Pass | None = None,
    backward: bool = False,
    input_gradient: bool = False,
    steps: Tensor | None = None,
) -> Pass:
    """One launch: forward unless a pass was ``saved`` by one, with its loss if there is one; backward if asked."""
    rows, device = len(batch.actions), batch.actions.device
    extents = _extents(layout, rows, config)
    shape = (layout.members, rows, layout.output_dim)
    hidden = (layout.members, mlp.depth, extents.padded_rows, mlp.padded_width)
    forward = saved is None
    if saved is None:
        nothing = _empty(0, mlp.dtype, device)
        saved = Pass(
            out=_empty(shape, torch.float32, device),
            dout=_empty(shape, torch.float32, device, loss != "none"),
            left=_empty(extents.left_size, mlp.dtype, device),
            z=_empty(hidden, torch.float32, device),
            right=nothing,
            sums=nothing,
            dx=nothing,
            losses=_empty((extents.blocks, layout.members, 4), torch.float32, device, loss != "none"),
        )
    if backward:
        saved = saved._replace(
            right=_empty(extents.right_size, mlp.dtype, device),
            sums=_empty(extents.sums_size, torch.float32, device),
            dx=_empty((layout.members, rows, layout.inputs), torch.float32, device, input_gradient),
        )
    scratch = _empty(hidden[:1] + hidden[2:], torch.float32, device, backward)
    time = batch.actions if batch.time is None else batch.time
    noise = batch.actions if batch.noise is None else batch.noise
    target = batch.actions if batch.target is None else batch.target
    with launch.on_device(batch.actions):
        mlp_training_kernel[(extents.blocks, layout.members)](
            batch.observations,
            batch.actions,
            time,
            noise,
            target,
            mlp.state,
            mlp.action,
            mlp.time,
            mlp.hidden,
            mlp.head,
            mlp.vectors,
            mlp.head_bias,
            mlp.widths,
            saved.left,
            saved.left[extents.hidden_place :],
            saved.z,
            saved.out,
            saved.dout,
            saved.right,
            saved.right[extents.hidden_size :],
            saved.sums,
            saved.sums[extents.vectors_size :],
            scratch,
            saved.dx,
            saved.losses,
            mlp.widths if steps is None else steps,
            *batch.observations.stride(),
            *batch.actions.stride(),
            time.stride(0),
            *noise.stride(),
            *target.stride(),
            B=rows,
            O=layout.observation_dim,
            A=layout.action_dim,
            D=mlp.depth,
            OUT=layout.output_dim,
            width_bound=mlp.padded_width,
            steps=0 if steps is None else steps.shape[0],
            weight=weight,
            IP=extents.input_width,
            SP=layout.padded_state,
            RP=layout.padded_action,
            HP=mlp.padded_width,
            OP=layout.padded_output,
            GO=extents.output_width,
            HAS_TIME=layout.time,
            INTERPOLATE=batch.noise is not None,
            LAYER_NORM=layout.layer_norm,
            ACTIVATION=mlp.activation,
            LOSS=loss,
            FORWARD=forward,
            BACKWARD=backward,
            INPUT_GRADIENT=input_gradient,
            COUNT=steps is not None,
            BLOCK_R=min(config.block_k, layout.padded_action),
            PRECISION=precision or launch.precision(mlp.dtype),
            **config.options(),
        )
    return saved


def _stack(
    parameters: Sequence[Tensor], layer_norm: bool, activation: str, observation_dim: int, action_dim: int
) -> Stack:
    """The inverse of ``Stack.parameters``."""
    depth = (len(parameters) - 2) // (4 if layer_norm else 2)
    ends = (depth + 1, 2 * (depth + 1), 2 * (depth + 1) + (depth if layer_norm else 0))
    return Stack(
        parameters[: ends[0]],
        parameters[ends[0] : ends[1]],
        parameters[ends[1] : ends[2]],
        parameters[ends[2] :],
        activation,
        observation_dim,
        action_dim,
    )


@torch.library.custom_op("vgf_fast::mlp_forward", mutates_args=())
def _mlp_forward(
    observations: Tensor,
    actions: Tensor,
    time: Tensor | None,
    target: Tensor | None,
    parameters: list[Tensor],
    layer_norm: bool,
    activation: str,
    loss: str,
    weight: float,
    dtype: torch.dtype,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [], out [E, B, OUT], d loss / d out, then what the backward pass reads."""
    launch.check_device("actions", actions)
    stack = _stack(parameters, layer_norm, activation, observations.shape[1], actions.shape[1])
    layout, batch = stack.layout, Batch(observations, actions, time, None, target)
    sizes = packing.buffer_sizes([layout])
    # Zeros, as what pads the buffers is returned with them.
    matrices = torch.zeros(sizes[0], dtype=dtype, device=actions.device)
    vectors = torch.zeros(sizes[1], dtype=torch.float32, device=actions.device)
    mlp = packing.views([layout], [activation], matrices, vectors)[0]
    packing.pack_many([stack], dtype, [mlp])
    config = _config(layout, dtype)
    if len(actions) == 0:
        return (*_fake_forward(layout, actions, config, dtype, loss), matrices, vectors)
    result = _run(mlp, layout, batch, config, precision, loss, weight)
    result.left[-launch.GRADIENT_TILE :].zero_()
    value = actions.new_zeros(())
    if loss != "none":
        value = result.losses[..., 0].sum() / (len(actions) * layout.output_dim)
    return value, result.out, result.dout, result.left, result.z, matrices, vectors


def _fake_forward(
    layout: Layout, actions: Tensor, config: launch.TrainingLaunch, dtype: torch.dtype, loss: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    extents = _extents(layout, actions.shape[0], config)
    out = actions.new_empty((layout.members, actions.shape[0], layout.output_dim))
    z = (layout.members, len(layout.widths), extents.padded_rows, layout.padded_width)
    return (
        actions.new_zeros(()),
        out,
        torch.empty_like(out) if loss != "none" else actions.new_empty(0),
        actions.new_empty(extents.left_size, dtype=dtype),
        actions.new_empty(z),
    )


@_mlp_forward.register_fake
def _(
    observations: Tensor,
    actions: Tensor,
    time: Tensor | None,
    target: Tensor | None,
    parameters: list[Tensor],
    layer_norm: bool,
    activation: str,
    loss: str,
    weight: float,
    dtype: torch.dtype,
    precision: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = _stack(parameters, layer_norm, activation, observations.shape[1], actions.shape[1]).layout
    sizes = packing.buffer_sizes([layout])
    config = _config(layout, dtype)
    return (
        *_fake_forward(layout, actions, config, dtype, loss),
        actions.new_empty(sizes[0], dtype=dtype),
        actions.new_empty(sizes[1]),
    )


@torch.library.custom_op("vgf_fast::mlp_backward", mutates_args=())
def _mlp_backward(
    dout: Tensor,
    observations: Tensor,
    actions: Tensor,
    left: Tensor,
    z: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    inputs: int,
    widths: list[int],
    layer_norm: bool,
    activation: str,
    precision: str | None,
    input_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of all parameters one after another, and of the inputs [B, inputs] if asked."""
    layout = _layout_of(dout, observations, actions, inputs, widths, layer_norm)
    config = _config(layout, matrices.dtype, forward=False)
    if len(actions) == 0:
        size = sum(math.prod(shape) for shape in optimizer.parameter_shapes(layout))
        return dout.new_zeros(size), dout.new_zeros((0, inputs) if input_gradient else 0)
    mlp = packing.views([layout], [activation], matrices, vectors)[0]
    none = dout.new_empty(0)
    saved = Pass(none, dout.contiguous(), left, z, left, none, none, none)
    result = _run(
        mlp,
        layout,
        Batch(observations, actions),
        config,
        precision,
        saved=saved,
        backward=True,
        input_gradient=input_gradient,
    )
    extents = _extents(layout, len(actions), config)
    gradients = optimizer.weight_gradients(extents, left, result.right, result.sums, precision)
    return gradients, result.dx.sum(dim=0) if input_gradient else result.dx


def _layout_of(
    dout: Tensor, observations: Tensor, actions: Tensor, inputs: int, widths: list[int], layer_norm: bool
) -> Layout:
    members, _, output_dim = dout.shape
    return Layout(
        int(members),
        inputs,
        tuple(widths),
        int(output_dim),
        int(observations.shape[1]),
        int(actions.shape[1]),
        layer_norm,
    )


@_mlp_backward.register_fake
def _(
    dout: Tensor,
    observations: Tensor,
    actions: Tensor,
    left: Tensor,
    z: Tensor,
    matrices: Tensor,
    vectors: Tensor,
    inputs: int,
    widths: list[int],
    layer_norm: bool,
    activation: str,
    precision: str | None,
    input_gradient: bool,
) -> tuple[Tensor, Tensor]:
    layout = _layout_of(dout, observations, actions, inputs, widths, layer_norm)
    size = sum(math.prod(shape) for shape in optimizer.parameter_shapes(layout))
    return dout.new_empty(size), dout.new_empty((actions.shape[0], inputs) if input_gradient else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    observations, actions, time, _, parameters, layer_norm, activation, _, _, _, precision = inputs
    _, _, dout, left, z, matrices, vectors = output
    ctx.save_for_backward(observations, actions, dout, left, z, matrices, vectors)
    ctx.mark_non_differentiable(dout, left, z, matrices, vectors)
    ctx.set_materialize_grads(False)
    ctx.has_time = time is not None
    ctx.layout = _stack(parameters, layer_norm, activation, observations.shape[1], actions.shape[1]).layout
    ctx.activation, ctx.precision = activation, precision


def _backward(ctx: Any, grad_loss: Tensor | None, grad_out: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    observations, actions, dout, left, z, matrices, vectors = ctx.saved_tensors
    layout = ctx.layout
    total = grad_out
    if grad_loss is not None:
        total = dout * grad_loss if total is None else total + dout * grad_loss
    parameter_count = len(optimizer.parameter_shapes(layout))
    nothing = (None,) * 6
    if total is None:
        return (None, None, None, None, [None] * parameter_count, *nothing)
    wanted = ctx.needs_input_grad
    gradients, dx = torch.ops.vgf_fast.mlp_backward(
        total,
        observations,
        actions,
        left,
        z,
        matrices,
        vectors,
        layout.inputs,
        list(layout.widths),
        layout.layer_norm,
        ctx.activation,
        ctx.precision,
        any(wanted[:3]),
    )
    shapes = optimizer.parameter_shapes(layout)
    parts = gradients.split([math.prod(shape) for shape in shapes])
    parameters = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    o, a = layout.observation_dim, layout.action_dim
    slices = [
        dx[:, s] if want else None
        for s, want in zip((slice(0, o), slice(o, o + a), slice(o + a, None)), wanted[:3], strict=True)
    ]
    return (*slices, None, parameters, *nothing)


_mlp_forward.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(
    "vgf_fast::mlp_training_step_", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs", "steps", "targets")
)
def _mlp_training_step_(
    observations: Tensor,
    actions: Tensor,
    time: Tensor | None,
    noise: Tensor | None,
    target: Tensor | None,
    packed: list[Tensor],
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    layer_norm: bool,
    activation: str,
    loss: str,
    weight: float,
    learning_rate: float,
    tau: float,
    precision: str | None,
) -> Tensor:
    launch.check_device("actions", actions)
    layout = _stack(parameters, layer_norm, activation, observations.shape[1], actions.shape[1]).layout
    state, action, time_row, hidden, head, vectors, head_bias, widths = packed
    sizes = (layout.observation_dim, layout.action_dim, layout.output_dim, layout.layer_norm, activation)
    mlp = PackedMLP(state, action, time_row, hidden, head, vectors, head_bias, widths, *sizes)
    config = _config(layout, mlp.dtype)
    batch = Batch(observations, actions, time, noise, target)
    counters = optimizer.step_table(steps)
    result = _run(mlp, layout, batch, config, precision, loss, weight, backward=True, steps=counters)
    adam = optimizer.AdamState(tuple(parameters), tuple(exp_avgs), tuple(exp_avg_sqs), tuple(steps), learning_rate)
    extents = _extents(layout, len(actions), config)
    return optimizer.adam_step_(
        extents, result.left, result.right, result.sums, result.losses, adam, targets, tau, len(actions), precision
    )


@_mlp_training_step_.register_fake
def _(
    observations: Tensor,
    actions: Tensor,
    time: Tensor | None,
    noise: Tensor | None,
    target: Tensor | None,
    packed: list[Tensor],
    parameters: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    targets: list[Tensor],
    layer_norm: bool,
    activation: str,
    loss: str,
    weight: float,
    learning_rate: float,
    tau: float,
    precision: str | None,
) -> Tensor:
    return actions.new_empty(3)


# --- public functions ------------------------------------------------------------------------------------------------


def _check(stack: Stack, batch: Batch, loss: str, weight: float) -> Layout:
    layout = stack.layout
    first, rows, outputs = stack.weights[0], len(batch.actions), layout.output_dim
    if layout.inputs not in (layout.observation_dim + layout.action_dim + extra for extra in (0, 1)):
        raise ValueError(
            f"the first layer takes {layout.inputs} inputs, expected observations and actions, "
            f"{layout.observation_dim} + {layout.action_dim}, or one more for the time"
        )
    limit = launch.MAX_WIDTH
    if layout.padded_width > limit:
        raise ValueError(f"the widest hidden layer has {max(layout.widths)} units, expected at most {limit}")
    if max(layout.action_dim, outputs) > launch.MAX_ACTION_DIM:
        raise ValueError(
            f"actions and outputs have {layout.action_dim} and {outputs} columns, expected at most "
            f"{launch.MAX_ACTION_DIM}: the kernel's limit"
        )
    if stack.activation not in ("relu", "gelu", "swish"):
        raise ValueError(f"activation is {stack.activation!r}, expected 'relu', 'gelu' or 'swish'")
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "observations": (batch.observations, (rows, layout.observation_dim)),
        "actions": (batch.actions, (rows, layout.action_dim)),
        "time": (batch.time, (rows, 1)),
        "noise": (batch.noise, (rows, layout.action_dim)),
        "target": (batch.target, (rows, outputs)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            launch.check_shape(name, tensor, shape, "rows of the batch, and what the network takes")
            launch.check_dtype(name, tensor, (torch.float32,))
            launch.check_same_device(name, tensor, "the parameters", first.device)
    for parameter in stack.parameters:
        launch.check_dtype("a parameter", parameter, (torch.float32,))
    if layout.time != (batch.time is not None):
        raise ValueError(
            f"time is {'None' if batch.time is None else 'given'}, but the first layer takes {layout.inputs} inputs"
        )
    if loss != "none":
        if loss not in LOSSES:
            raise ValueError(f"loss is {loss!r}, expected one of {', '.join(map(repr, LOSSES))}")
        if loss != "squared" and not weight > 0.0:
            raise ValueError(f"weight is {weight!r}, expected a number > 0: loss={loss!r}")
        if rows == 0:
            raise ValueError("actions is empty, expected at least one row: the loss is a mean over rows")
    return layout


def mlp(
    stack: Stack,
    observations: Tensor,
    actions: Tensor,
    time: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
) -> Tensor:
    """Outputs [E, B, OUT] of a stack at observations [B, O], actions [B, A] and, if it takes it, time [B, 1].

    Differentiable with respect to all parameters and inputs. Parameters and inputs are float32, ``dtype`` is that of
    the products' operands, float32 or bfloat16; ``precision`` of float32 products is "ieee" or "tf32", the default on
    a GPU. Two launches forward, two backward. Raises ``ValueError`` naming what is wrong.
    """
    _check(stack, Batch(observations, actions, time), "none", 0.0)
    parameters = list(stack.parameters)
    flags = (bool(stack.norm_scales), stack.activation, "none", 0.0, dtype, precision)
    return _mlp_forward(observations, actions, time, None, parameters, *flags)[1]


def mlp_loss(
    stack: Stack,
    observations: Tensor,
    actions: Tensor,
    target: Tensor,
    loss: str = "squared",
    weight: float = 0.5,
    time: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss [] at a constant target [B, OUT], and the outputs [E, B, OUT]; differentiable as in ``mlp``.

    ``loss`` is "squared" (TD and flow matching), "expectile" with ``weight`` the expectile, or "sql" with its alpha;
    formulas at the top. The loss and its derivative come from the forward launch.
    """
    _check(stack, Batch(observations, actions, time, None, target), loss, weight)
    parameters = list(stack.parameters)
    flags = (bool(stack.norm_scales), stack.activation, loss, float(weight), dtype, precision)
    value, out = _mlp_forward(observations, actions, time, target, parameters, *flags)[:2]
    return value, out


@torch.no_grad()
def training_step_(
    stack: Stack,
    packed: PackedMLP,
    batch: Batch,
    adam: torch.optim.Adam,
    loss: str = "squared",
    weight: float = 0.5,
    targets: Sequence[Tensor] = (),
    tau: float = 0.0,
    precision: str | None = None,
) -> Tensor:
    """One step of Adam on a loss, in place, and of the Polyak average ``targets`` of the parameters: two launches.

    ``packed`` are the stack's weights as they are now. ``targets``, in the order of ``stack.parameters``, move towards
    the parameters as they were before the step. The state of ``adam`` is read and written; moments and step counters
    are its own. Returns loss, mean output of member 0 and mean target: [3] on the device.
    Predicted against gradients followed by ``torch.optim.Adam(fused=True)`` and a separate average: 32 bytes moved a
    parameter instead of 44 (24 instead of 32 without targets) and 2 launches a network instead of about 7. Hence it is
    the learner's default; not yet measured on a GPU.
    Raises ``ValueError`` naming what is wrong; then nothing was changed.
    """
    layout = _check(stack, batch, loss, weight)
    if (batch.noise is None) == (batch.target is None):
        raise ValueError("noise and target are both given or both None, expected one: each of them says the target")
    if batch.noise is not None and (batch.time is None or layout.output_dim != layout.action_dim):
        raise ValueError(
            "noise is given, expected a network that takes the time and returns one output an action entry"
        )
    if packed.widths is not packing.width_table(layout.widths, packed.state.device) or packed.members != layout.members:
        raise ValueError(f"packed has widths {packed.widths.tolist()}, expected {layout.widths}: pack the stack anew")
    state = optimizer.adam_state(adam, stack.parameters)
    optimizer.check_state(state, targets, layout)
    return _mlp_training_step_(
        batch.observations,
        batch.actions,
        batch.time,
        batch.noise,
        batch.target,
        list(packed[:8]),
        list(state.parameters),
        list(state.exp_avgs),
        list(state.exp_avg_sqs),
        list(state.steps),
        list(targets),
        layout.layer_norm,
        stack.activation,
        loss,
        float(weight),
        state.learning_rate,
        float(tau),
        precision,
    )
