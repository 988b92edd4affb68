"""The command line, on real data and real simulators: what it writes, what it refuses, and how a run goes on."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from vgf_fast import cli
from vgf_fast.backends import native
from vgf_fast.backends import torch as torch_backend
from vgf_fast.cli import main
from vgf_fast.common import checkpoints

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("ogbench")
pytest.importorskip("tyro")
pytest.importorskip("rich")

TASK = "pointmaze-medium-navigate-singletask-v0"
SMALL = (
    "policy.hidden_dims=[16]", "policy.behavior_hidden_dims=[16]", "policy.particles=3", "policy.behavior_steps=2",
    "policy.train_budget.steps=1", "train.batch_size=8",
)  # fmt: skip
STEPS = 12
RUN = (
    "--steps", str(STEPS), "--log-interval", "2", "--eval-interval", "6", "--checkpoint-interval", "4",
    "--eval-episodes", "2", "--eval-num-envs", "2", "--eval-flow-steps", "0", "1", "--no-tensorboard",
    "--device", "cpu",
)  # fmt: skip


def shorten_episodes(patch):
    """The real environment, with a time limit of 5 steps."""
    from vgf_fast.data import ogbench

    real = ogbench.make_env
    patch(ogbench, "make_env", lambda task: gymnasium.wrappers.TimeLimit(real(task), 5))


@pytest.fixture(autouse=True)
def _short_episodes(monkeypatch):
    shorten_episodes(monkeypatch.setattr)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A generated data set of 3 short episodes."""
    from vgf_fast.envs.generate import generate

    folder = tmp_path_factory.mktemp("data")
    name = "pointmaze-medium-navigate"
    generate(name, folder, episodes=3, steps_per_episode=50, processes=1, progress=False)
    return str(folder)


def train_arguments(data, out, *more):
    return ["train", "--out", str(out), "--task", TASK, "--dataset-dir", data, *RUN, *more, "--set", *SMALL]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        shorten_episodes(patch.setattr)
        assert main(train_arguments(data, out)) == 0
    return out


def contents(out):
    """What a run that went on must share with one that nothing interrupted: its logs' bytes, and all numbers."""
    files = {name: (out / name).read_bytes() for name in ("train.csv", "eval.csv", "policy/config.json")}
    for name, kind in (("checkpoint/learner.safetensors", "learner"), ("policy/model.safetensors", "policy")):
        tensors, header = checkpoints.load_tensors(out / name, kind)
        files[name] = header, {key: (str(one.dtype), one.numpy().tobytes()) for key, one in tensors.items()}
    return files


