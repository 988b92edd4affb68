"""What an update takes: a batch of transitions and the random numbers of it, checked or drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vgf_fast.common.arrays import as_tensor
from vgf_fast.kernels import ranges

if TYPE_CHECKING:
    from vgf_fast.policy import VGFPolicy

BATCH_FIELDS = ("observations", "actions", "next_observations", "rewards", "masks")
RANGES = {"actions": (-1, 1), "masks": (0, 1), "bc_t": (0, 1)}  # of the numbers in a batch or in noise


def checked_batch(policy: VGFPolicy, batch: Mapping[str, Any], check: bool) -> dict[str, Tensor]:
    """The fields of a batch of B transitions as tensors, on the policy's device and in its dtype.

    ``check=False`` skips looking at their values. Raises ``ValueError`` or ``TypeError`` naming the field that is
    missing, of another shape, dtype or device, not finite, or out of its range.
    """
    _check_fields("batch", batch, BATCH_FIELDS)
    rewards = as_tensor("batch['rewards']", batch["rewards"])
    if rewards.ndim != 1:
        raise ValueError(f"batch['rewards'] has shape {tuple(rewards.shape)}, expected (B,): one number a transition")
    size = len(rewards)
    if size < 1:
        raise ValueError("batch is empty, expected at least one transition")
    observation, action = (size, policy.config.observation_dim), (size, policy.config.action_dim)
    shapes = dict(zip(BATCH_FIELDS, (observation, action, observation, (size,), (size,)), strict=True))
    data = {}
    for name, shape in shapes.items():
        data[name] = _tensor(policy, f"batch[{name!r}]", batch[name], shape)
        if check:
            _check_values(f"batch[{name!r}]", data[name], *RANGES.get(name, ()))
    return data


def noise_shapes(policy: VGFPolicy, size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the random numbers of an update on ``size`` transitions, by name."""
    config = policy.config
    shapes: dict[str, tuple[int, ...]] = {"particles": (size, config.particles, config.action_dim)}
    if config.behavior == "flow":
        shapes |= {"bc_x0": (size, config.action_dim), "bc_t": (size, 1)}
    return shapes


def checked_noise(policy: VGFPolicy, noise: Mapping[str, Any], size: int, check: bool) -> dict[str, Tensor]:
    """Random numbers that were given, as ``checked_batch`` checks a batch's fields, with the same errors."""
    shapes = noise_shapes(policy, size)
    _check_fields("noise", noise, shapes)
    given = {name: _tensor(policy, f"noise[{name!r}]", noise[name], shape) for name, shape in shapes.items()}
    for name, tensor in given.items() if check else ():
        _check_values(f"noise[{name!r}]", tensor, *RANGES.get(name, ()))
    return given


def drawn_noise(policy: VGFPolicy, size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random numbers of an update on ``size`` transitions: times uniform in [0, 1), the others standard normal."""
    draw = {"bc_t": torch.Tensor.uniform_}
    with ranges.span("vgf/noise"):
        return {
            name: draw.get(name, torch.Tensor.normal_)(
                torch.empty(shape, device=policy.device, dtype=policy.dtype), generator=generator
            )
            for name, shape in noise_shapes(policy, size).items()
        }


def _tensor(policy: VGFPolicy, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    tensor = as_tensor(name, value)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    if isinstance(value, Tensor) and tensor.device != policy.device:
        raise ValueError(f"{name} is on {tensor.device}, but the policy is on {policy.device}: move one of them")
    tensor = tensor.to(policy.device, policy.dtype)
    # A tensor of inference mode cannot be kept for a backward pass.
    return tensor.clone() if tensor.is_inference() else tensor


def _check_fields(name: str, given: Mapping[str, Any], fields: Iterable[str]) -> None:
    """Raise ``TypeError`` for what is no mapping, and ``ValueError`` for one that lacks a field."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} is a {type(given).__name__}, expected a dict with {', '.join(fields)}")
    missing = [field for field in fields if field not in given]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}; it needs {', '.join(fields)}")


def _check_values(name: str, tensor: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise ``ValueError`` naming the first row of ``tensor``, as the update takes it, not finite or out of range."""
    if tensor.device.type != "cpu":
        return
    rows = tensor.reshape(len(tensor), -1)
    for wrong, told in (
        (~torch.isfinite(rows), "has NaN or infinity in row {row}, expected finite numbers"),
        ((rows < low) | (rows > high), f"leaves [{low}, {high}] in row {{row}}: {{values}}"),
    ):
        if wrong.any():
            row = int(wrong.any(dim=1).nonzero()[0])
            raise ValueError(f"{name} {told.format(row=row, values=tensor[row].tolist())}")
