"""Bounds of an environment's actions: the line between its units and the [-1, 1] in which the policy acts."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from vgf_fast.config import checked_bounds

Actions = TypeVar("Actions", np.ndarray, torch.Tensor)

# How far beyond its bounds an action counts as rounded: in [-1, 1], and relative to a bound of a float32 action.
TOLERANCE, ROUNDING = 1e-5, 1e-6


@dataclasses.dataclass(frozen=True)
class ActionBounds:
    """What -1 and 1 stand for: ``low`` and ``high`` [A] in the environment's units, as tuples of floats.

    An actuator with low = high is locked: whatever the policy says, it gets that number, which is 0 to the policy.
    Raises ``ValueError`` unless both are finite, of one length, and low <= high.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        low, high = checked_bounds("ActionBounds", ("low", "high"), self.low, self.high)
        object.__setattr__(self, "low", low)
        object.__setattr__(self, "high", high)

    @classmethod
    def of(cls, bounds: ActionBounds | tuple[ArrayLike, ArrayLike], action_dim: int) -> ActionBounds:
        """Bounds of ``action_dim`` actuators from (low, high), of which a single number counts for every actuator.

        Raises ``ValueError`` for another number of actuators.
        """
        if not isinstance(bounds, cls):
            if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
                raise ValueError(f"action_bounds is {bounds!r}, expected (low, high) or ActionBounds")
            ends = [np.asarray(end).reshape(-1).tolist() for end in bounds]
            bounds = cls(*(tuple(end * action_dim if len(end) == 1 else end) for end in ends))
        if len(bounds.low) != action_dim:
            raise ValueError(f"action_bounds has {len(bounds.low)} entries, expected {action_dim}: the actions' width")
        return bounds

    @property
    def is_unit(self) -> bool:
        """Whether the units are the policy's own."""
        return set(self.low) == {-1.0} and set(self.high) == {1.0}

    def is_close(self, other: ActionBounds) -> bool:
        """Whether both are the same up to float32's rounding."""
        pairs = ((self.low, other.low), (self.high, other.high))
        return all(len(a) == len(b) and np.allclose(a, b, rtol=ROUNDING, atol=1e-9) for a, b in pairs)

    def __str__(self) -> str:
        return f"[{_listed(self.low)}] to [{_listed(self.high)}]"

    def to_environment(self, action: Actions) -> Actions:
        """Actions [..., A] in [-1, 1] -> the environment's units, in their dtype; -1 and 1 give the bounds exactly."""
        xp, low, high = self._ends(action)
        inside = xp.clip(low / 2 + high / 2 + (high / 2 - low / 2) * action, low, high)
        return xp.where(action <= -1.0, low, xp.where(action >= 1.0, high, inside))

    def from_environment(self, action: Actions, first_row: int = 0) -> Actions:
        """Actions [A] or [M, A] in the environment's units -> [-1, 1] in float64; the bounds give -1 and 1 exactly.

        Rounding beyond the bounds is cut off, locked actuators become 0, and NaN stays. Raises ``ValueError`` for an
        action outside the bounds, naming its row, counted from ``first_row``, and its column.
        """
        xp = torch if isinstance(action, torch.Tensor) else np
        action = action.double() if isinstance(action, torch.Tensor) else action.astype(np.float64)
        _, low, high = self._ends(action)
        half = high / 2 - low / 2
        allowed = TOLERANCE * half + ROUNDING * xp.maximum(abs(low), abs(high))
        outside = (action < low - allowed) | (action > high + allowed)
        if bool(outside.any()):
            row, column = divmod(int(outside.reshape(-1).nonzero()[0][0]), len(self.low))
            raise ValueError(
                f"actions holds {float(action.reshape(-1, len(self.low))[row, column]):.7g} in row {first_row + row}, "
                f"column {column}, expected in [{self.low[column]:.7g}, {self.high[column]:.7g}]: its bounds"
            )
        locked = half == 0.0
        scaled = xp.clip((action - (low / 2 + high / 2)) / xp.where(locked, 1.0, half), -1.0, 1.0)
        scaled = xp.where(action == low, -1.0, xp.where(action == high, 1.0, scaled))
        return xp.where(locked & (action == action), 0.0, scaled)

    def _ends(self, action: np.ndarray | torch.Tensor) -> tuple[Any, Any, Any]:
        """The array library of the actions, and both bounds in their dtype where they lie."""
        if action.shape[-1:] != (len(self.low),):
            raise ValueError(f"actions has shape {tuple(action.shape)}, expected (*, {len(self.low)})")
        if isinstance(action, torch.Tensor):
            ends = torch.tensor((self.low, self.high), dtype=action.dtype, device=action.device)
            return torch, ends[0], ends[1]
        return np, np.asarray(self.low, action.dtype), np.asarray(self.high, action.dtype)


def _listed(values: tuple[float, ...]) -> str:
    """List the values, of which one stands for all where they are equal."""
    return ", ".join(f"{value:.7g}" for value in (values[:1] if len(set(values)) == 1 else values))
