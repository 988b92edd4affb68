"""D4RL data sets, from their original HDF5 files, without the d4rl package.

Transitions are those of d4rl's ``qlearning_dataset``, rewards as the public release of VGF transforms them. A task's
files and reference scores are those of D4RL 1.1.
"""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import numpy as np
import torch

from vgf_fast.data.dataset import ACTION_CLIP, ACTION_TOLERANCE, Dataset
from vgf_fast.data.download import download
from vgf_fast.data.reading import h5py, named, reading

Arrays: TypeAlias = "dict[str, np.ndarray[Any, Any]]"

DATASET_DIR_VARIABLE = "D4RL_DATASET_DIR"
DEFAULT_DATASET_DIR = "~/.d4rl/datasets"
SERVER = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
KEYS = ("observations", "actions", "rewards", "terminals")

# Returns of a random and of an expert policy, between which a score is normalised to 0 and 100.
REFERENCE_RETURNS = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "door": (-56.512833, 2880.5693087298737),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
}
LOCOMOTION = {
    "halfcheetah": ("HalfCheetah-v4", {}),
    "hopper": ("Hopper-v4", {}),
    "walker2d": ("Walker2d-v4", {}),
    # D4RL's ant observes contact forces.
    "ant": ("Ant-v4", {"use_contact_forces": True}),
}
_LEVELS = ("random", "medium", "expert", "medium-replay", "full-replay", "medium-expert")
_MAZES = {
    "umaze": ("u-maze", False, False),
    "umaze-diverse": ("u-maze", True, True),
    "medium-play": ("big-maze", True, False),
    "medium-diverse": ("big-maze", True, True),
    "large-play": ("hardest-maze", True, False),
    "large-diverse": ("hardest-maze", True, True),
}
_HANDS = ("pen", "door", "hammer", "relocate")
# Steps after which D4RL ends an episode, where a file does not say.
_EPISODE_STEPS = {"umaze": 700, **dict.fromkeys(("medium", "large"), 1000)}
_HAND_STEPS = {"pen": 100, **dict.fromkeys(("door", "hammer", "relocate"), 200)}


def _urls() -> dict[str, str]:
    urls = {}
    for name in LOCOMOTION:
        for level in _LEVELS:
            for version in ("v1", "v2"):
                file = f"{name}_{level.replace('-', '_')}-{version}.hdf5"
                urls[f"{name}-{level}-{version}"] = f"{SERVER}/gym_mujoco_{version}/{file}"
    for name, (maze, start, goal) in _MAZES.items():
        file = f"Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse"
        urls[f"antmaze-{name}-v0"] = f"{SERVER}/ant_maze_new/{file}.hdf5"
        urls[f"antmaze-{name}-v2"] = f"{SERVER}/ant_maze_v2/{file}_fixed.hdf5"
    for name in _HANDS:
        for level in ("human", "cloned", "expert"):
            urls[f"{name}-{level}-v1"] = f"{SERVER}/hand_dapg_v1/{name}-{level}-v1.hdf5"
    return urls


URLS = _urls()  # task -> address of its file


class D4RLData(NamedTuple):
    """A task's data.

    Attributes:
        train: the transitions, with rewards ``reward_scale * reward + reward_shift``.
        task: such as "hopper-medium-v2".
        reward_scale, reward_shift: what the rewards of the file became; an online phase must use the same.
        score: returns of the file's own rewards that are normalised to 0 and 100.
    """

    train: Dataset
    task: str
    reward_scale: float
    reward_shift: float
    score: tuple[float, float]


def family(task: str) -> str:
    """The robot of a task, such as "hopper". Raises ``ValueError`` with the closest names for one that is none."""
    if task not in URLS:
        close = ", ".join(difflib.get_close_matches(str(task), URLS, n=3, cutoff=0.0))
        raise ValueError(f"task is {task!r}, which is not a D4RL task with states; the closest are {close}")
    return task.split("-")[0]


