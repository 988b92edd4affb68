"""Bounds of actions: what reaches the environment, what is learnt from, and what a caller gets, in their units."""

import dataclasses
import json
import re
import warnings

import numpy as np
import pytest
import torch
from properties import given, settings, st

import vgf_fast as vgf
from vgf_fast.common.bounds import ActionBounds
from vgf_fast.data import files
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.replay import ReplayBuffer
from vgf_fast.envs import tasks
from vgf_fast.online import OnlineTraining

gymnasium = pytest.importorskip("gymnasium")
from gymnasium import spaces  # noqa: E402

from vgf_fast.envs.evaluation import EvaluationError, evaluate  # noqa: E402

SMALL = {"hidden_dims": (16, 16), "behavior_hidden_dims": (16, 16), "particles": 4, "behavior_steps": 2}


class Watched(gymnasium.Wrapper):
    """Keeps every action it is given."""

    def __init__(self, env, actions):
        super().__init__(env)
        self.actions = actions

    def step(self, action):
        assert self.env.action_space.contains(action), f"{action} is not in {self.env.action_space}"
        self.actions.append(np.array(action))
        return self.env.step(action)


def pendulum(given, moved, bound=2.0):
    """Pendulum, whose torques are in [-2, 2], behind bounds of its own: what it was given, and what moved it."""
    env = Watched(gymnasium.make("Pendulum-v1", max_episode_steps=20), moved)
    if bound != 2.0:
        env = gymnasium.wrappers.RescaleAction(env, np.float32(-bound), np.float32(bound))
    return Watched(env, given)


class Aim(gymnasium.Env):
    """One step: the reward is minus the squared distance of the action from a target; the last actuator is locked."""

    observation_space = spaces.Box(-1.0, 1.0, (2,), np.float32)
    target = np.array([1.5, -0.5], np.float32)
    action_space = spaces.Box(np.array([-2.0, -3.0, 0.7], np.float32), np.array([2.0, 1.0, 0.7], np.float32))

    def __init__(self):
        self.actions = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action)
        return np.zeros(2, np.float32), self.reward(action), True, False, {}

    @classmethod
    def reward(cls, action):
        return -float(np.square(action[:2] - cls.target).sum())


def aimed(rows=512):
    """Random actions of ``Aim`` in its units, with their rewards."""
    space = Aim.action_space
    actions = np.random.default_rng(0).uniform(space.low, space.high, (rows, 3)).astype(np.float32)
    states = np.zeros((rows, 2), np.float32)
    rewards = np.array([Aim.reward(action) for action in actions], np.float32)
    return {
        "observations": states, "actions": actions, "next_observations": states, "rewards": rewards,
        "masks": np.zeros(rows, np.float32),
    }  # fmt: skip


# --- the two directions ---


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.floats(-1e6, 1e6), st.floats(0.0, 1e6), st.booleans(), st.sampled_from([np.float32, np.float64]))
def test_there_and_back(low, width, as_tensor, dtype):
    low = float(np.float32(low))
    high = max(low, float(np.float32(low + width)))
    bounds = ActionBounds((low, -1.0, 0.25), (high, 1.0, 0.25))
    inside = np.random.default_rng(0).uniform(-1, 1, (50, 3)).astype(dtype)
    inside[0], inside[1] = -1.0, 1.0
    action = bounds.to_environment(torch.from_numpy(inside) if as_tensor else inside)
    back = bounds.from_environment(action)
    assert action.dtype == (torch.from_numpy(inside).dtype if as_tensor else dtype)
    action, back = np.asarray(action), np.asarray(back)
    # The ends are exact, nothing leaves the bounds, and the unit stays as it is, bit for bit.
    np.testing.assert_array_equal(action[:2], np.array([bounds.low, bounds.high], dtype))
    assert (action >= np.array(bounds.low, dtype)).all()
    assert (action <= np.array(bounds.high, dtype)).all()
    np.testing.assert_array_equal(action[:, 1], inside[:, 1])
    np.testing.assert_array_equal(back[:, 1], inside[:, 1])
    # A locked actuator has one action, which is 0 to the policy.
    assert (action[:, 2] == 0.25).all()
    assert (back[:, 2] == 0.0).all()
    if high > low:
        np.testing.assert_array_equal(back[:2, 0], [-1.0, 1.0])
        rounding = np.finfo(dtype).eps * max(abs(low), abs(high)) / (high - low)
        np.testing.assert_allclose(back[:, 0], inside[:, 0], atol=8 * rounding + 1e-15)


