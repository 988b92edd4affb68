"""Environments side by side, each with random numbers of its own, in this process or in workers."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.random.mtrand import get_bit_generator, set_bit_generator

from vgf_fast.common.spaces import Spaces, spaces_of
from vgf_fast.config import choice

Workers = Literal["sync", "async"]
SUCCESS = ("success", "is_success")  # where an environment's info may say so
CLOSE_SECONDS = 5.0  # how long a worker may take to end by itself


class EvaluationError(RuntimeError):
    """An environment failed; the message says which, in which episode and step, and why."""


class EpisodeSeed(NamedTuple):
    """Seeds of one episode, each below 2**32: of ``env.reset``, and of NumPy's and Python's global generators."""

    environment: int
    global_numpy: int
    global_python: int


class Outcome(NamedTuple):
    """What a step led to; ``success`` is None where the environment's info has neither "success" nor "is_success"."""

    observation: np.ndarray  # [O]
    reward: float
    done: bool
    success: bool | None
    terminated: bool = False  # not merely out of time


def read_spaces(make_env: Callable[[], Any]) -> Spaces:
    """Make an environment, read its sizes and bounds as ``spaces_of``, and close it."""
    simulators = make_simulators(make_env, 1, "sync")
    try:
        return simulators.spaces
    finally:
        simulators.close()


class Simulator:
    """One environment with its own copy of NumPy's global generator.

    OGBench's mazes draw start noise and teleports from that generator, whatever ``reset`` was seeded with. So that an
    episode depends on nothing but its seed, the generator is this environment's own while it runs, and the caller's
    again afterwards.
    """

    def __init__(self, make_env: Callable[[], Any]) -> None:
        self._bits = np.random.MT19937(0)
        self._episode, self._steps = "before its first episode", 0
        try:
            with self._own_numpy():
                self.env = make_env()
        except (ImportError, OSError, TypeError, ValueError):
            raise
        except Exception as error:
            raise EvaluationError(" ".join(f"make_env failed: {type(error).__name__}: {error}".split())) from error
        with warnings.catch_warnings():
            # OGBench's robot arms make their action space anew whenever they are asked, from bounds in float64.
            warnings.filterwarnings("ignore", module="gymnasium")
            for name in ("reset", "step", "observation_space", "action_space"):
                if not hasattr(self.env, name):
                    raise TypeError(f"make_env returned a {type(self.env).__name__}, expected a gymnasium.Env")
            if hasattr(self.env, "single_action_space"):
                raise TypeError(
                    f"make_env returned a vector environment, {type(self.env).__name__}, expected a single one: "
                    "several are made and stepped side by side here (num_envs)"
                )
            self._observation_space, self._action_space = self.env.observation_space, self.env.action_space

    @contextlib.contextmanager
    def _own_numpy(self) -> Iterator[None]:
        callers = get_bit_generator()
        set_bit_generator(self._bits)
        try:
            yield
        finally:
            set_bit_generator(callers)

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        try:
            with self._own_numpy():
                yield
        except Exception as error:
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            raise EvaluationError(f"the environment failed in {what} {self._episode}: {cause}") from error

    def spaces(self) -> Spaces:
        """Sizes and bounds; errors as ``spaces_of``'s."""
        return spaces_of(self.env, self._observation_space, self._action_space)

    def reset(self, seed: EpisodeSeed) -> np.ndarray:
        """Begin an episode that is a function of the seed and the actions; returns its first observation [O]."""
        self._steps = 0
        self._episode = f"of the episode with seed {seed.environment}"
        with self._blamed("reset"):
            np.random.seed(seed.global_numpy)  # noqa: NPY002
            random.seed(seed.global_python)
            with warnings.catch_warnings():
                # As above, in OGBench's own reset.
                warnings.filterwarnings("ignore", message=".*precision lowered by casting")
                observation, _ = self.env.reset(seed=seed.environment)
            return self._vector(observation)

    def step(self, action: np.ndarray) -> Outcome:
        """One step with an action [A] in the environment's units."""
        self._steps += 1
        with self._blamed(f"step {self._steps}"):
            observation, reward, terminated, truncated, info = self.env.step(action.astype(self._action_space.dtype))
            told = [bool(info[name]) for name in SUCCESS if name in info]
            done = bool(terminated or truncated)
            if not np.isfinite(reward):
                raise ValueError(f"reward is {reward}, expected a finite number")
            success = any(told) if told else None
            return Outcome(self._vector(observation), float(reward), done, success, bool(terminated))

    def _vector(self, observation: Any) -> np.ndarray:
        vector = np.array(observation, dtype=np.float64)
        if vector.shape != self._observation_space.shape:
            raise ValueError(f"observation has shape {vector.shape}, expected {self._observation_space.shape}")
        if not np.isfinite(vector).all():
            raise ValueError("observation has NaN or infinity, expected finite numbers")
        return vector

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()


