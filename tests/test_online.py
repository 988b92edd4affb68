"""Offline to online: the replay buffer, the three ways to use the offline data, and going on after a stop."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from properties import given, settings, st

gymnasium = pytest.importorskip("gymnasium")
from gymnasium import spaces  # noqa: E402

from vgf_fast import Learner, TrainConfig, TransportBudget, VGFConfig, VGFPolicy  # noqa: E402
from vgf_fast.data.dataset import ACTION_CLIP, Dataset  # noqa: E402
from vgf_fast.data.replay import ReplayBuffer  # noqa: E402
from vgf_fast.online import OnlineTraining  # noqa: E402

STYLES = ("one_buffer", "half_and_half", "online_only")
BUDGET = TransportBudget(1, 0.1, 0.1)
CONFIG = VGFConfig(
    2, 1, hidden_dims=(16, 16), behavior_hidden_dims=(16, 16), particles=4, behavior_steps=2, train_budget=BUDGET,
    test_budget=BUDGET,
)  # fmt: skip


class Line(gymnasium.Env):
    """A point on a line that shall reach 1; the reward is minus the distance, and being there ends the episode."""

    observation_space = spaces.Box(-9.0, 9.0, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, limit=8):
        self.limit = limit

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.time = float(self.np_random.uniform(-0.5, 0.5)), 0
        return np.array([self.at, 1.0]), {}

    def step(self, action):
        self.at += 0.3 * float(action[0])
        self.time += 1
        done = self.at >= 1.0
        reward = -abs(1.0 - self.at)
        return np.array([self.at, 1.0]), reward, done, not done and self.time == self.limit, {"success": done}


def offline(rows=40, reward=-7.0):
    """Offline transitions that can be told from new ones by their reward."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 2, generator=generator)
    return Dataset.from_arrays(
        observations=states, actions=torch.rand(rows, 1, generator=generator) * 2 - 1,
        next_observations=states.roll(-1, 0), rewards=torch.full((rows,), reward), masks=torch.ones(rows),
    )  # fmt: skip


def training(style="one_buffer", dataset=None, seed=0, **options):
    learner = Learner(VGFPolicy(CONFIG, seed=seed), TrainConfig(batch_size=8))
    return OnlineTraining(
        learner, offline() if dataset is None else dataset, Line, style=style, **{"warm_up": 3, "seed": seed, **options}
    )


# --- the buffer ---


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(0, 40), st.integers(1, 4), st.integers(1, 3))
def test_the_buffer_keeps_the_last_ones(capacity, count, observation, action):
    buffer = ReplayBuffer(capacity, observation, action)
    for index in range(count):
        buffer.add([index] * observation, [0.5] * action, [index + 1] * observation, float(index), index % 2)
    assert buffer.size == min(count, capacity)
    if count:
        batch = buffer.sample(200, torch.Generator().manual_seed(0))
        kept = set(range(max(0, count - capacity), count))
        assert set(batch["rewards"].int().tolist()) <= kept
        if len(kept) <= 5:
            assert set(batch["rewards"].int().tolist()) == kept
        assert torch.equal(batch["observations"], batch["rewards"].unsqueeze(1).expand(-1, observation))
        assert torch.equal(batch["next_observations"], batch["observations"] + 1)
        assert torch.equal(batch["masks"], batch["rewards"] % 2)


def test_the_buffer_refuses_what_is_wrong():
    buffer = ReplayBuffer(3, 2, 1)
    with pytest.raises(ValueError, match="the replay buffer is empty"):
        buffer.sample(2)
    with pytest.raises(ValueError, match="observation has 3 entries, expected 2"):
        buffer.add([1, 2, 3], [0], [1, 2], 0.0, 1.0)
    with pytest.raises(ValueError, match="reward has NaN or infinity"):
        buffer.add([1, 2], [0], [1, 2], float("nan"), 1.0)
    assert buffer.size == 0
    buffer.add([1, 2], [1.0], [1, 2], 0.0, 1.0)
    assert buffer.sample(1)["actions"].item() == pytest.approx(ACTION_CLIP)
    with pytest.raises(ValueError, match="capacity is 0, expected an integer >= 1"):
        ReplayBuffer(0, 2, 1)


