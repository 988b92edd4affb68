"""Device helpers of the kernels in which one program walks all layers of a perceptron for its block of rows.

A program holds BLOCK_M rows. Between layers they lie in its own scratch, [BLOCK_M, HP] each in the dtype of the
weights: ``h`` and ``spare`` for activations and gradients, and ``z`` with one slot a hidden layer. A layer is a loop
over column tiles [BLOCK_M, BLOCK_N] of sums over chunks of BLOCK_K; with LayerNorm, whole rows follow in tiles
[ROWS, HP]. Without it the activation is applied as the tile is stored. The loop over layers and the bounds of the sums
are run-time values: an unrolled one spills.

Between a store to scratch and a load by other threads of the program stands ``tl.debug_barrier()``: Triton puts none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, activation_slope, normalise, normalise_backward


@triton.jit
def product(
    x_ptr: tl.tensor,  # to the first row's first column, rows stride_x apart, columns contiguous
    w_ptr: tl.tensor,  # to the weight of the first row and the tile's first column
    stride_x: tl.tensor,
    stride_k: tl.tensor,
    stride_n: tl.tensor,
    K: tl.tensor,  # a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """sum_k x[m, k] w[k, n], float32 [BLOCK_M, BLOCK_N]."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (tl.arange(0, BLOCK_M)[:, None] * stride_x + offs_k[None, :])
    w_ptrs = w_ptr + (offs_k[:, None] * stride_k + tl.arange(0, BLOCK_N)[None, :] * stride_n)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(0, K, BLOCK_K):
        total = tl.dot(tl.load(x_ptrs), tl.load(w_ptrs), total, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_k
    return total


@triton.jit
def store_tile(
    y: tl.tensor,  # [BLOCK_M, BLOCK_N] before LayerNorm or the activation
    z_ptr: tl.tensor,  # [BLOCK_M, HP] this layer's slot
    h_ptr: tl.tensor,  # [BLOCK_M, HP], written without LayerNorm only
    first: tl.tensor,  # the tile's first column
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Store one tile of a layer's linear part, and of its activation if no LayerNorm comes between."""
    offs = tl.arange(0, BLOCK_M)[:, None] * HP + (first + tl.arange(0, BLOCK_N))[None, :]
    if LAYER_NORM or STORE_Z:
        tl.store(z_ptr + offs, y.to(z_ptr.dtype.element_ty))
    if not LAYER_NORM:
        tl.store(h_ptr + offs, activate(y, ACTIVATION).to(h_ptr.dtype.element_ty))


@triton.jit
def affine_rows(
    z_ptr: tl.tensor,  # [ROWS, HP] the rows
    vector_ptr: tl.tensor,  # [3, HP] float32 of this layer: bias, scale, shift
    width: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """What the activation is applied to, y [ROWS, HP]; the normalised rows, 1 / std [ROWS, 1] and scale [1, HP]."""
    offs_h = tl.arange(0, HP)
    y = tl.load(z_ptr + (tl.arange(0, ROWS)[:, None] * HP + offs_h[None, :])).to(tl.float32)
    normal = y
    rstd = tl.zeros([ROWS, 1], tl.float32)
    scale = tl.zeros([1, HP], tl.float32)
    if LAYER_NORM:
        normal, rstd = normalise(y, offs_h < width, width)
        scale = tl.load(vector_ptr + HP + offs_h)[None, :]
        y = normal * scale + tl.load(vector_ptr + 2 * HP + offs_h)[None, :]
    return y, normal, rstd, scale


@triton.jit
def activate_rows(
    z_ptr: tl.tensor,  # [BLOCK_M, HP]
    h_ptr: tl.tensor,  # [BLOCK_M, HP], written
    vector_ptr: tl.tensor,
    width: tl.tensor,
    HP: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """LayerNorm and activation of the block's rows, between two barriers."""
    tl.debug_barrier()
    offs = tl.arange(0, ROWS)[:, None] * HP + tl.arange(0, HP)[None, :]
    for row in range(0, BLOCK_M, ROWS):
        y, _, _, _ = affine_rows(z_ptr + row * HP, vector_ptr, width, HP, True, ROWS)
        tl.store(h_ptr + row * HP + offs, activate(y, ACTIVATION).to(h_ptr.dtype.element_ty))
    tl.debug_barrier()


@triton.jit
def first_layer(
    x: tl.tensor,  # [BLOCK_M, RP] action rows in the dtype of the weights
    share_ptr: tl.tensor,  # [*, HP] float32, the states' share of the first layer, bias included
    offs_s: tl.tensor,  # [BLOCK_M] each row's state
    w_ptr: tl.tensor,  # [RP, HP]
    time_ptr: tl.tensor,  # [HP] float32, the time's row of the first layer; unused without HAS_TIME
    time: tl.tensor,
    z_ptr: tl.tensor,
    h_ptr: tl.tensor,
    HP: tl.constexpr,
    RP: tl.constexpr,
    HAS_TIME: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Layer 0 of the block's rows, as far as ``store_tile`` takes it; no barrier."""
    offs_r = tl.arange(0, RP)
    for first in range(0, HP, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        w = tl.load(w_ptr + (offs_r[:, None] * HP + offs_n[None, :]))
        y = tl.load(share_ptr + (offs_s[:, None] * HP + offs_n[None, :]))
        if HAS_TIME:
            y += time * tl.load(time_ptr + offs_n)[None, :]
        y = tl.dot(x, w, y, input_precision=PRECISION)
        store_tile(y, z_ptr, h_ptr, first, HP, LAYER_NORM, ACTIVATION, STORE_Z, BLOCK_M, BLOCK_N)


@triton.jit
def hidden_layers(
    z_ptr: tl.tensor,  # [D, BLOCK_M, HP] if KEEP, else one slot
    h_ptr: tl.tensor,  # [BLOCK_M, HP]: without LayerNorm, the first layer's activation
    spare_ptr: tl.tensor,  # [BLOCK_M, HP]
    w_ptr: tl.tensor,  # [D - 1, HP, HP]
    vector_ptr: tl.tensor,  # [D, 3, HP] float32
    widths_ptr: tl.tensor,  # [D] int32
    D: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    KEEP: tl.constexpr,
    STORE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Layers 1 to D - 1, the last one's LayerNorm left out. Returns the buffer that holds, or is to hold, its result.

    The other of the two buffers is free then. Ends with a barrier.
    """
    for layer in range(1, D):
        if LAYER_NORM:
            activate_rows(z_ptr, h_ptr, vector_ptr, tl.load(widths_ptr + layer - 1), HP, ACTIVATION, BLOCK_M, ROWS)
        else:
            tl.debug_barrier()
        if KEEP:
            z_ptr += BLOCK_M * HP
        vector_ptr += 3 * HP
        for first in range(0, HP, BLOCK_N):
            y = product(h_ptr, w_ptr + first, HP, HP, 1, HP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            y += tl.load(vector_ptr + first + tl.arange(0, BLOCK_N))[None, :]
            store_tile(y, z_ptr, spare_ptr, first, HP, LAYER_NORM, ACTIVATION, STORE_Z, BLOCK_M, BLOCK_N)
        w_ptr += HP * HP
        if not LAYER_NORM:
            h_ptr, spare_ptr = spare_ptr, h_ptr
    tl.debug_barrier()
    return h_ptr, spare_ptr


@triton.jit
def rows_backward(
    grad: tl.tensor,  # [ROWS, HP] with respect to the activation
    y: tl.tensor,
    normal: tl.tensor,
    rstd: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tl.tensor:
    """Gradient with respect to a layer's linear part, zero in the padding: [ROWS, HP]. The rest is ``affine_rows``'."""
    grad *= activation_slope(y, ACTIVATION)
    if LAYER_NORM:
        grad = normalise_backward(grad * scale, normal, rstd, width)
    return tl.where((tl.arange(0, HP) < width)[None, :], grad, 0.0)


@triton.jit
def hidden_layers_backward(
    z_ptr: tl.tensor,  # [D, BLOCK_M, HP] kept by the forward pass
    g_ptr: tl.tensor,  # [BLOCK_M, HP] gradient with respect to the last layer's linear part
    spare_ptr: tl.tensor,  # [BLOCK_M, HP]
    w_ptr: tl.tensor,  # [D - 1, HP, HP]
    vector_ptr: tl.tensor,  # [D, 3, HP] float32
    widths_ptr: tl.tensor,  # [D] int32
    D: tl.tensor,
    HP: tl.constexpr,
    LAYER_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """From the last layer's linear part to the first one's. Returns the buffer that holds its gradient, and the other.

    Starts and ends with a barrier.
    """
    tl.debug_barrier()
    offs_m = tl.arange(0, BLOCK_M)
    offs = tl.arange(0, ROWS)[:, None] * HP + tl.arange(0, HP)[None, :]
    # Down to layer 0; pointers to a slot are computed, for the layers below a block's first are other blocks'.
    for step in range(1, D):
        layer = D - 1 - step
        slot_ptr = z_ptr + layer * BLOCK_M * HP
        layer_w_ptr = w_ptr + layer * HP * HP
        for first in range(0, HP, BLOCK_N):
            # The transposed weights: sums over their columns.
            grad = product(g_ptr, layer_w_ptr + first * HP, HP, 1, HP, HP, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
            tile = offs_m[:, None] * HP + (first + tl.arange(0, BLOCK_N))[None, :]
            if not LAYER_NORM:
                grad *= activation_slope(tl.load(slot_ptr + tile).to(tl.float32), ACTIVATION)
            tl.store(spare_ptr + tile, grad.to(spare_ptr.dtype.element_ty))
        tl.debug_barrier()
        if LAYER_NORM:
            width = tl.load(widths_ptr + layer)
            for row in range(0, BLOCK_M, ROWS):
                y, normal, rstd, scale = affine_rows(
                    slot_ptr + row * HP, vector_ptr + layer * 3 * HP, width, HP, LAYER_NORM, ROWS
                )
                grad = tl.load(spare_ptr + row * HP + offs).to(tl.float32)
                grad = rows_backward(grad, y, normal, rstd, scale, width, HP, LAYER_NORM, ACTIVATION)
                tl.store(g_ptr + row * HP + offs, grad.to(g_ptr.dtype.element_ty))
            tl.debug_barrier()
        else:
            g_ptr, spare_ptr = spare_ptr, g_ptr
    return g_ptr, spare_ptr


@triton.jit
def critic_block(
    x: tl.tensor,  # [BLOCK_M, RP] actions in the dtype of the weights
    share_ptr: tl.tensor,  # [*, HP] float32 of this member
    offs_s: tl.tensor,  # [BLOCK_M] each row's state
    action_ptr: tl.tensor,  # [RP, HP] of this member, as the next four
    hidden_ptr: tl.tensor,  # [D - 1, HP, HP]
    head_ptr: tl.tensor,  # [HP]
    vector_ptr: tl.tensor,  # [D, 3, HP] float32
    head_bias_ptr: tl.tensor,  # [1] float32
    widths_ptr: tl.tensor,  # [D] int32
    scratch_ptr: tl.tensor,  # this program's: [2 + D, BLOCK_M, HP] if BACKWARD, else [3, BLOCK_M, HP]
    q_ptr: tl.tensor,  # [rows] float32, written
    rows: tl.tensor,  # of the block's BLOCK_M how many are real, the first ones
    D: tl.tensor,
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
) -> tl.tensor:
    """Stores this member's value of every row; returns its gradient with respect to the action, [BLOCK_M, RP] float32.

    Without BACKWARD the result is zeros, to be left alone.
    """
    h_ptr = scratch_ptr
    spare_ptr = scratch_ptr + BLOCK_M * HP
    z_ptr = scratch_ptr + 2 * BLOCK_M * HP
    first_layer(
        x,
        share_ptr,
        offs_s,
        action_ptr,
        share_ptr,
        0.0,
        z_ptr,
        h_ptr,
        HP,
        RP,
        False,
        LAYER_NORM,
        ACTIVATION,
        True,
        BLOCK_M,
        BLOCK_N,
        PRECISION,
    )
    h_ptr, spare_ptr = hidden_layers(
        z_ptr,
        h_ptr,
        spare_ptr,
        hidden_ptr,
        vector_ptr,
        widths_ptr,
        D,
        HP,
        LAYER_NORM,
        ACTIVATION,
        BACKWARD,
        True,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        ROWS,
        PRECISION,
    )
    offs_h = tl.arange(0, HP)
    width = tl.load(widths_ptr + D - 1)
    head = tl.load(head_ptr + offs_h).to(tl.float32)[None, :]
    head_bias = tl.load(head_bias_ptr)
    last_ptr = z_ptr
    if BACKWARD:
        last_ptr += (D - 1) * BLOCK_M * HP
    offs = tl.arange(0, ROWS)[:, None] * HP + offs_h[None, :]
    for row in range(0, BLOCK_M, ROWS):
        y, normal, rstd, scale = affine_rows(
            last_ptr + row * HP, vector_ptr + (D - 1) * 3 * HP, width, HP, LAYER_NORM, ROWS
        )
        q = tl.sum(activate(y, ACTIVATION) * head, axis=1) + head_bias  # [ROWS]
        if BACKWARD:
            grad = rows_backward(
                tl.broadcast_to(head, [ROWS, HP]), y, normal, rstd, scale, width, HP, LAYER_NORM, ACTIVATION
            )
            tl.store(h_ptr + row * HP + offs, grad.to(h_ptr.dtype.element_ty))
        tl.store(q_ptr + row + tl.arange(0, ROWS), q, mask=row + tl.arange(0, ROWS) < rows)
    total = tl.zeros([BLOCK_M, RP], tl.float32)
    if BACKWARD:
        g_ptr, spare_ptr = hidden_layers_backward(
            z_ptr,
            h_ptr,
            spare_ptr,
            hidden_ptr,
            vector_ptr,
            widths_ptr,
            D,
            HP,
            LAYER_NORM,
            ACTIVATION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            ROWS,
            PRECISION,
        )
        total = product(g_ptr, action_ptr, HP, 1, HP, HP, BLOCK_M, RP, BLOCK_K, PRECISION)
    return total
