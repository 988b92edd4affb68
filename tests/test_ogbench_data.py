"""Loading OGBench's files: what comes out, and what every bad name, file and download is told."""

import functools
import http.server
import io
import re
import shutil
import subprocess
import sys
import threading
import warnings
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch

pytest.importorskip("ogbench")

from vgf_fast.data import Dataset, ogbench
from vgf_fast.envs import tasks
from vgf_fast.envs.generate import generate

NAME = "pointmaze-medium-navigate-v0"
TASK = "pointmaze-medium-navigate-singletask-task1-v0"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small maze data set in which some episodes reach the goal of task 1."""
    folder = tmp_path_factory.mktemp("source")
    generate(NAME, folder, episodes=10, processes=1)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of that folder to spoil."""
    return Path(shutil.copytree(source, tmp_path / "data"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> Any:
        raise AssertionError(f"asked the network for {url}")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def rewrite(path: Path, **changes: Any) -> None:
    """Replace arrays of an npz file; None removes one."""
    with np.load(path) as file:
        arrays = {**dict(file), **changes}
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


@pytest.mark.usefixtures("no_network")
def test_load(source: Path) -> None:
    data = ogbench.load(TASK, source)
    assert data.task == TASK
    assert data.environment == "pointmaze-medium-singletask-task1-v0"
    file = arrays_of(source / f"{NAME}.npz")
    rows = ~file["terminals"]
    following = np.flatnonzero(rows) + 1
    assert (data.train.size, data.validation.size) == (10_000, 1_000)
    np.testing.assert_array_equal(data.train.observations, file["observations"][rows])
    np.testing.assert_array_equal(data.train.next_observations, file["observations"][following])
    np.testing.assert_array_equal(data.train.actions, file["actions"][rows].clip(-(1 - 1e-5), 1 - 1e-5))
    # Task 1 goes to the cell (6, 6), whose centre is (20, 20).
    success = np.linalg.norm(file["qpos"][rows] - 20.0, axis=1) <= 1.0
    assert 0 < success.sum() < 10_000
    np.testing.assert_array_equal(data.train.rewards, success - 1.0)
    np.testing.assert_array_equal(data.train.masks, 1.0 - success)
    statistics = data.train.statistics()
    assert statistics.trajectories == 10
    assert statistics.success_fraction == success.reshape(10, 1000).any(axis=1).mean()
    np.testing.assert_allclose(statistics.return_mean, -1000 + success.sum() / 10)


def test_dtype_and_short_names(source: Path) -> None:
    data = ogbench.load("pointmaze-medium-navigate-singletask", source, dtype=torch.float64, device="cpu")
    assert data.task == "pointmaze-medium-navigate-singletask-v0"
    assert data.environment == "pointmaze-medium-singletask-v0"
    assert data.train.dtype == data.validation.dtype == torch.float64
    # The default task of a maze is the first.
    assert torch.equal(data.train.rewards, ogbench.load(TASK, source).train.rewards.double())


def test_data_of_ones_own_kind(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.rename(path.with_name(path.name.replace("navigate", "mine")))
    assert ogbench.load("pointmaze-medium-mine-singletask-v0", folder).train.size == 10_000


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("cube-singel-play-singletask-v0", "the closest are cube-single-play-singletask-v0"),
        ("cube-single-play-v0", "the closest are cube-single-play-singletask-v0"),
        ("cube-single-paly-singletask-task2-v0", "the closest are cube-single-play-singletask-task2-v0"),
        ("cube-single-navigate-singletask-v0", "which is not a single-task OGBench task"),
        ("cube-single-play-singletask-task6-v0", "which is not a single-task OGBench task"),
        ("puzzle-4x4-play-singletask-v1", "which is not a single-task OGBench task"),
        ("", "which is not a single-task OGBench task"),
        ("visual-cube-single-play-singletask-v0", "pixel observations are not supported, because"),
    ],
)
def test_unknown_tasks(task: str, message: str, tmp_path: Path) -> None:
    for dataset_dir in (tmp_path, None):
        with pytest.raises(ValueError, match=re.escape(message)):
            ogbench.load(task, dataset_dir)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", [f"{NAME}.npz", f"{NAME}-val.npz"])
def test_missing_files_are_named_and_not_downloaded(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{folder / name} does not exist: generate it")):
        ogbench.load(TASK, folder)
    with pytest.raises(FileNotFoundError, match="does not exist: generate it"):
        ogbench.load(TASK, folder / "nowhere")
    assert not (folder / "nowhere").exists()


@pytest.mark.parametrize("name", [f"{NAME}.npz", f"{NAME}-val.npz"])
def test_damaged_files_are_named(name: str, folder: Path) -> None:
    path = folder / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    # Inside the first array, the observations: the directory of the file stays right, a checksum does not.
    flipped[2000] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], b"", b"not an archive", bytes(flipped)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(f"{path} is damaged (")):
            ogbench.load(TASK, folder)


def test_files_that_do_not_fit_are_named(folder: Path) -> None:
    path = folder / f"{NAME}-val.npz"
    arrays = arrays_of(path)
    observations = arrays["observations"].copy()
    observations[3, 1] = np.nan
    for changes, message in [
        ({"qpos": None}, "has no array 'qpos'"),
        ({"terminals": None}, "has no array 'terminals'"),
        ({"observations": np.zeros((1001, 29), np.float32)}, "observations of shape (1001, 29), expected (1001, 2)"),
        ({"actions": np.zeros((1001, 8), np.float32)}, "actions of shape (1001, 8), expected (1001, 2)"),
        ({"qpos": arrays["qpos"][:-1]}, "qpos of shape (1000, 2), expected (1001, 2)"),
        ({name: array[:0] for name, array in arrays.items()}, "holds no transitions"),
        ({"terminals": np.ones(1001, bool)}, "holds no transitions"),
        ({"observations": observations}, ": observations holds nan in row 3, column 1"),
        ({"actions": arrays["actions"] * 2}, ": actions holds"),
    ]:
        rewrite(path, **{**arrays, **changes})
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{re.escape(message)}"):
            ogbench.load(TASK, folder)