def load(
    task: str,
    path: str | os.PathLike[str] | None = None,
    *,
    url: str | None = None,
    normalize_reward: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> D4RLData:
    """Load a task's transitions.

    A step that ends by timeout is dropped and never terminal, since its next observation is not in the file; AntMaze
    rewards become reward - 1, locomotion rewards are scaled by 1000 / (largest - smallest return of a trajectory).
    Actions are clipped to +-(1 - 1e-5).

    Args:
        task: such as "hopper-medium-v2".
        path: the HDF5 file, or a folder that has it; nothing is downloaded then, except from ``url``. None: the folder
            in the environment variable D4RL_DATASET_DIR, else "~/.d4rl/datasets", into which a missing file is
            downloaded.
        url: address of the file to download instead of that on D4RL's server, such as a mirror's.
        normalize_reward: False leaves locomotion rewards as they are.
        device: where the transitions lie; the default is the CPU.
        dtype: of the transitions, a floating dtype of torch.
        progress: whether a download shows a bar.

    Raises:
        ValueError: an unknown task; a file that is damaged, or has missing keys, arrays of unequal lengths, NaN, or
            integer or image observations: the message names file, key and row.
        FileNotFoundError: ``path`` is not there. ConnectionError: the download failed. ImportError: no h5py.
    """
    robot = family(task)
    file = find(task, path, url=url, progress=progress)
    arrays = read(file)
    fields = transitions(arrays, episode_steps(task))
    if len(fields["rewards"]) == 0:
        raise ValueError(f"{file} holds no transitions: {len(arrays['rewards'])} rows, expected at least 2 in a row")
    # With the file's rewards, as they were counted when the reference returns were.
    scale, shift = 1.0, 0.0
    if robot == "antmaze":
        shift = -1.0
    elif robot in LOCOMOTION and normalize_reward:
        # A trajectory that the file breaks off has no return.
        last = [arrays[name][-2:].any() for name in ("terminals", "timeouts") if name in arrays]
        scale = return_scale(file, fields["rewards"], fields["ends"], cut_off=not any(last))
    outside = int((np.abs(fields["actions"]) > 1.0 + ACTION_TOLERANCE).any(axis=1).sum())
    if outside:
        warnings.warn(f"{file}: {outside} actions lie outside [-1, 1], and are clipped", stacklevel=2)
    with named(file):
        train = Dataset.from_arrays(
            observations=fields["observations"],
            actions=np.clip(fields["actions"], -ACTION_CLIP, ACTION_CLIP),
            next_observations=fields["next_observations"],
            rewards=scale * fields["rewards"] + shift,
            masks=1.0 - fields["terminals"],
            terminals=fields["ends"],
            device=device,
            dtype=dtype,
        )
    return D4RLData(train, task, scale, shift, REFERENCE_RETURNS[robot])


def episode_steps(task: str) -> int:
    """Steps after which D4RL ends an episode of a task. Raises ``ValueError`` for an unknown one."""
    robot = family(task)
    if robot == "antmaze":
        return _EPISODE_STEPS[task.split("-")[1]]
    return _HAND_STEPS.get(robot, 1000)


def return_scale(file: Path, rewards: np.ndarray, ends: np.ndarray, cut_off: bool) -> float:
    """1000 / (largest - smallest return) of trajectories; rewards, ends [M]; without the last one if it is cut off.

    Raises ``ValueError`` when there are no two trajectories with different returns.
    """
    totals = np.cumsum(rewards.astype(np.float64))[ends]
    returns = np.diff(totals, prepend=0.0)[: -1 if cut_off else None]
    if len(set(returns.tolist())) < 2:
        raise ValueError(
            f"{file} has {len(returns)} whole trajectories, expected two with different returns, to scale rewards by: "
            "use normalize_reward=False"
        )
    return float(1000.0 / (returns.max() - returns.min()))


def transitions(arrays: Mapping[str, np.ndarray], max_episode_steps: int) -> Arrays:
    """d4rl's ``qlearning_dataset`` of the arrays of a file, and where trajectories end.

    Without ``timeouts`` among the arrays, an episode ends by timeout after ``max_episode_steps`` steps, counted as
    there: an episode that follows a terminal step begins with one.

    Returns observations, next_observations [M, O], actions [M, A], rewards [M], all float32; terminals and ends [M],
    bool: ``ends`` is true at the last transition of every trajectory.
    """
    rows = len(arrays["rewards"]) - 1
    terminals = arrays["terminals"][: max(rows, 0)].astype(bool)
    if "timeouts" in arrays:
        timeouts = arrays["timeouts"][: max(rows, 0)].astype(bool)
    else:
        timeouts = _count_timeouts(terminals, max_episode_steps)
    kept = np.flatnonzero(~timeouts)
    # What follows a kept row in the file is not kept, or begins another episode.
    follows = np.append(np.diff(kept) == 1, False) & ~terminals[kept]
    single = {name: np.asarray(arrays[name]).astype(np.float32, copy=False) for name in KEYS[:3]}
    return {
        "observations": single["observations"][kept],
        "next_observations": single["observations"][kept + 1],
        "actions": single["actions"][kept],
        "rewards": single["rewards"][kept],
        "terminals": terminals[kept],
        "ends": ~follows,
    }


def _count_timeouts(terminals: np.ndarray, max_episode_steps: int) -> np.ndarray:
    timeouts = np.zeros(len(terminals), bool)
    step = 0
    for row, terminal in enumerate(terminals.tolist()):
        if step == max_episode_steps - 1:
            timeouts[row] = True
            step = 0
            continue
        step = 1 if terminal else step + 1
    return timeouts


def read(file: Path) -> Arrays:
    """The checked arrays of a file: observations [M, O], actions [M, A], rewards, terminals and perhaps timeouts [M].

    Raises ``ValueError`` as ``load`` does.
    """
    with reading(file, ", or no HDF5 file", ": delete it, and get it again"), h5py().File(file, "r") as content:
        missing = [key for key in KEYS if key not in content]
        if missing:
            raise ValueError(f"{file} has no {' and no '.join(missing)}; it has {', '.join(sorted(content))}")
        wanted = [*KEYS, *(["timeouts"] if "timeouts" in content else [])]
        for key in wanted:
            if hasattr(content[key], "keys"):
                raise ValueError(
                    f"{file}: {key} is a group of {', '.join(content[key])}, expected one array: write those that the "
                    "policy shall see side by side"
                )
        arrays = {key: np.asarray(content[key][()]) for key in wanted}
    for name in ("rewards", "terminals", "timeouts"):
        # Some files have a column where others have a vector.
        if name in arrays and arrays[name].ndim == 2 and arrays[name].shape[1] == 1:
            arrays[name] = arrays[name][:, 0]
    size = len(np.atleast_1d(arrays["rewards"]))
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{file}: {name} has dtype {array.dtype}, expected real numbers")
        rank = 2 if name in ("observations", "actions") else 1
        if name == "observations" and (array.ndim > 2 or array.dtype.kind not in "f"):
            raise ValueError(
                f"{file}: observations have shape {array.shape} and dtype {array.dtype}: images and integers are not "
                "supported, because the networks take vectors of real numbers"
            )
        if array.ndim != rank or len(array) != size:
            expected = f"({size}, width)" if rank == 2 else f"({size},)"
            raise ValueError(f"{file}: {name} has shape {array.shape}, expected {expected}, as rewards")
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32))
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise ValueError(f"{file}: {name} has NaN or infinity in row {row}, expected finite numbers in float32")
        if name in ("terminals", "timeouts") and not np.isin(array, (0, 1)).all():
            row = int(np.argmin(np.isin(array, (0, 1))))
            raise ValueError(f"{file}: {name} has {array[row]:g} in row {row}, expected 0 or 1")
    return arrays


