"""The torch backend's networks on a CPU with oneDNN: weights in its blocked layout, rows a cache's worth at a time.

The formulas and their order are ``reference``'s. Laying a weight out costs as much as a product with few rows, so it
pays where a weight meets many rows, or is kept. Members are taken one by one, which leaves LayerNorm its own weights.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from vgf_fast.reference import LAYER_NORM_EPS, MLPWeights, activate_, activation_backward

CHUNK_ENTRIES = 640 * 512  # of one layer's activations: rows whose activations stay in the caches
MIN_BLOCKED = 256 * 256  # entries of a weight from which on another layout is faster
MIN_ROWS = 256  # from which on laying out the weights for one use pays


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies ``dtype`` by weights laid out in advance."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    try:
        x = torch.ones(2, 16, dtype=dtype, device="cpu")
        weight = torch.ops.mkldnn._reorder_linear_weight(torch.ones(16, 16, dtype=dtype, device="cpu"), 2)
        out = torch.ops.mkldnn._linear_pointwise(x, weight, None, "relu", [], "")
    except (AttributeError, RuntimeError):
        # Private operators of PyTorch, and not every CPU has them for bfloat16.
        return False
    return bool((out == 16.0).all())


def supports(mlp: MLPWeights, rows: int) -> bool:
    """Whether to lay out the weights for ``rows`` rows: where that is possible, and they are many."""
    first = mlp.weights[0]
    return rows >= MIN_ROWS and first.device.type == "cpu" and _multiplies(first.dtype)


def chunk_rows(mlp: MLPWeights | BlockedMLP) -> int:
    """Rows taken at a time."""
    width = mlp.members[0].rest.shape[1] if isinstance(mlp, BlockedMLP) else mlp.weights[0].shape[2]
    return max(CHUNK_ENTRIES // width, 1)


class Layer(NamedTuple):
    """One hidden layer of one member after the first."""

    forward: Tensor  # blocked, for h W
    backward: Tensor | None  # blocked, for g W^T
    bias: Tensor


class Member(NamedTuple):
    """One perceptron."""

    state: Tensor  # [O, H] the state's rows of the first layer
    rest: Tensor  # [R, H] its other rows
    bias: Tensor  # [H] of the first layer
    layers: tuple[Layer, ...]
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]
    head: Tensor  # [H, out]
    head_bias: Tensor


class BlockedMLP(NamedTuple):
    """A stack of perceptrons laid out for products with about ``rows`` rows."""

    members: tuple[Member, ...]
    activation: str
    dtype: torch.dtype


def block(mlp: MLPWeights, observation_dim: int, rows: int, backward: bool) -> BlockedMLP:
    """Lay out a stack on [state, rest]; ``backward`` for gradients with respect to the rest too."""

    def lay_out(weight: Tensor) -> Tensor:
        """A weight [out, in]; small ones lie in the cache as they are."""
        weight = weight.contiguous()
        if weight.numel() < MIN_BLOCKED:
            return weight
        return torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    mlp = mlp.detach()
    members = []
    for e in range(mlp.weights[0].shape[0]):
        first, *hidden, head = (weight[e] for weight in mlp.weights)
        bias, *biases, head_bias = (vector[e] for vector in mlp.biases)
        layers = tuple(
            Layer(
                lay_out(weight.t()),
                lay_out(weight) if backward else None,
                vector.clone(),
            )
            for weight, vector in zip(hidden, biases, strict=True)
        )
        scales, shifts = (tuple(v[e].clone() for v in group) for group in (mlp.norm_scales, mlp.norm_biases))
        first = first.clone()
        members.append(
            Member(
                first[:observation_dim],
                first[observation_dim:],
                bias.clone(),
                layers,
                scales,
                shifts,
                head.clone(),
                head_bias.clone(),
            )
        )
    return BlockedMLP(tuple(members), mlp.activation, mlp.weights[0].dtype)


class _Tape(NamedTuple):
    """What the backward pass needs of one hidden layer: [R, H], [R, 1], [R, 1], [R, H]."""

    z: Tensor
    mean: Tensor | None
    rstd: Tensor | None
    y: Tensor  # before the activation (for relu, after it)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, attribute: str = "none") -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, attribute, [], "")


def _normalise_and_activate(
    member: Member, activation: str, i: int, z: Tensor, tape: list[_Tape] | None, activated: bool = False
) -> Tensor:
    mean = rstd = None
    y = z
    if member.scales:
        y, mean, rstd = torch.native_layer_norm(z, z.shape[-1:], member.scales[i], member.shifts[i], LAYER_NORM_EPS)
    if tape is not None:
        tape.append(_Tape(z, mean, rstd, y))
    return y if activated else activate_(activation, y)


def _hidden(member: Member, activation: str, z: Tensor, tape: list[_Tape] | None = None) -> Tensor:
    """From the first layer's linear part to the last activation: [R, H]."""
    # oneDNN applies relu as it stores the product.
    fused = activation == "relu" and not member.scales
    h = _normalise_and_activate(member, activation, 0, z, tape)
    for i, layer in enumerate(member.layers, start=1):
        z = _linear(h, layer.forward, layer.bias, "relu" if fused else "none")
        h = _normalise_and_activate(member, activation, i, z, tape, activated=fused)
    return h


