"""D4RL: transitions equal to the d4rl package's, its tasks and scores, files of a real simulator, and downloads."""

import contextlib
import functools
import http.server
import io
import os
import threading
import types
import warnings

import numpy as np
import pytest
import torch

h5py = pytest.importorskip("h5py")
gymnasium = pytest.importorskip("gymnasium")
from properties import given, settings, st  # noqa: E402

from vgf_fast.data import d4rl  # noqa: E402
from vgf_fast.data.dataset import ACTION_CLIP  # noqa: E402
from vgf_fast.data.download import download  # noqa: E402
from vgf_fast.envs import tasks  # noqa: E402
from vgf_fast.envs.evaluation import evaluate  # noqa: E402


@pytest.fixture(scope="module")
def package():
    """The d4rl package; it prints what it cannot import, and its gym complains of its age."""
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return pytest.importorskip("d4rl")


def write(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def episodes(rng, rows, terminal=0.1, timeout=0.1, observation=3, action=2, dtype=np.float32):
    return {
        "observations": rng.normal(size=(rows, observation)).astype(dtype),
        "actions": rng.uniform(-1, 1, (rows, action)).astype(dtype),
        "rewards": rng.normal(size=rows).astype(dtype),
        "terminals": rng.random(rows) < terminal,
        "timeouts": rng.random(rows) < timeout,
    }


# --- the d4rl package ---


def assert_equal_to_the_package(package, arrays, max_steps):
    theirs = package.qlearning_dataset(types.SimpleNamespace(_max_episode_steps=max_steps), dataset=arrays)
    ours = d4rl.transitions(arrays, max_steps)
    assert len(ours["rewards"]) == len(theirs["rewards"])
    if len(theirs["rewards"]):
        for name, array in theirs.items():
            assert ours[name].dtype == array.dtype
            np.testing.assert_array_equal(ours[name], array)
    return ours


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**16), st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.sampled_from([None, 0.0, 0.1, 0.6, 1.0]), st.integers(1, 9), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_transitions_are_the_packages(package, seed, rows, terminal, timeout, max_steps, dtype):
    arrays = episodes(np.random.default_rng(seed), rows, terminal, timeout or 0.0, dtype=dtype)
    if timeout is None:
        del arrays["timeouts"]
    ours = assert_equal_to_the_package(package, arrays, max_steps)
    # A trajectory goes on exactly where the next transition begins where this one ends, in the file.
    observations, following = ours["observations"], ours["next_observations"]
    if len(observations):
        goes_on = (following[:-1] == observations[1:]).all(axis=1) & ~ours["terminals"][:-1]
        np.testing.assert_array_equal(ours["ends"], np.append(~goes_on, True))


@pytest.mark.parametrize(
    ("terminals", "timeouts"),
    [([0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]), ([0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 1]), ([0] * 6, [1] * 6)],
    ids=["one of each", "both at once", "nothing but timeouts"],
)
def test_edge_cases_are_the_packages(package, terminals, timeouts):
    arrays = episodes(np.random.default_rng(0), 6)
    arrays.update(terminals=np.array(terminals, bool), timeouts=np.array(timeouts, bool))
    assert_equal_to_the_package(package, arrays, 1000)


def test_tasks_addresses_and_scores_are_the_packages(package):
    theirs = package.infos.DATASET_URLS
    for task, url in d4rl.URLS.items():
        assert url == theirs[task]
        low, high = d4rl.REFERENCE_RETURNS[d4rl.family(task)]
        assert (low, high) == (package.infos.REF_MIN_SCORE[task], package.infos.REF_MAX_SCORE[task])
        assert (50.0 - low) / (high - low) == pytest.approx(package.get_normalized_score(task, 50.0))
    left_out = [task for task in theirs if task not in d4rl.URLS and task.split("-")[0] in d4rl.REFERENCE_RETURNS]
    # Superseded versions alone.
    assert all(task.endswith("-v0") for task in left_out)