def test_rounding_is_cut_off_and_more_is_refused():
    bounds = ActionBounds((-0.4, 0.0), (0.4, 3.0))
    rounded = bounds.from_environment(np.array([[np.float32(0.4), 3.0], [-0.4, -1e-6]]))
    assert rounded.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert np.isnan(bounds.from_environment(np.array([np.nan, 1.0]))).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"actions holds 0\.41 in row 7, column 0, expected in \[-0\.4, 0\.4\]"):
        bounds.from_environment(np.array([[0.0, 1.0], [0.0, 1.0], [0.41, 1.0]]), first_row=5)
    with pytest.raises(ValueError, match=r"actions holds 0\.1 in row 0, column 0, expected in \[0\.2, 0\.2\]"):
        ActionBounds((0.2,), (0.2,)).from_environment(torch.tensor([0.1]))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ((1.0,), (-1.0,), "low is 1 in entry 0, expected at most high, -1"),
        ((-1.0, -1.0), (1.0,), "low has 2 entries and high 1, expected as many"),
        ((-np.inf,), (1.0,), r"low is \(-inf,\), expected at least one finite number"),
        ((-1.0,), (), r"high is \(\), expected at least one finite number"),
        ("ab", (1.0,), "low is 'ab', expected at least one finite number"),
        (-1.0, (1.0,), "low is -1.0, expected at least one finite number"),
    ],
)
def test_bounds_that_are_none(low, high, message):
    with pytest.raises(ValueError, match=f"ActionBounds.{message}"):
        ActionBounds(low, high)
    with pytest.raises(
        ValueError, match=f"VGFConfig.action_{message.replace('most high', 'most action_high')}".split(" has")[0]
    ):
        vgf.VGFConfig(2, 1, action_low=low, action_high=high)


def test_bounds_of_another_length():
    with pytest.raises(ValueError, match="VGFConfig.action_low has 2 entries, expected 1: action_dim"):
        vgf.VGFConfig(2, 1, action_low=(-1, -1), action_high=(1, 1))
    with pytest.raises(ValueError, match="VGFConfig.action_high is None, expected at least one finite number"):
        vgf.VGFConfig(2, 1, action_low=(-1,))
    with pytest.raises(ValueError, match="action_bounds has 2 entries, expected 3: the actions' width"):
        Dataset.from_arrays(**aimed(4), action_bounds=([-1, -1], [1, 1]))


# --- evaluation ---


@pytest.mark.parametrize("bound", [2.0, 0.4])
def test_evaluation_uses_the_whole_range_and_no_more(bound):
    given, moved = [], []
    policy = vgf.VGFPolicy(vgf.VGFConfig(3, 1, selection="random", **SMALL))
    acted = []
    original = policy.sample_actions
    policy.sample_actions = lambda *args, **options: acted.append(original(*args, **options)) or acted[-1]
    evaluate(policy, lambda: pendulum(given, moved, bound), episodes=4, flow_steps=(0,), num_envs=1)
    inside = torch.cat(acted).double().numpy()
    assert abs(inside).max() == 1.0
    np.testing.assert_allclose(np.array(given), bound * inside, rtol=1e-6)
    np.testing.assert_allclose(np.array(moved), 2.0 * inside, rtol=1e-5, atol=1e-6)
    assert abs(np.array(moved)).max() == pytest.approx(2.0)


