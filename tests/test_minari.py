"""Minari: data sets written with its own API from real environments, back as transitions and as environments."""

import numpy as np
import pytest
import torch

minari = pytest.importorskip("minari")
gymnasium = pytest.importorskip("gymnasium")
from gymnasium import spaces  # noqa: E402
from minari.data_collector.episode_buffer import EpisodeBuffer  # noqa: E402

from vgf_fast.common.bounds import ActionBounds  # noqa: E402
from vgf_fast.data import minari as loader  # noqa: E402
from vgf_fast.envs import tasks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Goal(gymnasium.Env):
    """A point that shall reach a goal: dict observations, actions in [-0.5, 2]."""

    observation_space = spaces.Dict(
        {
            "observation": spaces.Box(-9.0, 9.0, (2,), np.float64),
            "desired_goal": spaces.Box(-9.0, 9.0, (1,), np.float64),
            "achieved_goal": spaces.Box(-9.0, 9.0, (1,), np.float64),
        }
    )
    action_space = spaces.Box(np.array([-0.5], np.float32), np.array([2.0], np.float32))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.goal = 0.0, float(self.np_random.uniform(1, 3))
        return self._observe(), {}

    def step(self, action):
        self.at += float(action[0])
        done = self.at >= self.goal
        return self._observe(), float(done), done, False, {"success": done}

    def _observe(self):
        state = {"observation": [self.at, self.at**2], "desired_goal": [self.goal], "achieved_goal": [self.at]}
        return {key: np.array(value) for key, value in state.items()}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    gymnasium.register("VgfGoal-v0", entry_point=f"{__name__}:Goal", max_episode_steps=6)
    yield
    gymnasium.registry.pop("VgfGoal-v0")


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def record(name, env_id, episodes=5, seed=0, **options):
    """Random actions in an environment, as Minari writes them."""
    environment = gymnasium.make(env_id)
    buffers, rng = [], np.random.default_rng(seed)
    for episode in range(episodes):
        observation, _ = environment.reset(seed=episode)
        lists = {field: [] for field in ("observations", "actions", "rewards", "terminations", "truncations")}
        lists["observations"].append(observation)
        done = False
        while not done:
            space = environment.action_space
            action = rng.uniform(space.low, space.high).astype(np.float32)
            observation, reward, terminated, truncated, _ = environment.step(action)
            for field, value in zip(lists, (observation, action, reward, terminated, truncated), strict=True):
                lists[field].append(value)
            done = terminated or truncated
        if isinstance(observation, dict):
            lists["observations"] = {key: [one[key] for one in lists["observations"]] for key in observation}
        buffer = EpisodeBuffer(**lists)
        buffers.append(buffer)
    environment.close()
    return minari.create_dataset_from_buffers(name, buffers, env=env_id, **options), buffers