# --- files ---


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    """Random actions in the real simulator, episodes cut after 20 steps, in D4RL's format."""
    environment = gymnasium.make("Hopper-v5", max_episode_steps=20)
    rows = {name: [] for name in ("observations", "actions", "rewards", "terminals", "timeouts")}
    rng = np.random.default_rng(0)
    observation, _ = environment.reset(seed=0)
    for _ in range(600):
        action = rng.uniform(-1, 1, 3).astype(np.float32)
        following, reward, terminated, truncated, _ = environment.step(action)
        for name, value in zip(rows, (observation, action, reward, terminated, truncated), strict=True):
            rows[name].append(value)
        observation = environment.reset()[0] if terminated or truncated else following
    environment.close()
    arrays = {name: np.array(value) for name, value in rows.items()}
    arrays["observations"], arrays["rewards"] = (arrays[n].astype(np.float32) for n in ("observations", "rewards"))
    folder = tmp_path_factory.mktemp("d4rl")
    return write(folder / "hopper_medium-v2.hdf5", **arrays), arrays


def test_a_file_of_the_simulator(hopper):
    path, arrays = hopper
    data = d4rl.load("hopper-medium-v2", path)
    kept = np.flatnonzero(~arrays["timeouts"][:-1])
    assert data.train.size == len(kept) < 599
    np.testing.assert_array_equal(data.train.masks, 1.0 - arrays["terminals"][kept])
    np.testing.assert_array_equal(data.train.next_observations, arrays["observations"][kept + 1])
    assert data.train.actions.abs().max() <= ACTION_CLIP
    # The scale spreads the returns of whole trajectories over 1000.
    done = arrays["terminals"] | arrays["timeouts"]
    number = np.cumsum(done) - done
    whole = range(number[done][-1] + 1)
    returns = [sum(arrays["rewards"][i] for i in kept if number[i] == n) for n in whole if (number[kept] == n).any()]
    assert data.reward_scale == pytest.approx(1000.0 / (max(returns) - min(returns)), rel=1e-5)
    np.testing.assert_allclose(data.train.rewards, arrays["rewards"][kept] * data.reward_scale, rtol=1e-5)
    assert (data.reward_shift, data.score) == (0.0, (-20.272305, 3234.3))
    assert d4rl.load("hopper-medium-v2", path, normalize_reward=False).reward_scale == 1.0
    assert d4rl.load("hopper-medium-v2", path, dtype=torch.bfloat16).train.dtype == torch.bfloat16


def test_a_trajectory_that_is_cut_off_does_not_scale(tmp_path):
    arrays = episodes(np.random.default_rng(0), 9, 0.0, 0.0)
    arrays["terminals"][[1, 4]] = True
    arrays["rewards"][:] = [1, 1, 2, 2, 2, 50, 50, 50, 50]
    data = d4rl.load("hopper-medium-v2", write(tmp_path / "a.hdf5", **arrays))
    assert data.reward_scale == pytest.approx(1000.0 / (6.0 - 2.0))


def test_antmaze_rewards_are_shifted(tmp_path):
    arrays = episodes(np.random.default_rng(0), 50, 0.0, 0.05, observation=29, action=8)
    arrays["rewards"] = (np.arange(50) % 7 == 0).astype(np.float32)
    data = d4rl.load("antmaze-umaze-v2", write(tmp_path / "a.hdf5", **arrays))
    assert (data.reward_scale, data.reward_shift, data.score) == (1.0, -1.0, (0.0, 1.0))
    assert set(data.train.rewards.tolist()) == {-1.0, 0.0}


def test_actions_outside_the_box_are_clipped_with_a_warning(tmp_path):
    arrays = episodes(np.random.default_rng(0), 9, observation=45, action=24)
    arrays["actions"][3, 5] = 1.7
    path = write(tmp_path / "pen-human-v1.hdf5", **arrays)
    arrays["timeouts"][:] = False
    with pytest.warns(UserWarning, match=r"1 actions lie outside \[-1, 1\], and are clipped"):
        data = d4rl.load("pen-human-v1", tmp_path)
    assert data.train.actions.max() == np.float32(ACTION_CLIP)
    assert path.is_file()