class Unbounded(Aim):
    action_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def test_an_environment_without_bounds_needs_the_policys():
    with pytest.raises(
        ValueError, match=r"action space is .*inf.*, expected finite bounds: give the policy's as config"
    ):
        evaluate(vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL)), Unbounded, episodes=1)
    with pytest.raises(
        ValueError, match=r"action space is .*inf.*, expected finite bounds: give action_low and action_h"
    ):
        vgf.VGFPolicy.for_env(Unbounded())
    made = []
    policy = vgf.VGFPolicy.for_env(Unbounded(), action_low=(-2, -3, 0.7), action_high=(2, 1, 0.7), **SMALL)
    evaluate(policy, lambda: made.append(Unbounded()) or made[-1], episodes=20, flow_steps=(0,), num_envs=1)
    actions = np.array(made[0].actions)
    assert (actions >= Aim.action_space.low).all()
    assert (actions <= Aim.action_space.high).all()
    assert actions[:, 0].max() == 2.0


def test_other_bounds_than_the_policys_are_said():
    policy = vgf.VGFPolicy.for_env(Aim(), **SMALL)

    class Wider(Aim):
        action_space = spaces.Box(-4.0, 4.0, (3,), np.float32)

    with pytest.warns(UserWarning, match=r"actions go from \[-4\] to \[4\], the policy's from \[-2, -3, 0\.7\] to"):
        evaluate(policy, Wider, episodes=1, flow_steps=(0,), num_envs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(policy, Aim, episodes=1, flow_steps=(0,), num_envs=1)
        rescaled = lambda: gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1", max_episode_steps=3), -1, 1)  # noqa: E731
        pendulums = vgf.VGFPolicy.for_env(gymnasium.make("Pendulum-v1"), **SMALL)
        evaluate(pendulums, rescaled, episodes=1, flow_steps=(0,), num_envs=1)


# --- what a caller gets ---


@pytest.mark.parametrize("vector", [False, True])
def test_a_policy_for_an_environment_acts_in_its_units(vector, tmp_path):
    def make():
        return gymnasium.make_vec("Pendulum-v1", num_envs=3) if vector else gymnasium.make("Pendulum-v1")

    env = make()
    policy = vgf.VGFPolicy.for_env(env, selection="random", **SMALL)
    assert policy.action_bounds == ActionBounds((-2.0,), (2.0,))
    observation, _ = env.reset(seed=0)
    largest = 0.0
    for _ in range(30):
        action, _ = policy.predict(observation, deterministic=False)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
        largest = max(largest, abs(action).max())
    assert largest > 1.0
    action, _ = policy.predict(observation)
    noise = torch.Generator().manual_seed(3)
    for one in (observation, torch.from_numpy(observation)):
        policy.generator.set_state(noise.get_state())
        inside = policy.sample_actions(one)
        policy.generator.set_state(noise.get_state())
        torch.testing.assert_close(policy.select_action(one), 2 * inside, rtol=0, atol=1e-6)
    policy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["action_high"] == [2.0]
    loaded = vgf.VGFPolicy.from_pretrained(tmp_path)
    assert loaded.config == policy.config
    np.testing.assert_array_equal(loaded.predict(observation)[0], action)
    env.close()


def test_a_checkpoint_without_bounds_acts_in_the_unit(tmp_path):
    policy = vgf.VGFPolicy(vgf.VGFConfig(3, 1, **SMALL))
    policy.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["action_low"], values["action_high"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    loaded = vgf.VGFPolicy.from_pretrained(tmp_path)
    assert loaded.action_bounds is None
    noise = torch.ones(4, 1)
    observation = np.zeros(3, np.float32)
    assert torch.equal(loaded.sample_actions(observation, noise=noise), policy.sample_actions(observation, noise=noise))
    assert abs(loaded.predict(observation)[0]) <= 1.0


def test_spaces_that_cannot_be_acted_in_name_what_mends_them():
    whole = gymnasium.make_vec("CartPole-v1", num_envs=2)
    with pytest.raises(ValueError, match=r"gymnasium\.wrappers\.vector\.TransformAction"):
        vgf.VGFPolicy.for_env(whole)
    whole.close()

    class Whole(Aim):
        action_space = spaces.Box(0, 9, (3,), np.int64)

    wide = vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL))
    for call in (lambda: vgf.VGFPolicy.for_env(Whole()), lambda: evaluate(wide, Whole, episodes=1)):
        with pytest.raises(ValueError, match="the action space holds int64, expected floating numbers"):
            call()
    policy = vgf.VGFPolicy(vgf.VGFConfig(3, 1, **SMALL))
    with pytest.raises(
        TypeError, match=r"make_env returned a vector environment, SyncVectorEnv, expected a single one"
    ):
        evaluate(policy, lambda: gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync"), episodes=1)


# --- learning ---


def learner_of(dataset, **overrides):
    config = vgf.VGFConfig(2, 3, hidden_dims=(32, 32), behavior_hidden_dims=(32, 32), particles=16, behavior_steps=3)
    settings = vgf.TrainConfig(batch_size=64, critic_learning_rate=3e-3, behavior_learning_rate=3e-3)
    learner = vgf.Learner(vgf.VGFPolicy(dataclasses.replace(config, **overrides)), settings)
    learner.fit(dataset, 300, progress=False)
    return learner


def test_a_policy_learns_the_best_action_outside_of_the_unit(tmp_path):
    """The best action, (1.5, -0.5), is beyond [-1, 1], and no middle of its bounds."""
    np.savez(tmp_path / "data.npz", **aimed())
    bounds = (Aim.action_space.low, Aim.action_space.high)
    loaded = files.load(tmp_path / "data.npz", action_bounds=bounds, progress=False)
    made = Dataset.from_arrays(**aimed(), action_bounds=bounds)
    assert torch.equal(made.actions, loaded.actions)
    assert made.action_bounds == loaded.action_bounds == made.to(torch.device("cpu"), torch.float64).action_bounds
    assert made.actions.abs().max() <= 1.0
    assert not made.actions[:, 2].any()
    policy = learner_of(made).policy
    assert policy.action_bounds == made.action_bounds
    action, _ = policy.predict(np.zeros(2, np.float32))
    np.testing.assert_allclose(action[:2], Aim.target, atol=0.35)
    assert action[2] == np.float32(0.7)
    (result,) = evaluate(policy, Aim, episodes=10, flow_steps=(5,), num_envs=10)
    assert result.return_mean > -0.2
    with pytest.raises(
        ValueError, match=r"the data's actions go from \[-2, -3, 0\.7\] to .*, expected from \[-2\] to \[2\]"
    ):
        learner_of(made, action_low=(-2, -2, -2), action_high=(2, 2, 2))


def test_a_file_takes_its_bounds_from_the_environment_or_the_caller(tmp_path, monkeypatch):
    monkeypatch.setitem(
        gymnasium.registry, "VgfAim-v0", gymnasium.envs.registration.EnvSpec("VgfAim-v0", entry_point=Aim)
    )
    name = str(tmp_path / "data.npz")
    np.savez(name, **aimed())
    with pytest.raises(
        ValueError, match=r"data\.npz: actions holds .*, expected in \[-1, 1\]: rescale .* or give action_bounds"
    ):
        tasks.load(name)
    task = tasks.load(name, env="VgfAim-v0")
    assert "actions are rescaled from the bounds of VgfAim-v0, [-2, -3, 0.7] to [2, 1, 0.7], to [-1, 1]" in task.summary
    assert task.train.actions.abs().max() > 0.99
    asked = tasks.load(name, env="VgfAim-v0", action_low=[-4.0], action_high=[4.0])
    assert asked.train.action_bounds == ActionBounds((-4.0,) * 3, (4.0,) * 3)
    torch.testing.assert_close(asked.train.actions[:, 0], task.train.actions[:, 0] / 2, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"data\.npz: actions holds .* in row \d+, column 1, expected in \[-2, 2\]"):
        tasks.load(name, action_low=[-2.0], action_high=[2.0])
    with pytest.raises(ValueError, match="action_low is None and action_high is .*, expected both or none"):
        tasks.load(name, action_high=[2.0])
    with pytest.raises(ValueError, match="expected none for d4rl/hopper-medium-v2: its own bounds are known"):
        tasks.load("d4rl/hopper-medium-v2", action_low=[-2.0], action_high=[2.0])
    # A mapped copy is that of its bounds.
    mapped = [files.load(name, memory_share=0.0, progress=False, action_bounds=(low, -low)) for low in (-4.0, -8.0)]
    torch.testing.assert_close(mapped[0].actions, 2 * mapped[1].actions, rtol=0, atol=2e-5)


@pytest.mark.parametrize("bound", [2.0, 0.4])
def test_what_is_learnt_online_is_what_moved_the_environment(bound):
    given, moved = [], []
    learner = vgf.Learner(
        vgf.VGFPolicy(vgf.VGFConfig(3, 1, selection="random", **SMALL)), vgf.TrainConfig(batch_size=4)
    )
    training = OnlineTraining(
        learner, None, lambda: pendulum(given, moved, bound), style="online_only", warm_up=1000, buffer_size=60
    )
    for _ in range(60):
        training.step()
    training.close()
    assert learner.policy.action_bounds.is_close(ActionBounds((-bound,), (bound,)))
    rows = training.buffer._rows
    torque = 2.0 * rows.actions.double().numpy()
    np.testing.assert_allclose(torque, np.array(moved), atol=5e-5)
    assert abs(torque).max() > 1.99
    # The reward is Pendulum's own of the torque that the buffer says.
    cos, sin, speed = rows.observations.double().numpy().T
    cost = np.arctan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque[:, 0] ** 2
    np.testing.assert_allclose(rows.rewards.double().numpy(), -cost, atol=1e-4)


def test_a_locked_actuator_online():
    learner = vgf.Learner(vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL)), vgf.TrainConfig(batch_size=4))
    learner.finetune_online(
        Dataset.from_arrays(**aimed(8), action_bounds=(Aim.action_space.low, Aim.action_space.high)),
        Aim, 8, warm_up=2, buffer_size=20, progress=False,
    )  # fmt: skip
    assert learner.step == 6
    assert learner.policy.action_bounds == ActionBounds(Aim.action_space.low, Aim.action_space.high)


