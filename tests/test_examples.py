"""Every example and the notebook run, with tiny settings; the one file computes what the library does."""

import runpy
import sys
from pathlib import Path

import gymnasium
import language
import numpy as np
import pytest
import torch

import vgf_fast as vgf

EXAMPLES = Path(__file__).parent.parent / "examples"
NETWORKS = {"hidden_dims": (8,), "behavior_hidden_dims": (8,)}


def run(name, monkeypatch, capsys, *arguments):
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where an example writes what it writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_example_has_a_test():
    text = Path(__file__).read_text(encoding="utf-8")
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f'"{path.name}"' in text


def test_one_file(monkeypatch, capsys):
    told = run("vgf_in_one_file.py", monkeypatch, capsys, "--updates", 2, "--episodes", 2)
    assert all(f"\n{steps} flow steps: return " in told for steps in (0, 1, 3, 5, 10))


def test_one_file_computes_what_the_library_does():
    one = runpy.run_path(str(EXAMPLES / "vgf_in_one_file.py"))
    generator = torch.Generator().manual_seed(0)
    particles, score = torch.randn(2, 4, one["N"], 2, generator=generator, dtype=torch.float64).tanh()
    expected = vgf.svgd_direction(particles, score, one["TEMPERATURE"])
    torch.testing.assert_close(one["direction"](particles, score), expected, rtol=1e-9, atol=1e-12)

    policy = vgf.VGFPolicy(vgf.VGFConfig(4, 2, hidden_dims=(8, 8), behavior_hidden_dims=(8,)))
    policy.double()
    critics = torch.nn.ModuleList(member_of(policy.critic, e) for e in range(2))
    states = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    for steps in (0, 1, 3):
        budget = vgf.TransportBudget(steps, one["STEP_SIZE"], one["TEMPERATURE"])
        expected = vgf.value_gradient_flow(policy.critic, states, particles, budget).particles
        torch.testing.assert_close(one["flow"](critics, states, particles, steps), expected, rtol=1e-9, atol=1e-9)


def member_of(critic, member):
    """One member of an ensemble as modules of PyTorch, as the example has them."""
    layers = []
    for index, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
        linear = torch.nn.Linear(*weight.shape[1:], dtype=weight.dtype)
        linear.weight.data, linear.bias.data = weight[member].T.contiguous(), bias[member]
        layers.append(linear)
        if index < len(critic.norm_scales):
            norm = torch.nn.LayerNorm(weight.shape[2], eps=1e-6, dtype=weight.dtype)
            norm.weight.data, norm.bias.data = critic.norm_scales[index][member], critic.norm_biases[index][member]
            layers += [norm, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).requires_grad_(False)


def test_own_data(folder, monkeypatch, capsys):
    told = run("own_data.py", monkeypatch, capsys, "--updates", 2)
    assert "after 40 steps from 0.7 m the cart is at " in told
    policy = vgf.VGFPolicy.from_pretrained(folder / "own_data" / "policy")
    assert policy.action_bounds.low == (-20.0,)
    assert np.load(folder / "own_data" / "log.npz")["masks"].min() == 0


def test_offline_to_online(monkeypatch, capsys):
    told = run(
        "offline_to_online.py", monkeypatch, capsys,
        *("--data", 300, "--updates", 1, "--steps", 3, "--episodes", 1),
    )  # fmt: skip
    assert [line.split(":")[0] for line in told.splitlines()] == [
        "offline, L=0", "offline, L=5", "online, L=0", "online, L=5",
    ]  # fmt: skip


def test_budget_curve(folder, monkeypatch, capsys):
    env = gymnasium.make("Reacher-v5")
    vgf.VGFPolicy.for_env(env, **NETWORKS).save_pretrained(folder / "demo" / "policy")
    told = run("budget_curve.py", monkeypatch, capsys, "--flow-steps", 0, 2, "--episodes", 1)
    assert [line.split(":")[0] for line in told.splitlines()] == ["bc", "L=0", "L=2", "written"]
    assert (folder / "budget_curve.png").read_bytes().startswith(b"\x89PNG")


def test_align_language_model(folder, monkeypatch, capsys):
    tokenizer = language.wordpiece()
    models = {"reference": language.causal("gpt2", tokenizer), "reward": language.classifier("bert", tokenizer)}
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    told = run(
        "align_language_model.py", monkeypatch, capsys,
        *("--reference", "reference", "--reward", "reward", "--prompts", "the old man"),
        *("--reward-units", 20, "--new-tokens", 4),
    )  # fmt: skip
    assert "embedding flow: the old man | " in told
    assert "best of N: the old man | " in told


def test_notebook():
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "vgf_in_one_file.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert "UPDATES, EPISODES = 2000, 300" in code[0].source
    code[0].source = code[0].source.replace("2000, 300", "2, 2")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 2