def broken(**changes):
    arrays = episodes(np.random.default_rng(0), 8, 0.2, 0.0)
    for name, change in changes.items():
        arrays[name] = change(arrays[name])
    return {name: array for name, array in arrays.items() if array is not None}


def with_nan(array):
    array = array.copy()
    array[5] = np.nan
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(rewards=lambda a: None), "has no rewards; it has actions, observations, terminals, timeouts"),
        (broken(actions=lambda a: a[:-1]), r"actions has shape \(7, 2\), expected \(8, width\)"),
        (broken(observations=with_nan), "observations has NaN or infinity in row 5"),
        (broken(rewards=with_nan), "rewards has NaN or infinity in row 5"),
        (broken(timeouts=lambda a: np.arange(8)), "timeouts has 2 in row 2, expected 0 or 1"),
        (broken(observations=lambda a: np.zeros((8, 4, 4, 3), np.uint8)), "images and integers are not supported"),
        (broken(observations=lambda a: a.astype(int)), "images and integers are not supported, because"),
        (broken(timeouts=lambda a: ~(a & False)), "holds no transitions: 8 rows"),
        (broken(terminals=lambda a: a & False), "0 whole trajectories, expected two with different returns"),
    ],
)
def test_bad_files_are_named(tmp_path, arrays, message):
    path = write(tmp_path / "hopper_medium-v2.hdf5", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        d4rl.load("hopper-medium-v2", path)
    assert str(path) in str(caught.value)


def test_one_episode(tmp_path):
    arrays = broken()
    arrays["terminals"][:] = False
    arrays["terminals"][-1] = True
    path = write(tmp_path / "hopper_medium-v2.hdf5", **arrays)
    # As in d4rl, the file's last row has no next one.
    assert d4rl.load("hopper-medium-v2", path, normalize_reward=False).train.size == 7
    with pytest.raises(ValueError, match="has 1 whole trajectories, expected two .*: use normalize_reward=False"):
        d4rl.load("hopper-medium-v2", path)


@pytest.mark.parametrize("content", [b"", b"no HDF5", None], ids=["empty", "other", "truncated"])
def test_damaged_files_are_named(tmp_path, hopper, content):
    path = tmp_path / "a.hdf5"
    path.write_bytes(hopper[0].read_bytes()[:20_000] if content is None else content)
    with pytest.raises(ValueError, match="is damaged, or no HDF5 file") as caught:
        d4rl.load("hopper-medium-v2", path)
    assert str(path) in str(caught.value)


def test_where_a_file_is_looked_for(tmp_path, hopper, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"expected hopper_expert-v2.hdf5 or hopper-expert-v2.hdf5 in it"):
        d4rl.load("hopper-expert-v2", hopper[0].parent)
    with pytest.raises(FileNotFoundError, match="to be a file"):
        d4rl.load("hopper-medium-v2", tmp_path / "nowhere")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(hopper[0].parent))
    assert d4rl.find("hopper-medium-v2") == hopper[0]
    with pytest.raises(ValueError, match="'hopper-medum-v2', which is not a D4RL task .* hopper-medium-v2"):
        d4rl.load("hopper-medum-v2")


