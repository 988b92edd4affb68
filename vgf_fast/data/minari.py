"""Minari data sets with continuous actions: episodes to transitions, and the environment they are evaluated in."""

from __future__ import annotations

import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vgf_fast.common.bounds import ActionBounds
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.reading import named, reading
from vgf_fast.data.writing import waiting_for


class MinariData(NamedTuple):
    """A data set.

    Attributes:
        train: the transitions, actions rescaled to [-1, 1]; ``train.action_bounds`` has what from, if it is another.
        name: the data set's identifier.
        make_env: makes the environment it recovers, with flat observations and its own actions; None without one.
        score: (low, high), the returns that are normalised to 0 and 100; None where it has no reference scores.
    """

    train: Dataset
    name: str
    make_env: Callable[[], Any] | None
    score: tuple[float, float] | None


def load(
    dataset: Any,
    dataset_dir: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> MinariData:
    """Load a data set's transitions.

    A termination stops the bootstrapping (mask 0); a truncation only ends the trajectory, its last transition has mask
    1. Observations that are dicts, such as those with a goal, are flattened in the order of their space, as
    ``gymnasium.wrappers.FlattenObservation`` does. Actions are rescaled from the bounds of their space to [-1, 1].

    Args:
        dataset: identifier such as "mujoco/hopper/medium-v0", or a ``minari.MinariDataset``.
        dataset_dir: folder of data sets; nothing is downloaded then. None: Minari's own (MINARI_DATASETS_PATH), into
            which a missing data set is downloaded.
        device: where the transitions lie; the default is the CPU.
        dtype: of the transitions, a floating dtype of torch.

    Raises:
        ValueError: spaces that are not supported (discrete actions, images, integers, unbounded actions), or an episode
            with NaN, actions outside their bounds or a wrong number of observations: the message names the episode.
        FileNotFoundError: no such data set in ``dataset_dir``. ConnectionError: the download failed.
        ImportError: Minari is not installed.
    """
    stored = _open(dataset, dataset_dir)
    name = stored.spec.dataset_id
    bounds = _action_bounds(name, stored.action_space)
    _check_observations(name, stored.observation_space)
    parts: dict[str, list[np.ndarray]] = {
        field: [] for field in ("observations", "actions", "next_observations", "rewards", "masks", "terminals")
    }
    for episode in _episodes(stored):
        where = f"{name}, episode {episode.id}"
        rewards = np.asarray(episode.rewards, np.float64)
        steps = len(rewards)
        try:
            observations = _flat(stored.observation_space, episode.observations)
        except KeyError as error:
            raise ValueError(
                f"{where}: observations has no {error}, expected all of {stored.observation_space}"
            ) from error
        actions = np.asarray(episode.actions, np.float64)
        lengths = {"actions": len(actions), "terminations": len(episode.terminations)}
        lengths["observations but the last one"] = len(observations) - 1
        for field, length in lengths.items():
            if length != steps:
                raise ValueError(f"{where}: {length} {field} but {steps} rewards, expected equal numbers")
        if steps == 0:
            continue
        actions = actions.reshape(steps, -1)
        for field, array in (("observations", observations), ("actions", actions), ("rewards", rewards)):
            if not np.isfinite(array).all():
                row = int(np.argwhere(~np.isfinite(array))[0][0])
                raise ValueError(f"{where}: {field} has NaN or infinity in step {row}, expected finite numbers")
        try:
            bounds.from_environment(actions)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        ends = np.zeros(steps, bool)
        ends[-1] = True
        parts["observations"].append(observations[:-1])
        parts["next_observations"].append(observations[1:])
        parts["actions"].append(actions)
        parts["rewards"].append(rewards)
        parts["masks"].append(1.0 - np.asarray(episode.terminations, np.float64))
        parts["terminals"].append(ends)
    if not parts["rewards"]:
        raise ValueError(f"{name} holds no transitions: {stored.total_episodes} episodes, expected one with a step")
    arrays: dict[str, Any] = {field: np.concatenate(arrays) for field, arrays in parts.items()}
    with named(name):
        own = None if bounds.is_unit else bounds
        train = Dataset.from_arrays(**arrays, action_bounds=own, device=device, dtype=dtype)
    return MinariData(train, name, _make_env(stored), _score(stored))


def evaluation(
    dataset: Any, dataset_dir: str | os.PathLike[str] | None = None
) -> tuple[Callable[[], Any] | None, tuple[float, float] | None]:
    """``make_env`` and ``score`` of a data set; arguments and errors as ``load``'s."""
    stored = _open(dataset, dataset_dir)
    return _make_env(stored), _score(stored)


def _open(dataset: Any, dataset_dir: str | os.PathLike[str] | None) -> Any:
    try:
        import minari
    except ImportError as error:
        raise ImportError(f"Minari cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if dataset_dir is None:
        from minari.storage import get_dataset_path

        path = get_dataset_path(str(dataset)) / "data"
        # Minari downloads to where another process would find a part.
        with waiting_for(get_dataset_path() / str(dataset).replace("/", "-")):
            if not path.is_dir():
                _download(minari, str(dataset), path)
    else:
        path = Path(dataset_dir).expanduser() / str(dataset) / "data"
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected the Minari data set {dataset!r} there")
    with reading(path, ", or no Minari data set"):
        return minari.MinariDataset(path)


def _download(minari: Any, dataset: str, path: Path) -> None:
    """Let Minari download a data set, whose files will lie in ``path``."""
    try:
        minari.load_dataset(dataset, download=True)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
        # What its hosts raise depends on which of their clients is installed.
        raise ConnectionError(
            f"the Minari data set {dataset!r} is not here, and its download failed: {type(error).__name__}: {error}; "
            "get it elsewhere, and pass the folder of data sets as dataset_dir"
        ) from error


def _episodes(stored: Any) -> Iterator[Any]:
    """The episodes of a data set; a ``ValueError`` names the one that its file has no more, or not whole."""
    episodes = iter(stored.iterate_episodes())
    for number in stored.episode_indices:
        with (
            named(f"{stored.spec.dataset_id}, episode {number}"),
            reading(stored.storage.data_path, advice=": delete it, and get it again"),
        ):
            episode = next(episodes)
        yield episode


def _action_bounds(name: str, space: Any) -> ActionBounds:
    if not hasattr(space, "high") or len(space.shape) != 1 or space.dtype.kind != "f":
        raise ValueError(
            f"{name} has the action space {space}: not supported, because the policy's actions are vectors of real "
            "numbers, expected a Box of them"
        )
    if not np.isfinite([space.low, space.high]).all():
        raise ValueError(f"{name} has the action space {space}, expected finite bounds, which actions are rescaled by")
    return ActionBounds(space.low, space.high)


def _check_observations(name: str, space: Any) -> None:
    spaces = getattr(space, "spaces", None)
    if spaces is not None:
        for one in spaces.values() if hasattr(spaces, "values") else spaces:
            _check_observations(name, one)
    elif not hasattr(space, "high") or space.dtype.kind != "f":
        raise ValueError(
            f"{name} has the observation space {space}: pixel and integer observations are not supported, because the "
            "networks take vectors of real numbers"
        )


def _flat(space: Any, observations: Any) -> np.ndarray:
    """Observations of an episode, [T + 1, O], float64."""
    spaces = getattr(space, "spaces", None)
    if spaces is None:
        array = np.asarray(observations, np.float64)
        return array.reshape(len(array), -1)
    keys = spaces.keys() if hasattr(spaces, "keys") else range(len(spaces))
    return np.concatenate([_flat(spaces[key], observations[key]) for key in keys], axis=1)


def _make_env(stored: Any) -> Callable[[], Any] | None:
    if stored.env_spec is None:
        return None

    def make() -> Any:
        import gymnasium

        with warnings.catch_warnings():
            # That there is a newer version than the data's, and what Minari was installed with.
            warnings.simplefilter("ignore")
            environment = stored.recover_environment(eval_env=True)
        if isinstance(environment.observation_space, (gymnasium.spaces.Dict, gymnasium.spaces.Tuple)):
            environment = gymnasium.wrappers.FlattenObservation(environment)
        return environment

    return make


def _score(stored: Any) -> tuple[float, float] | None:
    low, high = (stored.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max"))
    return None if low is None or high is None else (float(low), float(high))
