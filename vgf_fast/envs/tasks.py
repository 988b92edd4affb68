"""What a run can learn from, by name: OGBench, D4RL and Minari tasks, and files of your own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vgf_fast.common.bounds import ActionBounds
from vgf_fast.data import d4rl, files, minari, ogbench
from vgf_fast.data.dataset import Dataset
from vgf_fast.envs.evaluation import Score
from vgf_fast.envs.simulators import read_spaces

D4RL, MINARI = "d4rl/", "minari/"


class Evaluation(NamedTuple):
    """Where a policy is evaluated.

    Attributes:
        make_env: makes one environment, or None of a task that has none here.
        score: how returns are normalised, or None.
    """

    make_env: Callable[[], Any] | None
    score: Score | None


class Task(NamedTuple):
    """A task's transitions and how its policy is evaluated.

    Attributes:
        name: as it was asked for.
        train: the transitions.
        evaluation: where a policy is evaluated.
        summary: lines to print.
        reward_scale, reward_shift: the rewards of ``train`` are reward_scale * reward + reward_shift.
    """

    name: str
    train: Dataset
    evaluation: Evaluation
    summary: str
    reward_scale: float = 1.0
    reward_shift: float = 0.0


def load(
    name: str,
    dataset_dir: str | os.PathLike[str] | None = None,
    *,
    env: str | None = None,
    url: str | None = None,
    action_low: Sequence[float] | None = None,
    action_high: Sequence[float] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Load a task's transitions.

    Args:
        name: an OGBench single task such as "cube-single-play-singletask-v0"; "d4rl/" and a D4RL task, such as
            "d4rl/hopper-medium-v2"; "minari/" and a Minari data set, such as "minari/mujoco/hopper/medium-v0"; or the
            path of a file of transitions (.npz, .hdf5, .h5, .parquet).
        dataset_dir: folder of the task's files, or a file; default is where the task's own library looks.
        env: Gymnasium environment to evaluate in, instead of the task's own; a file has none of its own.
        url: address of a folder, such as a mirror's, from which missing files of OGBench and D4RL are downloaded.
        action_low, action_high: bounds of the actions of a file, one number for all or one each; default are those of
            ``env``, and [-1, 1] without one.
        device, dtype: of the transitions; the default device is the CPU.

    Raises ``ValueError`` for an unknown name, and what the loaders raise.
    """
    evaluation = environment(name, dataset_dir, env=env)
    if url is not None and (name.startswith(MINARI) or is_file(name)):
        raise ValueError(
            f"url is {url!r}, expected none for {name}: it is for OGBench and D4RL; Minari has MINARI_REMOTE"
        )
    if (action_low, action_high) != (None, None) and not is_file(name):
        raise ValueError(f"action_low is {action_low!r}, expected none for {name}: its own bounds are known")
    if name.startswith(D4RL):
        task = name.removeprefix(D4RL)
        address = None if url is None else f"{url.rstrip('/')}/{d4rl.file_name(task)}"
        data = d4rl.load(task, dataset_dir, url=address, device=device, dtype=dtype)
        summary = ogbench.counts(data.train, name)
        if (data.reward_scale, data.reward_shift) != (1.0, 0.0):
            summary += f"\n  rewards are the file's times {data.reward_scale:.6g} plus {data.reward_shift:g}"
        return Task(name, data.train, evaluation, summary, data.reward_scale, data.reward_shift)
    if name.startswith(MINARI):
        train = minari.load(name.removeprefix(MINARI), dataset_dir, device=device, dtype=dtype).train
        return Task(name, train, evaluation, ogbench.counts(train, name))
    if is_file(name):
        bounds = _file_bounds(evaluation.make_env, action_low, action_high)
        train = files.load(name, device=device, dtype=dtype, cache_dir=dataset_dir, action_bounds=bounds)
        summary = ogbench.counts(train, name)
        if train.action_bounds is not None:
            whose = f"the bounds of {env}" if action_low is None else "their bounds"
            summary += f"\n  actions are rescaled from {whose}, {train.action_bounds}, to [-1, 1]"
        return Task(name, train, evaluation, summary)
    train = ogbench.load(name, dataset_dir, url=url, device=device, dtype=dtype).train
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        summary = ogbench.summary(train, name)
    return Task(name, train, evaluation, "\n".join([summary, *(f"warning: {one.message}" for one in caught)]))


def _file_bounds(
    make_env: Callable[[], Any] | None, low: Sequence[float] | None, high: Sequence[float] | None
) -> ActionBounds | tuple[Sequence[float], Sequence[float]] | None:
    """Bounds of a file's actions: those given, else the environment's, unless these are [-1, 1] or infinite."""
    if low is not None or high is not None:
        if low is None or high is None:
            raise ValueError(f"action_low is {low!r} and action_high is {high!r}, expected both or none")
        return low, high
    if make_env is None:
        return None
    bounds = read_spaces(make_env).bounds
    return None if bounds is None or bounds.is_unit else bounds


def environment(name: str, dataset_dir: str | os.PathLike[str] | None = None, *, env: str | None = None) -> Evaluation:
    """Where a task's policy is evaluated; arguments and errors as ``load``'s."""
    if env is not None:
        try:
            import gymnasium
        except ImportError as error:
            raise ImportError(f"Gymnasium cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
        try:
            gymnasium.spec(env)
        except gymnasium.error.Error as error:
            raise ValueError(f"env is {env}: {error}") from error
        return Evaluation(lambda: _make(env), None)
    if name.startswith(D4RL):
        task = name.removeprefix(D4RL)
        return Evaluation(d4rl.environment(task), d4rl.REFERENCE_RETURNS[d4rl.family(task)])
    if name.startswith(MINARI):
        return Evaluation(*minari.evaluation(name.removeprefix(MINARI), dataset_dir))
    if is_file(name):
        return Evaluation(None, None)
    return Evaluation(lambda: ogbench.make_env(name), None)


def _make(env: str) -> Any:
    import gymnasium

    try:
        return gymnasium.make(env)
    except (ImportError, gymnasium.error.Error) as error:
        # Also of the simulator of an environment that Gymnasium knows by name.
        raise ImportError(f"env is {env}, which cannot be made here: {error}") from error


def is_file(name: str) -> bool:
    """Whether a task's name is the path of a file of transitions."""
    return Path(name).suffix in files.SUFFIXES