def test_the_command_line_learns_and_evaluates_in_the_environments_units(tmp_path, capsys):
    for needed in ("tyro", "rich", "yaml"):
        pytest.importorskip(needed)
    from vgf_fast.cli import main

    rng = np.random.default_rng(0)
    env = gymnasium.make("Pendulum-v1")
    rows = {name: [] for name in ("observations", "actions", "next_observations", "rewards", "masks")}
    observation, _ = env.reset(seed=0)
    for _ in range(100):
        action = rng.uniform(-2, 2, 1).astype(np.float32)
        after, reward, *_ = env.step(action)
        for column, value in zip(
            rows.values(), (observation, action, after, np.float32(reward), np.float32(1)), strict=True
        ):
            column.append(value)
        observation = after
    np.savez(tmp_path / "data.npz", **{name: np.array(column) for name, column in rows.items()})
    small = [f"policy.{name}=[8]" for name in ("hidden_dims", "behavior_hidden_dims")] + ["policy.particles=2"]

    def call(*arguments):
        assert main([str(one) for one in arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    train = ["train", "--task", tmp_path / "data.npz", "--steps", 4, "--eval-interval", 0, "--no-tensorboard"]
    told = call(*train, "--out", tmp_path / "run", "--env", "Pendulum-v1", "--set", *small)
    assert "actions are rescaled from the bounds of Pendulum-v1, [-2] to [2]" in " ".join(told.split())
    call(*train[:4], 6, *train[5:], "--out", tmp_path / "run", "--resume")
    online = ["--steps", 8, "--warm-up", 4, "--buffer-size", 200, "--eval-interval", 0]
    call("finetune", "--run", tmp_path / "run", "--out", tmp_path / "online", *online)
    call(*train, "--out", tmp_path / "asked", "--action-low", -2.5, "--action-high", 2.5, "--set", *small)
    for folder, bound in (("run", 2.0), ("online", 2.0), ("asked", 2.5)):
        policy = vgf.VGFPolicy.from_pretrained(tmp_path / folder / "policy")
        assert policy.action_bounds == ActionBounds((-bound,), (bound,))
    evaluation = ["--episodes", 1, "--flow-steps", 0, "--max-episode-steps", 5]
    with pytest.warns(UserWarning, match=r"1 of 1 episodes were cut off after 5 steps"):
        assert "Pendulum" in call("evaluate", "--policy", tmp_path / "run", *evaluation, "--env", "Pendulum-v1")


def test_a_buffer_refuses_actions_in_other_units():
    buffer = ReplayBuffer(3, 2, 1)
    with pytest.raises(ValueError, match=r"action is \[2\.0\], expected in \[-1, 1\]: rescale it by vgf_fast"):
        buffer.add([0, 0], [2.0], [0, 0], 0.0, 1.0)


# --- evaluation: what ends it, and what it counts ---


class Endless(Aim):
    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {}


def test_an_environment_that_never_ends_does_not_hang():
    policy = vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL))
    with pytest.warns(UserWarning, match=r"L=0: 3 of 3 episodes were cut off after 7 steps \(max_episode_steps\)"):
        (result,) = evaluate(policy, Endless, episodes=3, flow_steps=(0,), num_envs=2, max_episode_steps=7)
    assert result.lengths == (7, 7, 7)
    assert result.returns == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="max_episode_steps is 0, expected an integer >= 1"):
        evaluate(policy, Endless, max_episode_steps=0)