def error_of(capsys):
    """The one line on standard error."""
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_train_writes_a_run(finished):
    rows = list(csv.DictReader((finished / "train.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert {"critic_loss", "bc_loss", "q_mean"} < set(rows[0])
    assert all(torch.isfinite(torch.tensor(float(value))) for row in rows for value in row.values())
    rows = list(csv.DictReader((finished / "eval.csv").open()))
    assert [(row["step"], row["label"]) for row in rows] == [("6", "L=0"), ("6", "L=1"), ("12", "L=0"), ("12", "L=1")]
    assert all(row["return_mean"] == "-5.0" and row["success_mean"] == "0.0" for row in rows)
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    assert settings["policy"]["hidden_dims"] == [16]
    assert settings["policy"]["observation_dim"] == 2
    assert settings["policy"]["train_budget"] == {"steps": 1, "step_size": 0.1, "temperature": 0.1}
    assert settings["train"]["batch_size"] == 8
    assert settings["run"]["task"] == TASK
    assert settings["run"]["eval_flow_steps"] == [0, 1]


def test_the_saved_policy_is_the_learners(finished):
    import vgf_fast as vgf

    policy = vgf.VGFPolicy.from_pretrained(finished / "policy")
    learner = vgf.Learner.resume(finished / "checkpoint")
    assert learner.step == STEPS
    for name, parameter in learner.policy.named_parameters():
        assert torch.equal(policy.get_parameter(name), parameter)


def test_the_summary_comes_first_and_tensorboard_is_written(data, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    arguments = [one for one in train_arguments(data, out, "--eval-interval", "0") if one != "--no-tensorboard"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{TASK}: observations 2, actions 2\n  147 transitions in 3 trajectories\n")
    assert "update 2 of 12: critic_loss" in printed
    assert f"vgf-fast evaluate --policy {out}" in printed
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/critic_loss")] == [2, 4, 6, 8, 10, 12]
    assert (out / "eval.csv").read_text() == ""


def test_settings_override_one_another(data, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(
        "policy: {particles: 6, selection: softmax, train_budget: {temperature: 0.7}}\n"
        "train: {discount: 0.9, critic_learning_rate: 1e-3}\nrun: {steps: 3, log_interval: 1}\n"
    )
    arguments = [
        "train", "--preset", "ogbench/pointmaze-medium-navigate", "--config", str(file), "--steps", "2", "--out",
        str(tmp_path / "run"), "--dataset-dir", data, "--eval-interval", "0", "--seed", "5", "--device", "cpu",
        "--no-tensorboard", "--set", "policy.hidden_dims=[8]", "policy.behavior_hidden_dims=[8]", "train.discount=0.8",
    ]  # fmt: skip
    assert main(arguments) == 0
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    policy, train, run = settings["policy"], settings["train"], settings["run"]
    # Of the preset:
    assert policy["behavior_steps"] == 10
    assert policy["train_budget"]["steps"] == 3
    assert run["task"] == TASK
    # of the file:
    assert (policy["particles"], policy["selection"], policy["train_budget"]["temperature"]) == (6, "softmax", 0.7)
    assert (train["critic_learning_rate"], run["log_interval"]) == (1e-3, 1)
    # of --set:
    assert (policy["hidden_dims"], train["discount"]) == ([8], 0.8)
    # of the flags:
    assert (run["steps"], train["seed"]) == (2, 5)


# --- going on -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "behavior", "loss"),
    [("softmax", "gaussian", "expectile"), ("random", "flow", "sql"), ("softmax", "flow", "td")],
)
@pytest.mark.parametrize("amortized", [False, True])
def test_every_choice_is_reached_from_the_settings(data, tmp_path, selection, behavior, loss, amortized):
    import vgf_fast as vgf

    chosen = (
        f"policy.selection={selection}", "policy.selection_temperature=0.5", f"policy.behavior={behavior}",
        f"train.critic_loss={loss}", "train.expectile=0.7", f"policy.amortized={str(amortized).lower()}",
    )  # fmt: skip
    assert main([*train_arguments(data, tmp_path), *chosen]) == 0
    learner = vgf.Learner.resume(tmp_path / "checkpoint")
    config = learner.policy.config
    assert (config.selection, config.behavior, config.amortized) == (selection, behavior, amortized)
    assert (learner.config.critic_loss, learner.config.expectile, learner.step) == (loss, 0.7, STEPS)
    rows = list(csv.DictReader((tmp_path / "train.csv").open()))
    assert all(float(row[name]) == float(row[name]) for row in rows for name in ("critic_loss", "bc_loss"))
    assert ("score_loss" in rows[0]) == amortized
    assert len((tmp_path / "eval.csv").read_text().splitlines()) == 5


def test_a_directory_with_a_run_is_refused(data, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    assert main(train_arguments(data, out)) == 1
    assert f"{out} holds a run: go on with --resume, or remove it with --overwrite" in error_of(capsys)
    assert contents(out) == before
    assert main([*train_arguments(data, out, "--overwrite"), "train.seed=9"]) == 0
    after = contents(out)
    assert after["train.csv"] != before["train.csv"]
    assert after["policy/model.safetensors"] != before["policy/model.safetensors"]
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "place"), [("SIGINT", "update"), ("SIGTERM", "update"), ("SIGINT", "evaluation"), ("SIGTERM", "log")]
)
def test_a_signal_saves_and_the_run_goes_on(data, finished, tmp_path, monkeypatch, capsys, number, place):
    import vgf_fast as vgf
    from vgf_fast.envs.simulators import Simulator
    from vgf_fast.experiments.run import CsvLog

    calls = 0

    def signalling(original, at, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), getattr(signal, number))
        return original(*arguments, **options)

    owner, method, at = {
        "update": (torch_backend, "behavior_loss", 7),
        "evaluation": (Simulator, "step", 13),
        "log": (CsvLog, "write", 3),
    }[place]
    with monkeypatch.context() as patch:
        original = getattr(owner, method)
        patch.setattr(owner, method, lambda *a, **o: signalling(original, at, *a, **o))
        out = tmp_path / "run"
        assert main(train_arguments(data, out)) == 130
    step = vgf.Learner.resume(out / "checkpoint").step
    # Between updates, within half a second.
    assert step in ((7, 8) if place == "update" else (6,))
    told = f"{number}: stopping; a second one stops at once\n{number}: saved after {step} of 12 updates; go on with: "
    assert capsys.readouterr().err == f"{told}vgf-fast train --out {out} --resume\n"
    # Nothing but the directory is needed.
    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert contents(out) == contents(finished)
    # The handlers are the caller's again.
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


KILL_POINTS = [
    *(("os.replace", number) for number in (1, 3, 4, 5, 6, 7, 8)),
    *(("os.fsync", number) for number in (1, 9, 11)),
    ("update", 1),
    ("update", 6),
    ("update", 11),
    ("evaluation", 3),
    ("row", 3),
]

KILLER = """
    import json, os, signal, sys
    import torch
    import gymnasium, mujoco, ogbench, rich.table, torch._dynamo, tyro  # once, not in every child
    from vgf_fast import Learner, cli
    from vgf_fast.cli import console
    from vgf_fast.experiments import run
    from vgf_fast.data import ogbench
    from vgf_fast.envs.simulators import Simulator

    torch.set_num_threads(1)
    real = ogbench.make_env
    ogbench.make_env = lambda task: gymnasium.wrappers.TimeLimit(real(task), 5)
    points, arguments, folder = json.loads(sys.argv[1])

    class Torn:
        # Half of a row reaches the file.
        def __init__(self, file):
            self.file, self.rows = file, 0
        def __getattr__(self, name):
            return getattr(self.file, name)
        def write(self, text):
            self.rows += 1
            if self.rows == at:
                self.file.write(text[: len(text) // 2])
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(text)

    def arm(owner, name):
        original, calls = getattr(owner, name), 0
        def killing(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)
        setattr(owner, name, killing)

    for index, (place, at) in enumerate(points):
        child = os.fork()
        if child == 0:
            if place == "row":
                made = run.CsvLog.__init__
                def torn(self, path, step):
                    made(self, path, step)
                    if path.name == "train.csv":
                        self._file = Torn(self._file)
                run.CsvLog.__init__ = torn
            else:
                owners = {"os.replace": (os, "replace"), "os.fsync": (os, "fsync")}
                owners |= {"update": (Learner, "_update"), "evaluation": (Simulator, "step")}
                arm(*owners[place])
            cli.main([f"{folder}/{index}" if one == "OUT" else one for one in arguments])
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (place, at, status)
"""


def test_a_killed_run_goes_on_as_if_never_killed(data, finished, tmp_path, capsys):
    """SIGKILL in the middle of updates, evaluations, rows, and of writing every file of a checkpoint."""
    arguments = train_arguments(data, "OUT")
    job = json.dumps([KILL_POINTS, arguments, str(tmp_path)])
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLER), job], check=True, timeout=240)
    for index, point in enumerate(KILL_POINTS):
        out = tmp_path / str(index)
        assert main([*train_arguments(data, out, "--resume")]) == 0, point
        assert contents(out) == contents(finished), point
        leftovers = [path for path in out.rglob("*") if path.name.endswith(".partial")]
        assert not leftovers, point
    capsys.readouterr()


