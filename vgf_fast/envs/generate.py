"""Generate OGBench data sets in the simulator, in the format of the official files, with nothing to download."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import math
import multiprocessing
import operator
import os
import re
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vgf_fast.common.progress import progress_bar
from vgf_fast.data.writing import removing, waiting_for
from vgf_fast.envs.collection import Episode, EpisodeSpec, collect_in_worker, make_collector, start_worker

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

NAMES: tuple[str, ...] = (
    *(f"pointmaze-{size}-navigate-v0" for size in ("medium", "large", "giant", "teleport")),
    *(f"cube-{count}-play-v0" for count in ("single", "double", "triple", "quadruple")),
    "scene-play-v0",
    *(f"puzzle-{size}-play-v0" for size in ("3x3", "4x4", "4x5", "4x6")),
)

MAZE_NOISE = 0.5
PLAN_NOISE, PLAN_NOISE_SMOOTHING = 0.1, 0.5


class GenerationError(RuntimeError):
    """An episode could not be generated; the message is one line that names the episode and the cause."""


class GeneratedFiles(NamedTuple):
    """Paths of the two files that the loader needs."""

    train: Path
    validation: Path


def generate(
    name: str,
    out_dir: str | os.PathLike[str],
    *,
    episodes: int | None = None,
    transitions: int | None = None,
    validation_episodes: int | None = None,
    seed: int = 0,
    steps_per_episode: int = 1001,
    noise: float | None = None,
    noise_smoothing: float | None = None,
    processes: int = 2,
    progress: bool = True,
    overwrite: bool = False,
) -> GeneratedFiles:
    """Generate `<name>.npz` and `<name>-val.npz`, which `ogbench.make_env_and_datasets(dataset_dir=out_dir)` loads.

    Arrays, one row for each step: observations, actions, qpos, qvel float32, terminals bool, and for scene and puzzle
    button_states int64. Row t holds the state before action t; the loader drops the last row of each episode.

    The bytes of both files do not depend on out_dir, processes, progress or overwrite, only on the other arguments; the
    first episodes of a larger data set are those of a smaller one. Several processes need the calling script to be
    guarded by `if __name__ == "__main__":`, as always in Python.

    Args:
        name: one of `NAMES`, with or without "-v0"; the name of one of its tasks is accepted too.
        out_dir: folder of the files, made if absent.
        episodes: number of training episodes; give this or `transitions`.
        transitions: least number of training transitions; rounded up to whole episodes.
        validation_episodes: default a tenth of the training episodes, at least 1: the loader needs one.
        seed: not negative.
        steps_per_episode: rows of an episode, at least 2; the default, 1001, gives 1000 transitions.
        noise: mazes: standard deviation of the noise on an action of unit length, default 0.5; manipulation: scale of
            the noise on a plan, default 0.1.
        noise_smoothing: width, in control steps, of the Gaussian filter over the noise of a plan, default 0.5.
        processes: how many processes simulate; 1 stays in the calling one.
        progress: show a bar with the time left, if standard error is a terminal and rich is installed.
        overwrite: replace files that exist.

    Raises:
        ValueError, TypeError: a wrong argument. FileExistsError: a file exists. OSError: a file cannot be written.
        GenerationError: an episode failed. ImportError: OGBench is not installed. Whatever is raised, no file is
        written or changed.
    """
    if importlib.util.find_spec("ogbench") is None:
        raise ImportError("OGBench is not installed, and generates the data: pip install 'vgf_fast[envs]'")
    name = _full_name(name)
    steps = _integer("steps_per_episode", steps_per_episode, 2)
    if (episodes is None) == (transitions is None):
        raise ValueError(f"episodes is {episodes} and transitions is {transitions}, expected exactly one of them")
    if transitions is not None:
        episodes = math.ceil(_integer("transitions", transitions, 1) / (steps - 1))
    train_count = _integer("episodes", episodes, 1)
    validation_count = max(1, train_count // 10)
    if validation_episodes is not None:
        validation_count = _integer(
            "validation_episodes", validation_episodes, 1, ": the loader needs a validation file"
        )
    spec = _spec(name, steps, noise, noise_smoothing)
    seed = _integer("seed", seed, 0)
    processes = min(_integer("processes", processes, 1), train_count + validation_count)

    folder = Path(out_dir).expanduser()
    files = GeneratedFiles(folder / f"{name}.npz", folder / f"{name}-val.npz")
    _check_absent(files, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to: pass another out_dir")

    # Every episode has its own seeds, whatever the counts: (split, number) below the seed.
    seeds = [np.random.SeedSequence(seed, spawn_key=(0, number)) for number in range(train_count)]
    seeds += [np.random.SeedSequence(seed, spawn_key=(1, number)) for number in range(validation_count)]
    train: dict[str, np.ndarray] = {}
    validation: dict[str, np.ndarray] = {}
    with (
        progress_bar(f"{name}, episodes", len(seeds), progress) as advance,
        contextlib.closing(_collect(name, spec, seeds, processes)) as collected,
    ):
        for number, episode in collected:
            if number < train_count:
                _put(train, episode, number, train_count)
            else:
                _put(validation, episode, number - train_count, validation_count)
            advance()
    _write({files.validation: validation, files.train: train}, overwrite)
    return files


def _full_name(name: str) -> str:
    """The name of the data set that `name` means, a member of `NAMES`."""
    full = re.sub(r"-singletask(-task\d+)?(?=-v0$)", "", name if name.endswith("-v0") else f"{name}-v0")
    if full not in NAMES:
        close = difflib.get_close_matches(full, NAMES, n=3, cutoff=0.0)
        raise ValueError(f"name is {name!r}, which cannot be generated; the closest are {', '.join(close)}")
    return full


def _integer(argument: str, value: object, low: int, reason: str = "") -> int:
    """`value` as an int of at least `low`, or an error that names `argument`."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} is {value!r}, expected an integer") from None
    if number < low:
        raise ValueError(f"{argument} is {number}, expected at least {low}{reason}")
    return number


