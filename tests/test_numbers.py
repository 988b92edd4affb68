"""NumPy's numbers are numbers, and a number that is none is named: in configurations, training, acting, evaluation."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.replay import ReplayBuffer
from vgf_fast.envs.evaluation import evaluate
from vgf_fast.experiments.settings import RunConfig
from vgf_fast.online import OnlineTraining

SIZES = {"observation_dim": 3, "action_dim": 2, "hidden_dims": (8,), "behavior_hidden_dims": (8,), "particles": 3}


def numpy_of(value):
    """The value in NumPy's types."""
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.int32(value)
    if isinstance(value, float):
        return np.float64(value)
    if isinstance(value, tuple):
        return np.array(value)
    return value


@pytest.fixture
def learner():
    return vgf.Learner(vgf.VGFPolicy(vgf.VGFConfig(**SIZES)), vgf.TrainConfig(batch_size=4))


@pytest.fixture
def dataset():
    rng = np.random.default_rng(0)
    return Dataset.from_arrays(
        observations=rng.normal(size=(20, 3)), actions=rng.uniform(-1, 1, (20, 2)),
        next_observations=rng.normal(size=(20, 3)), rewards=rng.normal(size=20), masks=np.ones(20),
    )  # fmt: skip


class Environment:
    """Two steps an episode."""

    def __init__(self):
        import gymnasium

        self.observation_space = gymnasium.spaces.Box(-1.0, 1.0, (3,))
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, seed=None):
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(3, np.float32), 1.0, self.steps == 2, False, {}

    def close(self):
        pass


@pytest.mark.parametrize(
    "config", [vgf.TransportBudget(3, 0.5, 2.0), vgf.VGFConfig(**SIZES), vgf.TrainConfig(max_gradient_norm=1.0)]
)
def test_a_configuration_of_numpys_numbers_is_the_plain_one(config):
    fields = {field.name: numpy_of(getattr(config, field.name)) for field in dataclasses.fields(config)}
    found = type(config)(**fields)
    assert found == config
    for field in dataclasses.fields(config):
        assert type(getattr(found, field.name)) is type(getattr(config, field.name)), field.name
    assert json.dumps(dataclasses.asdict(found)) == json.dumps(dataclasses.asdict(config))
    assert hash(found) == hash(config)


def test_half_precision_numbers_are_numbers():
    assert vgf.TransportBudget(np.uint8(2), np.float32(0.5), np.float16(0.25)) == vgf.TransportBudget(2, 0.5, 0.25)
    assert vgf.VGFConfig(**{**SIZES, "hidden_dims": [np.int64(8)]}).hidden_dims == (8,)
    assert RunConfig(steps=np.int64(5), eval_flow_steps=[np.int8(1)]).checked() == RunConfig(
        steps=5, eval_flow_steps=(1,)
    )


def test_numpys_numbers_everywhere(learner, dataset):
    policy, two = learner.policy, np.int64(2)
    observation = np.zeros(3, np.float32)
    action = policy.sample_actions(observation, flow_steps=two, noise=np.zeros((3, 2), np.float32))
    assert torch.equal(action, policy.sample_actions(observation, 2, noise=np.zeros((3, 2), np.float32)))
    assert vgf.VGFPolicy(policy.config, seed=two).seed == 2
    noise = torch.zeros(1, 3, 2)
    assert vgf.behavior_flow(policy.behavior, torch.zeros(1, 3), noise, two).shape == (1, 3, 2)
    assert ReplayBuffer(two, two, two).size == 0
    results = evaluate(
        policy, Environment, episodes=two, flow_steps=np.array([0, 1]), num_envs=two, seed=two,
        confidence=np.float32(0.5), progress=False,
    )  # fmt: skip
    assert [result.label for result in results] == ["L=0", "L=1"]
    records = learner.fit(dataset, two, log_interval=two, eval_interval=two, progress=False)
    assert [record["step"] for record in records] == [2]
    training = OnlineTraining(
        learner, dataset, Environment, warm_up=two, buffer_size=np.int32(50), reward_scale=np.float32(2.0), seed=two
    )
    assert [record["step"] for record in training.run(two, log_interval=two, progress=False)] == [2]


@pytest.mark.parametrize("value", [0, -3, 1.5, "7", None, True, np.float32(2.0)])
@pytest.mark.parametrize(
    "name", ["log_interval", "eval_interval", "checkpoint_interval", "eval_episodes", "eval_num_envs"]
)
def test_what_is_no_interval_is_named(learner, dataset, name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, expected an integer >= 1"):
        learner.fit(dataset, 2, progress=False, **{name: value})
    assert learner.step == 0


@pytest.mark.parametrize("value", [3, "03", None, {0: 1}, (0, -1), (True,), (1.0,)])
def test_what_are_no_integers_is_named(learner, dataset, value):
    with pytest.raises(ValueError, match="eval_flow_steps is .*, expected integers >= 0"):
        learner.fit(dataset, 2, eval_flow_steps=value, progress=False)
    with pytest.raises(ValueError, match=" flow_steps is .*, expected integers >= 0|^flow_steps is "):
        evaluate(learner.policy, Environment, flow_steps=value, progress=False)
    with pytest.raises(ValueError, match="VGFConfig.hidden_dims is .*, expected at least 1 integers >= 1"):
        vgf.VGFConfig(**{**SIZES, "hidden_dims": value})
    with pytest.raises(ValueError, match="eval_flow_steps is "):
        RunConfig(eval_flow_steps=value).checked()


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), np.float32("inf"), 10**400, 1j, np.zeros(1)])
def test_what_is_no_number_is_named(value):
    with pytest.raises(ValueError, match="TransportBudget.temperature is .*, expected a number in "):
        vgf.TransportBudget(temperature=value)


@pytest.mark.parametrize("seed", [2**64, -(2**64), 1.5, "a"])
def test_a_seed_that_seeds_nothing_is_named(learner, dataset, seed):
    for call in (
        lambda: vgf.TrainConfig(seed=seed),
        lambda: vgf.VGFPolicy(learner.policy.config, seed=seed),
        lambda: evaluate(learner.policy, Environment, seed=seed),
        lambda: OnlineTraining(learner, dataset, Environment, seed=seed),
    ):
        with pytest.raises(ValueError, match="seed is .*, expected an integer"):
            call()
    largest = vgf.TrainConfig(seed=2**63 - 1)
    assert vgf.Learner(learner.policy, largest).config.seed == 2**63 - 1