def test_a_finished_run_may_be_prolonged(data, finished, tmp_path):
    out = tmp_path / "run"
    assert main(train_arguments(data, out, "--steps", "6")) == 0
    assert main(["train", "--out", str(out), "--resume", "--steps", str(STEPS)]) == 0
    assert contents(out) == contents(finished)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "train.discount=0.5"], "train.discount is 0.5, but the checkpoint in .* was trained with 0.99"),
        (["--seed", "1"], "train.seed is 1, but the checkpoint"),
        (["--steps", "5"], "run.steps is 5, but the checkpoint in .* has 12 updates already"),
        (["--set", "policy.members=3"], "policy.members is 3, but the checkpoint"),
    ],
)
def test_a_checkpoint_keeps_its_settings(finished, tmp_path, capsys, more, message):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    assert main(["train", "--out", str(out), "--resume", *more]) == 1
    assert re.search(message, error_of(capsys))
    assert contents(out) == contents(finished)


def test_a_damaged_checkpoint_is_told(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "checkpoint" / "learner.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-5] ^= 1
    file.write_bytes(damaged)
    assert main(["train", "--out", str(out), "--resume"]) == 1
    assert "learner.safetensors is damaged" in error_of(capsys)


def test_training_that_diverges_ends(data, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = [*train_arguments(data, out), "train.critic_learning_rate=1e30"]
    assert main(arguments) == 1
    assert "training diverged: in update" in error_of(capsys)
    assert not (out / "policy").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "pointmaze-medum-navigate-singletask-v0"], "the closest are pointmaze-medium-navigate-singletask"),
        (["--dataset-dir", "nowhere"], "does not exist: generate it"),
        (
            ["--preset", "ogbench/cube-singel-play"],
            "no preset 'ogbench/cube-singel-play'; the closest are ogbench/cube",
        ),
        (["--preset", "ogbench/cube-single-play"], "policy.observation_dim is 28, but the data of .* have 2"),
        (["--config", "nowhere.yaml"], "no configuration file at nowhere.yaml"),
        (["--device", "cuda:99"], "device is 'cuda:99', which cannot be used here"),
        (["--env", "Reacher-v5"], "the environment's observations have 10 entries, expected 2: the policy's config"),
        (["--env", "Reacer-v5"], "env is Reacer-v5: .*Reacher"),
        (["--steps", "0"], "run.steps is 0, expected an integer >= 1"),
        (["--set", "policy.partcles=5"], "policy has no field 'partcles' .did you mean 'particles'"),
        (["--set", "policy.particles"], "--set has 'policy.particles', expected section.field=value"),
        (["--set", "policy.particles=0"], "VGFConfig.particles is 0, expected an integer >= 1"),
        (["--set", "train.discount=much"], "TrainConfig.discount is 'much', expected a number"),
        (["--set", "policy.train_budget=5"], "policy.train_budget is 5, expected steps, step_size, temperature"),
        (["--set", "polcy.particles=5"], "has no field 'polcy' .did you mean 'policy'"),
        (["--set", "train.seed=1", "--set", "train.seed=2"], "--set is given twice"),
        (["--set", "policy.train_budget.stepsize=5"], "did you mean 'step_size'"),
    ],
)
def test_mistakes_are_told_in_a_line(data, tmp_path, capsys, more, message):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), "--task", TASK, "--dataset-dir", data, "--device", "cpu", *more]) == 1
    error = error_of(capsys)
    assert re.search(message, error), error
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {discout: 0.9}", "train has no field 'discout' (did you mean 'discount'?)"),
        ("run: {evaluate: 3}", "run has no field 'evaluate'"),
        ("trian: {}", "has no field 'trian' (did you mean 'train'?)"),
        ("- a", "holds a list, expected the sections policy, train, run"),
        ("a: [", "is not YAML"),
        ("train: 3", "train is 3, expected fields"),
        ("run: {tensorboard: 3}", "run.tensorboard is 3, expected True or False"),
        ("run: {backend: cuda}", "run.backend is 'cuda', expected one of 'auto', 'triton', 'torch'"),
        ("run: {eval_flow_steps: [0, -1]}", "run.eval_flow_steps is (0, -1), expected integers >= 0"),
    ],
)
def test_a_wrong_file_is_told(data, tmp_path, capsys, text, message):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    arguments = ["train", "--out", str(tmp_path / "run"), "--task", TASK, "--dataset-dir", data, "--config", str(file)]
    assert main(arguments) == 1
    assert message in error_of(capsys)