def test_a_buffer_of_a_data_set_has_room():
    data = offline(10)
    buffer = ReplayBuffer.of(data, 5)
    assert (buffer.capacity, buffer.size) == (11, 10)
    buffer.add([9, 9], [0], [9, 9], 3.0, 1.0)
    buffer.add([8, 8], [0], [8, 8], 4.0, 1.0)
    rewards = set(buffer.sample(500, torch.Generator().manual_seed(0))["rewards"].tolist())
    assert rewards == {-7.0, 3.0, 4.0}
    # The data set is a copy of its own: it lost nothing.
    assert set(data.rewards.tolist()) == {-7.0}


# --- styles ---


@pytest.mark.parametrize("style", STYLES)
def test_what_a_batch_is_made_of(style):
    one = training(style, buffer_size=100)
    for _ in range(30):
        one.step()
    assert one.steps == 30
    assert one.learner.step == 27
    old = (one.sample(400)["rewards"] == -7.0).float().mean().item()
    if style == "one_buffer":
        assert one.buffer.size == 70
        assert old == pytest.approx(40 / 70, abs=0.08)
    else:
        assert one.buffer.size == 30
        assert old == (0.5 if style == "half_and_half" else 0.0)
    one.close()


def test_masks_and_rewards_of_what_is_met():
    one = training("online_only", reward_scale=2.0, reward_shift=-1.0, warm_up=1000, buffer_size=200)
    for _ in range(200):
        one.step()
    rows = one.buffer._rows
    reached = rows.next_observations[:, 0] >= 1.0
    assert 0 < reached.sum() < 200
    assert torch.equal(rows.masks, 1.0 - reached.float())
    assert torch.allclose(rows.rewards, 2.0 * -(1.0 - rows.next_observations[:, 0]).abs() - 1.0, atol=1e-5)
    assert len(one.returns) == len(one.successes) > 10
    assert sum(one.successes) == reached.sum()
    assert one.learner.step == 0
    one.close()


def test_it_gets_better():
    learner = Learner(VGFPolicy(CONFIG, seed=0), TrainConfig(batch_size=32, discount=0.9, critic_learning_rate=3e-3))
    records = learner.finetune_online(
        offline(), Line, 900, style="online_only", warm_up=50, buffer_size=1000, eval_interval=300, make_eval_env=Line,
        eval_episodes=20, eval_flow_steps=(1,), progress=False,
    )  # fmt: skip
    evaluated = [(record["step"], record["return/L=1"]) for record in records if "return/L=1" in record]
    assert [step for step, _ in evaluated] == [0, 300, 600, 900]
    assert evaluated[-1][1] > evaluated[0][1] + 1.0
    assert learner.step == 850


# --- the same again ---


def parameters(one):
    return [p.detach().clone() for p in one.learner.policy.parameters()]


@pytest.mark.parametrize("style", STYLES)
def test_the_same_seed_is_the_same_run(style):
    first, second, other = training(style), training(style), training(style, seed=1)
    for one in (first, second, other):
        one.run(25, progress=False)
        one.close()
    assert all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(second), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(parameters(first), parameters(other), strict=True))
    assert first.returns == second.returns