class Simulators(ABC):
    """``count`` environments in numbered slots; whatever is asked of several slots is asked of all of them at once."""

    spaces: Spaces

    @abstractmethod
    def reset(self, seeds: Mapping[int, EpisodeSeed]) -> dict[int, np.ndarray]:
        """Begin an episode in each of the given slots: slot -> first observation [O]."""

    @abstractmethod
    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Outcome]:
        """One step in each of the given slots: slot -> what came of it."""

    @abstractmethod
    def close(self) -> None:
        """Free all environments."""


class LocalSimulators(Simulators):
    """Environments in this process, one after the other."""

    def __init__(self, make_env: Callable[[], Any], slots: range) -> None:
        self._python_state = random.getstate()
        self._simulators: dict[int, Simulator] = {}
        try:
            for slot in slots:
                self._simulators[slot] = Simulator(make_env)
            self.spaces = self._simulators[slots[0]].spaces()
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Mapping[int, EpisodeSeed]) -> dict[int, np.ndarray]:
        return {slot: self._simulators[slot].reset(seed) for slot, seed in seeds.items()}

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Outcome]:
        return {slot: self._simulators[slot].step(action) for slot, action in actions.items()}

    def close(self) -> None:
        for simulator in self._simulators.values():
            simulator.close()
        random.setstate(self._python_state)


class WorkerSimulators(Simulators):
    """Environments in worker processes, at most one a core, each with several slots."""

    def __init__(self, make_env: Callable[[], Any], slots: range) -> None:
        import cloudpickle  # type: ignore[import-untyped]

        payload = cloudpickle.dumps(make_env)
        # A fresh interpreter for each worker: forking one in which torch has started threads can hang.
        context = multiprocessing.get_context("spawn")
        count = min(len(slots), os.cpu_count() or 1)
        self._count = count
        self._workers: list[tuple[Any, Connection]] = []
        try:
            for worker in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, payload, slots[worker::count]), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
            answers = [self._receive(worker) for worker in range(count)]
            self.spaces = answers[0]
        except BaseException:
            self.close()
            raise

    def reset(self, seeds: Mapping[int, EpisodeSeed]) -> dict[int, np.ndarray]:
        return self._ask("reset", seeds)

    def step(self, actions: Mapping[int, np.ndarray]) -> dict[int, Outcome]:
        return self._ask("step", actions)

    def _ask(self, method: str, arguments: Mapping[int, Any]) -> dict[int, Any]:
        shares: dict[int, dict[int, Any]] = {}
        for slot, argument in arguments.items():
            shares.setdefault(slot % self._count, {})[slot] = argument
        for worker, share in shares.items():
            with self._alive(worker):
                self._workers[worker][1].send((method, share))
        return {slot: answer for worker in shares for slot, answer in self._receive(worker).items()}

    @contextlib.contextmanager
    def _alive(self, worker: int) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            process = self._workers[worker][0]
            process.join(CLOSE_SECONDS)
            raise EvaluationError(
                f"a worker process ended with exit code {process.exitcode}: it was killed, ran out of memory, or the "
                'calling script lacks `if __name__ == "__main__":`; workers="sync" needs none of these'
            ) from error

    def _receive(self, worker: int) -> Any:
        with self._alive(worker):
            answer = self._workers[worker][1].recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        for _, connection in self._workers:
            connection.close()
        for process, _ in self._workers:
            process.join(CLOSE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(connection: Connection, payload: bytes, slots: range) -> None:
    """A worker: make the environments, then answer (method, {slot: argument}) until the other end closes."""
    import cloudpickle

    # An interrupt from the keyboard is the parent's to handle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    simulators: LocalSimulators | None = None
    try:
        simulators = LocalSimulators(cloudpickle.loads(payload), slots)
        connection.send(simulators.spaces)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(simulators, method)(arguments))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    except Exception as error:
        # The other end may be gone because another worker failed first.
        with contextlib.suppress(OSError):
            connection.send(_plain(error))
    finally:
        if simulators is not None:
            simulators.close()


def _plain(error: Exception) -> Exception:
    """The error as one that any process can unpickle."""
    if type(error) in (EvaluationError, TypeError, ValueError):
        return type(error)(*error.args)
    return EvaluationError(" ".join(f"make_env failed: {type(error).__name__}: {error}".split()))


def make_simulators(make_env: Callable[[], Any], count: int, workers: Workers) -> Simulators:
    """``count`` environments in slots 0 to count - 1; ``workers`` is "sync" (this process) or "async" (others)."""
    choice("workers", workers, get_args(Workers))
    if not callable(make_env):
        raise TypeError(f"make_env is a {type(make_env).__name__}, expected a function that makes one environment")
    return (LocalSimulators if workers == "sync" else WorkerSimulators)(make_env, range(count))
