"""The learner: updates, losses reachable from the configuration, checking of batches, exact resumption."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast import reference
from vgf_fast.common.checkpoints import CheckpointError
from vgf_fast.data.dataset import Dataset

CONFIG = vgf.VGFConfig(
    observation_dim=4,
    action_dim=2,
    hidden_dims=(16, 16),
    behavior_hidden_dims=(16,),
    particles=5,
    behavior_steps=3,
    train_budget=vgf.TransportBudget(2, 0.1, 0.1),
)
TRAIN = vgf.TrainConfig(batch_size=8, seed=3)


def make_dataset(size=64):
    generator = torch.Generator().manual_seed(0)
    return Dataset.from_arrays(
        observations=torch.randn(size, 4, generator=generator),
        actions=torch.rand(size, 2, generator=generator) * 2 - 1,
        next_observations=torch.randn(size, 4, generator=generator),
        rewards=torch.randn(size, generator=generator),
        masks=(torch.rand(size, generator=generator) > 0.1).float(),
    )


def make_batch(size=8):
    return make_dataset().sample(size, torch.Generator().manual_seed(1))


def state_of(learner):
    optimizers = [
        value
        for optimizer in learner._optimizers.values()
        for _, state in sorted(optimizer.state_dict()["state"].items())
        for _, value in sorted(state.items())
    ]
    return [
        *learner.policy.parameters(),
        *optimizers,
        learner.generator.get_state(),
        learner.policy.generator.get_state(),
    ]


def assert_same_state(ours, theirs):
    assert ours.step == theirs.step
    for a, b in zip(state_of(ours), state_of(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("critic_loss", ["td", "expectile", "sql"])
@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_both_losses(critic_loss, behavior, precision):
    policy = vgf.VGFPolicy(dataclasses.replace(CONFIG, behavior=behavior, gaussian_tanh=True))
    train = dataclasses.replace(
        TRAIN,
        critic_loss=critic_loss,
        precision=precision,
        expectile=0.7,
        discount=0.0,
        critic_learning_rate=3e-3,
        behavior_learning_rate=3e-3,
    )
    learner = vgf.Learner(policy, train)
    batch = make_batch(8)
    noise = {"particles": torch.randn(8, 5, 2), "bc_x0": torch.randn(8, 2), "bc_t": torch.rand(8, 1)}
    first = learner.update(batch, noise)
    for _ in range(60):
        last = learner.update(batch, noise)
    assert last["critic_loss"] < first["critic_loss"]
    assert last["bc_loss"] < first["bc_loss"]
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


def test_the_target_follows_the_critic_from_before_its_step():
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    for _ in range(2):
        before = [p.detach().clone() for p in learner.policy.critic.parameters()]
        target = [p.detach().clone() for p in learner.policy.target_critic.parameters()]
        learner.update(make_batch())
        for old, critic, new in zip(target, before, learner.policy.target_critic.parameters(), strict=True):
            torch.testing.assert_close(new, 0.005 * critic + 0.995 * old)


def test_bfloat16_updates_stay_close_to_float32():
    losses = {}
    for precision in ("float32", "bfloat16"):
        learner = vgf.Learner(vgf.VGFPolicy(CONFIG), dataclasses.replace(TRAIN, precision=precision))
        losses[precision] = learner.update(make_batch())
    for name, value in losses["float32"].items():
        assert losses["bfloat16"][name].item() == pytest.approx(value.item(), rel=0.05, abs=0.02), name


def test_a_single_particle_has_no_variance():
    learner = vgf.Learner(vgf.VGFPolicy(dataclasses.replace(CONFIG, particles=1)), TRAIN)
    info = learner.update(make_batch())
    assert info["vgf_var"] == 0
    assert all(torch.isfinite(value) for value in info.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": None}, ValueError, "batch lacks rewards"),
        ({"observations": torch.zeros(8, 5)}, ValueError, r"'observations'\] has shape \(8, 5\), expected \(8, 4\)"),
        ({"actions": torch.zeros(7, 2)}, ValueError, r"'actions'\] has shape \(7, 2\), expected \(8, 2\)"),
        ({"masks": torch.ones(8, dtype=torch.int64)}, TypeError, r"'masks'\] has dtype torch.int64"),
        ({"next_observations": torch.full((8, 4), float("nan"))}, ValueError, "'next_observations'.* row 0"),
        ({"rewards": torch.tensor([0, 0, 0, float("inf"), 0, 0, 0, 0])}, ValueError, "'rewards'.* row 3"),
        ({"actions": torch.full((8, 2), 1.5)}, ValueError, r"leaves \[-1, 1\] in row 0"),
        ({"masks": torch.tensor([0, 1, 5.0, 0, 0, 0, 0, 0])}, ValueError, r"'masks'\] leaves \[0, 1\] in row 2: 5.0"),
        ({"masks": torch.tensor([0, 1, 1, -1.0, 0, 0, 0, 0])}, ValueError, r"'masks'\] leaves \[0, 1\] in row 3: -1.0"),
        ({"rewards": np.ma.masked_greater(np.arange(8.0), 6)}, ValueError, r"'rewards'\] has 1 masked entries"),
        # Finite, but not in the precision that the update has.
        ({"rewards": torch.full((8,), 1e300, dtype=torch.float64)}, ValueError, "'rewards'.* infinity in row 0"),
    ],
)
def test_bad_batches_change_nothing(change, error, message):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    untouched = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    batch = {name: value for name, value in {**make_batch(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        learner.update(batch)
    assert_same_state(learner, untouched)


def test_arrays_of_any_strides_and_byte_order_are_batches():
    batch = make_batch()
    ours, theirs = (vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN) for _ in range(2))
    ours.update(batch)
    arrays = {name: field.numpy()[::-1].copy()[::-1] for name, field in batch.items()}
    theirs.update({**arrays, "rewards": batch["rewards"].numpy().astype(">f4")})
    assert_same_state(ours, theirs)


def test_bad_noise_and_bad_policies():
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    noise = {"particles": torch.randn(8, 5, 2), "bc_x0": torch.randn(8, 2), "bc_t": torch.rand(8, 1)}
    for name, value, message in (
        ("particles", float("nan"), r"noise\['particles'\] has NaN or infinity in row 0"),
        ("bc_x0", float("inf"), r"noise\['bc_x0'\] has NaN or infinity in row 0"),
        ("bc_t", 2.0, r"noise\['bc_t'\] leaves \[0, 1\] in row 0: \[2.0\]"),
    ):
        wrong = {**noise, name: torch.full_like(noise[name], value)}
        with pytest.raises(ValueError, match=message):
            learner.update(make_batch(), wrong)
    assert_same_state(learner, vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN))
    learner.update(make_batch(), wrong, check=False)
    assert learner.step == 1
    with pytest.raises(ValueError, match="noise lacks bc_x0, bc_t"):
        learner.update(make_batch(), {"particles": torch.randn(8, 5, 2)})
    with pytest.raises(ValueError, match="TrainConfig\\(precision='bfloat16'\\)"):
        vgf.Learner(vgf.VGFPolicy(CONFIG).to(torch.bfloat16))
    wide = Dataset.from_arrays(
        observations=torch.zeros(3, 5),
        actions=torch.zeros(3, 2),
        next_observations=torch.zeros(3, 5),
        rewards=torch.zeros(3),
        masks=torch.ones(3),
    )
    with pytest.raises(ValueError, match="observation_dim is 5, expected 4"):
        learner.fit(wide, 1)


def test_saving_and_resuming_is_bit_for_bit(tmp_path):
    dataset = make_dataset()
    straight = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    straight.fit(dataset, 7, progress=False)
    straight.policy.sample_actions(torch.zeros(4))

    stopped = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    stopped.fit(dataset, 3, progress=False)
    stopped.policy.sample_actions(torch.zeros(4))
    stopped.save(tmp_path)
    resumed = vgf.Learner.resume(tmp_path)
    assert_same_state(resumed, stopped)
    resumed.fit(dataset, 4, progress=False)
    assert_same_state(resumed, straight)


def test_fit_logs_and_saves_at_steps_of_its_own_count(tmp_path):
    seen = []
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    records = learner.fit(
        make_dataset(), 5, log_interval=2, checkpoint_dir=tmp_path, on_log=seen.append, progress=False
    )
    assert records == seen
    assert [record["step"] for record in records] == [2, 4, 5]
    assert {"critic_loss", "bc_loss", "q_mean"} <= records[0].keys()
    assert vgf.Learner.resume(tmp_path).step == 5


def test_an_interrupted_fit_saves(tmp_path):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)

    def interrupt(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner.fit(make_dataset(), 9, log_interval=4, checkpoint_dir=tmp_path, on_log=interrupt, progress=False)
    assert_same_state(vgf.Learner.resume(tmp_path), learner)
    assert learner.step == 4


def test_ctrl_c_in_the_middle_of_an_update_takes_effect_after_it(tmp_path, monkeypatch):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    polyak = reference.polyak_

    def interrupted(*arguments):
        polyak(*arguments)
        if learner.step == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(reference, "polyak_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(make_dataset(), 9, checkpoint_dir=tmp_path, progress=False)
    assert learner.step == 3
    untouched = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    monkeypatch.undo()
    untouched.fit(make_dataset(), 3, progress=False)
    assert_same_state(vgf.Learner.resume(tmp_path), untouched)


def test_a_second_ctrl_c_does_not_wait_and_saves_nothing_torn(tmp_path, monkeypatch):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    polyak = reference.polyak_

    def interrupted(*arguments):
        polyak(*arguments)
        if learner.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(reference, "polyak_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(make_dataset(), 9, checkpoint_dir=tmp_path, checkpoint_interval=2, progress=False)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    untouched = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    untouched.fit(make_dataset(), 2, progress=False)
    assert_same_state(vgf.Learner.resume(tmp_path), untouched)


@pytest.mark.parametrize(("log_interval", "checkpoint_interval"), [(1, 1), (1000, 1), (1, 1000)])
def test_divergence_is_an_error_and_leaves_the_last_checkpoint(tmp_path, log_interval, checkpoint_interval):
    sound = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    sound.fit(make_dataset(), 2, checkpoint_dir=tmp_path, progress=False)
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), dataclasses.replace(TRAIN, critic_learning_rate=1e30))
    with pytest.raises(ArithmeticError, match=r"training diverged: in update \d+ critic_loss is (nan|inf)"):
        learner.fit(
            make_dataset(), 50, log_interval=log_interval, checkpoint_dir=tmp_path,
            checkpoint_interval=checkpoint_interval, progress=False,
        )  # fmt: skip
    kept = vgf.Learner.resume(tmp_path)
    assert all(torch.isfinite(one).all() for one in kept.policy.parameters())
    with torch.no_grad():
        next(sound.policy.behavior.parameters()).fill_(float("nan"))
    whole = (tmp_path / "learner.safetensors").read_bytes()
    with pytest.raises(ArithmeticError, match=r"learner\.safetensors was not written: policy/behavior"):
        sound.save(tmp_path)
    assert (tmp_path / "learner.safetensors").read_bytes() == whole


def test_a_damaged_checkpoint_is_refused(tmp_path):
    learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    learner.save(tmp_path)
    file = tmp_path / "learner.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"learner\.safetensors is damaged"):
        vgf.Learner.resume(tmp_path)
    with pytest.raises(FileNotFoundError):
        vgf.Learner.resume(tmp_path / "nowhere")


TRAINING = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    import torch
    import vgf_fast as vgf
    from test_learner import CONFIG, TRAIN, make_dataset
    torch.set_num_threads(1)
    directory, total, fatal_replace = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if os.path.exists(directory + "/learner.safetensors"):
        learner = vgf.Learner.resume(directory)
    else:
        learner = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    replace, count = os.replace, 0
    def counted(source, target):
        global count
        count += 1
        if count == fatal_replace:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
    os.replace = counted
    print("ready", flush=True)
    learner.fit(make_dataset(), total - learner.step, checkpoint_dir=directory, checkpoint_interval=10, progress=False)
"""


