"""A locomotion data set of medium quality in D4RL's format, made here: ``python -m profiling.locomotion --out DIR``.

A linear controller of HalfCheetah-v4 is improved by random search (Mania et al. 2018, "Simple random search of static
linear policies": the best directions, returns scaled by their deviation, observations normalised by running
statistics). The data are of controllers along the way, with Gaussian noise of several sizes on the actions: as D4RL's
"medium-replay", neither expert nor random. The same seed makes the same file.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vgf_fast.common.files import replacing
from vgf_fast.common.progress import progress_bar

ENVIRONMENT = "HalfCheetah-v4"
FILE = "halfcheetah_medium_replay-v2.hdf5"  # what D4RL calls this kind
ITERATIONS, DIRECTIONS, BEST = 60, 8, 4
STEP_SIZE, DEVIATION = 0.03, 0.04
SEARCH_STEPS = 300  # of an episode while searching
EPISODE_STEPS = 1000
NOISES = (0.1, 0.3, 0.5)  # of the actions in the data
FIRST = ITERATIONS // 3  # the first controller in the data

Array = NDArray[np.float64]


class Controller(NamedTuple):
    """Action = clip(weights (s - mean) / deviation)."""

    weights: Array  # [A, O]
    mean: Array  # [O]
    deviation: Array  # [O]

    def __call__(self, state: Array) -> Array:
        return np.clip(self.weights @ ((state - self.mean) / self.deviation), -1.0, 1.0)


class Statistics:
    """Running mean and deviation of states."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.squares = 0, np.zeros(size), np.zeros(size)

    def add(self, states: Array) -> None:
        """States [M, O]."""
        for state in states:
            self.count += 1
            difference = state - self.mean
            self.mean = self.mean + difference / self.count
            self.squares = self.squares + difference * (state - self.mean)

    @property
    def deviation(self) -> Array:
        """[O], 1 where nothing varied yet."""
        deviation = np.sqrt(self.squares / max(self.count - 1, 1))
        return np.where(deviation < 1e-7, 1.0, deviation)


def make_env() -> Any:
    """The simulator."""
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(ENVIRONMENT, max_episode_steps=EPISODE_STEPS)


def rollout(env: Any, controller: Controller, steps: int, seed: int) -> tuple[float, Array]:
    """Return and states [T, O] of an episode cut after ``steps``."""
    state, _ = env.reset(seed=seed)
    total, states = 0.0, []
    for _ in range(steps):
        states.append(state)
        state, reward, terminated, truncated, _ = env.step(controller(state))
        total += float(reward)
        if terminated or truncated:
            break
    return total, np.asarray(states)


def search(env: Any, seed: int) -> list[Controller]:
    """Controllers after every iteration of the random search."""
    rng = np.random.default_rng(seed)
    size, actions = env.observation_space.shape[0], env.action_space.shape[0]
    weights, statistics = np.zeros((actions, size)), Statistics(size)
    controllers = []
    with progress_bar("searching a controller", total=ITERATIONS) as advance:
        for iteration in range(ITERATIONS):
            mean, deviation = statistics.mean, statistics.deviation
            directions = rng.normal(size=(DIRECTIONS, actions, size))
            returns = np.zeros((DIRECTIONS, 2))
            for index, direction in enumerate(directions):
                for side, sign in enumerate((1.0, -1.0)):
                    controller = Controller(weights + sign * DEVIATION * direction, mean, deviation)
                    returns[index, side], states = rollout(env, controller, SEARCH_STEPS, seed + iteration)
                    statistics.add(states)
            best = np.argsort(-returns.max(axis=1))[:BEST]
            spread = returns[best].std() + 1e-8
            slopes = (returns[best, 0] - returns[best, 1])[:, None, None] * directions[best]
            weights = weights + STEP_SIZE / spread * slopes.mean(axis=0)
            controllers.append(Controller(weights, statistics.mean, statistics.deviation))
            advance()
    return controllers


def collect(env: Any, controllers: Sequence[Controller], episodes: int, seed: int) -> dict[str, NDArray[Any]]:
    """Whole episodes under D4RL's keys: controllers from poor to good, noise of each size by turns."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    with progress_bar("recording episodes", total=episodes) as advance:
        for episode in range(episodes):
            controller = controllers[episode * len(controllers) // episodes]
            noise = NOISES[episode % len(NOISES)]
            state, _ = env.reset(seed=seed + episode)
            done = False
            while not done:
                action = np.clip(controller(state) + noise * rng.normal(size=env.action_space.shape), -1.0, 1.0)
                action = action.astype(np.float32)
                following, reward, terminated, truncated, _ = env.step(action)
                for name, value in zip(rows, (state, action, reward, terminated, truncated), strict=True):
                    rows[name].append(value)
                state, done = following, terminated or truncated
            advance()
    kinds = {"terminals": bool, "timeouts": bool}
    return {name: np.asarray(values, kinds.get(name, np.float32)) for name, values in rows.items()}


def make(folder: Path, episodes: int, seed: int) -> Path:
    """Write the file, whole or not at all, and return its path."""
    import h5py

    env = make_env()
    arrays = collect(env, search(env, seed)[FIRST:], episodes, seed)
    env.close()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE) as part, h5py.File(part, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, compression="gzip", track_times=False)
    return folder / FILE


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the file, and say what is in it."""
    parser = argparse.ArgumentParser(
        prog="python -m profiling.locomotion", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    path = make(given.out, given.episodes, given.seed)
    from vgf_fast.data import d4rl, ogbench

    data = d4rl.load("halfcheetah-medium-replay-v2", path, normalize_reward=False)
    sys.stdout.write(f"{ogbench.counts(data.train, str(path))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
