"""profiling/reacher.py: the release is given the demo's settings, and what it cannot do is told."""

import pytest
from test_profiling import load_profiling

import vgf_fast as vgf
from vgf_fast.experiments import demo

load_profiling()
from profiling import reacher  # noqa: E402


def test_the_release_gets_the_demos_settings():
    learner = demo.make_learner(demo.DemoConfig(seed=3), "cpu")
    policy, train = learner.policy.config, learner.config
    settings = reacher.release_settings(policy, train)
    found = vgf.config_from_reference(
        {**settings, "ob_dims": [policy.observation_dim], "action_dim": policy.action_dim}
    )
    for mine, theirs, differ in (
        (policy.to_dict(), found[0].to_dict(), {"bandwidth_gradient", "test_budget"}),
        (train.to_dict(), found[1].to_dict(), {"seed"}),
    ):
        assert {name for name, value in mine.items() if theirs[name] != value} == differ


def test_a_release_that_cannot_run_is_told(tmp_path, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    # This process is the other tests' too.
    monkeypatch.setattr(reacher.machine, "limit_cores", lambda threads: None)
    monkeypatch.setattr(reacher.torch, "set_num_threads", lambda threads: None)
    flags = ["--threads", "1", "--episodes", "1", "--out", str(tmp_path / "out")]
    (tmp_path / "agents").mkdir()
    for more, message in (
        (["--jax-python", str(tmp_path / "none")], "error: [Errno 2] No such file or directory"),
        ([], "error: the release failed: ModuleNotFoundError: No module named "),
    ):
        assert reacher.main(["--jax-release", str(tmp_path), *flags, *more]) == 1
        assert capsys.readouterr().out.splitlines()[-1].startswith(message)
    assert not (tmp_path / "out").exists()
