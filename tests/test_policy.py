"""VGFPolicy: shapes, dtypes, randomness, files, and what it refuses."""

import copy
import dataclasses
import json
import os

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.backends import choice
from vgf_fast.common.checkpoints import CheckpointError

CONFIG = vgf.VGFConfig(
    observation_dim=4,
    action_dim=2,
    hidden_dims=(16, 16),
    behavior_hidden_dims=(16, 16),
    particles=6,
    behavior_steps=3,
    test_budget=vgf.TransportBudget(2, 0.1, 0.1),
)
OBSERVATIONS = np.random.default_rng(0).normal(size=(7, 4))


@pytest.fixture
def policy():
    return vgf.VGFPolicy(CONFIG)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_one_observation_or_a_batch_numpy_or_tensor(policy, dtype, as_tensor):
    observations = OBSERVATIONS.astype(dtype)
    if as_tensor:
        observations = torch.from_numpy(observations)
    batch, single = policy.sample_actions(observations), policy.sample_actions(observations[0])
    assert (batch.shape, single.shape) == ((7, 2), (2,))
    assert batch.dtype == single.dtype == torch.float32
    assert batch.abs().max() <= 1
    assert not batch.requires_grad


def test_given_noise_decides_the_action(policy):
    noise = torch.randn(7, 6, 2)
    batch = policy.sample_actions(OBSERVATIONS, noise=noise)
    assert torch.equal(batch, policy.sample_actions(OBSERVATIONS, noise=noise.numpy()))
    for row in range(7):
        torch.testing.assert_close(policy.sample_actions(OBSERVATIONS[row], noise=noise[row]), batch[row])


def test_action_is_the_chosen_particle_of_the_flow(policy):
    states, noise = torch.from_numpy(OBSERVATIONS).float(), torch.randn(7, 6, 2)
    for steps in (0, 3):
        particles = vgf.behavior_flow(policy.behavior, states, noise, CONFIG.behavior_steps)
        budget = vgf.TransportBudget(steps, 0.1, 0.1)
        result = vgf.value_gradient_flow(policy.critic, states, particles, budget)
        action, _ = vgf.select_particle(result.particles, result.q.amin(dim=0))
        assert torch.equal(policy.sample_actions(OBSERVATIONS, flow_steps=steps, noise=noise), action)


def test_randomness_comes_through_generators_only():
    policies = [vgf.VGFPolicy(CONFIG, seed=seed) for seed in (0, 0, 1)]
    weights = [policy.critic.weights[0] for policy in policies]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [policy.sample_actions(OBSERVATIONS) for policy in policies[:2]]
    second = [policy.sample_actions(OBSERVATIONS) for policy in policies[:2]]
    assert torch.equal(first[0], first[1])
    assert torch.equal(second[0], second[1])
    assert not torch.equal(first[0], second[0])
    given = [policies[0].sample_actions(OBSERVATIONS, generator=torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*given)
    assert torch.equal(torch.get_rng_state(), state)


def test_predict_is_stable_baselines_signature(policy):
    action, state = policy.predict(OBSERVATIONS[0])
    assert isinstance(action, np.ndarray)
    assert action.shape == (2,)
    assert state is None
    batch, _ = policy.predict(OBSERVATIONS, episode_start=np.ones(7, bool))
    np.testing.assert_allclose(batch[0], action, rtol=1e-5)
    again, _ = policy.predict(OBSERVATIONS)
    np.testing.assert_array_equal(batch, again)
    random = [policy.predict(OBSERVATIONS, deterministic=False)[0] for _ in range(2)]
    assert not np.array_equal(*random)


def test_select_action_is_lerobots(policy):
    policy.reset()
    observation = torch.from_numpy(OBSERVATIONS).float()
    assert policy.select_action({"observation.state": observation, "task": ["reach"]}).shape == (7, 2)
    assert policy.select_action(observation[0]).shape == (2,)
    with pytest.raises(ValueError, match="keys \\['state'\\], expected 'observation.state'"):
        policy.select_action({"state": observation})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_casting_and_copying(policy, dtype):
    noise = torch.randn(7, 6, 2)
    expected = policy.sample_actions(OBSERVATIONS, flow_steps=0, noise=noise)
    cast = copy.deepcopy(policy).to(dtype)
    assert policy.dtype == torch.float32
    actions = cast.sample_actions(OBSERVATIONS, flow_steps=0, noise=noise)
    assert actions.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.float64:
        torch.testing.assert_close(actions.float(), expected)


@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("selection", ["max", "softmax", "random"])
def test_behaviors_and_selections(behavior, selection):
    policy = vgf.VGFPolicy(dataclasses.replace(CONFIG, behavior=behavior, selection=selection, gaussian_tanh=True))
    actions = policy.sample_actions(OBSERVATIONS)
    assert actions.shape == (7, 2)
    assert actions.abs().max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saving_and_loading(policy, tmp_path, dtype):
    policy.to(dtype)
    loaded = vgf.VGFPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    assert loaded.config == CONFIG
    assert loaded.dtype == dtype
    for (name, ours), theirs in zip(policy.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad
    assert torch.equal(policy.sample_actions(OBSERVATIONS), loaded.sample_actions(OBSERVATIONS))
    assert sorted(os.listdir(tmp_path / "policy")) == ["config.json", "model.safetensors"]


def test_the_test_budget_can_be_edited_in_the_saved_configuration(policy, tmp_path):
    policy.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["test_budget"]["steps"] = 9
    file.write_text(json.dumps(config))
    assert vgf.VGFPolicy.from_pretrained(tmp_path).config.test_budget.steps == 9
    config["hidden_dims"] = [16, 17]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="does not fit the configuration"):
        vgf.VGFPolicy.from_pretrained(tmp_path)
    config["hiden_dims"] = config.pop("hidden_dims")
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="did you mean 'hidden_dims'"):
        vgf.VGFPolicy.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        vgf.VGFPolicy.from_pretrained(tmp_path)
    file.unlink()
    assert vgf.VGFPolicy.from_pretrained(tmp_path).config == CONFIG


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(policy, tmp_path, monkeypatch):
    with torch.no_grad():
        policy.critic.biases[1].view(-1)[3] = float("nan")
    with pytest.raises(ArithmeticError, match=r"model.safetensors was not written: critic.biases.1 has values"):
        policy.save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        # A file of before that was looked at.
        patch.setattr(torch, "isfinite", torch.ones_like)
        policy.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model.safetensors: critic.biases.1 has values that are not finite"):
        vgf.VGFPolicy.from_pretrained(tmp_path)


