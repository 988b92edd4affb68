"""Stacks of perceptrons in plain PyTorch, in any floating dtype, with closed-form gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LAYER_NORM_EPS = 1e-6
BATCHED_ROWS = 64  # up to so many rows the CPU multiplies all members at once


class MLPWeights(NamedTuple):
    """A stack of E perceptrons of one shape: linear, LayerNorm (optional), activation; linear at the end."""

    weights: tuple[Tensor, ...]  # per layer [E, in, out]
    biases: tuple[Tensor, ...]  # per layer [E, out]
    norm_scales: tuple[Tensor, ...]  # per hidden layer [E, out]; empty without LayerNorm
    norm_biases: tuple[Tensor, ...]  # per hidden layer [E, out]; empty without LayerNorm
    activation: str  # "relu" | "gelu" (tanh approximation) | "swish"

    def to(self, dtype: torch.dtype) -> MLPWeights:
        """The same weights in another dtype; gradients flow back to these."""
        return self._map(lambda tensor: tensor.to(dtype))

    def detach(self) -> MLPWeights:
        """The same weights outside of any autograd graph."""
        return self._map(Tensor.detach)

    def _map(self, function: Callable[[Tensor], Tensor]) -> MLPWeights:
        weights, biases, scales, shifts = (tuple(map(function, group)) for group in self[:4])
        return MLPWeights(weights, biases, scales, shifts, self.activation)


class Activation(NamedTuple):
    """An activation, and what its derivative makes of a gradient."""

    apply: Callable[[Tensor], Tensor]
    apply_: Callable[[Tensor], Tensor]  # the same, and may overwrite its argument
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient, input) -> gradient; relu's input may be its output


ACTIVATIONS = {
    "relu": Activation(F.relu, torch.relu_, lambda grad, y: torch.ops.aten.threshold_backward(grad, y, 0)),
    "gelu": Activation(
        lambda y: F.gelu(y, approximate="tanh"),
        lambda y: F.gelu(y, approximate="tanh"),
        lambda grad, y: torch.ops.aten.gelu_backward(grad, y, approximate="tanh"),
    ),
    "swish": Activation(F.silu, F.silu, lambda grad, y: torch.ops.aten.silu_backward(grad, y)),
}


def activation(name: str) -> Activation:
    """The activation called ``name``. Raises ``ValueError`` naming the known ones if there is none."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


def activate_(name: str, y: Tensor) -> Tensor:
    """The activation of ``y``; relu overwrites its argument, whose sign its derivative can still be read from."""
    return activation(name).apply_(y)


def activation_backward(name: str, grad: Tensor, y: Tensor) -> Tensor:
    """``grad`` times the activation's derivative at its input ``y`` (for relu, ``y`` may be its output)."""
    return activation(name).backward(grad, y)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Member by member ``x @ weight + bias``: x [E, R, in], weight [E, in, out], bias [E, 1, out] -> [E, R, out]."""
    members, rows, _ = x.shape
    if members == 1 or rows <= BATCHED_ROWS or x.device.type != "cpu":
        return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias, x, weight)
    # With many rows the CPU's batched product is a fifth slower than one product a member.
    out = x.new_empty(members, rows, weight.shape[2])
    for e in range(members):
        if bias is None:
            torch.mm(x[e], weight[e], out=out[e])
        else:
            torch.addmm(bias[e], x[e], weight[e], out=out[e])
    return out


def layer_norm_backward(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of (z - mean) * rstd with respect to z, all over the last axis."""
    return torch.ops.aten.native_layer_norm_backward(
        grad, z, z.shape[-1:], mean, rstd, None, None, [True, False, False]
    )[0]


def mlp_forward(mlp: MLPWeights, x: Tensor) -> Tensor:
    """Differentiable forward pass: x [R, in] -> [E, R, out]. The one to train with."""
    h = x.to(mlp.weights[0].dtype).expand(mlp.weights[0].shape[0], -1, -1)
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        h = torch.baddbmm(bias.unsqueeze(1), h, weight)
        if i + 1 < len(mlp.weights):
            if mlp.norm_scales:
                h = F.layer_norm(h, h.shape[-1:], eps=LAYER_NORM_EPS)
                h = torch.addcmul(mlp.norm_biases[i].unsqueeze(1), h, mlp.norm_scales[i].unsqueeze(1))
            h = activation(mlp.activation).apply(h)
    return h


def member_values(critic: MLPWeights, observations: Tensor, actions: Tensor) -> Tensor:
    """Differentiable Q of every member at one action a state: [B, O], [B, A] -> [E, B], in float32 at least."""
    q = mlp_forward(critic, torch.cat([observations, actions], dim=-1)).squeeze(-1)
    return q.to(torch.promote_types(q.dtype, torch.float32))


class _Layer(NamedTuple):
    """What the backward pass needs of one hidden layer."""

    z: Tensor  # [E, R, H] before LayerNorm
    mean: Tensor | None  # [E, R, 1]
    rstd: Tensor | None  # [E, R, 1]
    y: Tensor  # [E, R, H] before the activation (for relu, after it)


