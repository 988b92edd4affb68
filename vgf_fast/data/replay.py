"""Transitions of an online phase on a device: a ring that forgets the oldest."""

from __future__ import annotations

from typing import Any

import torch

from vgf_fast.common.ambient import neutral
from vgf_fast.common.arrays import with_values
from vgf_fast.config import integer
from vgf_fast.data.dataset import ACTION_CLIP, ACTION_TOLERANCE, Dataset, allocate, check_storage


class ReplayBuffer:
    """At most ``capacity`` transitions on one device, sampled uniformly with replacement.

    All memory is taken at the start. A row is that of ``Dataset``: observation, action, next observation, reward, mask.
    """

    @neutral
    def __init__(
        self,
        capacity: int,
        observation_dim: int,
        action_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """An empty buffer; the default device is the CPU.

        Raises ``ValueError`` for sizes below 1 or too large for the device, and for a device that is not there, and
        ``TypeError`` for a dtype that is not floating.
        """
        capacity = integer("capacity", capacity, 1)
        observation_dim = integer("observation_dim", observation_dim, 1)
        action_dim = integer("action_dim", action_dim, 1)
        place = check_storage(device, dtype)
        storage = allocate(capacity, 2 * observation_dim + action_dim + 2, dtype, place).zero_()
        ends = torch.zeros(capacity, dtype=torch.bool, device=place)
        # All rows as a data set, for its views of the fields; what is sampled are the filled ones.
        self._rows = Dataset(storage, ends, observation_dim, action_dim)
        self.size = 0
        self.cursor = 0  # where the next transition goes

    @classmethod
    @neutral
    def of(cls, dataset: Dataset, capacity: int) -> ReplayBuffer:
        """A buffer that begins with a data set's transitions; it holds at least one more than they are."""
        buffer = cls(
            max(capacity, dataset.size + 1), dataset.observation_dim, dataset.action_dim,
            device=dataset.device, dtype=dataset.dtype,
        )  # fmt: skip
        for name in ("observations", "actions", "next_observations", "rewards", "masks"):
            getattr(buffer._rows, name)[: dataset.size] = getattr(dataset, name)
        buffer.size = buffer.cursor = dataset.size
        return buffer

    @property
    def _storage(self) -> torch.Tensor:
        return self._rows._storage

    @property
    def capacity(self) -> int:
        """Most transitions it can hold."""
        return self._storage.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the transitions lie."""
        return self._storage.device

    @neutral
    def add(self, observation: Any, action: Any, next_observation: Any, reward: float, mask: float) -> None:
        """Add a transition: observation and next_observation [O], action [A] in [-1, 1], mask in [0, 1].

        The action is kept in [-(1 - 1e-5), 1 - 1e-5], as a data set's. Raises ``ValueError`` for wrong lengths, for
        what is NaN or infinite in the buffer's dtype, and for another action or mask; ``TypeError`` for what is not
        numbers. Then nothing was added.
        """
        o, a = self._rows.observation_dim, self._rows.action_dim
        parts = {
            "observation": (with_values("observation", observation), o),
            "action": (with_values("action", action), a),
            "next_observation": (with_values("next_observation", next_observation), o),
            "reward": (with_values("reward", reward), 1),
            "mask": (with_values("mask", mask), 1),
        }
        values = []
        for name, (value, length) in parts.items():
            if value.numel() != length:
                raise ValueError(f"{name} has {value.numel()} entries, expected {length}")
            stored = value.flatten().to("cpu", self._storage.dtype)
            if not bool(stored.isfinite().all()):
                raise ValueError(f"{name} has NaN or infinity in {stored.dtype}, expected finite numbers")
            if name == "action" and value.abs().max() > 1.0 + ACTION_TOLERANCE:
                raise ValueError(
                    f"action is {value.tolist()}, expected in [-1, 1]: rescale it by "
                    "vgf_fast.common.bounds.ActionBounds"
                )
            values.append(stored.clamp(-ACTION_CLIP, ACTION_CLIP) if name == "action" else stored)
        if not 0 <= values[-1].item() <= 1:
            raise ValueError(f"mask is {values[-1].item():.7g}, expected in [0, 1]")
        self._storage[self.cursor].copy_(torch.cat(values))
        self.cursor = (self.cursor + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    @neutral
    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Transitions drawn uniformly with replacement, as ``Dataset.sample``. Raises ``ValueError`` when empty."""
        if self.size == 0:
            raise ValueError("the replay buffer is empty, expected at least one transition")
        return self._rows._draw(self.size, batch_size, generator)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """What ``restore`` takes: the filled rows, and counts."""
        return {"rows": self._storage[: self.size]}, {"capacity": self.capacity, "cursor": self.cursor}

    @neutral
    def restore(self, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
        """Become what ``state`` was taken of. Raises ``ValueError`` for another capacity or width."""
        rows = tensors["rows"]
        if counts["capacity"] != self.capacity or rows.shape[1:] != self._storage.shape[1:]:
            raise ValueError(
                f"the saved buffer has capacity {counts['capacity']} and rows of {rows.shape[1]}, expected "
                f"{self.capacity} and {self._storage.shape[1]}"
            )
        self._storage[: len(rows)].copy_(rows)
        self.size, self.cursor = len(rows), counts["cursor"]