def _backward(member: Member, activation: str, grad: Tensor, tape: list[_Tape]) -> Tensor:
    """From the gradient of the last activation to that of the rest: [R, H] -> [R, rest]."""
    for i in range(len(tape) - 1, -1, -1):
        layer = tape.pop()
        grad = activation_backward(activation, grad, layer.y)
        if layer.mean is not None and layer.rstd is not None:
            grad = torch.ops.aten.native_layer_norm_backward(
                grad,
                layer.z,
                layer.z.shape[-1:],
                layer.mean,
                layer.rstd,
                member.scales[i],
                member.shifts[i],
                [True, False, False],
            )[0]
        if i > 0:
            backward = member.layers[i - 1].backward
            assert backward is not None
            grad = _linear(grad, backward, None)
    return grad @ member.rest.t()


class BlockedAtStates:
    """A blocked stack bound to B states, whose share of the first layer is computed once."""

    def __init__(self, mlp: BlockedMLP, observations: Tensor) -> None:
        self.mlp = mlp
        states = observations.detach().to(mlp.dtype)
        self.shares = [torch.addmm(member.bias, states, member.state) for member in mlp.members]

    def first_layer(self, e: int, rest: Tensor, weight: Tensor, start: int) -> Tensor:
        """z of member ``e``'s first layer for the states from ``start`` on: rest [b, N, R] -> [b * N, H]."""
        batch, particles, width = rest.shape
        z = rest.reshape(batch * particles, width).to(self.mlp.dtype) @ weight
        z.view(batch, particles, z.shape[1]).add_(self.shares[e][start : start + batch].unsqueeze(1))
        return z


class BlockedCriticAtStates(BlockedAtStates):
    """``reference.CriticAtStates`` with blocked weights."""

    def values(self, actions: Tensor) -> Tensor:
        """Q of every member: actions [B, N, A] -> [E, B, N], in float32."""
        parts = [self._values(chunk, start) for start, chunk in _chunks(self.mlp, actions)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def score(self, actions: Tensor, aggregation: str = "mean") -> Tensor:
        """grad_a of the members' mean or minimum: [B, N, A]."""
        score = torch.empty(actions.shape, dtype=actions.dtype, device="cpu")
        for start, chunk in _chunks(self.mlp, actions):
            self._score(chunk, start, aggregation, score[start : start + len(chunk)])
        return score

    def values_and_score(self, actions: Tensor, aggregation: str = "mean") -> tuple[Tensor, Tensor]:
        """Both."""
        q = torch.empty(len(self.mlp.members), *actions.shape[:2], dtype=torch.float32, device="cpu")
        score = torch.empty(actions.shape, dtype=actions.dtype, device="cpu")
        for start, chunk in _chunks(self.mlp, actions):
            part = slice(start, start + len(chunk))
            self._score(chunk, start, aggregation, score[part], q[:, part])
        return q, score

    def _values(self, actions: Tensor, start: int) -> Tensor:
        q = [
            self._head(member, _hidden(member, self.mlp.activation, self._first(e, actions, start)))
            for e, member in enumerate(self.mlp.members)
        ]
        return torch.stack(q).view(len(q), *actions.shape[:2]).float()

    @staticmethod
    def _head(member: Member, h: Tensor) -> Tensor:
        return torch.addmm(member.head_bias, h, member.head)

    def _first(self, e: int, actions: Tensor, start: int) -> Tensor:
        return self.first_layer(e, actions, self.mlp.members[e].rest, start)

    def _score(self, actions: Tensor, start: int, aggregation: str, out: Tensor, values: Tensor | None = None) -> None:
        """Write the score of a chunk to ``out`` [b, N, A], and its values to ``values`` [E, b, N]."""
        members, activation = self.mlp.members, self.mlp.activation
        tapes: list[list[_Tape]] = []
        q: list[Tensor] = []
        if aggregation == "min":
            for e, member in enumerate(members):
                tapes.append([])
                q.append(self._head(member, _hidden(member, activation, self._first(e, actions, start), tapes[e])))
            smallest = torch.cat(q, dim=1).argmin(dim=1, keepdim=True)
        for e, member in enumerate(members):
            head = member.head.t()  # [1, H]
            if aggregation == "min":
                tape, grad = tapes[e], (smallest == e) * head
            else:
                tape = []
                h = _hidden(member, activation, self._first(e, actions, start), tape)
                if values is not None:
                    q.append(self._head(member, h))
                grad = (head / len(members)).repeat(len(tape[-1].y), 1)
            part = _backward(member, activation, grad, tape).view(actions.shape)
            if e == 0:
                out.copy_(part)
            else:
                out.add_(part)
        if values is not None:
            values.copy_(torch.stack(q).view(values.shape))


def _chunks(mlp: BlockedMLP, rest: Tensor) -> list[tuple[int, Tensor]]:
    """States [B, N, ...] in parts of about ``chunk_rows`` rows, each with the number of its first state."""
    states = max(chunk_rows(mlp) // rest.shape[1], 1)
    return [(start, rest[start : start + states]) for start in range(0, len(rest), states)] or [(0, rest)]


def behavior_flow(velocity: BlockedMLP, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """``reference.behavior_flow`` with blocked weights."""
    (member,) = velocity.members
    field = BlockedAtStates(velocity, observations)
    action_weight, time_weight = member.rest[:-1], member.rest[-1:]
    (share,) = field.shares
    out = torch.empty(noise.shape, dtype=noise.dtype, device="cpu")
    for start, x in _chunks(velocity, noise):
        for k in range(steps):
            field.shares[0] = torch.add(share, time_weight, alpha=k / steps)
            h = _hidden(member, velocity.activation, field.first_layer(0, x, action_weight, start))
            v = torch.addmm(member.head_bias, h, member.head).view(x.shape)
            x = x.add(v, alpha=1.0 / steps)
        torch.clamp(x, -1.0, 1.0, out=out[start : start + len(x)])
    return out
