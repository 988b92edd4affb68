"""OGBench single-task data sets and environments, through OGBench's own loader."""

from __future__ import annotations

import difflib
import os
import re
import socket
import warnings
import zipfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.error import URLError

import numpy as np
import torch

from vgf_fast.data.dataset import Dataset
from vgf_fast.data.download import DOWNLOAD_TIMEOUT, download
from vgf_fast.data.reading import named, npy_header, reading
from vgf_fast.data.writing import removing, waiting_for

if TYPE_CHECKING:
    from collections.abc import Iterator

DATASET_DIR_VARIABLE = "OGBENCH_DATASET_DIR"
DEFAULT_DATASET_DIR = "~/.ogbench/data"

ADVICE = ": delete it, then generate or download it again"

# The types of data that OGBench publishes, by the first word of an environment's name.
DATASET_TYPES = {
    "pointmaze": ("navigate", "stitch"),
    "antmaze": ("navigate", "stitch", "explore"),
    "humanoidmaze": ("navigate", "stitch"),
    "antsoccer": ("navigate", "stitch"),
    "cube": ("play", "noisy"),
    "scene": ("play", "noisy"),
    "puzzle": ("play", "noisy"),
}


class TaskData(NamedTuple):
    """A task's data.

    Attributes:
        train, validation: the transitions of the two files, with the rewards and masks of the task.
        task: full name of the task, such as "cube-single-play-singletask-task2-v0".
        environment: identifier of its evaluation environment, such as "cube-single-singletask-task2-v0".
    """

    train: Dataset
    validation: Dataset
    task: str
    environment: str


class _Task(NamedTuple):
    """A task's name, taken apart."""

    name: str
    environment: str
    dataset: str
    kind: str


