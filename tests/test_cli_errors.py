"""Whatever is wrong with what the command line is given, it says so in one line that names it, and ends with a code."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

import vgf_fast as vgf
from vgf_fast.cli import commands, main
from vgf_fast.cli.options import Info
from vgf_fast.envs.simulators import EvaluationError
from vgf_fast.experiments.settings import layered

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("ogbench")
pytest.importorskip("h5py")
pytest.importorskip("tyro")
pytest.importorskip("rich")

SIZES = {"observation_dim": 10, "action_dim": 2, "hidden_dims": (8,), "behavior_hidden_dims": (8,), "particles": 3}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A directory of a policy, transitions and settings that are right, and of others that are wrong."""
    folder = tmp_path_factory.mktemp("given")
    policy = vgf.VGFPolicy(vgf.VGFConfig(**SIZES))
    policy.save_pretrained(folder / "policy")
    for name, config in (("null", "null"), ("list", "[1]"), ("text", "{"), ("deep", "[" * 100_000)):
        policy.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(config)
    config = policy.config.to_dict()
    for name, change in (("wide", {"hidden_dims": [9]}), ("odd", {"particles": 2.5}), ("unknown", {"partcles": 2})):
        policy.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps({**config, **change}))
    policy.save_pretrained(folder / "short")
    model = folder / "short" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:100])
    policy.save_pretrained(folder / "run" / "policy")
    (folder / "run" / "config.yaml").write_text("run: {task: 5}")
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(20, 10)), "actions": rng.uniform(-1, 1, (20, 2)),
        "next_observations": rng.normal(size=(20, 10)), "rewards": rng.normal(size=20), "masks": np.ones(20),
    }  # fmt: skip
    np.savez(folder / "data.npz", **arrays)
    np.savez(folder / "lacking.npz", observations=arrays["observations"])
    np.savez(folder / "unequal.npz", **{**arrays, "rewards": arrays["rewards"][:7]})
    (folder / "no.npz").write_text("no archive")
    (folder / "no.hdf5").write_text("no archive")
    for name, text in (
        ("twice", "policy: {particles: 3}\ntrain: {seed: 1}\npolicy: {members: 3}\n"),
        ("field", "policy: {particles: 3, members: 2, particles: 4}"),
        ("deep", "policy: " + "[" * 500),
        ("bytes", "\x00"),
        ("date", "run: {steps: 2021-99-99}"),
        ("list", "- policy"),
        ("number", "policy: 3"),
        ("task", "run: {task: 5}"),
        ("folder", "run: {dataset_dir: 5}"),
        ("interval", "run: {log_interval: 1.5}"),
    ):
        (folder / f"{name}.yaml").write_text(text)
    (folder / "prompts.txt").write_text("\n")
    return folder


