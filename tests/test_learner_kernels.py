"""The learner on the Triton backend: the release's updates, the torch backend's results, and checkpoints of either."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from launches import count_launches
from release import DATA, below, relative_error
from test_kernel_training import training_launches
from test_learner import CONFIG, TRAIN, make_batch, state_of
from tolerances import BOUNDS, F32

import vgf_fast as vgf
from vgf_fast.reference_checkpoint import load_mlp

pytest.importorskip("triton")

# Unused columns of a tile hold whatever was in memory, and the interpreter warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def learners(config=CONFIG, train=TRAIN, **options):
    """The same learner on both backends."""
    return [vgf.Learner(vgf.VGFPolicy(config, backend=backend), train, **options) for backend in ("triton", "torch")]


def make_noise(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "particles": torch.randn(size, CONFIG.particles, CONFIG.action_dim, generator=generator),
        "bc_x0": torch.randn(size, CONFIG.action_dim, generator=generator),
        "bc_t": torch.rand(size, 1, generator=generator),
    }


def assert_same_training(ours, theirs):
    for name in ("critic", "target_critic", "behavior"):
        parameters = (getattr(learner.policy, name).parameters() for learner in (ours, theirs))
        for value, expected in zip(*parameters, strict=True):
            assert relative_error(value.detach(), expected.detach()) < BOUNDS["update_parameters"][F32], name
    for name, optimizer in ours._optimizers.items():
        state = theirs._optimizers[name].state_dict()["state"]
        for index, entries in optimizer.state_dict()["state"].items():
            assert entries["step"] == state[index]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                assert relative_error(entries[key], state[index][key]) < BOUNDS["update_moments"][F32], (name, key)


@pytest.mark.parametrize("fused_optimizer", [True, False])
def test_three_updates_of_the_release(fused_optimizer):
    with np.load(DATA / "update_td_mean.npz") as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(bytes(arrays["meta"]))
    config = {**meta["config"], "ob_dims": [meta["O"]]}
    policy_config, train_config = vgf.config_from_reference(config)
    policy = vgf.VGFPolicy.from_reference_parameters(below("before/", arrays), config, backend="triton")
    learner = vgf.Learner(policy, train_config, fused_optimizer=fused_optimizer)
    for step in range(meta["steps"]):
        batch, noise = below(f"step{step}/batch/", arrays), below(f"step{step}/noise/", arrays)
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        info = learner.update(batch, noise)
        for name, value in below(f"step{step}/info/", arrays).items():
            assert info[name].item() == pytest.approx(float(value), rel=BOUNDS["update_metrics"][F32]), name
        expected = vgf.VGFPolicy(policy_config).double()
        for module, prefix in (("critic", "critic"), ("target_critic", "target_critic"), ("behavior", "bc")):
            load_mlp(getattr(expected, module), below(f"step{step}/after/", arrays), prefix)
        for value, truth, old in zip(policy.parameters(), expected.parameters(), before, strict=True):
            moved = (truth - old).abs().max()
            assert (value - truth).abs().max() <= BOUNDS["update_step"][F32] * moved + 2**-23 * truth.abs().max()


@pytest.mark.parametrize("fused_optimizer", [True, False])
@pytest.mark.parametrize(
    ("policy", "train"),
    [
        ({}, {}),
        ({"layer_norm": False, "activation": "swish"}, {"critic_loss": "expectile", "expectile": 0.7}),
        ({"behavior_layer_norm": True, "members": 3}, {"critic_loss": "sql", "target_reduce": "max"}),
        ({"behavior": "gaussian"}, {}),
    ],
)
def test_as_on_the_torch_backend(policy, train, fused_optimizer):
    kernels, plain = learners(
        dataclasses.replace(CONFIG, **policy), dataclasses.replace(TRAIN, **train), fused_optimizer=fused_optimizer
    )
    for step in range(2):
        noise = make_noise(seed=step)
        ours, theirs = kernels.update(make_batch(), noise), plain.update(make_batch(), noise)
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == ()
            assert ours[name].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert_same_training(kernels, plain)


def test_launches_of_training():
    """4 D - 1 a network, the critic's first; and one to pack all of them."""
    learner, _ = learners()
    with count_launches() as launches:
        learner.update(make_batch(), make_noise())
    depths = len(CONFIG.hidden_dims), len(CONFIG.behavior_hidden_dims)
    passes = [name for depth in depths for name in training_launches(depth)]
    assert launches[-len(passes) :] == passes
    assert launches.count("packing_kernel") == 1
    assert launches.count("weight_gradient_kernel") == 2


def test_a_batch_of_one():
    kernels, plain = learners()
    batch = {name: value[:1] for name, value in make_batch().items()}
    for learner in (kernels, plain):
        learner.update(batch, make_noise(1))
    assert_same_training(kernels, plain)


def test_checkpoints_resume_on_either_backend(tmp_path):
    """Saved by the kernels, resumed with PyTorch's optimiser, and the other way round; bit for bit with its own."""
    for first, second in (("triton", "torch"), ("torch", "triton"), ("triton", "triton")):
        learner = vgf.Learner(vgf.VGFPolicy(CONFIG, backend=first), TRAIN)
        learner.update(make_batch(), make_noise())
        learner.save(tmp_path / first)
        resumed = vgf.Learner.resume(tmp_path / first, backend=second)
        straight = copy.deepcopy(state_of(learner))
        for value, expected in zip(state_of(resumed), straight, strict=True):
            assert torch.equal(value, expected)
        for one in (learner, resumed):
            one.update(make_batch(), make_noise(seed=1))
        assert_same_training(resumed, learner)
        if first == second:
            for value, expected in zip(state_of(resumed), state_of(learner), strict=True):
                assert torch.equal(value, expected)


def test_networks_too_wide_for_the_kernels_are_refused_or_train_in_pytorch():
    config = dataclasses.replace(CONFIG, hidden_dims=(1025,))
    with pytest.raises(ValueError, match="the widest hidden layer has 1025 units"):
        vgf.VGFPolicy(config, backend="triton")
    learner = vgf.Learner(vgf.VGFPolicy(config), TRAIN)
    with count_launches() as launches:
        info = learner.update(make_batch(), make_noise())
    assert launches == []
    assert info["critic_loss"].isfinite()