def run_training(directory, total, fatal_replace=0, **options):
    script = textwrap.dedent(TRAINING.format(path=[os.path.dirname(__file__)]))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory), str(total), str(fatal_replace)],
        stdout=subprocess.PIPE,
        **options,
    )


def test_training_killed_again_and_again_ends_in_the_same_parameters(tmp_path):
    """SIGKILL in the middle of a checkpoint's write, and at several moments of training; then resumed each time."""
    total = 200
    straight = vgf.Learner(vgf.VGFPolicy(CONFIG), TRAIN)
    straight.fit(make_dataset(), total, progress=False)

    directory = tmp_path / "run"
    for fatal_replace in (1, 3):
        child = run_training(directory, total, fatal_replace)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
    killed_at = [vgf.Learner.resume(directory).step]
    for delay in (0.1, 0.3):
        child = run_training(directory, total)
        child.stdout.readline()
        time.sleep(delay)
        child.kill()
        child.communicate()
        killed_at.append(vgf.Learner.resume(directory).step)
    assert killed_at[0] == 20
    assert killed_at == sorted(killed_at)
    child = run_training(directory, total)
    child.communicate()
    assert child.returncode == 0
    assert_same_state(vgf.Learner.resume(directory), straight)
    assert os.listdir(directory) == ["learner.safetensors"]
