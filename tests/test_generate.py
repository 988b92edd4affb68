"""Generation: the files are OGBench's, the same for any number of processes, and never half-written."""

import math
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ogbench")

from vgf_fast.envs import generate as module
from vgf_fast.envs.collection import EpisodeSpec, make_collector
from vgf_fast.envs.generate import NAMES, GeneratedFiles, GenerationError, generate

# OGBench's own loader, called directly, builds environments with bounds given in float64.
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")

MAZE = "pointmaze-medium-navigate-v0"
MAZE_SPEC = EpisodeSpec("pointmaze-medium-v0", 40, 0.5)


def contents(files: GeneratedFiles) -> tuple[bytes, bytes]:
    return files.train.read_bytes(), files.validation.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def small_maze(folder: Path, **changes: Any) -> GeneratedFiles:
    return generate(MAZE, folder, **{"episodes": 3, "steps_per_episode": 40, "processes": 1, **changes})


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> GeneratedFiles:
    return small_maze(tmp_path_factory.mktemp("maze"))


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> GeneratedFiles:
    return generate(
        "cube-single-play", tmp_path_factory.mktemp("cube"), episodes=2, steps_per_episode=70, processes=1, seed=1
    )


def load(files: GeneratedFiles, task: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The training and validation data as OGBench's own loader gives them."""
    import ogbench

    environment, train, validation = ogbench.make_env_and_datasets(task, dataset_dir=str(files.train.parent))
    environment.close()
    return train, validation


def test_files_of_a_maze(maze: GeneratedFiles) -> None:
    assert names(maze.train.parent) == [f"{MAZE}-val.npz", f"{MAZE}.npz"]
    for path, episodes in zip(maze, (3, 1), strict=True):
        with np.load(path) as file:
            arrays = dict(file)
        assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
            "observations": ((40 * episodes, 2), np.float32),
            "actions": ((40 * episodes, 2), np.float32),
            "qpos": ((40 * episodes, 2), np.float32),
            "qvel": ((40 * episodes, 2), np.float32),
            "terminals": ((40 * episodes,), np.bool_),
        }
        assert np.flatnonzero(arrays["terminals"]).tolist() == [40 * k + 39 for k in range(episodes)]
        np.testing.assert_array_equal(arrays["observations"], arrays["qpos"])
        assert np.abs(arrays["actions"]).max() <= 1.0
        starts = arrays["observations"][::40]
        assert len(np.unique(starts, axis=0)) == episodes


def test_a_row_holds_the_state_before_its_action(maze: GeneratedFiles) -> None:
    with np.load(maze.train) as file:
        arrays = dict(file)
    collector = make_collector(MAZE_SPEC)
    simulator = collector._environment
    rows = np.flatnonzero(~arrays["terminals"])
    for row in rows[::5]:
        simulator.set_state(arrays["qpos"][row].astype(np.float64), arrays["qvel"][row].astype(np.float64))
        observation = simulator.step(arrays["actions"][row])[0]
        np.testing.assert_allclose(observation, arrays["observations"][row + 1], atol=1e-4)
    collector.close()


def test_ogbenchs_loader_reads_a_maze(maze: GeneratedFiles) -> None:
    train, validation = load(maze, "pointmaze-medium-navigate-singletask-task2-v0")
    for data, episodes in ((train, 3), (validation, 1)):
        assert len(data["observations"]) == 39 * episodes
        # Task 2 goes to the cell (1, 6), whose centre is (20, 0); anything within 1 of it succeeds.
        success = np.linalg.norm(data["observations"] - np.array([20.0, 0.0]), axis=1) <= 1.0
        np.testing.assert_array_equal(data["rewards"], success - 1.0)
        np.testing.assert_array_equal(data["masks"], 1.0 - success)


def test_maze_data_reach_the_goal_of_a_task(tmp_path: Path) -> None:
    files = generate(MAZE, tmp_path, episodes=10, processes=1)
    train, _ = load(files, "pointmaze-medium-navigate-singletask-task1-v0")
    assert len(train["observations"]) == 10_000
    assert (train["masks"] == 0).sum() > 10


