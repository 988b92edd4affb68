"""Training of an ensemble of perceptrons: forward, loss and backward pass, with weight gradients or a step of Adam.

    h_0 = [s, a, t],  z_i = h_{i-1} W_i + b_i,  y_i = scale_i normal(z_i) + shift_i or z_i,  h_i = act(y_i)
    out = h_D W + b,  u = target - out
    loss = (1 / (B OUT)) sum of  u^2 | |weight - 1[u < 0]| u^2 | weight max(u / (2 weight) + 1, 0)^2 - u
    dW_i = h_{i-1}^T dz_i,  db_i = sum dz_i,  dscale_i = sum dy_i normal(z_i),  dshift_i = sum dy_i   (sums over rows)

A pass is a sequence of launches: the first layer, D - 1 times rows and product, the last layer with the loss and where
the gradient starts, D - 1 times transposed product and rows, weight gradients: 4 D - 1 in all. Blocks of rows leave
their share of the sums; ``optimizer`` adds them up, and turns them at once into a step of Adam. No atomics: every sum
has one order. Statistics, accumulators, z, gradients and master weights are float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch, optimizer, packing
from .activations import activation
from .packing import Layout, PackedMLP, Stack
from .training_layers import LOSSES, Batch
from .training_passes import Network, Pass, extents_of

# --- registered ops --------------------------------------------------------------------------------------------------


def _stack(
    parameters: Sequence[Tensor], layer_norm: bool, activation: str, observation_dim: int, action_dim: int
) -> Stack:
    """The inverse of ``Stack.parameters``."""
    depth = (len(parameters) - 2) // (4 if layer_norm else 2)
    rest, normed = iter(parameters), depth if layer_norm else 0
    counts = (depth + 1, depth + 1, normed, normed)
    weights, biases, scales, shifts = (list(itertools.islice(rest, count)) for count in counts)
    return Stack(weights, biases, scales, shifts, activation, observation_dim, action_dim)


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
    if len(actions) == 0:
        return (*_fake_forward(layout, actions, dtype, loss), matrices, vectors)
    result = Network(mlp, layout, batch, precision).forward(None if loss == "none" else loss, weight)
    result.left[-launch.GRADIENT_TILE :].zero_()
    value, dout = actions.new_zeros(()), actions.new_empty(0) if result.dout is None else result.dout
    if result.losses is not None:
        value = result.losses[..., 0].sum() / (len(actions) * layout.output_dim)
    assert result.out is not None
    return value, result.out, dout, result.left, result.z, matrices, vectors


def _fake_forward(
    layout: Layout, actions: Tensor, dtype: torch.dtype, loss: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    extents = extents_of(layout, actions.shape[0], dtype)
    out = actions.new_empty((layout.members, actions.shape[0], layout.output_dim))
    z = (len(layout.widths), layout.members, extents.padded_rows, layout.padded_width)
    return (
        actions.new_zeros(()),
        out,
        torch.empty_like(out) if loss != "none" else actions.new_empty(0),
        actions.new_empty(extents.left_size, dtype=dtype),
        actions.new_empty(z),
    )


@_mlp_forward.register_fake
def _(observations: Tensor, actions: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, parameters, layer_norm, activation, loss, _, dtype, _ = rest
    layout = _stack(parameters, layer_norm, activation, observations.shape[1], actions.shape[1]).layout
    sizes = packing.buffer_sizes([layout])
    packed = actions.new_empty(sizes[0], dtype=dtype), actions.new_empty(sizes[1])
    return (*_fake_forward(layout, actions, dtype, loss), *packed)


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
    if len(actions) == 0:
        return dout.new_zeros(_gradient_size(layout)), dout.new_zeros((0, inputs) if input_gradient else 0)
    mlp = packing.views([layout], [activation], matrices, vectors)[0]
    network = Network(mlp, layout, Batch(observations, actions), precision)
    saved = network.with_gradients(Pass(None, dout.contiguous(), left, z, None))
    network.head(saved, None, 0.0, False, True)
    network.backward(saved)
    gradients = optimizer.weight_gradients(network.extents, *saved.operands, precision)
    return gradients, network.input_gradients(saved) if input_gradient else dout.new_empty(0)


def _gradient_size(layout: Layout) -> int:
    return sum(math.prod(shape) for shape in optimizer.parameter_shapes(layout))


def _layout_of(
    dout: Tensor, observations: Tensor, actions: Tensor, inputs: int, widths: list[int], layer_norm: bool
) -> Layout:
    outputs, (states, width) = dout.shape[2], (observations.shape[1], actions.shape[1])
    return Layout(int(dout.shape[0]), inputs, tuple(widths), int(outputs), int(states), int(width), layer_norm)


@_mlp_backward.register_fake
def _(dout: Tensor, observations: Tensor, actions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, inputs, widths, layer_norm, _, _, input_gradient = rest
    size = _gradient_size(_layout_of(dout, observations, actions, inputs, widths, layer_norm))
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
    observations, actions, dout, *saved = ctx.saved_tensors
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
        *(total, observations, actions, *saved),
        *(layout.inputs, list(layout.widths), layout.layer_norm, ctx.activation, ctx.precision, any(wanted[:3])),
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
    mlp = layout.packed(packed, activation)
    network = Network(mlp, layout, Batch(observations, actions, time, noise, target), precision)
    result = network.forward(loss, weight, optimizer.step_table(steps), backward=True)
    network.backward(result)
    adam = optimizer.AdamState(tuple(parameters), tuple(exp_avgs), tuple(exp_avg_sqs), tuple(steps), learning_rate)
    assert result.losses is not None
    return optimizer.adam_step_(
        network.extents, *result.operands, result.losses, adam, targets, tau, len(actions), precision
    )


_mlp_training_step_.register_fake(lambda observations, actions, *_: actions.new_empty(3))


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
    activation(stack.activation)
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
    a GPU. Raises ``ValueError`` naming what is wrong.
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
    formulas at the top. The loss and its derivative come from the forward pass.
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
    """One step of Adam on a loss, in place, and of the Polyak average ``targets`` of the parameters.

    ``packed`` are the stack's weights as they are now. ``targets``, in the order of ``stack.parameters``, move towards
    the parameters as they were before the step. The state of ``adam`` is read and written; moments and step counters
    are its own. Returns loss, mean output of member 0 and mean target: [3] on the device.
    Predicted against gradients followed by ``torch.optim.Adam(fused=True)`` and a separate average: 32 bytes moved a
    parameter instead of 44 (24 instead of 32 without targets), and about 6 launches a network fewer. Hence it is the
    learner's default; not yet measured on a GPU.
    Raises ``ValueError`` naming what is wrong; then nothing was changed.
    """
    layout = _check(stack, batch, loss, weight)
    if (batch.noise is None) == (batch.target is None):
        raise ValueError("noise and target are both given or both None, expected one: each of them says the target")
    if batch.noise is not None and (batch.time is None or layout.output_dim != layout.action_dim):
        raise ValueError(
            "noise is given, expected a network that takes the time and returns one output an action entry"
        )
    if packed.hidden_dims != layout.widths or packed.members != layout.members:
        raise ValueError(f"packed has widths {packed.hidden_dims}, expected {layout.widths}: pack the stack anew")
    state = optimizer.adam_state(adam, stack.parameters)
    optimizer.check_state(state, targets, layout)
    lists = (list(tensors) for tensors in (packed.tensors, *state[:4], targets))
    flags = (layout.layer_norm, stack.activation, loss, float(weight), state.learning_rate, float(tau), precision)
    return _mlp_training_step_(*batch, *lists, *flags)