def test_no_task(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path / "run")]) == 1
    assert "there is no task: give --task" in error_of(capsys)


def test_debugging_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.setenv("VGF_FAST_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no task"):
        main(["train", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("arguments", [[], ["tarin"], ["train"], ["train", "--out", "x", "--step", "many"]])
def test_wrong_usage(arguments, capsys):
    assert main(arguments) == 2
    capsys.readouterr()


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["train"], ["evaluate"], ["info"]])
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "usage: vgf-fast" in capsys.readouterr().out


def test_what_is_not_installed_is_told(monkeypatch, capsys):
    real = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "tyro" else real(name))
    assert main(["info"]) == 1
    assert error_of(capsys) == "error: the command line needs tyro: pip install 'vgf_fast[train]'\n"


# --- the other commands -------------------------------------------------------------------------------------------


def test_generate(tmp_path, capsys):
    import numpy as np

    arguments = ["generate", "--env", "pointmaze-medium-navigate", "--out", str(tmp_path), "--processes", "1"]
    assert main([*arguments, "--episodes", "1"]) == 0
    printed = capsys.readouterr().out
    for name in ("pointmaze-medium-navigate-v0.npz", "pointmaze-medium-navigate-v0-val.npz"):
        assert np.load(tmp_path / name)["observations"].shape == (1001, 2)
        assert f"written: {tmp_path / name}" in printed
    assert main([*arguments, "--episodes", "1"]) == 1
    assert "exists" in error_of(capsys)
    assert main([*arguments]) == 1
    assert "expected exactly one of them" in error_of(capsys)
    assert main(["generate", "--env", "cube-singel-play", "--out", str(tmp_path), "--episodes", "1"]) == 1
    assert "the closest are cube-single-play-v0" in error_of(capsys)


