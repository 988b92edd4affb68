# ruff: noqa: NPY002 - NumPy's global generator is what is tested
"""Evaluation: which episodes run, their seeds, the intervals, and what is left untouched; in real simulators."""

import functools
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.envs.evaluation import EvaluationError, bootstrap_interval, evaluate
from vgf_fast.envs.simulators import EpisodeSeed, Simulator

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("ogbench")
pytest.importorskip("mujoco")
# Worker processes cannot import a test.
pytest.importorskip("cloudpickle").register_pickle_by_value(sys.modules[__name__])

MAZE = "pointmaze-medium-navigate-singletask-v0"


def make_policy(observation_dim=2, action_dim=2, **overrides):
    config = vgf.VGFConfig(
        observation_dim,
        action_dim,
        hidden_dims=(16, 16),
        behavior_hidden_dims=(16,),
        particles=4,
        behavior_steps=2,
        **overrides,
    )
    return vgf.VGFPolicy(config)


class Recorder(gymnasium.Wrapper):
    """Appends the first observation of every episode to a file, so that worker processes can be watched too."""

    def __init__(self, env, path):
        super().__init__(env)
        self.path = path

    def reset(self, **options):
        observation, info = self.env.reset(**options)
        with open(self.path, "ab") as file:
            file.write(observation.tobytes())
        return observation, info


def make_maze(path=None, steps=15):
    from vgf_fast.data import ogbench

    env = gymnasium.wrappers.TimeLimit(ogbench.make_env(MAZE), steps)
    return env if path is None else Recorder(env, path)


def make_reacher():
    return gymnasium.make("Reacher-v5", max_episode_steps=10)


def first_observations(path):
    return np.frombuffer(Path(path).read_bytes()).reshape(-1, 2)


class Countdown(gymnasium.Env):
    """Episodes of very different lengths: as many steps as the seed says; the reward is 1 a step."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-0.5, 0.25, (2,), np.float32)

    def __init__(self):
        self.seeds, self.actions = [], []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.left = 1 + seed % 17
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        assert self.left > 0, "stepped after its end"
        self.actions.append(action)
        self.left -= 1
        success = self.left == 0 and self.seeds[-1] % 2 == 0
        return np.zeros(2, np.float32), 1.0, self.left == 0, False, {"success": success}


def test_results_do_not_depend_on_workers_and_starts_differ(tmp_path):
    policy = make_policy()
    options = {"episodes": 5, "flow_steps": (0, 2), "num_envs": 3, "behavior_cloning": True, "seed": 3}
    results, starts = {}, {}
    for workers in ("sync", "async"):
        path = str(tmp_path / workers)
        results[workers] = evaluate(policy, functools.partial(make_maze, path), workers=workers, **options)
        starts[workers] = first_observations(path)
    assert results["sync"] == results["async"]
    assert [result.label for result in results["sync"]] == ["bc", "L=0", "L=2"]
    # Three settings of five episodes, every one of them elsewhere; and every setting starts from the same places.
    for found in starts.values():
        assert found.shape == (15, 2)
        assert len(np.unique(found, axis=0)) == 5
    sync = starts["sync"].reshape(3, 5, 2)
    np.testing.assert_array_equal(sync[0], sync[1])
    np.testing.assert_array_equal(sync[0], sync[2])
    np.testing.assert_array_equal(np.unique(starts["sync"], axis=0), np.unique(starts["async"], axis=0))


def test_the_same_seed_and_another(tmp_path):
    policy = make_policy()
    starts = []
    for index, seed in enumerate((0, 0, 1)):
        path = str(tmp_path / str(index))
        # The state of the caller's global generator must not matter.
        np.random.seed(index)
        evaluate(
            policy, functools.partial(make_maze, path, 2), episodes=4, flow_steps=(0,), num_envs=2 + index, seed=seed
        )
        starts.append(np.unique(first_observations(path), axis=0))
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.isin(starts[2], starts[0]).any()


def test_generators_are_left_as_they_were():
    policy = make_policy(selection="softmax")
    np.random.seed(11)
    random.seed(12)
    torch.manual_seed(13)
    before = np.random.get_state(), random.getstate(), torch.get_rng_state(), policy.generator.get_state()
    evaluate(policy, make_maze, episodes=3, flow_steps=(0, 1), num_envs=2, behavior_cloning=True)
    np.testing.assert_array_equal(np.random.get_state()[1], before[0][1])
    assert np.random.get_state()[2:] == before[0][2:]
    assert random.getstate() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(policy.generator.get_state(), before[3])
    # The very generator that was there, not a copy of it.
    drawn = np.random.rand(3)
    np.random.seed(11)
    np.testing.assert_array_equal(np.random.rand(3), drawn)


def test_randomness_within_an_episode_belongs_to_its_environment():
    """A teleport drawn from NumPy's global generator must not depend on the other environments' draws."""

    class Drawing(Countdown):
        def step(self, action):
            observation, _, done, cut, info = super().step(action)
            return observation, float(np.random.rand()), done, cut, info

    policy = make_policy()
    returns = [evaluate(policy, Drawing, episodes=6, flow_steps=(0,), num_envs=count)[0].returns for count in (1, 4, 6)]
    assert returns[0] == returns[1] == returns[2]


class Casting(Countdown):
    """Makes a space in every reset, as OGBench's arms do, and has something to say."""

    def reset(self, **options):
        gymnasium.spaces.Box(-0.123456789 * np.ones(2), np.ones(2), dtype=np.float32)
        warnings.warn("worth knowing", stacklevel=1)
        return super().reset(**options)


