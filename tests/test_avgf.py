"""AVGF, the amortised variant: the release's numbers in float64, and the same on both backends."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from release import DATA, below, relative_error

from vgf_fast import Learner, TrainConfig, VGFConfig, VGFPolicy, reference
from vgf_fast.backends import torch as torch_backend
from vgf_fast.config import TransportBudget, config_from_reference
from vgf_fast.data.dataset import Dataset
from vgf_fast.networks import ScoreField
from vgf_fast.reference_checkpoint import load_mlp

NETWORKS = {"critic": "critic", "target_critic": "target_critic", "bc": "behavior", "q_grad": "score_field"}


@pytest.fixture(scope="module")
def release():
    """Three updates and twelve actions of the public release's agent, in float64."""
    with np.load(DATA / "update_avgf.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(bytes(arrays.pop("meta")))
    return meta, arrays


def load(policy, arrays):
    for prefix, name in NETWORKS.items():
        load_mlp(getattr(policy, name), arrays, prefix)


def learner_of(release, dtype=torch.float64, backend="torch", train=None):
    meta, arrays = release
    config, default = config_from_reference(meta["config"])
    policy = VGFPolicy(config, backend=backend).to(dtype)
    load(policy, below("before/", arrays))
    return Learner(policy, train or default)


def step_of(arrays, k, dtype):
    batch, noise = (
        {name: torch.from_numpy(value).to(dtype) for name, value in below(f"step{k}/{part}/", arrays).items()}
        for part in ("batch", "noise")
    )
    return batch, noise, below(f"step{k}/info/", arrays)


def test_configuration(release):
    config, train = config_from_reference(release[0]["config"])
    assert config.amortized
    assert (train.max_gradient_norm, train.normalize_score) == (1.0, True)
    plain = config_from_reference({"ob_dims": [3], "action_dim": 2})[1]
    assert (plain.max_gradient_norm, plain.normalize_score) == (None, False)
    assert VGFConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="particle_optimizer is 'ascent', expected 'adam': amortized is True"):
        VGFConfig(3, 2, amortized=True, particle_optimizer="ascent")
    with pytest.raises(ValueError, match=r"max_gradient_norm is 0, expected a number in \(0, inf\)"):
        TrainConfig(max_gradient_norm=0)


def test_three_updates_are_the_releases(release):
    meta, arrays = release
    learner = learner_of(release)
    for k in range(meta["steps"]):
        batch, noise, info = step_of(arrays, k, torch.float64)
        found = learner.update(batch, noise)
        for ours, theirs in (
            ("critic_loss", "critic_loss"), ("bc_loss", "bc_loss"), ("score_loss", "q_grad_loss"), ("q_mean", "q_mean"),
            ("bc_flow_var", "bc_flow_var"), ("vgf_var", "vgf_var"),
        ):  # fmt: skip
            assert found[ours].item() == pytest.approx(float(info[theirs]), rel=1e-9), (k, ours)
    expected = VGFPolicy(learner.policy.config).double()
    load(expected, below(f"step{meta['steps'] - 1}/after/", arrays))
    for (name, mine), theirs in zip(learner.policy.named_parameters(), expected.parameters(), strict=True):
        assert relative_error(mine, theirs) < 1e-8, name


def test_actions_are_the_releases(release):
    meta, arrays = release
    policy = VGFPolicy(config_from_reference(meta["config"])[0]).double()
    load(policy, below(f"step{meta['steps'] - 1}/after/", arrays))
    act = {name: torch.from_numpy(value) for name, value in below("act/", arrays).items()}
    for column, steps in enumerate(meta["act_steps"]):
        expected = act["actions"][:, column]
        together = policy.sample_actions(act["observations"], flow_steps=steps, noise=act["noise"])
        assert relative_error(together, expected) < 1e-9
        for row in range(len(expected)):
            alone = policy.sample_actions(act["observations"][row], flow_steps=steps, noise=act["noise"][row])
            assert relative_error(alone, expected[row]) < 1e-9


def test_the_direction_is_clipped():
    x = torch.tensor([[[3.0, 4.0]], [[0.3, 0.4]]], dtype=torch.float64)
    each = reference.clip_to_norm(x, 1.0, (1, 2))
    assert torch.allclose(each, torch.tensor([[[0.6, 0.8]], [[0.3, 0.4]]], dtype=torch.float64))
    together = reference.clip_to_norm(x, 1.0)
    assert torch.linalg.vector_norm(together).item() == pytest.approx(1.0)
    assert torch.allclose(together[1] / together[0], torch.full((1, 2), 0.1, dtype=torch.float64))
    assert torch.equal(reference.clip_to_norm(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))


def test_flow_equals_its_definition():
    generator = torch.Generator().manual_seed(0)
    field = ScoreField(4, 3, (9, 7), generator=generator).double()
    states = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    start = torch.rand(5, 6, 3, generator=generator, dtype=torch.float64) * 2 - 1
    result = torch_backend.amortized_flow(
        reference.FieldAtStates(field.stacked(), states), start, 4, 0.1, per_state=True, return_trajectory=True
    )
    x = start.clone().requires_grad_()
    adam = torch.optim.Adam([x], lr=0.1)
    for step in range(5):
        assert torch.allclose(result.trajectory[step], x.detach(), atol=1e-12)
        rows = states.unsqueeze(1).expand(-1, 6, -1).flatten(0, 1)
        direction = field(rows, x.detach().flatten(0, 1)).view_as(x).detach()
        norm = direction.flatten(1).norm(dim=1).view(-1, 1, 1)
        x.grad = -direction / norm.clamp(min=1.0)
        adam.step()
        x.data.clamp_(-1.0, 1.0)
    assert torch.equal(result.particles, result.trajectory[-1])