def test_evaluate(finished, tmp_path, capsys):
    file = tmp_path / "results.json"
    options = ["--episodes", "3", "--flow-steps", "0", "2", "--behavior-cloning", "--device", "cpu"]
    assert main(["evaluate", "--policy", str(finished), *options, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    for text in (f"{TASK}, 3 episodes", "behaviour cloning", "L = 0, best of N", "L = 2", "-5.0 to -5.0", "success %"):
        assert text in printed
    record = json.loads(file.read_text())
    assert [result["label"] for result in record["results"]] == ["bc", "L=0", "L=2"]
    assert record["results"][0]["returns"] == [-5.0, -5.0, -5.0]
    # The policy alone, with the task by name.
    assert main(["evaluate", "--policy", str(finished / "policy"), "--task", TASK, *options, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["results"] == record["results"]
    capsys.readouterr()
    for more, message in (
        ([], "there is no task"),
        (["--env", "Reacher-v5"], "observations have 10 entries, expected 2"),
        (["--env", "Reacher-v99"], "env is Reacher-v99: "),
        (["--env", "Reacher-v5", "--task", TASK], "expected only one of them"),
    ):
        assert main(["evaluate", "--policy", str(finished / "policy"), *more]) == 1
        assert message in error_of(capsys)
    assert main(["evaluate", "--policy", str(tmp_path / "nowhere"), "--task", TASK]) == 1
    assert "no policy at" in error_of(capsys)


def test_an_interrupted_command_writes_nothing(finished, tmp_path, monkeypatch, capsys):
    from vgf_fast.envs.simulators import Simulator

    def interrupt(self, action):
        raise KeyboardInterrupt

    monkeypatch.setattr(Simulator, "step", interrupt)
    file = tmp_path / "results.json"
    assert main(["evaluate", "--policy", str(finished), "--json", str(file)]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["name"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count()
    folder = Path(__file__).parent.parent / "kernels"
    assert found["kernels"] == sorted(path.stem for path in folder.glob("*.py") if path.stem != "__init__")
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["compiled"] == native.state()
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    printed = " ".join(printed.split())
    assert found["compiled"] in printed
    assert found["threads"]["spin"] in printed
    assert torch.__version__ in printed
    assert "backend triton" in printed


def test_nothing_heavy_is_imported_before_it_is_needed():
    heavy = ("gymnasium", "mujoco", "ogbench", "h5py", "rich", "tyro", "triton", "matplotlib", "yaml", "tensorboard")
    code = f"""
        import sys
        import vgf_fast.cli, vgf_fast.envs.evaluation
        from vgf_fast.experiments import demo, plots, presets, run
        loaded = [name for name in {heavy} if name in sys.modules]
        assert not loaded, loaded
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
