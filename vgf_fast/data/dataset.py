"""Transitions resident on a device, sampled uniformly with replacement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from vgf_fast.common.ambient import neutral
from vgf_fast.common.arrays import DTYPES, as_tensor, check_generator, with_values
from vgf_fast.common.bounds import TOLERANCE, ActionBounds
from vgf_fast.common.devices import device_of
from vgf_fast.common.memory import check_fits
from vgf_fast.config import integer, real

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"

# Rounding of a simulator's float32 actions; anything further outside [-1, 1] is another action scale, not rounding.
ACTION_TOLERANCE = TOLERANCE
# The public release keeps actions this far inside the bounds of the box.
ACTION_CLIP = 1.0 - 1e-5


@dataclass(frozen=True)
class DatasetStatistics:
    """What a dataset holds. Returns are undiscounted sums of rewards over whole trajectories.

    Attributes:
        transitions: number of transitions.
        trajectories: number of trajectories.
        return_mean, return_std, return_min, return_max: over trajectories (std is the population's).
        success_fraction: fraction of trajectories with at least one transition whose mask is 0.
        reward_min, reward_max: over transitions.
    """

    transitions: int
    trajectories: int
    return_mean: float
    return_std: float
    return_min: float
    return_max: float
    success_fraction: float
    reward_min: float
    reward_max: float


class Dataset:
    """M transitions (s, a, r, s', mask) on one device; build one with `Dataset.from_arrays`.

    All fields lie in one row-major matrix [M, O + A + O + 2], so that a batch is a single gather; the fields of a batch
    are views of its rows: their last dimension is contiguous, their row stride is the width of the matrix.

    Attributes (views of the storage, not copies):
        observations [M, O], actions [M, A], next_observations [M, O], rewards [M], masks [M], all of `dtype`.
        masks: 1 where the value of the next state is bootstrapped, 0 where it is not.
        terminals [M]: bool, true on the last transition of each trajectory.
        action_bounds: what -1 and 1 stand for in the units the actions were given in; None: not known, or the same.
    """

    def __init__(
        self,
        storage: torch.Tensor,
        terminals: torch.Tensor,
        observation_dim: int,
        action_dim: int,
        action_bounds: ActionBounds | None = None,
    ) -> None:
        """Wrap checked storage; use `from_arrays`, which checks.

        Args:
            storage: [M, 2 O + A + 2], columns observation, action, next observation, reward, mask.
            terminals: [M], bool, on the same device.
            observation_dim: O.
            action_dim: A.
            action_bounds: of the units in which the actions, in [-1, 1] here, were given.
        """
        self._storage = storage
        self._observation_dim = observation_dim
        self._action_dim = action_dim
        self.terminals = terminals
        self.action_bounds = action_bounds
        fields = self._split(storage)
        self.observations = fields["observations"]
        self.actions = fields["actions"]
        self.next_observations = fields["next_observations"]
        self.rewards = fields["rewards"]
        self.masks = fields["masks"]

    def __reduce__(self) -> tuple[type[Dataset], tuple[Any, ...]]:
        """The fields stay views of one matrix in what is read back."""
        sizes = (self._observation_dim, self._action_dim)
        return Dataset, (self._storage, self.terminals, *sizes, self.action_bounds)

    @classmethod
    @neutral
    def from_arrays(
        cls,
        *,
        observations: Array,
        actions: Array,
        next_observations: Array,
        rewards: Array,
        masks: Array,
        terminals: Array | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        action_clip: float = ACTION_CLIP,
        action_bounds: ActionBounds | tuple[ArrayLike, ArrayLike] | None = None,
    ) -> Dataset:
        """Check the arrays, clip the actions and move everything to `device` as `dtype`.

        Args:
            observations: [M, O], floating point, NumPy or torch.
            actions: [M, A], floating point, in [-1, 1] up to 1e-5, or within action_bounds and rescaled from there;
                then clipped to [-action_clip, action_clip].
            next_observations: [M, O], floating point.
            rewards: [M], any real dtype.
            masks: [M], any real dtype or bool, in [0, 1]; 1 bootstraps.
            terminals: [M], bool or 0 and 1, true at the end of each trajectory. None: a trajectory ends wherever the
                next observation is not the observation of the following row.
            device: default is the CPU.
            dtype: a floating dtype of torch.
            action_clip: in (0, 1].
            action_bounds: (low, high) of the actions in their own units, each [A] or one number for all; the policy
                that learns from the data set keeps them.

        Raises:
            TypeError: a field that is not an array, or of the wrong kind (integer or image observations), or a `dtype`
                that is not floating.
            ValueError: no transitions, unequal lengths, wrong rank, no width, masked entries, values that are NaN or
                infinite in `dtype` or out of range; the message names the field and the first bad row. A device that is
                not there or too small.
        """
        place = check_storage(device, dtype)
        action_clip = real("action_clip", action_clip, 0.0, 1.0, low_open=True)
        fields = {
            "observations": _as_tensor("observations", observations, rank=2, floating=True),
            "actions": _as_tensor("actions", actions, rank=2, floating=True),
            "next_observations": _as_tensor("next_observations", next_observations, rank=2, floating=True),
            "rewards": _as_tensor("rewards", rewards, rank=1),
            "masks": _as_tensor("masks", masks, rank=1),
        }
        if terminals is not None:
            fields["terminals"] = _as_tensor("terminals", terminals, rank=1)
        size = fields["observations"].shape[0]
        for name, field in fields.items():
            if field.shape[0] != size:
                raise ValueError(
                    f"{name} has {field.shape[0]} rows but observations has {size}: expected equal lengths"
                )
        if size == 0:
            raise ValueError("the dataset is empty: observations has 0 rows, expected at least 1")
        observation_dim, action_dim = fields["observations"].shape[1], fields["actions"].shape[1]
        if fields["next_observations"].shape[1] != observation_dim:
            raise ValueError(
                f"next_observations has shape {tuple(fields['next_observations'].shape)}, expected "
                f"(*, {observation_dim}): the width of observations"
            )
        check_widths(observation_dim, action_dim)

        bounds = None if action_bounds is None else ActionBounds.of(action_bounds, action_dim)
        if bounds is not None:
            fields["actions"] = bounds.from_environment(fields["actions"])

        done = fields.pop("terminals", None)
        if done is None:
            ends = trajectory_ends(fields["observations"], fields["next_observations"])
        else:
            _check_rows("terminals", done, (done == 0) | (done == 1), "expected 0 or 1")
            ends = done.bool()

        storage = allocate(size, 2 * observation_dim + action_dim + 2, dtype, place)
        dataset = cls(storage, ends.to(storage.device), observation_dim, action_dim, bounds)
        for name, field in fields.items():
            target: torch.Tensor = getattr(dataset, name)
            check_column(name, field, target.copy_(field))
        dataset.actions.clamp_(-action_clip, action_clip)
        return dataset

    def _split(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields of rows [B, 2 O + A + 2], as views."""
        o, a = self._observation_dim, self._action_dim
        return {
            "observations": rows[:, :o],
            "actions": rows[:, o : o + a],
            "next_observations": rows[:, o + a : 2 * o + a],
            "rewards": rows[:, 2 * o + a],
            "masks": rows[:, 2 * o + a + 1],
        }

    @neutral
    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> dict[str, torch.Tensor]:
        """Draw transitions uniformly with replacement, on the dataset's device.

        Args:
            batch_size: B, at least 1; may exceed the size of the dataset.
            generator: on the dataset's device; None is torch's default one. Its state alone decides the batch.

        Returns:
            observations [B, O], actions [B, A], next_observations [B, O], rewards [B], masks [B].

        Raises:
            TypeError, ValueError: a batch_size that is not an integer or below 1; a generator on another device.
        """
        return self._draw(self.size, batch_size, generator)

    def _draw(self, rows: int, batch_size: int, generator: torch.Generator | None) -> dict[str, torch.Tensor]:
        """Draw as `sample` does, from the first rows."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)):
            raise TypeError(f"batch_size is {batch_size!r}, expected an integer")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        batch_size, width = integer("batch_size", batch_size, 1), self._storage.shape[1]
        need = batch_size * width * self.dtype.itemsize
        check_fits(f"batch_size is {batch_size}: transitions of {width} numbers", need, self.device)
        if generator is not None:
            check_generator(generator, self.device)
        index = torch.randint(rows, (batch_size,), generator=generator, device=self.device)
        return self._split(self._storage.index_select(0, index))

    @neutral
    def take(self, index: Sequence[int] | Array) -> dict[str, torch.Tensor]:
        """The transitions at `index` [B], integers in [0, M), as `sample` returns them.

        Raises:
            TypeError: indices that are not integers. ValueError: not of rank 1. IndexError: out of range.
        """
        rows = as_tensor("index", index).to(self.device)
        if rows.dtype == torch.bool or rows.is_floating_point():
            raise TypeError(f"index has dtype {rows.dtype}, expected integers")
        if rows.ndim != 1:
            raise ValueError(f"index has shape {tuple(rows.shape)}, expected (B,)")
        rows = rows.long()
        bad = (rows < 0) | (rows >= self.size)
        if bool(bad.any()):
            raise IndexError(f"index holds {int(rows[bad][0])}, expected in [0, {self.size})")
        return self._split(self._storage.index_select(0, rows))

    @neutral
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Dataset:
        """The same transitions on another device or in another floating dtype; this very dataset if nothing changes.

        Raises:
            TypeError: a dtype that is not floating.
            ValueError: a value that is infinite in `dtype`, named with its row; a device not there or too small.
        """
        dtype = self.dtype if dtype is None else dtype
        place = check_storage(self.device if device is None else device, dtype)
        if (place, dtype) == (self.device, self.dtype):
            return self
        storage = allocate(self.size, self._storage.shape[1], dtype, place).copy_(self._storage)
        terminals = self.terminals.to(place)
        moved = Dataset(storage, terminals, self._observation_dim, self._action_dim, self.action_bounds)
        if dtype != self.dtype:
            for name, field in self._split(self._storage).items():
                check_column(name, field, getattr(moved, name))
        return moved

    @neutral
    def statistics(self) -> DatasetStatistics:
        """Counts, returns and successes; a last trajectory that was cut off counts as one."""
        ends = self.terminals.clone()
        ends[-1] = True
        trajectories = int(ends.sum())
        # Row i belongs to the trajectory numbered by the ends before it.
        number = torch.cumsum(ends, 0) - ends.long()
        rewards = self.rewards.double()
        returns = rewards.new_zeros(trajectories).index_add_(0, number, rewards)
        successes = torch.zeros_like(returns).index_add_(0, number, (self.masks == 0).double()) > 0
        return DatasetStatistics(
            transitions=self.size,
            trajectories=trajectories,
            return_mean=float(returns.mean()),
            return_std=float(returns.std(correction=0)),
            return_min=float(returns.min()),
            return_max=float(returns.max()),
            success_fraction=float(successes.double().mean()),
            reward_min=float(rewards.min()),
            reward_max=float(rewards.max()),
        )

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return (
            f"Dataset(size={self.size}, observation_dim={self.observation_dim}, action_dim={self.action_dim}, "
            f"device={str(self.device)!r}, dtype={self.dtype})"
        )

    @property
    def fingerprint(self) -> tuple[int, int, torch.dtype]:
        """Where the transitions lie, how many and of what dtype: what work recorded on them depends on."""
        return self._storage.data_ptr(), self.size, self.dtype

    @property
    def size(self) -> int:
        """Number of transitions, M."""
        return self._storage.shape[0]

    @property
    def observation_dim(self) -> int:
        """Width of an observation, O."""
        return self._observation_dim

    @property
    def action_dim(self) -> int:
        """Width of an action, A."""
        return self._action_dim

    @property
    def device(self) -> torch.device:
        """Where the transitions lie."""
        return self._storage.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of every field but terminals."""
        return self._storage.dtype


def _as_tensor(name: str, array: Array, rank: int, floating: bool = False) -> torch.Tensor:
    """`array` as a tensor where it lies, its kind and rank checked."""
    if not isinstance(array, (np.ndarray, torch.Tensor)):
        raise TypeError(f"{name} is a {type(array).__name__}, expected a NumPy array or a torch tensor")
    array = with_values(name, array)
    if floating and not array.is_floating_point():
        what = "pixel and integer observations are" if "observations" in name else "discrete actions are"
        raise TypeError(
            f"{name} has dtype {str(array.dtype).removeprefix('torch.')}, expected floating point: {what} not "
            f"supported, because the networks take vectors of real numbers"
        )
    if array.ndim != rank:
        expected = "(M,)" if rank == 1 else "(M, width)"
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {expected}")
    return array


def check_storage(device: torch.device | str | None, dtype: torch.dtype) -> torch.device:
    """The device of transitions, the CPU by default, with its number.

    Raises ``TypeError`` for a dtype that is not floating, and ``ValueError`` for a device that is not there.
    """
    if dtype not in DTYPES:
        raise TypeError(f"dtype is {dtype}, expected a floating dtype of torch: {', '.join(map(str, DTYPES))}")
    place = device_of(device)
    if place.type == "meta":
        raise ValueError("device is 'meta', which transitions cannot lie on: it holds no values")
    return place


def allocate(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for rows [rows, width]. Raises ``ValueError`` where the device has less."""
    check_fits(f"{rows} transitions of {width} numbers in {dtype}", rows * width * dtype.itemsize, device)
    # What is made in inference mode could not be written to outside of it.
    with torch.inference_mode(False):
        return torch.empty((rows, width), dtype=dtype, device=device)


def check_widths(observation_dim: int, action_dim: int) -> None:
    """Raise a ValueError for observations or actions without any numbers."""
    if observation_dim < 1 or action_dim < 1:
        raise ValueError(
            f"observations and actions have widths {observation_dim} and {action_dim}, expected at least 1"
        )


def check_column(name: str, given: torch.Tensor, stored: torch.Tensor, first_row: int = 0) -> None:
    """Raise a ValueError for values of a field that are not finite as stored, or out of its range.

    `given`, `stored`: [M] or [M, D], rows `first_row` and after of the field.
    """
    _check_rows(name, given, torch.isfinite(stored), f"expected finite numbers in {stored.dtype}", first_row)
    if name == "actions":
        expected = "expected in [-1, 1]: rescale the actions, or give action_bounds (--action-low, --action-high)"
        _check_rows(name, given, given.abs() <= 1.0 + ACTION_TOLERANCE, expected, first_row)
    if name == "masks":
        _check_rows(name, given, (stored >= 0) & (stored <= 1), "expected in [0, 1]", first_row)


def _check_rows(name: str, values: torch.Tensor, good: torch.Tensor, expected: str, first_row: int = 0) -> None:
    """Raise a ValueError that names the first row of `values` [M] or [M, D] where `good` is false."""
    if bool(good.all()):
        return
    row, *column = torch.nonzero(~good)[0].tolist()
    where = f"row {first_row + row}" + (f", column {column[0]}" if column else "")
    raise ValueError(f"{name} holds {values[(row, *column)].item():.7g} in {where}, {expected}")


def trajectory_ends(observations: torch.Tensor, next_observations: torch.Tensor) -> torch.Tensor:
    """[M] bool: true where the next observation is not the observation of the following row, and on the last row."""
    ends = torch.ones(observations.shape[0], dtype=torch.bool, device=observations.device)
    ends[:-1] = (next_observations[:-1] != observations[1:]).any(dim=1)
    return ends