def load(
    task: str,
    dataset_dir: str | os.PathLike[str] | None = None,
    *,
    url: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> TaskData:
    """Load the training and validation transitions of a single-task OGBench task.

    Rewards are those of the state s of a transition: success - 1 in mazes, minus the number of unsatisfied objects in
    manipulation; masks are 1 - success, and terminals only end trajectories.

    Args:
        task: such as "cube-single-play-singletask-task2-v0"; without "-taskK" it is the environment's default task, and
            "-v0" may be left out.
        dataset_dir: folder of `<data set>.npz` and `<data set>-val.npz`; nothing is downloaded into it, except from
            `url`. None: the folder in the environment variable OGBENCH_DATASET_DIR, else "~/.ogbench/data", where
            OGBench downloads what is missing.
        url: address of a mirror's folder, from which missing files are downloaded instead.
        device: where the transitions lie; the default is the CPU.
        dtype: of the transitions, a floating dtype of torch.
        progress: whether a download from `url` shows a bar.

    Raises:
        ValueError: an unknown task, or a file that is damaged, empty or of another environment.
        FileNotFoundError: a file is missing in `dataset_dir`. ConnectionError: the download failed.
        ImportError: OGBench is not installed.
    """
    ogbench = _import_ogbench()
    parsed = _parse(task)
    if dataset_dir is None:
        folder = Path(os.environ.get(DATASET_DIR_VARIABLE) or DEFAULT_DATASET_DIR).expanduser()
    else:
        folder = Path(dataset_dir).expanduser()
    paths = [folder / f"{parsed.dataset}.npz", folder / f"{parsed.dataset}-val.npz"]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        if parsed.kind not in DATASET_TYPES.get(parsed.dataset.split("-")[0], ()):
            raise _unknown(task)
        if url is not None:
            for path in missing:
                download(f"{url.rstrip('/')}/{path.name}", path, progress=progress)
        elif dataset_dir is not None:
            raise FileNotFoundError(
                f"{missing[0]} does not exist: generate it (vgf_fast.envs.generate), or download it, or pass "
                f"dataset_dir=None to let OGBench download it"
            )
        else:
            _download(ogbench, parsed.dataset, folder, missing)
    with _quiet():
        environment = ogbench.make_env_and_datasets(parsed.name, env_only=True)
        try:
            for path in paths:
                _check_file(path, parsed, environment)
            train, validation = ogbench.make_env_and_datasets(
                parsed.name, dataset_dir=str(folder), dataset_only=True, cur_env=environment
            )
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            path = _damaged_file(paths)
            raise ValueError(f"{path} is damaged ({error}){ADVICE}") from error
        finally:
            environment.close()
    return TaskData(
        train=_dataset(paths[0], train, device, dtype),
        validation=_dataset(paths[1], validation, device, dtype),
        task=parsed.name,
        environment=parsed.environment,
    )


def make_env(task: str) -> Any:
    """The evaluation environment of `task`, a `gymnasium.Env`.

    Mazes draw their start from NumPy's global generator and other environments from their own: for a reproducible
    evaluation call both `numpy.random.seed(seed)`, in the process of the environment, and `env.reset(seed=seed)`.

    Raises:
        ValueError: an unknown task. ImportError: OGBench is not installed.
    """
    ogbench = _import_ogbench()
    with _quiet():
        return ogbench.make_env_and_datasets(_parse(task).name, env_only=True)


def counts(dataset: Dataset, task: str) -> str:
    """Lines to print: sizes, counts, returns and rewards of ``dataset``."""
    statistics = dataset.statistics()
    return "\n".join(
        (
            f"{task}: observations {dataset.observation_dim}, actions {dataset.action_dim}",
            f"  {statistics.transitions:,} transitions in {statistics.trajectories:,} trajectories",
            f"  return {statistics.return_mean:.1f} ± {statistics.return_std:.1f} "
            f"(from {statistics.return_min:.1f} to {statistics.return_max:.1f})",
            f"  reward from {statistics.reward_min:g} to {statistics.reward_max:g}",
        )
    )


def summary(dataset: Dataset, task: str) -> str:
    """Lines to print: ``counts``, and successes. Warns if no trajectory solves `task`."""
    statistics = dataset.statistics()
    if statistics.success_fraction == 0:
        warnings.warn(
            f"no trajectory in the data of {task} reaches its goal: success cannot be learned from it", stacklevel=2
        )
    share = f"  the goal is reached in {100 * statistics.success_fraction:.1f} % of the trajectories"
    return f"{counts(dataset, task)}\n{share}"


def _import_ogbench() -> Any:
    try:
        import ogbench
    except ImportError as error:
        raise ImportError(f"OGBench cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
    return ogbench


def _parse(task: str) -> _Task:
    """Take `task` apart, or raise a ValueError that names the closest tasks."""
    name = task if re.search(r"-v\d+$", task) else f"{task}-v0"
    match = re.fullmatch(r"(?P<stem>.+)-(?P<kind>[^-]+)-(?P<single>singletask(-task\d+)?)-(?P<version>v\d+)", name)
    if match is None or f"{match['stem']}-{match['single']}-{match['version']}" not in _environments():
        raise _unknown(task)
    if match["stem"].startswith("visual-"):
        raise ValueError(f"task is {task!r}: pixel observations are not supported, because the networks take vectors")
    return _Task(
        name=name,
        environment=f"{match['stem']}-{match['single']}-{match['version']}",
        dataset=f"{match['stem']}-{match['kind']}-{match['version']}",
        kind=match["kind"],
    )


def _environments() -> list[str]:
    """The single-task environments that OGBench registers."""
    import gymnasium

    return [name for name in gymnasium.registry if "-singletask" in name]


def _unknown(task: str) -> ValueError:
    """The error for a name that is no task."""
    tasks = []
    for environment in _environments():
        stem, rest = environment.split("-singletask")
        tasks += [f"{stem}-{kind}-singletask{rest}" for kind in DATASET_TYPES.get(stem.split("-")[0], ())]
    close = difflib.get_close_matches(task, tasks, n=3, cutoff=0.0)
    return ValueError(f"task is {task!r}, which is not a single-task OGBench task; the closest are {', '.join(close)}")


def _download(ogbench: Any, dataset: str, folder: Path, missing: list[Path]) -> None:
    """Let OGBench download `missing` into `folder`; a download that fails leaves nothing behind."""
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        # OGBench downloads what is missing to names that several processes would share.
        with waiting_for(folder / dataset), removing([path.with_name(f"{path.name}.tmp") for path in missing]):
            ogbench.download_datasets([dataset], str(folder))
    except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
        raise ConnectionError(
            f"{dataset} could not be downloaded to {folder} ({error}): the OGBench server seems to be away; "
            f"generate the data (vgf_fast.envs.generate) or get it elsewhere, and pass its folder as dataset_dir"
        ) from error
    except OSError as error:
        raise OSError(error.errno, f"{dataset} cannot be written: {error.strerror}", str(folder)) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _check_file(path: Path, task: _Task, environment: Any) -> None:
    """Raise a ValueError that names `path` unless it holds a transition, and arrays of the shapes of `environment`."""
    widths = {
        "observations": environment.observation_space.shape[0],
        "actions": environment.action_space.shape[0],
        "qpos": environment.unwrapped.model.nq,
    }
    if task.dataset.startswith(("scene", "puzzle")):
        widths["button_states"] = environment.unwrapped._num_buttons
    with reading(path, advice=ADVICE):
        with zipfile.ZipFile(path) as archive:
            for name in ("terminals", *widths):
                if f"{name}.npy" not in archive.namelist():
                    raise ValueError(f"{path} has no array {name!r}: it is not a file of {task.dataset}")
            shapes = {name: _array_shape(archive, name) for name in widths}
        with np.load(path) as file:
            terminals = file["terminals"]
    for name, width in widths.items():
        if shapes[name] != (len(terminals), width):
            raise ValueError(
                f"{path} holds {name} of shape {shapes[name]}, expected ({len(terminals)}, {width}): the rows of "
                f"terminals and the width of {task.environment}"
            )
    # The loader makes a transition of every row that does not end a trajectory.
    if not np.any(terminals == 0):
        raise ValueError(f"{path} holds no transitions: the loader needs at least one episode in each of the two files")


def _array_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    """The shape of the array `name` of an npz file, from its header alone."""
    with archive.open(f"{name}.npy") as stream:
        return npy_header(stream)[0]


def _dataset(path: Path, arrays: dict[str, Any], device: torch.device | str | None, dtype: torch.dtype) -> Dataset:
    """The data set of the arrays that the loader made of `path`; an error names the file."""
    with named(path):
        return Dataset.from_arrays(**arrays, device=device, dtype=dtype)


def _damaged_file(paths: list[Path]) -> Path:
    """Which of `paths` has a part that cannot be read or whose checksum is wrong; the last one if no other has."""
    for path in paths[:-1]:
        try:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return path
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return path
    return paths[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide two warnings of building an environment: that there is no display, and bounds given in float64."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="glfw|gymnasium")
        yield