class StackAtStates:
    """A stack of MLPs on [state, rest] bound to B states, whose share of the first layer is computed once.

    ``state_share`` is W_s s + b, [E, B, H]; every call adds W_r r for rows r of N particles a state.
    """

    def __init__(self, mlp: MLPWeights, observations: Tensor) -> None:
        mlp = mlp.detach()
        first = mlp.weights[0]
        self.activation = mlp.activation
        self.dtype = first.dtype
        self.rest_weight = first[:, observations.shape[-1] :]
        self.weights = (self.rest_weight, *mlp.weights[1:])
        self.biases, self.scales, self.shifts = (
            [tensor.unsqueeze(1) for tensor in group] for group in (mlp.biases, mlp.norm_scales, mlp.norm_biases)
        )
        x = observations.detach().to(self.dtype).expand(first.shape[0], -1, -1)
        self.state_share = matmul(x, first[:, : observations.shape[-1]], self.biases[0])

    def first_layer(self, rest: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        """z of the first layer: rest [B, N, R], its weight [E, R, H], the states' share [E, B, H] -> [E, B * N, H]."""
        batch, particles, width = rest.shape
        flat = rest.detach().reshape(batch * particles, width).to(self.dtype)
        z = matmul(flat.expand(weight.shape[0], -1, -1), weight)
        z.view(z.shape[0], batch, particles, z.shape[2]).add_(share.unsqueeze(2))
        return z

    def hidden(self, z: Tensor, tape: list[_Layer] | None = None) -> Tensor:
        """From z of the first layer to the last activation [E, R, H]; ``tape`` collects what a backward needs."""
        h = self._normalise_and_activate(0, z, tape)
        for i in range(1, len(self.weights) - 1):
            h = self._normalise_and_activate(i, matmul(h, self.weights[i], self.biases[i]), tape)
        return h

    def _normalise_and_activate(self, i: int, z: Tensor, tape: list[_Layer] | None) -> Tensor:
        mean = rstd = None
        y = z
        if self.scales:
            y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], None, None, LAYER_NORM_EPS)
            torch.addcmul(self.shifts[i], y, self.scales[i], out=y)
        if tape is not None:
            tape.append(_Layer(z, mean, rstd, y))
        return activate_(self.activation, y)

    def output(self, h: Tensor) -> Tensor:
        """The last linear layer: [E, R, H] -> [E, R, out]."""
        return matmul(h, self.weights[-1], self.biases[-1])


class CriticAtStates(StackAtStates):
    """An ensemble critic bound to B states: values, and the action gradient of the aggregated value."""

    def values(self, actions: Tensor) -> Tensor:
        """Q of every member: actions [B, N, A] -> [E, B, N], in float32 at least."""
        return self._as_values(self.output(self._hidden_at(actions)), actions)

    def values_and_score(self, actions: Tensor, aggregation: str = "mean") -> tuple[Tensor, Tensor]:
        """Q of every member [E, B, N] and grad_a Q_agg [B, N, A], with Q_agg the mean or the minimum over members.

        The gradient of the minimum is that of the smallest member, particle by particle. (ALGORITHM: flow step 1.)
        """
        tape: list[_Layer] = []
        q = self.output(self._hidden_at(actions, tape))
        return self._as_values(q, actions), self._backward(tape, q, aggregation, actions)

    def score(self, actions: Tensor, aggregation: str = "mean") -> Tensor:
        """The score of ``values_and_score`` alone: the mean's gradient needs no values."""
        tape: list[_Layer] = []
        h = self._hidden_at(actions, tape)
        return self._backward(tape, self.output(h) if aggregation == "min" else None, aggregation, actions)

    def _hidden_at(self, actions: Tensor, tape: list[_Layer] | None = None) -> Tensor:
        return self.hidden(self.first_layer(actions, self.rest_weight, self.state_share), tape)

    def _backward(self, tape: list[_Layer], q: Tensor | None, aggregation: str, actions: Tensor) -> Tensor:
        head = self.weights[-1].transpose(1, 2)  # [E, 1, H]
        members = head.shape[0]
        if q is None or aggregation == "mean":
            # Copied out: element-wise products run several times slower over a broadcast tensor.
            grad = (head / members).repeat(1, tape[-1].y.shape[1], 1)
        else:
            smallest = q.argmin(dim=0, keepdim=True) == torch.arange(members, device=q.device).view(-1, 1, 1)
            grad = smallest * head
        for i in range(len(tape) - 1, -1, -1):
            layer = tape.pop()
            grad = activation_backward(self.activation, grad, layer.y)
            if layer.mean is not None and layer.rstd is not None:
                grad.mul_(self.scales[i])
                grad = layer_norm_backward(grad, layer.z, layer.mean, layer.rstd)
            grad = matmul(grad, self.weights[i].transpose(1, 2))
        return grad.to(actions.dtype).sum(dim=0).view_as(actions)

    @staticmethod
    def _as_values(q: Tensor, actions: Tensor) -> Tensor:
        return q.view(q.shape[0], *actions.shape[:2]).to(torch.promote_types(q.dtype, torch.float32))


class FieldAtStates(StackAtStates):
    """A score field bound to B states."""

    def __call__(self, actions: Tensor) -> Tensor:
        """Scores at actions [B, N, A] -> [B, N, A], in the actions' dtype."""
        z = self.first_layer(actions, self.rest_weight, self.state_share)
        return self.output(self.hidden(z)).view_as(actions).to(actions.dtype)