def _spec(name: str, steps: int, noise: float | None, noise_smoothing: float | None) -> EpisodeSpec:
    """The specification of an episode of the data set `name`, defaults filled in."""
    is_maze = name.startswith("pointmaze")
    if is_maze and noise_smoothing is not None:
        raise ValueError(f"noise_smoothing is {noise_smoothing}, expected None: the noise of mazes is not smoothed")
    if noise is None:
        noise = MAZE_NOISE if is_maze else PLAN_NOISE
    if noise_smoothing is None:
        noise_smoothing = 0.0 if is_maze else PLAN_NOISE_SMOOTHING
    for argument, value in (("noise", noise), ("noise_smoothing", noise_smoothing)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{argument} is {value}, expected a finite number of at least 0")
    *environment, _, version = name.split("-")
    return EpisodeSpec("-".join((*environment, version)), steps, float(noise), float(noise_smoothing))


def _collect(
    name: str, spec: EpisodeSpec, seeds: Sequence[np.random.SeedSequence], processes: int
) -> Generator[tuple[int, Episode], None, None]:
    """Yield (number, episode) for every seed, in the order in which they are finished."""
    number = 0
    try:
        if processes == 1:
            with contextlib.closing(make_collector(spec)) as collector:
                for number, seed in enumerate(seeds):
                    yield number, collector.episode(seed)
            return
        # A fresh interpreter for each worker: forking one in which torch has started threads can hang.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=start_worker) as pool:
            try:
                numbers = {pool.submit(collect_in_worker, spec, seed): number for number, seed in enumerate(seeds)}
                for future in as_completed(list(numbers)):
                    number = numbers.pop(future)
                    yield number, future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise GenerationError(
            f"a process that generated {name} died: it was killed, ran out of memory, or the calling script lacks "
            f'`if __name__ == "__main__":`; processes=1 needs none of these'
        ) from None
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise GenerationError(f"episode {number} of {name} failed: {cause}") from error


def _put(arrays: dict[str, np.ndarray], episode: Episode, number: int, count: int) -> None:
    """Copy `episode` to its rows of `arrays`, which are made for `count` episodes by the first one."""
    for key, values in episode.items():
        if key not in arrays:
            arrays[key] = np.empty((count * len(values), *values.shape[1:]), values.dtype)
        arrays[key][number * len(values) : (number + 1) * len(values)] = values


def _write(contents: dict[Path, dict[str, np.ndarray]], overwrite: bool) -> None:
    """Write every file beside its place and only then rename them all, unless another process was first."""
    partial = {path: path.with_name(f".{path.name}.{os.getpid()}.partial") for path in contents}
    with removing(partial.values()):
        for path, arrays in contents.items():
            try:
                with partial[path].open("wb") as file:
                    np.savez(file, **arrays)  # type: ignore[arg-type]
            except OSError as error:
                raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from error
        with waiting_for(next(iter(contents))):
            _check_absent(contents, overwrite)
            for path, temporary in partial.items():
                os.replace(temporary, path)


def _check_absent(files: Iterable[Path], overwrite: bool) -> None:
    for path in files:
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists: pass overwrite=True to replace it, or another out_dir")