@pytest.mark.parametrize("reward", [float("nan"), float("inf")])
def test_a_reward_that_is_no_number_says_where(reward):
    class Bad(Endless):
        def reset(self, **options):
            self.count = 0
            return super().reset(**options)

        def step(self, action):
            self.count += 1
            observation, _, *rest = super().step(action)
            return observation, reward if self.count == 3 else 1.0, *rest

    policy = vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL))
    message = rf"failed in step 3 of the episode with seed \d+: ValueError: reward is {re.escape(str(reward))}"
    with pytest.raises(EvaluationError, match=message):
        evaluate(policy, Bad, episodes=2, flow_steps=(0,), num_envs=2)
    training = OnlineTraining(vgf.Learner(policy), None, Bad, style="online_only", buffer_size=9)
    with pytest.raises(EvaluationError, match=message):
        training.run(5, progress=False)


@pytest.mark.parametrize("name", ["success", "is_success"])
def test_both_names_of_success_count(name):
    class Succeeding(Aim):
        def reset(self, *, seed=None, options=None):
            self.even = seed % 2 == 0
            return super().reset(seed=seed)

        def step(self, action):
            *outcome, _ = super().step(action)
            return *outcome, {name: np.bool_(self.even)}

    policy = vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL))
    (result,) = evaluate(policy, Succeeding, episodes=8, flow_steps=(0,), num_envs=2)
    seeds = [int(np.random.SeedSequence((0, number)).generate_state(1)[0]) for number in range(8)]
    assert result.successes == tuple(seed % 2 == 0 for seed in seeds)


# --- arguments of acting ---


def test_what_reset_returns_gets_a_hint():
    env = gymnasium.make("Pendulum-v1")
    policy = vgf.VGFPolicy.for_env(env, **SMALL)
    for act in (policy.sample_actions, policy.predict, policy.select_action):
        with pytest.raises(TypeError, match=r"the pair \(observation, info\) that env.reset\(\) returns"):
            act(env.reset(seed=0))
    env.close()


def test_a_generator_and_a_selection_that_are_none():
    policy = vgf.VGFPolicy(vgf.VGFConfig(2, 3, **SMALL))
    for wrong in (0, 5, np.random.default_rng(0)):
        with pytest.raises(TypeError, match=r"generator is .*, expected a torch\.Generator"):
            policy.sample_actions(np.zeros(2), generator=wrong)
    for wrong in ("best", "", 0):
        with pytest.raises(ValueError, match=rf"selection is {wrong!r}, expected one of 'max', 'softmax', 'random'"):
            policy.sample_actions(np.zeros(2), selection=wrong)
