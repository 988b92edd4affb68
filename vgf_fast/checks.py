"""Networks whose layers do not fit together, and numbers that are not finite, named before or after they are used.

Numbers are looked at on a CPU, where that costs next to nothing: on a GPU, looking would wait for the device.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Iterator
from typing import get_args

import torch
from torch import Tensor

from vgf_fast.common.arrays import has_memory
from vgf_fast.config import Activation
from vgf_fast.reference import MLPWeights

_are_left: contextvars.ContextVar[bool] = contextvars.ContextVar("are_left", default=False)


@contextlib.contextmanager
def results_left() -> Iterator[None]:
    """Let results that are not finite pass inside this block: training notices them by its losses."""
    token = _are_left.set(True)
    try:
        yield
    finally:
        _are_left.reset(token)


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # A sum is the quickest, and only its own overflow needs a second look.
    return math.isfinite(tensor.detach().sum().item()) or bool(tensor.isfinite().all())


def check_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """On a CPU, raise ``ValueError`` naming the first row that is not finite in the dtype it is used in."""
    if not tensor.is_cpu:
        return
    used = tensor.to(dtype)
    if not is_finite(used):
        row = int((~used.isfinite()).reshape(len(used), -1).any(dim=1).nonzero()[0].item()) if used.ndim else 0
        raise ValueError(f"{name} has NaN or infinity in row {row}, expected finite numbers in {dtype}")


def check_range(name: str, tensor: Tensor, network: MLPWeights) -> None:
    """On a CPU, raise ``ValueError`` naming an input so large that LayerNorm's squares overflow without a NaN."""
    if not tensor.numel() or not _are_looked_at(tensor):
        return
    dtype = network.weights[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    # A layer's sums may be that many times larger than its input.
    limit = min(torch.finfo(dtype).max, 1e-4 * torch.finfo(wide).max ** 0.5)
    largest = torch.linalg.vector_norm(tensor.detach(), math.inf).item()
    if limit < largest < math.inf:
        raise ValueError(f"{name} reaches {largest:g}, expected smaller numbers: squares leave the range of {wide}")


def _are_looked_at(tensor: Tensor) -> bool:
    return not torch.compiler.is_compiling() and tensor.is_cpu and not _are_left.get() and has_memory(tensor)


def check_weights(name: str, mlp: MLPWeights) -> None:
    """Raise ``ValueError`` naming the first of a network's tensors that has NaN or infinity."""
    for group, tensors in zip(mlp._fields, mlp[:4], strict=False):
        for i, tensor in enumerate(tensors):
            if not is_finite(tensor):
                raise ValueError(f"{name}'s {group}[{i}] has values that are not finite, expected finite weights")


def check_result(result: Tensor, network: tuple[str, MLPWeights] | None = None, **inputs: Tensor) -> None:
    """On a CPU, raise ``ValueError`` naming which of the inputs or weights made a result that is not finite.

    Where all of them are finite, the largest input is named: numbers in between are too large for their dtype.
    """
    if not _are_looked_at(result) or is_finite(result):
        return
    dtype = result.dtype if network is None else network[1].weights[0].dtype
    for name, tensor in inputs.items():
        check_finite(name, tensor, dtype)
    if network is not None:
        check_weights(*network)
    name = max(inputs, key=lambda name: float(inputs[name].detach().abs().max()))
    largest = float(inputs[name].detach().abs().max())
    raise ValueError(f"{name} reaches {largest:g}, expected smaller numbers: the result leaves the range of {dtype}")


def check_network(name: str, mlp: MLPWeights) -> None:
    """Raise ``ValueError`` naming a tensor of a network that does not fit the others in shape, dtype or device."""
    activations = get_args(Activation)
    if mlp.activation not in activations:
        raise ValueError(
            f"{name}.activation is {mlp.activation!r}, expected one of {', '.join(map(repr, activations))}"
        )
    first = mlp.weights[0]
    for i, weight in enumerate(mlp.weights):
        if weight.ndim != 3:
            raise ValueError(f"{name}.weights[{i}] has shape {tuple(weight.shape)}, expected (E, in, out)")
    members, widths = first.shape[0], [first.shape[1], *(weight.shape[2] for weight in mlp.weights)]
    vectors = [(members, width) for width in widths[1:]]
    norms = vectors[:-1] if mlp.norm_scales or mlp.norm_biases else []
    shapes: dict[str, list[tuple[int, ...]]] = {
        "weights": [(members, *pair) for pair in itertools.pairwise(widths)],
        "biases": list(vectors),
        "norm_scales": list(norms),
        "norm_biases": list(norms),
    }
    for field, expected in shapes.items():
        tensors: tuple[Tensor, ...] = getattr(mlp, field)
        if len(tensors) != len(expected):
            raise ValueError(f"{name}.{field} has {len(tensors)} tensors, expected {len(expected)}")
        for i, (tensor, shape) in enumerate(zip(tensors, expected, strict=True)):
            if tuple(tensor.shape) != shape or tensor.dtype != first.dtype or tensor.device != first.device:
                raise ValueError(
                    f"{name}.{field}[{i}] is {tuple(tensor.shape)}, {tensor.dtype}, on {tensor.device}, expected "
                    f"{shape}, {first.dtype}, on {first.device}"
                )
