"""Episodes of OGBench's scripted controllers in the real simulator.

An episode is a pure function of its specification and its `numpy.random.SeedSequence`: neither the process it runs in
nor the episodes run before it in the same environment change a bit of it.
"""

from __future__ import annotations

import functools
import signal
import warnings
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

Episode = dict[str, np.ndarray]
Cell = tuple[int, int]

# An episode in which the simulation went bad is drawn again, from further seeds of its own.
MAX_ATTEMPTS = 20

# Chance that a cube's next target lies on another cube, drawn for each episode from this range.
STACKING = {"double": (0.0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}

# In the qpos of the scene environment the cube's position follows six arm and eight gripper joints.
CUBE_POSITION = slice(14, 17)


@dataclass(frozen=True)
class EpisodeSpec:
    """What to collect.

    Attributes:
        environment: identifier of a goal-conditioned OGBench environment, such as "cube-single-v0".
        steps: rows of an episode; the loader makes steps - 1 transitions of them.
        noise: mazes: standard deviation of the normal noise added to an action of unit length; manipulation: scale of
            the noise added to a plan.
        noise_smoothing: width, in control steps, of the Gaussian filter over a plan's noise; mazes have none.
    """

    environment: str
    steps: int
    noise: float
    noise_smoothing: float = 0.0


class Collector(ABC):
    """One environment and the loop that records an episode in it; a subclass chooses the actions."""

    def __init__(self, spec: EpisodeSpec, **environment_options: Any) -> None:
        """Build the environment of `spec`."""
        import gymnasium
        import ogbench  # noqa: F401  (registers the environments)

        self.spec = spec
        with warnings.catch_warnings():
            # Only a display is missing, and bounds given in float64.
            warnings.filterwarnings("ignore", module="glfw|gymnasium")
            made = gymnasium.make(
                spec.environment,
                terminate_at_goal=False,
                max_episode_steps=spec.steps,
                disable_env_checker=True,
                **environment_options,
            )
            self._environment: Any = made.unwrapped
            with _global_numpy_seed(np.random.SeedSequence(0)):
                self._environment.reset(seed=0)

    def episode(self, seed: np.random.SeedSequence) -> Episode:
        """Record one episode.

        Returns:
            observations [T, O], actions [T, A], qpos [T, nq], qvel [T, nv], all float32, terminals [T] bool (true in
            the last row), and for environments with buttons button_states [T, buttons] int64; T is `spec.steps`. Row t
            holds the state before action t.

        Raises:
            RuntimeError: the simulation went bad in every attempt.
        """
        for attempt in range(MAX_ATTEMPTS):
            recorded = self._record(_child(seed, attempt))
            if self._is_healthy(recorded):
                return recorded
        raise RuntimeError(f"the simulation of {self.spec.environment} went bad in {MAX_ATTEMPTS} attempts in a row")

    def close(self) -> None:
        """Free the simulator."""
        self._environment.close()

    def _record(self, seed: np.random.SeedSequence) -> Episode:
        environment, steps = self._environment, self.spec.steps
        simulator_seed, global_seed, own_seed = (_child(seed, stream) for stream in range(3))
        reset_seed = int(simulator_seed.generate_state(1, np.uint64)[0])
        rows: list[tuple[np.ndarray, ...]] = []
        with _global_numpy_seed(global_seed):
            observation = self._start(np.random.default_rng(own_seed), reset_seed)
            for _ in range(steps):
                # The very numbers that are stored are the ones that act.
                action = np.clip(self._action(), -1.0, 1.0).astype(np.float32)
                rows.append((observation, action, *self._state()))
                observation, _, _, _, info = environment.step(action)
                self._stepped(info)
        columns = [np.stack(column) for column in zip(*rows, strict=True)]
        names = ("observations", "actions", "qpos", "qvel", "button_states")
        episode = {
            name: column.astype(np.int64 if name == "button_states" else np.float32)
            for name, column in zip(names, columns, strict=False)
        }
        episode["terminals"] = np.arange(steps) == steps - 1
        return episode

    def _state(self) -> tuple[np.ndarray, ...]:
        data = self._environment.data
        return data.qpos.copy(), data.qvel.copy()

    def _is_healthy(self, episode: Episode) -> bool:
        return all(bool(np.isfinite(episode[name]).all()) for name in ("observations", "actions", "qpos", "qvel"))

    @abstractmethod
    def _start(self, rng: np.random.Generator, reset_seed: int) -> np.ndarray:
        """Begin an episode and return its first observation; `rng` is the episode's own."""

    @abstractmethod
    def _action(self) -> np.ndarray:
        """The controller's action [A] in the present state."""

    @abstractmethod
    def _stepped(self, info: dict[str, Any]) -> None:
        """Take note of what the environment reported after a step."""


class MazeCollector(Collector):
    """A point that follows the shortest path to random cells, one after the other, with noise on every action.

    After a teleport the environment still reports the place before it, in evaluation too, and so do the observations;
    qpos has the true place.
    """

    def __init__(self, spec: EpisodeSpec) -> None:
        super().__init__(spec)
        self._free = [(int(i), int(j)) for i, j in np.argwhere(self._environment.maze_map == 0)]
        self._goals = [cell for cell in self._free if not self._is_corridor(cell)]
        self._rng = np.random.default_rng(0)
        self._goal: Cell = self._free[0]
        self._ways: dict[tuple[Cell, Cell], tuple[np.ndarray, bool]] = {}

    def _is_corridor(self, cell: Cell) -> bool:
        """Whether the cell only leads straight on: walls on two opposite sides, and free cells on the other two."""
        (i, j), maze = cell, self._environment.maze_map
        north, south, west, east = maze[i - 1, j], maze[i + 1, j], maze[i, j - 1], maze[i, j + 1]
        return bool(north == south and west == east and north != west)

    def _start(self, rng: np.random.Generator, reset_seed: int) -> np.ndarray:
        self._rng = rng
        self._environment.action_space.seed(reset_seed)
        start = self._free[rng.integers(len(self._free))]
        options = {"task_info": {"init_ij": start, "goal_ij": start}}
        observation, _ = self._environment.reset(seed=reset_seed, options=options)
        self._draw_goal(start)
        return observation

    def _draw_goal(self, cell: Cell) -> None:
        """Aim at a random cell that can be walked to from `cell`: a teleport may have ended in a closed one."""
        reachable = [goal for goal in self._goals if self._toward(cell, goal)[1]]
        self._goal = reachable[self._rng.integers(len(reachable))] if reachable else cell
        self._environment.set_goal(goal_xy=self._environment.add_noise(self._environment.ij_to_xy(self._goal)))

    def _toward(self, cell: Cell, goal: Cell) -> tuple[np.ndarray, bool]:
        """The simulator's own next way-point [2] from `cell` to `goal`, and whether there is a way."""
        if (cell, goal) not in self._ways:
            environment = self._environment
            waypoint, distance = environment.get_oracle_subgoal(environment.ij_to_xy(cell), environment.ij_to_xy(goal))
            self._ways[cell, goal] = waypoint, bool(distance[cell] >= 0)
        return self._ways[cell, goal]

    def _action(self) -> np.ndarray:
        position = self._environment.get_xy()
        cell = self._environment.xy_to_ij(position)
        waypoint, reachable = self._toward(cell, self._goal)
        if not reachable:
            self._draw_goal(cell)
            waypoint, _ = self._toward(cell, self._goal)
        direction = waypoint - position
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        return direction + self._rng.normal(0.0, self.spec.noise, size=direction.shape)

    def _stepped(self, info: dict[str, Any]) -> None:
        if info["success"]:
            self._draw_goal(self._environment.xy_to_ij(self._environment.get_xy()))


class ManipulationCollector(Collector):
    """A robot arm that follows noisy plans to random targets (cubes, buttons, drawer, window), one after the other."""

    def __init__(self, spec: EpisodeSpec) -> None:
        super().__init__(spec, mode="data_collection")
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        family, size = spec.environment.split("-")[:2]
        options = {"env": self._environment, "noise": spec.noise, "noise_smoothing": spec.noise_smoothing}
        self._planners: dict[str, Any] = {}
        if family in ("cube", "scene"):
            self._planners["cube"] = CubePlanOracle(**options)
        if family in ("puzzle", "scene"):
            self._planners["button"] = ButtonPlanOracle(gripper_always_closed=family == "puzzle", **options)
        if family == "scene":
            self._planners["drawer"] = DrawerPlanOracle(**options)
            self._planners["window"] = WindowPlanOracle(**options)
        self._stacking = STACKING.get(size, (0.0, 0.0))
        self._has_cube_bounds = family == "scene"
        self._has_buttons = family in ("puzzle", "scene")
        self._stack_probability = 0.0
        self._observation = np.empty(0)
        self._info: dict[str, Any] = {}

    def _start(self, rng: np.random.Generator, reset_seed: int) -> np.ndarray:
        self._stack_probability = float(rng.uniform(*self._stacking))
        observation, info = self._environment.reset(seed=reset_seed)
        self._plan(observation, info)
        return observation

    def _plan(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        self._planner = self._planners[info["privileged/target_task"]]
        self._planner.reset(observation, info)
        self._observation, self._info = observation, info

    def _action(self) -> np.ndarray:
        return self._planner.select_action(self._observation, self._info)

    def _stepped(self, info: dict[str, Any]) -> None:
        self._info = info
        if self._planner.done:
            self._plan(*self._environment.set_new_target(p_stack=self._stack_probability))

    def _state(self) -> tuple[np.ndarray, ...]:
        if self._has_buttons:
            return (*super()._state(), self._environment._cur_button_states.copy())
        return super()._state()

    def _is_healthy(self, episode: Episode) -> bool:
        """In the scene, besides, the cube must stay in sight unless it lies in the drawer: never beyond y = 0.29 m, and
        beyond y = -0.3 m only at the height of the drawer's floor, 0.06 to 0.08 m.
        """
        healthy = super()._is_healthy(episode)
        if healthy and self._has_cube_bounds:
            _, y, z = episode["qpos"][:, CUBE_POSITION].T
            in_drawer = (z >= 0.06) & (z <= 0.08)
            healthy = bool(((y < 0.29) & ((y > -0.3) | in_drawer)).all())
        return healthy


def make_collector(spec: EpisodeSpec) -> Collector:
    """The collector for the environment of `spec`."""
    return MazeCollector(spec) if spec.environment.startswith("pointmaze") else ManipulationCollector(spec)


def _child(seed: np.random.SeedSequence, index: int) -> np.random.SeedSequence:
    """What the first `seed.spawn` would give at `index`, without counting in `seed` what was spawned."""
    return np.random.SeedSequence(seed.entropy, spawn_key=(*seed.spawn_key, index))


@contextmanager
def _global_numpy_seed(seed: np.random.SeedSequence) -> Iterator[None]:
    """Seed NumPy's global generator, from which mazes draw start noise and plans their shape; restore it afterwards."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed.generate_state(8))  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def start_worker() -> None:
    """Prepare a worker process: an interrupt from the keyboard is its parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


_worker_collector = functools.lru_cache(maxsize=1)(make_collector)


def collect_in_worker(spec: EpisodeSpec, seed: np.random.SeedSequence) -> Episode:
    """`Collector.episode` in a worker process, which keeps the environment from one call to the next."""
    return _worker_collector(spec).episode(seed)