def test_two_processes_write_the_same_bytes(maze: GeneratedFiles, tmp_path: Path) -> None:
    assert contents(small_maze(tmp_path, processes=2)) == contents(maze)


def test_two_processes_write_the_same_bytes_of_manipulation(cube: GeneratedFiles, tmp_path: Path) -> None:
    again = generate("cube-single-play-v0", tmp_path, episodes=2, steps_per_episode=70, processes=2, seed=1)
    assert contents(again) == contents(cube)


def test_the_seed_and_the_noise_decide_the_bytes(maze: GeneratedFiles, tmp_path: Path) -> None:
    np.random.seed(1234)  # noqa: NPY002
    assert contents(small_maze(tmp_path / "same", seed=0)) == contents(maze)
    for changes in ({"seed": 1}, {"noise": 0.2}):
        other = small_maze(tmp_path / str(changes), **changes)
        assert other.train.read_bytes() != maze.train.read_bytes()
        assert other.validation.read_bytes() != maze.validation.read_bytes()


def test_a_larger_data_set_extends_a_smaller_one(maze: GeneratedFiles, tmp_path: Path) -> None:
    larger = small_maze(tmp_path, episodes=5, validation_episodes=2)
    for small, large in zip(maze, larger, strict=True):
        with np.load(small) as few, np.load(large) as many:
            for name in few:
                np.testing.assert_array_equal(few[name], many[name][: len(few[name])])


def test_training_and_validation_differ(maze: GeneratedFiles) -> None:
    with np.load(maze.train) as train, np.load(maze.validation) as validation:
        assert not np.isin(validation["observations"][:, 0], train["observations"][:, 0]).any()


def test_the_callers_generator_is_left_alone(tmp_path: Path) -> None:
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random_sample(3)  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    small_maze(tmp_path)
    np.testing.assert_array_equal(np.random.random_sample(3), expected)  # noqa: NPY002


@pytest.mark.parametrize("environment", ["pointmaze-teleport-v0", "cube-double-v0", "scene-v0"])
def test_earlier_episodes_leave_no_trace(environment: str) -> None:
    spec = EpisodeSpec(environment, 90, 0.1, 0.5)
    collector = make_collector(spec)
    seeds = [np.random.SeedSequence(0, spawn_key=(0, number)) for number in range(2)]
    first = collector.episode(seeds[0])
    collector.episode(seeds[1])
    again = collector.episode(seeds[0])
    assert first.keys() == again.keys()
    for name in first:
        assert first[name].tobytes() == again[name].tobytes(), name
    collector.close()


def test_the_arm_moves_cubes() -> None:
    collector = make_collector(EpisodeSpec("cube-single-v0", 250, 0.1, 0.5))
    episode = collector.episode(np.random.SeedSequence(0))
    collector.close()
    positions = episode["qpos"][:, 14:17]
    assert positions[:, 2].max() > 0.08, "no cube was lifted"
    assert np.linalg.norm(positions[-1, :2] - positions[0, :2]) > 0.05, "no cube was carried away"


def test_files_of_a_cube(cube: GeneratedFiles) -> None:
    with np.load(cube.train) as file:
        arrays = dict(file)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == {
        "observations": ((140, 28), np.float32),
        "actions": ((140, 5), np.float32),
        "qpos": ((140, 21), np.float32),
        "qvel": ((140, 20), np.float32),
        "terminals": ((140,), np.bool_),
    }
    # The first twelve observations are the angles of the arm and their speeds.
    np.testing.assert_array_equal(arrays["observations"][:, :6], arrays["qpos"][:, :6])
    np.testing.assert_array_equal(arrays["observations"][:, 6:12], arrays["qvel"][:, :6])
    train, validation = load(cube, "cube-single-play-singletask-task2-v0")
    assert (len(train["rewards"]), len(validation["rewards"])) == (138, 69)
    np.testing.assert_array_equal(train["rewards"], -train["masks"])