TRAIN = "train --out {out} --task {in}/data.npz --eval-interval 0 --device cpu"
EVALUATE = "evaluate --policy {in}/policy --env Reacher-v5 --device cpu --episodes 1"
SEED = "99999999999999999999"
# Arguments, exit code, and what stands in the line.
WRONG = [
    ("", 2, "Expected one of {demo, generate, train,"),
    ("tarin", 2, "tarin"),
    ("train", 2, "--out PATH"),
    ("train --out x --steps many", 2, "Error parsing --steps: .*'many'; see vgf-fast --help"),
    ("train --out x --stepz 3", 2, r"--stepz, 3 \(did you mean --steps\?\); see vgf-fast --help"),
    ("evaluate --policy x --workers threads", 2, "'threads' for argument '--workers'.* 'async'.*vgf-fast evaluate"),
    ("evaluate --policy x --flow-steps 1.5", 2, "--flow-steps"),
    ("demo --seed", 2, "--seed"),
    ("info --jsno", 2, r"--jsno \(did you mean --json\?\)"),
    ("train --out {out}", 1, "there is no task: give --task"),
    (f"{TRAIN} --preset ogbench/cube", 1, "no preset 'ogbench/cube'; the closest are"),
    (f"{TRAIN} --config {{in}}/none.yaml", 1, "no configuration file at .*none.yaml"),
    (f"{TRAIN} --config {{in}}", 1, "no configuration file at "),
    (f"{TRAIN} --config {{in}}/twice.yaml", 1, "twice.yaml is not YAML: 'policy' stands twice, again in line 3"),
    (f"{TRAIN} --config {{in}}/field.yaml", 1, "'particles' stands twice, again in line 1"),
    (f"{TRAIN} --config {{in}}/deep.yaml", 1, "deep.yaml is nested too deeply"),
    (f"{TRAIN} --config {{in}}/bytes.yaml", 1, "bytes.yaml is not YAML"),
    (f"{TRAIN} --config {{in}}/date.yaml", 1, "date.yaml is not YAML"),
    (f"{TRAIN} --config {{in}}/list.yaml", 1, "list.yaml holds a list, expected the sections"),
    (f"{TRAIN} --config {{in}}/number.yaml", 1, "number.yaml: policy is 3, expected fields"),
    ("train --out {out} --config {in}/task.yaml", 1, "run.task is 5, expected a text"),
    ("train --out {out} --config {in}/folder.yaml", 1, "run.dataset_dir is 5, expected a text"),
    (f"{TRAIN} --config {{in}}/interval.yaml", 1, "run.log_interval is 1.5, expected an integer >= 1"),
    (f"{TRAIN} --log-interval 0", 1, "run.log_interval is 0, expected an integer >= 1"),
    (f"{TRAIN} --checkpoint-interval -3", 1, "run.checkpoint_interval is -3"),
    (f"{TRAIN} --seed {SEED}", 1, f"TrainConfig.seed is {SEED}, expected an integer from 0 to 9223372036854775807"),
    (f"{TRAIN} --seed -1", 1, "TrainConfig.seed is -1"),
    (f"{TRAIN} --set policy.hidden_dims=(64,0)", 1, r"VGFConfig.hidden_dims is \(64, 0\), expected at least 1 integer"),
    (f"{TRAIN} --set policy.hidden_dims=(64,a)", 1, "VGFConfig.hidden_dims is .*, expected at least 1 integer"),
    (f"{TRAIN} --set policy.particles=[[[", 1, r"--set policy.particles=\[\[\[ is not YAML"),
    (f"{TRAIN} --set policy.particles={'[' * 500}", 1, "is nested too deeply"),
    (f"{TRAIN} --set particles=3", 1, "--set has 'particles=3', expected section.field=value"),
    (f"{TRAIN} --set policy.partcles=3", 1, "no field 'partcles' .did you mean 'particles'"),
    (f"{TRAIN} --set train.discount=2", 1, r"TrainConfig.discount is 2, expected a number in \[0, 1\]"),
    (f"{TRAIN} --set train.batch_size=2.5", 1, "TrainConfig.batch_size is 2.5, expected an integer"),
    (f"{TRAIN} --set policy.action_dim=3", 1, "policy.action_dim is 3, but the data of .* have 2"),
    (f"{TRAIN} --device cuda:99", 1, "device is 'cuda:99', which cannot be used here"),
    (f"{TRAIN} --device meta", 1, "device is 'meta', which cannot be used here"),
    ("train --out {out} --task {in}/data.npz", 1, "has no environment to evaluate in: give --env"),
    ("train --out {out} --task {in}/none.npz --eval-interval 0", 1, "none.npz"),
    ("train --out {out} --task {in}/no.npz --eval-interval 0", 1, "no.npz"),
    ("train --out {out} --task {in}/no.hdf5 --eval-interval 0", 1, "no.hdf5"),
    ("train --out {out} --task {in}/lacking.npz --eval-interval 0", 1, "lacking.npz.*(actions|next_observations)"),
    ("train --out {out} --task {in}/unequal.npz --eval-interval 0", 1, "unequal.npz.*rewards"),
    ("train --out {out} --task cube-singel-play-singletask-v0", 1, "the closest are cube-single-play-singletask"),
    ("train --out {out} --task d4rl/hoper-medium-v2", 1, "hoper-medium-v2.*hopper-medium-v2"),
    ("train --out {in}/data.npz --task {in}/data.npz --eval-interval 0 --device cpu", 1, "data.npz"),
    ("train --out /proc/none --task {in}/data.npz --eval-interval 0 --device cpu", 1, "/proc/none"),
    (f"{EVALUATE} --task cube-single-play-singletask-v0", 1, "--task is .* and --env is .*, expected only one"),
    (f"{EVALUATE} --episodes 0", 1, "episodes is 0, expected an integer >= 1"),
    (f"{EVALUATE} --num-envs -2", 1, "num_envs is -2"),
    (f"{EVALUATE} --seed {SEED}", 1, f"seed is {SEED}"),
    (f"{EVALUATE} --confidence 1.5", 1, "confidence is 1.5"),
    (f"{EVALUATE} --flow-steps (0,-1)", 1, r"flow_steps is \(0, -1\), expected integers >= 0"),
    (f"{EVALUATE} --flow-steps=[1,1]", 1, r"flow_steps is \(1, 1\), expected different numbers"),
    ("evaluate --policy {in}/policy", 1, "there is no task: give --task, or --env"),
    ("evaluate --policy {in}/run", 1, "run.task is 5, expected a text"),
    ("evaluate --policy {in}/nowhere --env Reacher-v5", 1, "no policy at .*nowhere"),
    ("evaluate --policy {in}/policy --env Reacer-v5", 1, "env is Reacer-v5"),
    ("evaluate --policy {in}/policy --env Ant-v3", 1, "env is Ant-v3, which cannot be made here"),
    ("evaluate --policy {in}/policy --env CartPole-v1", 1, "the action space is"),
    *(
        (f"evaluate --policy {{in}}/{name} --env Reacher-v5", 1, f"{name}.*{reason}")
        for name, reason in (
            ("null", "config.json holds null, expected"), ("list", r"config.json holds \[1\], expected"),
            ("text", "config.json is not JSON"), ("deep", "config.json is not JSON"),
            ("wide", "does not fit the configuration"), ("odd", "config.json.*particles is 2.5, expected an integer"),
            ("unknown", "config.json.*no field 'partcles'"), ("short", "model.safetensors is damaged"),
        )
    ),
    ("finetune --run {in}/policy --out {out}", 1, "policy has no checkpoint/learner.safetensors"),
    ("demo --out {out} --updates 0", 1, "updates is 0, expected an integer >= 1"),
    (f"demo --out {{out}} --seed {SEED}", 1, f"seed is {SEED}"),
    ("demo --out {out} --flow-steps -1", 1, r"flow_steps is \(-1,\)"),
    ("generate --env cube-singel-play --out {out} --episodes 1", 1, "the closest are cube-single-play-v0"),
    ("generate --env cube-single-play --out {out}", 1, "episodes is None and transitions is None"),
    ("generate --env cube-single-play --out {out} --episodes 1 --seed -1", 1, "seed is -1"),
    ("generate --env cube-single-play --out {out} --episodes 1 --processes 0", 1, "processes is 0"),
    ("reproduce --out {out}", 1, "there is no task: give --preset"),
    ("reproduce --out {out} --preset d4rl/hopper-medium-v2 --seeds 7..0", 1, "--seeds is '7..0', expected such as"),
    (f"reproduce --out {{out}} --preset d4rl/hopper-medium-v2 --seeds {SEED}", 1, "--seeds is"),
    ("reproduce --out {out} --preset d4rl/hopper-medium-v2 --set run.eval_interval=0", 1, "run.eval_interval is 0"),
    ("presets --name cube", 1, "there is no preset 'cube'"),
    ("align --reference r --reward r --prompts {in}/none.txt --out {out}", 1, "no file of prompts at .*none.txt"),
    ("align --reference r --reward r --prompts p --out {out} --particles 0", 1, "particles is 0"),
    ("align --reference r --reward r --prompts p --out {out} --steps -1", 1, "TokenBudget.steps is -1"),
    (f"align --reference r --reward r --prompts {{in}}/prompts.txt --out {{out}} --seed {SEED}", 1, f"seed is {SEED}"),
]  # fmt: skip