def test_what_every_reset_of_an_arm_warns_of_is_not_said():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Casting().reset(seed=0)
    assert any("precision lowered" in str(one.message) for one in caught)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        evaluate(make_policy(), Casting, episodes=2, flow_steps=(0,), num_envs=1)
    assert {str(one.message) for one in caught} == {"worth knowing"}


@pytest.mark.parametrize("num_envs", [1, 3, 50])
def test_exactly_the_asked_episodes_run_however_long(num_envs):
    made = []

    def make_env():
        made.append(Countdown())
        return made[-1]

    (result,) = evaluate(make_policy(), make_env, episodes=8, flow_steps=(1,), num_envs=num_envs, seed=5)
    seeds = [int(np.random.SeedSequence((5, number)).generate_state(1)[0]) for number in range(8)]
    assert len(made) == min(num_envs, 8)
    assert sorted(seed for env in made for seed in env.seeds) == sorted(seeds)
    assert result.lengths == tuple(1 + seed % 17 for seed in seeds)
    assert len(set(result.lengths)) > 3
    assert result.returns == tuple(float(length) for length in result.lengths)
    assert result.length_mean == pytest.approx(np.mean(result.lengths))
    # Success is the last step's.
    assert result.successes == tuple(seed % 2 == 0 for seed in seeds)
    assert result.success_mean == pytest.approx(np.mean(result.successes))
    for env in made:
        assert np.all([(env.action_space.contains(action)) for action in env.actions])


def test_one_call_of_the_policy_a_step(monkeypatch):
    policy = make_policy(10, 2)
    batches = []
    original = policy.sample_actions

    def counted(observations, **options):
        batches.append((observations.shape, options["flow_steps"], options["selection"]))
        return original(observations, **options)

    monkeypatch.setattr(policy, "sample_actions", counted)
    evaluate(policy, make_reacher, episodes=6, flow_steps=(0, 3), num_envs=4, behavior_cloning=True)
    one = [(4, 10)] * 10 + [(2, 10)] * 10
    expected = [(shape, 0, "random") for shape in one] + [(shape, steps, None) for steps in (0, 3) for shape in one]
    assert batches == expected


def test_episodes_do_not_depend_on_their_neighbours():
    """Noise is an episode's own: the same numbers start its particles, with however many environments beside it."""
    policy = make_policy(10, 2)
    one, four = (
        evaluate(policy, make_reacher, episodes=5, flow_steps=(0,), num_envs=count)[0].returns for count in (1, 4)
    )
    # Not bit for bit: a product of matrices rounds otherwise in another batch.
    np.testing.assert_allclose(one, four, rtol=1e-4)


def test_behavior_cloning_and_best_of_n_differ():
    policy = make_policy(10, 2)
    options = {"episodes": 4, "num_envs": 4}
    cloned, best, moved = evaluate(policy, make_reacher, flow_steps=(0, 3), behavior_cloning=True, **options)
    assert cloned.returns != best.returns
    assert best.returns != moved.returns
    (alone,) = evaluate(policy, make_reacher, flow_steps=(), behavior_cloning=True, **options)
    assert alone == cloned
    assert cloned.success_mean is cloned.successes is None


def test_intervals():
    rng = np.random.default_rng(0)
    values = rng.normal(2.0, 3.0, size=400)
    low, high = bootstrap_interval(values, 0.95, seed=0)
    # The normal approximation holds for 400 values.
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert bootstrap_interval(values, 0.95, seed=0) == (low, high)
    narrow = bootstrap_interval(values, 0.5, seed=0)
    assert low < narrow[0] < narrow[1] < high
    assert bootstrap_interval([4.0], 0.95, seed=0) == (4.0, 4.0)


