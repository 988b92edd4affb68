"""Files are written whole or not at all, and damage is noticed."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import vgf_fast as vgf
from vgf_fast.common import checkpoints
from vgf_fast.common.checkpoints import CheckpointError
from vgf_fast.common.files import replacing

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([True, False]), "c": torch.zeros(0, 4).bfloat16()}
HEADER = {"step": 3, "config": {"x": [1, 2]}}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "x.safetensors"
    checkpoints.save_tensors(path, "policy", TENSORS, HEADER)
    return path


def test_round_trip(path):
    tensors, header = checkpoints.load_tensors(path, "policy")
    assert header == HEADER
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert os.listdir(path.parent) == [path.name]


def test_equal_checkpoints_are_equal_files(path, tmp_path):
    for number in range(5):
        checkpoints.save_tensors(tmp_path / f"{number}", "policy", dict(reversed(TENSORS.items())), HEADER)
        assert (tmp_path / f"{number}").read_bytes() == path.read_bytes()


def test_every_truncation_and_flipped_bits_are_noticed(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            checkpoints.load_tensors(path, "policy")
    data = len(whole) - 2 - 6 * 4
    for position in range(data, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoints.load_tensors(path, "policy")


def test_another_kind_another_writer_and_no_file(path):
    with pytest.raises(CheckpointError, match="holds a policy, expected a learner"):
        checkpoints.load_tensors(path, "learner")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoints.load_tensors(path.with_name("y"), "policy")
    from safetensors.torch import save_file

    save_file(TENSORS, path)
    with pytest.raises(CheckpointError, match="not written by vgf_fast"):
        checkpoints.load_tensors(path, "policy")


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(path):
    before = path.read_bytes()

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_is_not_finite_replaces_nothing(path):
    before = path.read_bytes()
    for value in (float("nan"), float("inf")):
        with pytest.raises(ArithmeticError, match=r"x\.safetensors was not written: a has values that are not finite"):
            checkpoints.save_tensors(path, "policy", {**TENSORS, "a": torch.full((2, 3), value)}, HEADER)
    assert path.read_bytes() == before


def test_two_writers_leave_each_other_alone(path):
    with replacing(path) as first:
        first.write_text("first")
        with replacing(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
        assert first.read_text() == "first"
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == [path.name]


def test_a_file_that_cannot_be_read_is_not_damaged(path, monkeypatch):
    def denied(self, *arguments):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(path), "open", denied)
    with pytest.raises(PermissionError, match=r"Permission denied: .*x\.safetensors"):
        checkpoints.load_tensors(path, "policy")


@pytest.mark.parametrize("text", ["null", "[1]", "3", "{", "[" * 100_000])
def test_a_file_of_settings_that_holds_none_is_told(tmp_path, text):
    config = vgf.VGFConfig(observation_dim=2, action_dim=1, hidden_dims=(4,), behavior_hidden_dims=(4,))
    vgf.VGFPolicy(config).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json (holds|is not JSON)"):
        vgf.VGFPolicy.from_pretrained(tmp_path)


@pytest.mark.parametrize("moment", ["write", "os.fsync", "os.replace"])
def test_a_kill_while_writing_leaves_the_old_file(path, moment):
    """The process dies by SIGKILL at each stage; what it left behind goes with the next write."""
    before = path.read_bytes()
    script = f"""
        import os, signal, sys
        from pathlib import Path
        from vgf_fast.common.files import replacing
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} != "write":
            setattr(os, {moment!r}.split(".")[1], die)
        with replacing({str(path)!r}) as temporary:
            temporary.write_bytes(b"half")
            if {moment!r} == "write":
                die()
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert child.returncode == -9
    assert path.read_bytes() == before
    checkpoints.save_tensors(path, "policy", TENSORS, HEADER)
    assert os.listdir(path.parent) == [path.name]
