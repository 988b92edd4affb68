"""What of an environment's spaces matters here: the width of an observation, the bounds of an action."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from vgf_fast.common.bounds import ActionBounds


class Spaces(NamedTuple):
    """Sizes and bounds of an environment with vector observations and actions."""

    observation_dim: int
    action_low: np.ndarray  # [A]
    action_high: np.ndarray  # [A]

    @property
    def bounds(self) -> ActionBounds | None:
        """Bounds of the actions; None where one is infinite."""
        if not np.isfinite([self.action_low, self.action_high]).all():
            return None
        return ActionBounds(tuple(self.action_low.tolist()), tuple(self.action_high.tolist()))


def spaces_of(env: Any, observation: Any = None, action: Any = None) -> Spaces:
    """Sizes and bounds of an environment, of a vector environment those of one of its environments.

    ``observation`` and ``action`` are its spaces, where they were read before. Raises ``ValueError`` for spaces that
    are no boxes of vectors and for actions that are no real numbers, naming what mends it.
    """
    is_vector = hasattr(env, "single_action_space")
    prefix, wrappers = ("single_", "gymnasium.wrappers.vector") if is_vector else ("", "gymnasium.wrappers")
    observation = getattr(env, f"{prefix}observation_space") if observation is None else observation
    action = getattr(env, f"{prefix}action_space") if action is None else action
    for name, space, mend in (
        ("observation", observation, f"use {wrappers}.FlattenObservation"),
        ("action", action, f"use a wrapper with a Box action space, such as one made by {wrappers}.TransformAction"),
    ):
        if not hasattr(space, "high") or len(space.shape) != 1:
            raise ValueError(f"the {name} space is {space}, expected a Box of vectors: {mend}")
    if not np.issubdtype(action.dtype, np.floating):
        raise ValueError(f"the action space holds {action.dtype}, expected floating numbers")
    return Spaces(observation.shape[0], action.low.copy(), action.high.copy())


def policy_fields(env: Any, *, with_bounds: bool) -> dict[str, Any]:
    """The fields of a policy's configuration that an environment decides: widths and, unless [-1, 1], bounds.

    Raises ``TypeError`` for what is no environment, and ``ValueError`` for spaces that no policy can act in.
    """
    if not hasattr(env, "observation_space"):
        raise TypeError(f"env is {env!r}, expected a Gymnasium environment, as gymnasium.make gives")
    spaces = spaces_of(env)
    observation = getattr(env, "single_observation_space", env.observation_space)
    if not np.issubdtype(observation.dtype, np.floating):
        raise ValueError(f"the observation space holds {observation.dtype}, expected floating numbers")
    fields: dict[str, Any] = {"observation_dim": spaces.observation_dim, "action_dim": len(spaces.action_low)}
    if with_bounds:
        bounds = spaces.bounds
        if bounds is None:
            raise ValueError(
                f"the action space is [{spaces.action_low}, {spaces.action_high}], expected finite bounds: give "
                "action_low and action_high, the range that is meant to be used"
            )
        fields |= {} if bounds.is_unit else {"action_low": bounds.low, "action_high": bounds.high}
    return fields