# --- download ---


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one file; ``breaks`` is after how many bytes the first answer ends, ``ranges`` whether it can go on."""

    content, breaks, ranges, asked = b"", None, True, []

    def do_GET(self):
        asked = self.headers.get("Range")
        type(self).asked.append(asked)
        start = int(asked.split("=")[1].rstrip("-")) if asked and self.ranges else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.breaks is not None:
            body, type(self).breaks = body[: self.breaks], None
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(hopper):
    handler = type("Handler", (Server,), {"content": hopper[0].read_bytes(), "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=functools.partial(running.serve_forever, poll_interval=0.01))
        thread.start()
        handler.url = f"http://127.0.0.1:{running.server_address[1]}/hopper_medium-v2.hdf5"
        yield handler
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_broke_off(server, tmp_path, monkeypatch, ranges):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    server.breaks, server.ranges = 30_000, ranges
    with pytest.raises(ConnectionError, match=r"30000 of \d+ bytes|IncompleteRead"):
        d4rl.load("hopper-medium-v2", url=server.url)
    (part,) = tmp_path.iterdir()
    assert part.name.startswith("hopper_medium-v2.hdf5.")
    assert part.suffix == ".part"
    data = d4rl.load("hopper-medium-v2", url=server.url)
    assert server.asked == [None, "bytes=30000-"]
    assert (tmp_path / "hopper_medium-v2.hdf5").read_bytes() == server.content
    assert [path.name for path in tmp_path.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert data.train.size > 0
    d4rl.load("hopper-medium-v2", url=server.url)
    assert len(server.asked) == 2


def test_a_task_is_downloaded_from_a_mirror(server, tmp_path):
    task = tasks.load("d4rl/hopper-medium-v2", tmp_path / "cache", url=server.url.rpartition("/")[0] + "/")
    assert (tmp_path / "cache" / "hopper_medium-v2.hdf5").read_bytes() == server.content
    assert task.train.size > 0
    with pytest.raises(ValueError, match=r"url is 'http.*', expected none for own.npz: it is for OGBench and D4RL"):
        tasks.load("own.npz", url=server.url)


def test_what_is_longer_than_the_file_is_downloaded_anew(server, tmp_path):
    file = tmp_path / "hopper_medium-v2.hdf5"
    server.breaks = 10
    with pytest.raises(ConnectionError):
        download(server.url, file)
    (part,) = tmp_path.iterdir()
    part.write_bytes(bytes(10**6))
    assert download(server.url, file).read_bytes() == server.content


def test_a_server_that_is_away(tmp_path):
    with pytest.raises(ConnectionError, match=r"could not be downloaded .* put it at .*file.hdf5"):
        download("http://127.0.0.1:9/file.hdf5", tmp_path / "file.hdf5")


# --- environments ---


@pytest.mark.parametrize(
    ("task", "sizes"),
    [("hopper-medium-v2", (11, 3)), ("halfcheetah-expert-v2", (17, 6)), ("walker2d-medium-v2", (17, 6)),
     ("ant-medium-v2", (111, 8))],
)  # fmt: skip
def test_environments_have_the_sizes_of_the_data(task, sizes):
    environment = d4rl.make_env(task)
    assert (environment.observation_space.shape[0], environment.action_space.shape[0]) == sizes
    environment.close()


def test_what_has_no_environment_says_so():
    assert d4rl.environment("antmaze-large-play-v2") is None
    with pytest.raises(ValueError, match=r"cannot be evaluated here, because Gymnasium has no environment"):
        d4rl.make_env("antmaze-large-play-v2")


def test_a_policy_is_scored(tiny_policy):
    from vgf_fast import VGFPolicy

    policy = VGFPolicy(tiny_policy(11, 3), seed=0)
    score = d4rl.REFERENCE_RETURNS["hopper"]
    result = evaluate(
        policy, d4rl.environment("hopper-medium-v2"), episodes=2, num_envs=2, flow_steps=(1,), score=score,
        progress=False,
    )[0]  # fmt: skip
    assert result.normalized_mean == pytest.approx(100.0 * (result.return_mean - score[0]) / (score[1] - score[0]))


@pytest.fixture
def tiny_policy():
    from vgf_fast import VGFConfig

    return lambda o, a: VGFConfig(o, a, hidden_dims=(8,), behavior_hidden_dims=(8,), particles=2, behavior_steps=1)