@pytest.mark.parametrize(("name", "buttons"), [("puzzle-3x3-play", 9), ("scene-play", 2)])
def test_files_with_buttons(name: str, buttons: int, tmp_path: Path) -> None:
    files = generate(name, tmp_path, episodes=1, steps_per_episode=60, processes=1)
    with np.load(files.train) as file:
        arrays = dict(file)
    assert (arrays["button_states"].shape, arrays["button_states"].dtype) == ((60, buttons), np.int64)
    # After 19 numbers of the arm, and 9 of the cube in the scene, each button has 4: its state one-hot comes first.
    start = 19 if name.startswith("puzzle") else 28
    shown = arrays["observations"][:, start : start + 4 * buttons].reshape(60, buttons, 4)
    np.testing.assert_array_equal(shown[:, :, :2].argmax(axis=2), arrays["button_states"])
    train, validation = load(files, f"{name}-singletask-v0")
    objects = buttons + (3 if name.startswith("scene") else 0)
    for data in (train, validation):
        assert len(data["rewards"]) == 59
        assert data["rewards"].min() >= -objects
        assert data["rewards"].max() <= 0
        np.testing.assert_array_equal(data["masks"], data["rewards"] != 0)


def test_transitions_are_rounded_up_to_episodes(tmp_path: Path) -> None:
    files = generate(MAZE, tmp_path, transitions=79, steps_per_episode=40, processes=1)
    with np.load(files.train) as file:
        assert len(file["observations"]) == 3 * 40


def test_validation_is_a_tenth(tmp_path: Path) -> None:
    files = generate(MAZE, tmp_path, episodes=20, steps_per_episode=5, processes=1)
    with np.load(files.validation) as file:
        assert len(file["observations"]) == 2 * 5


def test_the_name_of_a_task_is_accepted(maze: GeneratedFiles, tmp_path: Path) -> None:
    files = generate(
        "pointmaze-medium-navigate-singletask-task3-v0", tmp_path, episodes=3, steps_per_episode=40, processes=1
    )
    assert contents(files) == contents(maze)


def test_every_name_has_a_registered_environment() -> None:
    import gymnasium
    import ogbench  # noqa: F401

    for name in NAMES:
        spec = module._spec(name, 1001, None, None)
        assert spec.environment in gymnasium.registry
        assert (spec.noise, spec.noise_smoothing) == ((0.5, 0.0) if name.startswith("pointmaze") else (0.1, 0.5))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "cube-singel-play"}, ValueError, "the closest are cube-single-play-v0"),
        ({"name": "antmaze-large-navigate-v0"}, ValueError, "the closest are pointmaze-large-navigate-v0"),
        ({"episodes": None}, ValueError, "episodes is None and transitions is None, expected exactly one"),
        ({"transitions": 100}, ValueError, "episodes is 3 and transitions is 100, expected exactly one"),
        ({"episodes": 0}, ValueError, "episodes is 0, expected at least 1"),
        ({"episodes": 2.5}, TypeError, "episodes is 2.5, expected an integer"),
        ({"episodes": None, "transitions": 0}, ValueError, "transitions is 0, expected at least 1"),
        ({"validation_episodes": 0}, ValueError, "validation_episodes is 0, expected at least 1: the loader needs"),
        ({"steps_per_episode": 1}, ValueError, "steps_per_episode is 1, expected at least 2"),
        ({"seed": -1}, ValueError, "seed is -1, expected at least 0"),
        ({"processes": 0}, ValueError, "processes is 0, expected at least 1"),
        ({"noise": -0.1}, ValueError, "noise is -0.1, expected a finite number of at least 0"),
        ({"noise": math.nan}, ValueError, "noise is nan"),
        ({"noise_smoothing": 0.5}, ValueError, "the noise of mazes is not smoothed"),
    ],
)
def test_refuses(changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"name": MAZE, "episodes": 3, "steps_per_episode": 40, "processes": 1, **changes}
    with pytest.raises(error, match=re.escape(message)):
        generate(arguments.pop("name"), tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_refuses_to_overwrite(tmp_path: Path) -> None:
    (tmp_path / f"{MAZE}-val.npz").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"-val\.npz exists: pass overwrite=True"):
        small_maze(tmp_path)
    assert names(tmp_path) == [f"{MAZE}-val.npz"]
    assert (tmp_path / f"{MAZE}-val.npz").read_bytes() == b"mine"
    small_maze(tmp_path, overwrite=True)
    assert len((tmp_path / f"{MAZE}-val.npz").read_bytes()) > 4


