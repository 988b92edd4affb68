"""Acting, learning, evaluation and online learning on a device that is not the CPU: nothing mixes the two."""

import numpy as np
import pretend
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.data import dataset as dataset_module
from vgf_fast.data import replay
from vgf_fast.data.dataset import Dataset
from vgf_fast.online import OnlineTraining

gym = pytest.importorskip("gymnasium")

OBSERVATIONS = np.linspace(-1.0, 1.0, 300, dtype=np.float32).reshape(60, 5)
CONFIGURATIONS = {
    "flow": {},
    "gaussian": {"behavior": "gaussian", "selection": "softmax"},
    "amortized": {"amortized": True, "flow_q_aggregation": "min"},
}


@pytest.fixture(params=CONFIGURATIONS)
def policy(request, monkeypatch):
    sizes = {"hidden_dims": (32, 32), "behavior_hidden_dims": (32,)}
    config = vgf.VGFConfig(5, 3, **sizes, **CONFIGURATIONS[request.param])
    # Nobody else keeps transitions where there are no values.
    for module in (dataset_module, replay):
        monkeypatch.setattr(
            module, "check_storage", lambda device, dtype: torch.device("cpu" if device is None else device)
        )
    with pretend.gpu() as device:
        yield vgf.VGFPolicy(config, device=device, backend="torch")


class Environment(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (5,))
    action_space = gym.spaces.Box(-1.0, 1.0, (3,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 3
        return OBSERVATIONS[0], {}

    def step(self, action):
        self.left -= 1
        return OBSERVATIONS[self.left], float(action.sum()), self.left == 0, False, {}


def dataset(device):
    ones = np.ones(60, np.float32)
    made = Dataset.from_arrays(
        observations=OBSERVATIONS,
        actions=OBSERVATIONS[:, :3],
        next_observations=OBSERVATIONS,
        rewards=ones,
        masks=ones,
    )
    return Dataset(made._storage.to(device), made.terminals.to(device), 5, 3)


def test_acting(policy):
    assert policy.sample_actions(OBSERVATIONS).device == policy.device
    with pytest.raises(ValueError, match="observations is on cpu, but the policy is on"):
        policy.sample_actions(torch.zeros(5))
    deterministic, _ = policy.predict(OBSERVATIONS)
    drawn, _ = policy.predict(OBSERVATIONS[0], deterministic=False)
    assert isinstance(deterministic, np.ndarray)
    assert drawn.shape == (3,)
    assert policy.select_action({"observation.state": OBSERVATIONS[0]}).device == policy.device


def test_predicts_noise_is_the_cpus():
    config = vgf.VGFConfig(5, 3, hidden_dims=(32, 32), behavior_hidden_dims=(32,))
    right, _ = vgf.VGFPolicy(config, backend="torch").predict(OBSERVATIONS)
    with pretend.gpu() as device:
        found, _ = vgf.VGFPolicy(config, device=device, backend="torch").predict(OBSERVATIONS)
    np.testing.assert_allclose(found, right, atol=1e-4)


@pytest.mark.parametrize("where", ["gpu", "cpu"])
def test_learning(policy, where, tmp_path):
    """From transitions on the device, and in the host's memory."""
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=8, max_gradient_norm=1.0))
    data = dataset(policy.device if where == "gpu" else "cpu")
    records = learner.fit(
        data, 2, Environment, eval_episodes=2, eval_flow_steps=(0, 1), eval_num_envs=2, progress=False
    )
    assert np.isfinite(list(records[-1].values())).all()
    assert (learner.save(tmp_path) / "learner.safetensors").is_file()


@pytest.mark.parametrize("style", ["one_buffer", "half_and_half", "online_only"])
def test_learning_online(policy, style):
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=8))
    data = dataset("cpu") if style == "one_buffer" else dataset(policy.device)
    training = OnlineTraining(learner, data, Environment, style=style, warm_up=2, buffer_size=70)
    try:
        training.run(5, progress=False)
    finally:
        training.close()
    assert learner.step == 3


def test_evaluation(policy):
    results = vgf.evaluate(policy, Environment, episodes=2, num_envs=2, behavior_cloning=True, progress=False)
    assert len(results) == 5