def filled(command, given, out):
    return [part.replace("{in}", str(given)).replace("{out}", str(out)) for part in command.split()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("command", "code", "named"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_a_wrong_input_is_told_in_a_line(given, tmp_path, capsys, command, code, named):
    out = tmp_path / "out"
    assert main(filled(command, given, out)) == code
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "not foreseen" not in err
    assert re.search(named, err), err
    assert not out.exists()


@pytest.mark.parametrize(
    "command", ["evaluate --policy x --flow-steps 1.5", f"{TRAIN} --set policy.hidden_dims=(64,0)"]
)
def test_in_a_process_of_its_own_too(given, tmp_path, command):
    """Warnings at the end of the interpreter and the like would be lines too."""
    arguments = filled(command, given, tmp_path / "out")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CC": 'cc "'}
    done = subprocess.run(
        [sys.executable, "-m", "vgf_fast.cli", *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode in (1, 2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("particles is 0,\n  expected 1"), "error: particles is 0, expected 1"),
        (ImportError(), "error: ImportError"),
        (MemoryError(), "error: MemoryError"),
        (PermissionError(13, "Permission denied", "here"), "error: [Errno 13] Permission denied: 'here'"),
        (KeyError("x"), "error: KeyError: 'x' (not foreseen: VGF_FAST_DEBUG=1 shows where)"),
        (RecursionError("too deep"), "error: RecursionError: too deep (not foreseen: VGF_FAST_DEBUG=1 shows where)"),
        (SystemExit("told"), "error: told"),
    ],
)
def test_every_error_is_a_line(monkeypatch, capsys, error, line):
    def fail(*_):
        raise error

    monkeypatch.setitem(commands.COMMANDS, Info, fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == f"{line}\n"
    monkeypatch.setenv("VGF_FAST_DEBUG", "1")
    if not isinstance(error, SystemExit):
        with pytest.raises(type(error)):
            main(["info"])


def test_what_an_environment_lacks_is_told(given, monkeypatch, capsys):
    import gymnasium

    def lacking(*_):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed, run `pip install mujoco`")

    monkeypatch.setattr(gymnasium, "make", lacking)
    assert main(filled(EVALUATE, given, None)) == 1
    told = "error: env is Reacher-v5, which cannot be made here: MuJoCo is not installed, run `pip install mujoco`\n"
    assert capsys.readouterr().err == told
    with pytest.raises(EvaluationError, match="make_env failed: DependencyNotInstalled: MuJoCo"):
        vgf.evaluate(vgf.VGFPolicy(vgf.VGFConfig(**SIZES)), lacking)


def test_a_tuple_as_python_writes_it(given, tmp_path, capsys):
    file = tmp_path / "results.json"
    command = f"{EVALUATE} --num-envs 1 --json {file}"
    assert main([*filled(command, given, None), "--flow-steps", "(0, 2)"]) == 0
    assert [result["label"] for result in json.loads(file.read_text())["results"]] == ["L=0", "L=2"]
    for text in ("policy.hidden_dims=(64, 32)", "policy.hidden_dims=(64,32,)", "policy.hidden_dims=[64, 32]"):
        assert layered(None, None, [text], {})["policy"]["hidden_dims"] == [64, 32]
    settings = tmp_path / "settings.yaml"
    settings.write_text("policy:\n  hidden_dims: (64, 32)\n  behavior_hidden_dims: (16,)\nrun: {task: (a)}\n")
    found = layered(None, settings, [], {})
    assert found["policy"] == {"hidden_dims": [64, 32], "behavior_hidden_dims": [16]}
    assert found["run"]["task"] == "(a)"
    capsys.readouterr()


def test_the_command_that_training_ends_with_is_one_that_runs(given, tmp_path, capsys):
    out = tmp_path / "my run"
    command = f"{TRAIN} --steps 1 --no-tensorboard --set train.batch_size=4 policy.hidden_dims=[8] policy.particles=2"
    assert main([part.replace("{out}", str(out)) for part in filled(command, given, "{out}")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    program, *arguments = shlex.split(last.partition("evaluate with: ")[2].replace("--env ENV", "--env Reacher-v5"))
    assert program == "vgf-fast"
    assert main([*arguments, "--episodes", "1", "--num-envs", "1", "--flow-steps", "0", "--device", "cpu"]) == 0