@pytest.mark.parametrize("style", STYLES)
def test_it_goes_on_from_where_it_was_saved(style, tmp_path):
    whole = training(style)
    # To the end of an episode: what a simulator holds in the middle of one is not saved.
    while whole.steps < 12 or whole._observation is not None:
        whole.step()
    whole.save(tmp_path)
    resumed = OnlineTraining(Learner.resume(tmp_path), offline(), Line, style=style, warm_up=3)
    resumed.restore(tmp_path)
    assert (resumed.steps, resumed.episodes, resumed.returns) == (whole.steps, whole.episodes, whole.returns)
    for one in (whole, resumed):
        one.run(20, progress=False)
        one.close()
    assert all(torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True))
    assert resumed.returns == whole.returns
    whole.save(tmp_path)
    assert len(list(tmp_path.glob("replay-*"))) == 1
    with pytest.raises(ValueError, match="seed is 5, but .* was saved with 0"):
        OnlineTraining(Learner.resume(tmp_path), offline(), Line, style=style, seed=5).restore(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "iql"}, "style is 'iql', expected one of 'one_buffer', 'half_and_half', 'online_only'"),
        ({"warm_up": -1}, "warm_up is -1, expected an integer >= 0"),
        ({"reward_scale": float("nan")}, "reward_scale is nan, expected a number"),
        ({"dataset": Dataset.from_arrays(
            observations=torch.zeros(3, 4), actions=torch.zeros(3, 1), next_observations=torch.zeros(3, 4),
            rewards=torch.zeros(3), masks=torch.ones(3))}, "the dataset's observation_dim is 4, expected 2"),
    ],
)  # fmt: skip
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_more_bad_arguments():
    learner = Learner(VGFPolicy(CONFIG))
    with pytest.raises(ValueError, match="dataset is None, expected the offline transitions: style is 'half_and_half'"):
        OnlineTraining(learner, None, Line, style="half_and_half")
    with pytest.raises(ValueError, match="observations have 11 entries, expected 2"):
        OnlineTraining(learner, None, lambda: gymnasium.make("Hopper-v5"), style="online_only")
    with pytest.raises(ValueError, match="make_eval_env is None, expected a function: eval_interval is 5"):
        training().run(5, eval_interval=5, progress=False)


# --- the command ---


def test_the_command_goes_on_after_a_kill(tmp_path):
    pytest.importorskip("tyro")
    rng = np.random.default_rng(0)
    states = rng.normal(size=(300, 10)).astype(np.float32)
    np.savez(
        tmp_path / "data.npz", observations=states[:-1], actions=rng.uniform(-1, 1, (299, 2)).astype(np.float32),
        next_observations=states[1:], rewards=rng.normal(size=299).astype(np.float32), masks=np.ones(299, np.float32),
    )  # fmt: skip
    vgf = [sys.executable, "-m", "vgf_fast.cli"]
    small = [
        "policy.hidden_dims=[8]",
        "policy.behavior_hidden_dims=[8]",
        "policy.particles=2",
        "policy.behavior_steps=1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def call(*arguments):
        return subprocess.run(
            [*vgf, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=300, check=False
        )

    run, out = tmp_path / "run", tmp_path / "online"
    done = call(
        "train", "--task", tmp_path / "data.npz", "--env", "Reacher-v5", "--out", run, "--steps", 5, "--eval-interval",
        0, "--no-tensorboard", "--set", *small,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    options = [
        "finetune", "--run", run, "--out", out, "--steps", 400, "--style", "half_and_half", "--warm-up", 20,
        "--eval-interval", 0, "--log-interval", 50, "--checkpoint-interval", 50,
    ]  # fmt: skip
    process = subprocess.Popen(
        [*vgf, *map(str, options)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint" / "learner.safetensors").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = call(*options)
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stdout
    records = [json.loads(line) for line in (out / "online.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(50, 401, 50))
    assert records[-1]["updates"] == 5 + 380
    assert all(np.isfinite(record["critic_loss"]) for record in records)
    assert (out / "policy" / "model.safetensors").is_file()
    again = call(*options)
    assert again.returncode == 1
    assert "steps is 400, but the checkpoint" in again.stderr
    assert call("finetune", "--run", tmp_path / "none", "--out", out).returncode == 1