def test_files_with_buttons_need_their_states(tmp_path: Path) -> None:
    generate("puzzle-3x3-play", tmp_path, episodes=1, steps_per_episode=3, processes=1)
    task = "puzzle-3x3-play-singletask-v0"
    assert ogbench.load(task, tmp_path).train.observation_dim == 55
    rewrite(tmp_path / "puzzle-3x3-play-v0.npz", button_states=None)
    with pytest.raises(ValueError, match="has no array 'button_states'"):
        ogbench.load(task, tmp_path)


@pytest.mark.usefixtures("no_network")
def test_the_environment_variable_names_the_folder(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(source))
    assert ogbench.load(TASK).train.size == 10_000


@pytest.mark.usefixtures("no_network")
def test_the_default_folder_is_ogbenchs(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from ogbench.utils import DEFAULT_DATASET_DIR

    assert ogbench.DEFAULT_DATASET_DIR == DEFAULT_DATASET_DIR
    monkeypatch.delenv("OGBENCH_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ogbench").mkdir()
    folder.rename(tmp_path / ".ogbench" / "data")
    assert ogbench.load(TASK).train.size == 10_000


def test_missing_files_are_downloaded_to_the_default_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", lambda url: io.BytesIO((source / url.split("/")[-1]).read_bytes()))
    data = ogbench.load(TASK)
    assert (data.train.size, data.validation.size) == (10_000, 1_000)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{NAME}-val.npz", f"{NAME}.npz"]


def test_missing_files_are_downloaded_from_a_mirror(source: Path, tmp_path: Path) -> None:
    asked = []

    class Mirror(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            asked.append(self.path)

    handler = functools.partial(Mirror, directory=str(source))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        data = tasks.load(TASK, tmp_path / "cache", url=url)
        again = tasks.load(TASK, tmp_path / "cache", url=url)
        with pytest.raises(ConnectionError, match=r"pointmaze-large-navigate-v0.npz could not be downloaded .*404"):
            ogbench.load("pointmaze-large-navigate-singletask-v0", tmp_path / "cache", url=url)
        server.shutdown()
        thread.join()
    assert data.train.size == again.train.size == 10_000
    assert asked == [f"/{NAME}.npz", f"/{NAME}-val.npz", *["/pointmaze-large-navigate-v0.npz"] * 2]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [f"{NAME}-val.npz", f"{NAME}.npz"]


class Broken(io.BytesIO):
    """An answer that breaks off after its first line."""

    def __next__(self) -> bytes:
        if self.tell() > 0:
            raise ConnectionResetError("connection reset by peer")
        return super().__next__()


@pytest.mark.parametrize(
    "answer",
    [
        URLError("Name or service not known"),
        HTTPError("https://host/file", 503, "Service Unavailable", Message(), None),
        TimeoutError("timed out"),
        Broken(b"one line\nanother\n"),
    ],
)
def test_a_failed_download(answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(ConnectionError, match=r"the OGBench server seems to be away; .* as dataset_dir") as raised:
        ogbench.load(TASK)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_summary(source: Path) -> None:
    data = ogbench.load(TASK, source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lines = ogbench.summary(data.train, data.task).splitlines()
    assert lines[0] == f"{TASK}: observations 2, actions 2"
    assert lines[1] == "  10,000 transitions in 10 trajectories"
    statistics = data.train.statistics()
    assert f"return {statistics.return_mean:.1f} ± {statistics.return_std:.1f}" in lines[2]
    assert lines[3] == "  reward from -1 to 0"
    assert lines[4] == f"  the goal is reached in {100 * statistics.success_fraction:.1f} % of the trajectories"


def test_summary_warns_without_success() -> None:
    zeros = np.zeros((4, 2))
    dataset = Dataset.from_arrays(
        observations=zeros, actions=zeros, next_observations=zeros, rewards=-np.ones(4), masks=np.ones(4)
    )
    with pytest.warns(UserWarning, match="no trajectory in the data of some-task reaches its goal"):
        text = ogbench.summary(dataset, "some-task")
    assert "reached in 0.0 %" in text


def test_make_env(source: Path) -> None:
    environment = ogbench.make_env("pointmaze-medium-navigate-singletask")
    data = ogbench.load(TASK, source)
    observation, _ = environment.reset(seed=0)
    assert observation.shape == (data.train.observation_dim,)
    assert environment.action_space.shape == (data.train.action_dim,)
    reward = environment.step(np.zeros(2, np.float32))[1]
    assert reward == -1.0
    environment.close()
    with pytest.raises(ValueError, match=r"the closest are .*pointmaze-medium-navigate-singletask-v0"):
        ogbench.make_env("pointmaze-medium-v0")


def test_importing_the_package_imports_no_simulator() -> None:
    modules = "('ogbench', 'gymnasium', 'mujoco', 'h5py', 'rich', 'minari')"
    program = (
        "import sys, vgf_fast.data.ogbench, vgf_fast.envs.generate; "
        f"print([name for name in {modules} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
