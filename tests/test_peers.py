"""profiling/: what the methods of a benchmark have in common, and what a record says of the checkout."""

import dataclasses
import subprocess

import pytest
import torch
from test_profiling import TINY, load_profiling

from vgf_fast import VGFPolicy

load_profiling()
from profiling import machine, torch_methods, worker  # noqa: E402

JOB = worker.Job("ours-float32", "cpu", 1, 7, worker.Sizes(**TINY))


@pytest.fixture(autouse=True)
def _leave_this_process_alone(monkeypatch):
    monkeypatch.setattr(machine, "limit_cores", lambda threads: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


def weights(policy):
    modules = {"critic": policy.critic, "target": policy.target_critic, "behavior": policy.behavior}
    return {f"{part}.{name}": value for part, one in modules.items() for name, value in one.state_dict().items()}


def test_every_method_begins_with_the_same_weights():
    ours = torch_methods.make(JOB)
    expected = weights(ours.learner.policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(ours.acting).items())
    for method in ("eager-float32", "compile-bfloat16"):
        agent = torch_methods.make(dataclasses.replace(JOB, method=method)).agent
        found = [agent.critic, agent.target_critic, agent.behavior]
        modules = [ours.learner.policy.critic, ours.learner.policy.target_critic, ours.learner.policy.behavior]
        for module, mine in zip(found, modules, strict=True):
            values = [value.flatten() for value in module.state_dict().values()]
            wanted = [value.flatten() for value in mine.state_dict().values()]
            assert torch.cat(values).sort().values.equal(torch.cat(wanted).sort().values), method


def test_the_weights_have_the_releases_names_and_shapes():
    arrays = worker.random_weights(JOB.sizes, JOB.seed)
    for name in [name for name in arrays if name.startswith("critic/")]:
        arrays[f"target_{name}"] = arrays[name]
    settings = {"value_hidden_dims": (16, 16), "actor_hidden_dims": (16, 16), "ob_dims": (5,), "action_dim": 3}
    policy = VGFPolicy.from_reference_parameters(arrays, settings)
    expected = weights(torch_methods.make(JOB).learner.policy)
    assert all(torch.equal(value, expected[name]) for name, value in weights(policy).items())
    assert not torch.equal(policy.critic.weights[0][0], policy.critic.weights[0][1])


def test_a_record_does_not_make_the_checkout_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    assert machine.git_dirty() is None
    results = tmp_path / "profiling" / "results"
    results.mkdir(parents=True)
    for name in ("vgf_fast", "kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").touch()
    (tmp_path / "profiling" / "a.py").touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert machine.git_dirty() is False
    (results / "cpu.jsonl").write_text("{}\n")
    assert machine.git_dirty() is False
    (tmp_path / "vgf_fast" / "a.py").write_text("pass\n")
    assert machine.git_dirty() is True