def test_transitions_of_a_real_environment(local):
    dataset, buffers = record("test/reacher-v0", "Reacher-v5", ref_min_score=-10.0, ref_max_score=0.0)
    data = loader.load("test/reacher-v0")
    steps = [len(buffer.rewards) for buffer in buffers]
    assert data.train.size == sum(steps) == dataset.total_steps
    for name, expected in (
        ("observations", np.concatenate([b.observations[:-1] for b in buffers])),
        ("next_observations", np.concatenate([b.observations[1:] for b in buffers])),
        ("rewards", np.concatenate([b.rewards for b in buffers])),
    ):
        np.testing.assert_allclose(getattr(data.train, name), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(
        data.train.actions, np.clip(np.concatenate([b.actions for b in buffers]), -1, 1), atol=2e-5
    )
    # Reacher only ever times out: all is bootstrapped, and every episode ends a trajectory.
    assert data.train.masks.min() == 1.0
    assert data.train.terminals.nonzero().flatten().tolist() == (np.cumsum(steps) - 1).tolist()
    assert data.score == (-10.0, 0.0)
    environment = data.make_env()
    assert environment.spec.id == "Reacher-v5"
    environment.close()


def test_terminations_and_goals(local):
    _, buffers = record("test/goal-v0", "VgfGoal-v0", episodes=12)
    data = loader.load("test/goal-v0")
    terminated = np.concatenate([b.terminations for b in buffers])
    truncated = np.concatenate([b.truncations for b in buffers])
    assert terminated.any()
    assert (truncated & ~terminated).any()
    np.testing.assert_array_equal(data.train.masks, 1.0 - terminated)
    np.testing.assert_array_equal(data.train.terminals, terminated | truncated)
    environment = data.make_env()
    first, _ = environment.reset(seed=0)
    # As the environment's own wrapper flattens: achieved goal, desired goal, observation.
    np.testing.assert_allclose(data.train.observations[0], first, rtol=1e-6)
    assert data.train.observation_dim == 4
    actions = np.concatenate([b.actions for b in buffers])[:, 0]
    np.testing.assert_allclose(data.train.actions[:, 0], 2 * (actions + 0.5) / 2.5 - 1, atol=2e-5)
    # The environment takes actions in its own units, which a policy of the data knows.
    assert data.train.action_bounds == ActionBounds((-0.5,), (2.0,))
    environment.step(np.array([2.0], np.float32))
    assert environment.unwrapped.at == pytest.approx(2.0)
    assert data.score is None


def test_as_a_task(local):
    record("test/goal-v0", "VgfGoal-v0")
    task = tasks.load("minari/test/goal-v0", local, dtype=torch.bfloat16)
    assert task.train.dtype == torch.bfloat16
    assert task.evaluation.make_env().observation_space.shape == (4,)
    assert "minari/test/goal-v0: observations 4, actions 1" in task.summary
    with pytest.raises(FileNotFoundError, match=r"expected the Minari data set 'test/none-v0' there"):
        tasks.load("minari/test/none-v0", local)


def buffer_of(observations, actions, rewards=None):
    steps = len(actions)
    return EpisodeBuffer(
        observations=observations,
        actions=actions,
        rewards=[0.0] * steps if rewards is None else rewards,
        terminations=[False] * steps,
        truncations=[False] * (steps - 1) + [True],
    )


def written(buffer, observation_space, action_space):
    return minari.create_dataset_from_buffers(
        "test/made-v0", [buffer], observation_space=observation_space, action_space=action_space
    )


BOX = spaces.Box(-1.0, 1.0, (1,), np.float32)
STATE = spaces.Box(-9.0, 9.0, (2,), np.float64)


def test_what_is_not_supported_says_why(local):
    states, actions = [np.zeros(2)] * 3, [np.zeros(1, np.float32)] * 2
    discrete = written(buffer_of(states, [0, 1]), STATE, spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"test/made-v0 has the action space Discrete\(2\): not supported, because"):
        loader.load(discrete)
    minari.delete_dataset("test/made-v0")
    pixels = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    images = written(buffer_of([np.zeros((4, 4, 3), np.uint8)] * 3, actions), pixels, BOX)
    with pytest.raises(ValueError, match="pixel and integer observations are not supported"):
        loader.load(images)
    minari.delete_dataset("test/made-v0")
    unbounded = written(buffer_of(states, actions), STATE, spaces.Box(-np.inf, np.inf, (1,), np.float32))
    with pytest.raises(ValueError, match="expected finite bounds, which actions are rescaled by"):
        loader.load(unbounded)


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (buffer_of([np.zeros(2), np.full(2, np.nan), np.zeros(2)], [np.zeros(1, np.float32)] * 2),
         "episode 0: observations has NaN or infinity in step 1"),
        (buffer_of([np.zeros(2)] * 3, [np.zeros(1, np.float32), np.full(1, 3.0, np.float32)]),
         r"episode 0: actions holds 3 in row 1, column 0, expected in \[-1, 1\]"),
        (buffer_of([np.zeros(2)] * 3, [np.zeros(1, np.float32)] * 2, [0.0, np.inf]),
         "episode 0: rewards has NaN or infinity in step 1"),
    ],
)  # fmt: skip
def test_bad_episodes_are_named(local, buffer, message):
    with pytest.raises(ValueError, match=message):
        loader.load(written(buffer, STATE, BOX))


@pytest.mark.parametrize("cut", [0.0, 0.5, 0.95])
def test_damaged_files_are_named(local, cut):
    record("test/goal-v0", "VgfGoal-v0", episodes=1)
    assert loader.load("test/goal-v0", local).train.statistics().trajectories == 1
    file = local / "test" / "goal-v0" / "data" / "main_data.hdf5"
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(ValueError, match=r"test/goal-v0, episode 0: .*goal-v0.data is damaged"):
        loader.load("test/goal-v0", local)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("rewards", lambda array: None, "episode 1: .*'rewards' doesn't exist"),
        ("actions", lambda array: array[:-1], "episode 1: {} actions but {} rewards, expected equal numbers"),
        ("terminations", lambda array: array[:-1], "episode 1: {} terminations but {} rewards"),
        (
            "observations/desired_goal",
            lambda array: None,
            "episode 1: observations has no 'desired_goal', expected all of Dict",
        ),
    ],
)
def test_what_an_episode_lacks_is_named(local, key, change, message):
    h5py = pytest.importorskip("h5py")
    steps = len(record("test/goal-v0", "VgfGoal-v0", episodes=2)[1][1].rewards)
    with h5py.File(local / "test" / "goal-v0" / "data" / "main_data.hdf5", "a") as file:
        array = change(file[f"episode_1/{key}"][()])
        del file[f"episode_1/{key}"]
        if array is not None:
            file[f"episode_1/{key}"] = array
    with pytest.raises(ValueError, match=message.format(steps - 1, steps)):
        loader.load("test/goal-v0", local)


def test_without_an_environment_there_is_none(local):
    data = loader.load(written(buffer_of([np.zeros(2)] * 3, [np.zeros(1, np.float32)] * 2), STATE, BOX))
    assert (data.make_env, data.score, data.train.size) == (None, None, 2)


def test_a_download_that_fails(local, monkeypatch):
    def away(name, download):
        raise OSError("no route to host")

    monkeypatch.setattr(minari, "load_dataset", away)
    with pytest.raises(
        ConnectionError, match=r"'mujoco/hopper/medium-v0' is not here, .*no route to host.* dataset_dir"
    ):
        loader.load("mujoco/hopper/medium-v0")