CONFIG = VGFConfig(
    5, 3, hidden_dims=(16, 16), behavior_hidden_dims=(16, 16), particles=4, behavior_steps=2, amortized=True,
    train_budget=TransportBudget(2), test_budget=TransportBudget(2),
)  # fmt: skip


def batches(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
        batch = {
            "observations": draw(size, 5), "actions": draw(size, 3).clamp(-1, 1), "next_observations": draw(size, 5),
            "rewards": draw(size), "masks": torch.ones(size),
        }  # fmt: skip
        noise = {
            "particles": draw(size, 4, 3),
            "bc_x0": draw(size, 3),
            "bc_t": torch.rand(size, 1, generator=generator),
        }
        yield batch, noise


@pytest.mark.parametrize("limit", [None, 0.5])
def test_kernels_train_as_the_torch_backend(device, limit):
    pytest.importorskip("triton")
    train = TrainConfig(max_gradient_norm=limit, normalize_score=limit is not None)
    ours, theirs = (
        Learner(VGFPolicy(CONFIG, device=device, backend=backend, seed=3), train) for backend in ("triton", "torch")
    )
    for batch, noise in batches(3):
        placed = [{name: value.to(device) for name, value in part.items()} for part in (batch, noise)]
        found, expected = ours.update(*placed), theirs.update(*placed)
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name].item() == pytest.approx(value.item(), rel=2e-5, abs=1e-6), name
    for (name, mine), other in zip(ours.policy.named_parameters(), theirs.policy.parameters(), strict=True):
        assert (mine - other).abs().max() < 3e-5, name
    observations, noise = torch.randn(7, 5, device=device), torch.randn(7, 4, 3, device=device)
    theirs.policy.load_state_dict(ours.policy.state_dict())
    for steps in (0, 1, 3):
        mine, other = (one.policy.sample_actions(observations, steps, noise) for one in (ours, theirs))
        assert relative_error(mine, other) < 1e-4


def test_it_learns_the_scores():
    config = dataclasses.replace(CONFIG, hidden_dims=(64, 64), activation="swish")
    learner = Learner(VGFPolicy(config, seed=1), TrainConfig(critic_learning_rate=3e-3, batch_size=64))
    generator = torch.Generator().manual_seed(0)
    states, actions = torch.randn(400, 5, generator=generator), torch.rand(400, 3, generator=generator) * 2 - 1
    data = Dataset.from_arrays(
        observations=states, actions=actions, next_observations=states.roll(1, 0), masks=torch.zeros(400),
        # The gradient of the reward is -2 (a - 0.3).
        rewards=-(actions - 0.3).square().sum(dim=1),
    )  # fmt: skip
    learner.fit(data, 400, progress=False)
    found = learner.policy.score_field(states, actions)
    error = (found + 2.0 * (actions - 0.3)).square().mean() / (2.0 * (actions - 0.3)).square().mean()
    assert error < 0.15
    moved = learner.policy.sample_actions(states[:50], flow_steps=20)
    still = learner.policy.sample_actions(states[:50], flow_steps=0)
    assert (moved - 0.3).square().mean() < (still - 0.3).square().mean()


def test_it_is_saved_and_resumed(tmp_path):
    batch = list(batches(4))
    whole = Learner(VGFPolicy(CONFIG, seed=3), TrainConfig())
    half = Learner(VGFPolicy(CONFIG, seed=3), TrainConfig())
    for index, (data, noise) in enumerate(batch):
        whole.update(data, noise)
        if index < 2:
            half.update(data, noise)
    half.save(tmp_path)
    resumed = Learner.resume(tmp_path)
    for data, noise in batch[2:]:
        resumed.update(data, noise)
    for (name, mine), other in zip(resumed.policy.named_parameters(), whole.policy.named_parameters(), strict=True):
        assert name == other[0]
        assert torch.equal(mine, other[1])
    whole.policy.save_pretrained(tmp_path / "policy")
    again = VGFPolicy.from_pretrained(tmp_path / "policy")
    noise = torch.randn(4, 3)
    mine, other = (one.sample_actions(torch.ones(5), noise=noise) for one in (again, whole.policy))
    assert torch.equal(mine, other)


def test_a_policy_of_the_releases_parameters(release):
    meta, arrays = release
    parameters = below("before/", arrays)
    policy = VGFPolicy.from_reference_parameters(parameters, meta["config"])
    assert torch.equal(
        policy.score_field.weights[0][0], torch.from_numpy(parameters["q_grad/mlp/Dense_0/kernel"]).float()
    )
    del parameters["q_grad/mlp/Dense_1/kernel"]
    with pytest.raises(ValueError, match="the release's parameters lack 'q_grad/mlp/Dense_1/kernel'"):
        VGFPolicy.from_reference_parameters(parameters, meta["config"])
