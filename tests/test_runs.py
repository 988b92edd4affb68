"""What breaks a run: another one in its directory, signals, a full disk, other data; afterwards it is whole."""

import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.cli import main
from vgf_fast.common import interrupts, locks
from vgf_fast.common.files import write_text

pytest.importorskip("tyro")
pytest.importorskip("rich")

SMALL = (
    "policy.hidden_dims=[64, 64]", "policy.behavior_hidden_dims=[16]", "policy.particles=2", "policy.behavior_steps=1",
    "train.batch_size=8",
)  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def write_data(path, seed=0):
    """Transitions of Reacher-v5's sizes."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(61, 10)).astype(np.float32)
    np.savez(
        path, observations=states[:-1], actions=rng.uniform(-1, 1, (60, 2)).astype(np.float32),
        next_observations=states[1:], rewards=rng.normal(size=60).astype(np.float32), masks=np.ones(60, np.float32),
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data.npz")


def arguments(data, out, *more):
    return [
        "train", "--task", str(data), "--out", str(out), "--steps", "4", "--eval-interval", "0", "--log-interval", "2",
        "--checkpoint-interval", "2", "--no-tensorboard", "--device", "cpu", *more, "--set", *SMALL,
    ]  # fmt: skip


@pytest.fixture
def trained(data, tmp_path):
    """A run of four updates."""
    out = tmp_path / "run"
    assert main(arguments(data, out)) == 0
    return out


def files(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@contextmanager
def disk_full_beyond(size):
    """No file can grow beyond ``size`` bytes; the write that would fails as one on a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def error_of(capsys):
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- one run at a time --------------------------------------------------------------------------------------------


def test_a_second_run_in_a_directory_is_refused(data, trained, tmp_path, capsys):
    from vgf_fast.experiments import reproduce

    before = files(trained)
    with locks.holding(trained):
        capsys.readouterr()
        for command in (
            arguments(data, trained, "--resume"),
            arguments(data, trained, "--overwrite"),
            ["finetune", "--run", str(trained), "--out", str(trained)],
            ["demo", "--out", str(trained)],
        ):
            assert main(command) == 1
            told = f"{trained} is in use by process {os.getpid()} on {socket.gethostname()} since 20"
            assert told in error_of(capsys)
        with pytest.raises(locks.InUseError, match="is in use by process"):
            reproduce.reproduce(trained, {}, (0,), None, None)
    assert files(trained) == before