def file_name(task: str) -> str:
    """What D4RL calls a task's file. Raises ``ValueError`` for an unknown task."""
    family(task)
    return Path(urlsplit(URLS[task]).path).name


def find(
    task: str, path: str | os.PathLike[str] | None = None, *, url: str | None = None, progress: bool = True
) -> Path:
    """The file of a task, downloaded if need be; arguments and errors as ``load``'s."""
    name = file_name(task)
    if path is not None:
        given = Path(path).expanduser()
        for file in (given / name, given / f"{task}.hdf5", given):
            if file.is_file():
                return file
        if url is not None and given.suffix not in (".hdf5", ".h5"):
            return download(url, given / name, progress=progress)
        expected = f"{given} to be a file" if not given.is_dir() else f"{name} or {task}.hdf5 in it"
        raise FileNotFoundError(f"{given} has no data of {task}: expected {expected}, from {url or URLS[task]}")
    folder = Path(os.environ.get(DATASET_DIR_VARIABLE) or DEFAULT_DATASET_DIR).expanduser()
    for file in (folder / name, folder / f"{task}.hdf5"):
        if file.is_file():
            return file
    return download(url or URLS[task], folder / name, progress=progress)


def make_env(task: str) -> Any:
    """The Gymnasium environment that a task is evaluated in: the -v4 of its robot.

    Raises ``ValueError`` for tasks that Gymnasium has no environment of: AntMaze and the hands.
    """
    robot = family(task)
    if robot not in LOCOMOTION:
        raise ValueError(
            f"task is {task!r}, which cannot be evaluated here, because Gymnasium has no environment with its "
            "observations: evaluate with a make_env of your own, or train without (run.eval_interval=0)"
        )
    import gymnasium

    name, options = LOCOMOTION[robot]
    with warnings.catch_warnings():
        # -v4 is what the scores are of; Gymnasium would rather have -v5.
        warnings.simplefilter("ignore", DeprecationWarning)
        return gymnasium.make(name, **options)


def environment(task: str) -> Callable[[], Any] | None:
    """What makes a task's environment, or None of a task that has none. Raises ``ValueError`` for an unknown task."""
    return (lambda: make_env(task)) if family(task) in LOCOMOTION else None