def test_a_damaged_or_missing_policy(policy, tmp_path):
    with pytest.raises(FileNotFoundError, match="no policy at"):
        vgf.VGFPolicy.from_pretrained(tmp_path / "nowhere")
    file = policy.save_pretrained(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        vgf.VGFPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"observations": OBSERVATIONS[:, :3]},
            ValueError,
            r"observations has shape \(7, 3\), expected \(4,\) or \(\*, 4\)",
        ),
        ({"observations": OBSERVATIONS[None]}, ValueError, r"observations has shape \(1, 7, 4\)"),
        (
            {"observations": np.zeros((2, 4), np.uint8)},
            TypeError,
            "observations has dtype torch.uint8, expected a floating",
        ),
        ({"observations": {"a": 1}}, TypeError, "observations is a dict, expected numbers"),
        ({"observations": torch.zeros(2, 4, device="meta")}, ValueError, "on meta, but the policy is on cpu"),
        ({"observations": np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]])}, ValueError, "NaN or infinity in row 1"),
        ({"observations": OBSERVATIONS, "flow_steps": -1}, ValueError, "flow_steps is -1, expected an integer >= 0"),
        (
            {"observations": OBSERVATIONS, "noise": torch.zeros(7, 5, 2)},
            ValueError,
            r"noise has shape \(7, 5, 2\), expected",
        ),
        ({"observations": OBSERVATIONS, "selection": "best"}, ValueError, "selection is 'best'"),
    ],
)
def test_bad_input(policy, arguments, error, message):
    with pytest.raises(error, match=message):
        policy.sample_actions(**arguments)


def test_for_env():
    gymnasium = pytest.importorskip("gymnasium")
    env = gymnasium.make("Reacher-v5")
    policy = vgf.VGFPolicy.for_env(env, hidden_dims=(8,), behavior_hidden_dims=(8,), particles=3)
    assert (policy.config.observation_dim, policy.config.action_dim, policy.config.particles) == (10, 2, 3)
    observation, _ = env.reset(seed=0)
    assert env.action_space.contains(policy.predict(observation)[0])
    vector = gymnasium.make_vec("Reacher-v5", num_envs=2)
    assert vgf.VGFPolicy.for_env(vector, hidden_dims=(8,), behavior_hidden_dims=(8,)).config.observation_dim == 10
    vector.close()
    with pytest.raises(ValueError, match="has no field 'hidden'"):
        vgf.VGFPolicy.for_env(env, hidden=(8,))
    env.close()
    with pytest.raises(ValueError, match="the action space is Discrete"):
        vgf.VGFPolicy.for_env(gymnasium.make("CartPole-v1"))


def test_the_particles_obey_the_papers_bound_on_how_far_they_move():
    """MMD^2(mu, pi_L) <= (2 eps L / (sigma sqrt(e))) (c / alpha + 1 / (sigma sqrt(e))) for plain ascent (paper).

    Evaluated with the flow's own kernel width sigma, h = sigma^2, at its first particles, and c the largest score seen.
    """
    policy = vgf.VGFPolicy(dataclasses.replace(CONFIG, particles=32)).double()
    states = torch.from_numpy(OBSERVATIONS)
    start = policy.draw_particles(states, torch.randn(7, 32, 2, dtype=torch.float64))
    budget = vgf.TransportBudget(3, 0.02, 0.5)
    result = vgf.value_gradient_flow(policy.critic, states, start, budget, optimizer="ascent", return_trajectory=True)
    lipschitz = max(
        vgf.critic_value_and_score(policy.critic, states, x)[1].norm(dim=2).max().item() for x in result.trajectory
    )
    distances = torch.cdist(start, start).square().flatten(1)
    for row, h in enumerate(distances.quantile(0.5, dim=1).div(2 * np.log(33)).tolist()):
        sigma = h**0.5

        def kernel(x, y, h=h):
            return torch.exp(-torch.cdist(x, y).square() / (2 * h)).mean().item()

        a, b = start[row], result.particles[row]
        mmd = kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)
        scale = sigma * np.e**0.5
        bound = 2 * budget.step_size * budget.steps / scale * (lipschitz / budget.temperature + 1 / scale)
        assert 0 <= mmd + 1e-12 <= bound


def test_a_backend_is_chosen_once_where_the_policy_is(monkeypatch):
    """``.to()`` binds to another; a call does not choose again."""
    policy = vgf.VGFPolicy(
        vgf.VGFConfig(observation_dim=3, action_dim=2, hidden_dims=(16,), behavior_hidden_dims=(16,))
    )
    first = policy.bound(policy.dtype)
    monkeypatch.setattr(choice, "resolve_backend", lambda *arguments, **options: pytest.fail("chosen again"))
    policy.sample_actions(torch.zeros(3))
    assert policy.bound(policy.dtype) is first
    monkeypatch.undo()
    assert policy.to(torch.float64).bound(policy.dtype) is not first
    assert policy.to(torch.float32).bound(policy.dtype) is first