def test_a_lock_does_not_outlive_its_holder(tmp_path):
    """Nor does a child of the holder's keep it."""
    script = f"""
        import os, time
        from vgf_fast.common import locks
        with locks.holding({str(tmp_path / "run")!r}):
            child = os.fork()
            if child:
                print(child, flush=True)
            time.sleep(600)
    """
    holder = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with (
            pytest.raises(locks.InUseError, match=f"in use by process {holder.pid} on"),
            locks.holding(tmp_path / "run"),
        ):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        with locks.holding(tmp_path / "run"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
    assert os.listdir(tmp_path / "run") == []


def test_a_directory_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(ValueError, match="wrong"), locks.holding(tmp_path / "run"):
        raise ValueError("wrong")
    assert os.listdir(tmp_path) == []


# --- signals ----------------------------------------------------------------------------------------------------------


LONG_UPDATE = """
    import hashlib, sys
    from vgf_fast import Learner, cli
    update = Learner._update
    def slow(self, *arguments):
        if self.step == 3:
            print("in the update", flush=True)
            # Minutes in C, without a look at signals.
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        return update(self, *arguments)
    Learner._update = slow
    sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("first", ["SIGTERM", "SIGINT"])
def test_a_signal_is_heard_in_a_long_update_and_the_second_ends_at_once(data, tmp_path, first):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LONG_UPDATE), *arguments(data, out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if line == "in the update\n":
                break
        process.send_signal(getattr(signal, first))
        assert process.stderr.readline() == f"{first}: stopping; a second one stops at once\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == interrupts.INTERRUPTED
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()
    assert vgf.Learner.resume(out / "checkpoint").step == 2
    assert main(arguments(data, out, "--resume")) == 0


def test_an_interrupt_in_an_import_is_no_missing_package(tmp_path, monkeypatch, capsys):
    """A module in C makes an ImportError of what is raised while it is imported."""
    pytest.importorskip("gymnasium")
    (tmp_path / "mujoco.py").write_text(
        "import signal\n"
        "try:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt as error:\n"
        "    raise ImportError('initialization failed') from error\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == interrupts.INTERRUPTED
    assert capsys.readouterr().err == "SIGINT: stopping; a second one stops at once\ninterrupted\n"


def test_a_worker_process_has_no_part_in_the_signals_of_its_parent():
    with interrupts.listening():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(3)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert interrupts.requested() is None


# --- a full disk, divergence ------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(data, trained, tmp_path, capsys):
    whole = tmp_path / "whole"
    assert main(arguments(data, whole, "--steps", "8")) == 0
    before = files(trained)
    capsys.readouterr()
    with disk_full_beyond(len(before["checkpoint/learner.safetensors"]) // 2):
        assert main(["train", "--out", str(trained), "--resume", "--steps", "8"]) == 1
    told = error_of(capsys)
    assert f"{trained / 'checkpoint' / 'learner.safetensors'} could not be written" in told
    assert "File too large" in told
    after = files(trained)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.startswith(("checkpoint/", "policy/")))
    assert main(["train", "--out", str(trained), "--resume", "--steps", "8"]) == 0
    assert files(trained)["checkpoint/learner.safetensors"] == files(whole)["checkpoint/learner.safetensors"]
    assert files(trained)["train.csv"] == files(whole)["train.csv"]


def test_divergence_leaves_the_last_checkpoint_also_between_records(data, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--steps", "50", "--log-interval", "1000", "--checkpoint-interval", "1"]
    assert main([*arguments(data, out, *options), "train.critic_learning_rate=1e30"]) == 1
    assert "training diverged: in update " in error_of(capsys)
    learner = vgf.Learner.resume(out / "checkpoint")
    assert learner.step >= 1
    assert all(torch.isfinite(one).all() for one in learner.policy.parameters())


# --- what is kept -------------------------------------------------------------------------------------------------


def test_the_last_checkpoints_are_kept_under_their_steps(data, tmp_path):
    out = tmp_path / "run"
    assert main(arguments(data, out, "--steps", "11")) == 0
    kept = sorted(path.name for path in (out / "checkpoint").iterdir())
    assert kept == ["learner.safetensors", "step_10", "step_11", "step_8"]
    for step in (8, 10, 11):
        assert vgf.Learner.resume(out / "checkpoint" / f"step_{step}").step == step
    assert vgf.Learner.resume(out / "checkpoint").step == 11
    assert main(arguments(data, out, "--overwrite")) == 0
    assert sorted(os.listdir(out / "checkpoint")) == ["learner.safetensors", "step_2", "step_4"]


def test_the_best_by_evaluation_is_kept(tmp_path):
    policy = vgf.VGFPolicy(vgf.VGFConfig(observation_dim=2, action_dim=1, hidden_dims=(8,), behavior_hidden_dims=(8,)))
    learner = vgf.Learner(policy)

    def best_after(step, evaluation):
        learner.step = step
        learner.save_best(tmp_path, evaluation)
        return vgf.Learner.resume(tmp_path / "best").step

    assert best_after(1, {"step": 1, "return/L=0": -5.0, "return/L=1": -3.0, "return/bc": 9.0}) == 1
    assert best_after(2, {"return/L=0": -4.0}) == 1
    assert best_after(3, {"return/L=0": -2.0}) == 3
    # Of several kinds of scores the return counts last.
    assert best_after(4, {"return/L=0": -9.0, "success/L=0": 0.5}) == 4
    assert best_after(5, {"return/L=0": 0.0, "success/L=0": 0.5, "normalized/L=0": 0.4}) == 4


# --- other data, and what a run says at its end -----------------------------------------------------------------------


def test_other_transitions_are_refused(data, trained, tmp_path, capsys):
    before = files(trained)
    other = write_data(tmp_path / "other.npz", seed=1)
    capsys.readouterr()
    assert main(arguments(other, trained, "--resume", "--steps", "6")) == 1
    assert f"the checkpoint in {trained} was trained on other transitions (sha256 is " in error_of(capsys)
    assert files(trained) == before
    # The same ones elsewhere are as good.
    moved = write_data(tmp_path / "moved.npz")
    assert main(arguments(moved, trained, "--resume", "--steps", "6")) == 0
    # A run of before there was data.json goes on.
    (trained / "data.json").unlink()
    assert main(arguments(moved, trained, "--resume", "--steps", "8")) == 0
    assert json.loads((trained / "data.json").read_text())["transitions"] == 60


def command_after(text, printed):
    """The command that a printed line names, as a shell would read it."""
    found = [line.split(text)[1] for line in printed.splitlines() if text in line]
    program, *words = shlex.split(found[-1])
    assert program == "vgf-fast"
    return words


def test_finetuning_is_interrupted_goes_on_and_names_a_command_that_works(data, tmp_path, monkeypatch, capsys):
    pytest.importorskip("gymnasium")
    from vgf_fast.envs.simulators import Simulator

    run, out = tmp_path / "a run", tmp_path / "on line"
    assert main(arguments(data, run, "--env", "Reacher-v5")) == 0
    evaluation = ["--episodes", "1", "--num-envs", "1", "--flow-steps", "0", "--device", "cpu"]
    assert main([*command_after("evaluate with: ", capsys.readouterr().out), *evaluation]) == 0
    finetune = [
        "finetune", "--run", str(run), "--out", str(out), "--steps", "30", "--warm-up", "5", "--eval-interval", "0",
        "--log-interval", "10", "--device", "cpu",
    ]  # fmt: skip
    steps, real = 0, Simulator.step

    def step(self, action):
        nonlocal steps
        steps += 1
        if steps == 13:
            signal.raise_signal(signal.SIGTERM)
        return real(self, action)

    with monkeypatch.context() as patch:
        patch.setattr(Simulator, "step", step)
        assert main(finetune) == interrupts.INTERRUPTED
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"SIGTERM: saved after 13 of 30 steps; go on with: the same vgf-fast finetune --out '{out}'"
    data_file = (out / "data.json").read_bytes()
    (out / "data.json").write_bytes(data_file.replace(b'"transitions": 60', b'"transitions": 61'))
    assert main(finetune) == 1
    assert "was trained on other transitions (transitions is 60, was 61)" in error_of(capsys)
    (out / "data.json").write_bytes(data_file)
    assert main(finetune) == 0
    printed = capsys.readouterr().out
    assert "going on after 13 of 30 steps" in printed
    assert main([*command_after("evaluate with: ", printed), *evaluation]) == 0


def test_a_failed_save_leaves_no_replay_without_a_learner(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    from test_online import training

    one = training()
    one.run(5, checkpoint_dir=tmp_path, progress=False)
    before = files(tmp_path)
    monkeypatch.setattr(vgf.Learner, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        one.run(5, checkpoint_dir=tmp_path, progress=False)
    one.close()
    assert files(tmp_path) == before


def test_two_alignments_into_one_file_are_refused(tmp_path):
    from vgf_fast.llm.run import align_file

    out = tmp_path / "out.jsonl"
    with out.open("a") as file:
        assert locks.lock(file.fileno())
        with pytest.raises(locks.InUseError, match="out.jsonl is in use by another process"):
            align_file(None, ["a"], out, vgf.TransportBudget(), num_particles=1, seed=0, settings={}, progress=False)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=rf"File too large: '{tmp_path}/x.csv'"), disk_full_beyond(1000):
        write_text(tmp_path / "x.csv", "a" * 2000)
    assert os.listdir(tmp_path) == []