class FailingCollector:
    """A real collector whose second episode raises."""

    def __init__(self, error: BaseException) -> None:
        self.error = error
        self.real = make_collector(MAZE_SPEC)
        self.episodes = 0

    def episode(self, seed: np.random.SeedSequence) -> dict[str, np.ndarray]:
        self.episodes += 1
        if self.episodes == 2:
            raise self.error
        return self.real.episode(seed)

    def close(self) -> None:
        self.real.close()


def test_a_failed_episode_is_one_line_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_collector", lambda spec: FailingCollector(ValueError("bad\n  state")))
    with pytest.raises(GenerationError, match=f"^episode 1 of {MAZE} failed: ValueError: bad state$"):
        small_maze(tmp_path)
    assert names(tmp_path) == []


def test_an_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_collector", lambda spec: FailingCollector(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        small_maze(tmp_path)
    assert names(tmp_path) == []


def test_a_worker_that_raises_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the callables that another process can import, one that refuses these arguments.
    monkeypatch.setattr(module, "collect_in_worker", math.sqrt)
    with pytest.raises(GenerationError, match=rf"^episode \d of {MAZE} failed: TypeError: .*sqrt"):
        small_maze(tmp_path, processes=2)
    assert names(tmp_path) == []
    assert multiprocessing.active_children() == []


def test_a_worker_that_is_killed_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kill_and_wait(futures: list[Any]) -> Iterator[Any]:
        for child in multiprocessing.active_children():
            child.kill()
        return as_completed(futures)

    monkeypatch.setattr(module, "as_completed", kill_and_wait)
    with pytest.raises(GenerationError, match=f"a process that generated {MAZE} died"):
        small_maze(tmp_path, processes=2)
    assert names(tmp_path) == []


def test_a_full_disk_leaves_the_old_files(
    maze: GeneratedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = contents(small_maze(tmp_path))
    savez = np.savez

    def fill(file: Any, **arrays: np.ndarray) -> None:
        savez(file, **arrays)
        if "-val" not in file.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fill)
    with pytest.raises(OSError, match="No space left"):
        small_maze(tmp_path, seed=5, overwrite=True)
    assert names(tmp_path) == [f"{MAZE}-val.npz", f"{MAZE}.npz"]
    assert contents(GeneratedFiles(tmp_path / f"{MAZE}.npz", tmp_path / f"{MAZE}-val.npz")) == old


def test_a_simulation_that_goes_bad_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    collector = make_collector(MAZE_SPEC)
    good = collector.episode(np.random.SeedSequence(3))
    verdicts = iter([False, True])
    monkeypatch.setattr(collector, "_is_healthy", lambda episode: next(verdicts))
    other = collector.episode(np.random.SeedSequence(3))
    assert not np.array_equal(good["observations"], other["observations"])
    monkeypatch.setattr(collector, "_is_healthy", lambda episode: False)
    with pytest.raises(RuntimeError, match="the simulation of pointmaze-medium-v0 went bad in 20 attempts"):
        collector.episode(np.random.SeedSequence(3))
    collector.close()


def test_health_of_a_scene() -> None:
    collector = make_collector(EpisodeSpec("scene-v0", 2, 0.1, 0.5))
    episode = collector.episode(np.random.SeedSequence(0))
    for position, healthy in [
        ((0.4, 0.0, 0.02), True),
        ((0.4, 0.3, 0.02), False),
        ((0.4, -0.31, 0.02), False),
        ((0.33, -0.31, 0.07), True),
        ((0.4, 0.0, np.nan), False),
    ]:
        episode["qpos"][1, 14:17] = position
        assert collector._is_healthy(episode) is healthy, position
    collector.close()


def test_the_bar_counts_episodes_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    small_maze(tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    small_maze(tmp_path / "shown")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "4/4" in captured.err
    small_maze(tmp_path / "unwanted", progress=False)
    assert capsys.readouterr() == ("", "")