def test_normalised_returns():
    options = {"episodes": 4, "flow_steps": (0,), "num_envs": 4}
    (plain,) = evaluate(make_policy(), Countdown, **options)
    (ranged,) = evaluate(make_policy(), Countdown, score=(2.0, 12.0), **options)
    (called,) = evaluate(make_policy(), Countdown, score=lambda value: 10.0 * (value - 2.0), **options)
    assert plain.normalized_mean is None
    assert ranged.normalized_mean == pytest.approx(10.0 * (plain.return_mean - 2.0))
    assert ranged.normalized_low == pytest.approx(10.0 * (plain.return_low - 2.0))
    assert (called.normalized_mean, called.normalized_high) == pytest.approx(
        (ranged.normalized_mean, ranged.normalized_high)
    )


def test_fit_evaluates():
    """The learner's own call of it."""
    from vgf_fast.data.dataset import Dataset

    policy = make_policy()
    zeros = torch.zeros(8, 2)
    dataset = Dataset.from_arrays(
        observations=zeros, actions=zeros, next_observations=zeros, rewards=torch.zeros(8), masks=torch.ones(8)
    )
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=4))
    records = learner.fit(dataset, 1, Countdown, eval_episodes=3, eval_flow_steps=(0, 2), progress=False)
    assert set(records[-1]) == {"step", "return/L=0", "return/L=2", "success/L=0", "success/L=2"}


class Failing(Countdown):
    def step(self, action):
        if len(self.actions) == 3:
            raise RuntimeError("the arm\nfell off")
        return super().step(action)


class NaN(Countdown):
    def step(self, action):
        return np.array([0.0, np.nan]), 0.0, False, False, {}


@pytest.mark.parametrize("workers", ["sync", "async"])
def test_an_environment_that_fails_is_named(workers):
    state = np.random.get_state()[1].copy()
    with pytest.raises(
        EvaluationError, match=r"failed in step \d+ of the episode with seed \d+: RuntimeError: the arm fell"
    ):
        evaluate(make_policy(), Failing, episodes=4, num_envs=2, workers=workers)
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    if workers == "sync":
        with pytest.raises(EvaluationError, match="step 1 of .* ValueError: observation has NaN"):
            evaluate(make_policy(), NaN, episodes=1, num_envs=1)


class Suicidal(Countdown):
    def step(self, action):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_named():
    started = time.monotonic()
    with pytest.raises(EvaluationError, match=r"a worker process ended with exit code -9"):
        evaluate(make_policy(), Suicidal, episodes=1, num_envs=1, workers="async")
    assert time.monotonic() - started < 30


def test_environments_are_closed_whatever_happens():
    closed = []

    class Closing(Failing):
        def close(self):
            closed.append(self)

    with pytest.raises(EvaluationError):
        evaluate(make_policy(), Closing, episodes=4, num_envs=3)
    assert len(closed) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes is 0, expected an integer >= 1"),
        ({"num_envs": True}, "num_envs is True, expected an integer >= 1"),
        ({"seed": -1}, "seed is -1, expected an integer from 0"),
        ({"confidence": 1.0}, r"confidence is 1.0, expected a number in \(0, 1\)"),
        ({"flow_steps": (0, -1)}, r"flow_steps is \(0, -1\), expected integers >= 0"),
        ({"flow_steps": ()}, "flow_steps is empty"),
        ({"flow_steps": (1, 1)}, "expected different numbers"),
        ({"workers": "many"}, "workers is 'many', expected one of 'sync', 'async'"),
        ({"score": (1.0, 1.0)}, r"score is \(1.0, 1.0\), expected \(low, high\) with high > low"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_policy(), Countdown, **options)


def test_spaces_that_do_not_fit():
    with pytest.raises(ValueError, match="observations have 2 entries, expected 3: the policy's config"):
        evaluate(make_policy(3, 2), Countdown)
    with pytest.raises(ValueError, match="actions have 2 entries, expected 5: the policy's config"):
        evaluate(make_policy(2, 5), Countdown)
    with pytest.raises(ValueError, match=r"the action space is Discrete\(2\), expected a Box of vectors"):
        evaluate(make_policy(4, 2), lambda: gymnasium.make("CartPole-v1"))
    with pytest.raises(TypeError, match="make_env is a Countdown, expected a function"):
        evaluate(make_policy(), Countdown())
    with pytest.raises(TypeError, match=r"make_env returned a dict, expected a gymnasium.Env"):
        evaluate(make_policy(), dict)


def test_a_simulator_repeats_an_episode():
    simulator = Simulator(make_maze)
    runs = []
    for seed in (EpisodeSeed(1, 2, 3), EpisodeSeed(4, 5, 6), EpisodeSeed(1, 2, 3)):
        observations = [simulator.reset(seed)]
        observations += [simulator.step(np.array([0.3, -0.2])).observation for _ in range(5)]
        runs.append(np.array(observations))
    simulator.close()
    np.testing.assert_array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0], runs[1])
