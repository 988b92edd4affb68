"""Presets: all of them make configurations, inherit as written, and say what is not the release's."""

import dataclasses
import importlib.util
import json
from importlib.resources import files

import pytest

from vgf_fast.config import TrainConfig, TransportBudget, VGFConfig
from vgf_fast.experiments.presets import dotted, merged, preset, presets, train_presets
from vgf_fast.experiments.settings import RunConfig

NAMES = list(presets)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_makes_configurations(name):
    one = preset(name)
    assert isinstance(presets[name], VGFConfig)
    assert isinstance(train_presets[name], TrainConfig)
    RunConfig.from_dict(one.run)
    fields = set(dotted({"policy": one.policy, "train": one.train, "run": one.run}))
    assert one.ours <= fields
    # A field that is written in the file reaches the configuration.
    for field, value in one.train.items():
        assert getattr(train_presets[name], field) == value
    for budget in ("train_budget", "test_budget"):
        assert dataclasses.asdict(getattr(presets[name], budget)) == one.policy[budget]


def test_the_release_and_the_paper():
    cube = presets["ogbench/cube-double-play"]
    assert (cube.observation_dim, cube.action_dim, cube.particles, cube.behavior_steps) == (37, 5, 10, 10)
    assert cube.hidden_dims == cube.behavior_hidden_dims == (512, 512, 512, 512)
    assert cube.target_q_aggregation == "mean"
    assert train_presets["ogbench/cube-double-play"].discount == 0.99
    for name in ("antmaze-large-navigate", "humanoidmaze-medium-navigate", "antsoccer-arena-navigate"):
        assert train_presets[f"ogbench/{name}"].discount == 0.995
    maze = presets["d4rl/antmaze-large-diverse-v2"]
    assert maze.train_budget == TransportBudget(5, 0.1, 0.1)
    assert maze.target_q_aggregation == "min"
    assert [preset(f"ogbench/antmaze-{size}-navigate").run["steps"] for size in ("large", "giant")] == [
        2 * 10**6,
        3 * 10**6,
    ]
    assert presets["ogbench/puzzle-3x3-play"].train_budget == TransportBudget(5, 0.1, 1.0)
    for name in NAMES:
        assert not presets[name].bandwidth_gradient


def test_what_is_ours_is_said():
    assert "policy.train_budget.temperature" in preset("d4rl/hopper-medium-v2").ours
    assert "policy.train_budget.step_size" not in preset("d4rl/hopper-medium-v2").ours
    # The family's choice is the release's own value in this task.
    assert preset("ogbench/puzzle-3x3-play").ours == {"policy.test_budget.steps"}
    assert preset("ogbench/puzzle-4x4-play").ours >= {"policy.train_budget.temperature"}
    assert "policy.train_budget.steps" not in preset("ogbench/puzzle-4x4-play").ours
    assert "train.discount" in preset("demo/reacher").ours


@pytest.mark.filterwarnings("ignore:.*precision lowered by casting")
def test_sizes_are_the_environments():
    pytest.importorskip("ogbench")
    from vgf_fast.data import ogbench

    for name in ("ogbench/pointmaze-medium-navigate", "ogbench/cube-single-play", "ogbench/antmaze-large-navigate"):
        environment = ogbench.make_env(preset(name).run["task"])
        sizes = (environment.observation_space.shape[0], environment.action_space.shape[0])
        environment.close()
        assert (presets[name].observation_dim, presets[name].action_dim) == sizes


def test_unknown_names_get_the_closest():
    with pytest.raises(ValueError, match=r"no preset 'cube-double'; the closest are .*ogbench/cube-double-play"):
        presets["cube-double"]
    with pytest.raises(KeyError):
        train_presets["cube-double"]
    assert "cube-double" not in presets
    assert presets.get("cube-double") is None


def test_they_are_a_mapping():
    assert len(presets) == len(NAMES) == len(set(NAMES)) == len(train_presets)
    assert "ogbench/scene-play" in presets
    assert dict(presets.items())["ogbench/scene-play"] == presets["ogbench/scene-play"]


def test_every_family_is_used_and_every_field_known():
    tables = json.loads(files("vgf_fast.experiments").joinpath("presets.json").read_text())
    blocks = {**tables["families"], **tables["presets"]}
    assert {block["inherits"] for block in blocks.values() if "inherits" in block} == set(tables["families"])
    known = {"inherits", "policy", "train", "run", "ours", "tasks", "paper"}
    assert all(set(block) <= known for block in blocks.values())


def test_merging_writes_neither():
    base, change = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "e": {"f": 5}}
    assert merged(base, change) == {"a": {"b": 4, "c": 2}, "d": 3, "e": {"f": 5}}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    assert list(dotted(merged(base, change))) == ["a.b", "a.c", "d", "e.f"]


def test_the_file_is_read_when_asked_for():
    spec = importlib.util.find_spec("vgf_fast.experiments.presets")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh._tables.cache_info().misses == 0
    assert fresh.presets["demo/reacher"] == presets["demo/reacher"]
    assert fresh._tables.cache_info().misses == 1


def test_every_task_of_an_environment_is_a_preset():
    for stem in ("puzzle-3x3-play", "antmaze-giant-navigate", "scene-play"):
        base = preset(f"ogbench/{stem}")
        for number in range(1, 6):
            one = preset(f"ogbench/{stem}/task{number}")
            assert one.run == {**base.run, "task": f"{stem}-singletask-task{number}-v0"}
            assert (one.policy, one.train, one.ours) == (base.policy, base.train, base.ours)
    assert "ogbench/puzzle-3x3-play/task6" not in presets


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ogbench/")])
def test_tasks_are_ogbenchs(name):
    pytest.importorskip("ogbench")
    from vgf_fast.data import ogbench

    ogbench._import_ogbench()
    assert ogbench._parse(preset(name).run["task"]).name == preset(name).run["task"]


# The tasks of the paper's tables, with its scores where there are any: VGF, FQL, IQL.
PAPER = {
    "d4rl/hopper-medium-v2": (97.9, 60.6, 66.3),
    "d4rl/walker2d-medium-replay-v2": (97.8, 38.8, 76.1),
    "d4rl/antmaze-umaze-diverse-v2": (94.3, 89, 66.7),
    "d4rl/antmaze-medium-play-v2": (89.4, 78, 72.2),
    "d4rl/antmaze-large-diverse-v2": (83.8, 83, 47.5),
    "ogbench/humanoidmaze-medium-navigate": (72, 58, 33),
    "ogbench/cube-double-play": (70, 29, 7),
    "ogbench/puzzle-3x3-play": (75, 30, 9),
    "ogbench/puzzle-4x4-play": (45, 17, 7),
    **dict.fromkeys(
        ("ogbench/antmaze-large-navigate", "ogbench/antmaze-giant-navigate", "ogbench/humanoidmaze-large-navigate",
         "ogbench/antsoccer-arena-navigate", "ogbench/cube-single-play", "ogbench/scene-play"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_every_task_of_the_paper_is_whole(name):
    tasks = [f"/task{number}" for number in range(1, 6)] if name.startswith("ogbench/") else []
    for one in ("", *tasks, "-avgf", *(f"-avgf{task}" for task in tasks)):
        found = preset(name + one)
        # Everything that the release's scripts say is written, and nothing is left to a default by oversight.
        assert set(VGFConfig.from_dict(found.policy).to_dict()) - set(found.policy) <= {
            "kernel", "repulsion", "bandwidth_gradient", "amortized", "gaussian_tanh", "selection_temperature",
            "action_low", "action_high",
        }  # fmt: skip
        assert set(TrainConfig.from_dict(found.train).to_dict()) - set(found.train) <= {
            "expectile", "normalize_score", "max_gradient_norm", "precision", "seed",
        }  # fmt: skip
        run = RunConfig.from_dict(found.run)
        assert (run.eval_episodes, run.eval_interval) == (50, 50_000 if name.startswith("d4rl/") else 100_000)
        assert run.steps == {"antmaze-large": 2 * 10**6, "antmaze-giant": 3 * 10**6}.get(
            "-".join(run.task.split("-")[:2]), 10**6
        )
        assert presets[name + one].amortized == ("-avgf" in one)
    scores = preset(name).paper
    assert (scores and (scores.vgf, scores.fql, scores.iql)) == PAPER[name]


def test_tasks_are_d4rls():
    from vgf_fast.data import d4rl

    names = [name for name in NAMES if name.startswith("d4rl/")]
    assert len(names) == 2 * 18
    for name in names:
        name = name.removesuffix("-avgf")
        assert preset(name).run["task"] == name
        assert d4rl.family(name.removeprefix("d4rl/")) in d4rl.REFERENCE_RETURNS


def test_the_command_lists_them(capsys):
    pytest.importorskip("tyro")
    from vgf_fast import cli

    assert cli.main(["presets"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES if "-avgf" not in name)
    assert "d4rl/hopper-medium-v2-avgf" in listed
    assert "97.9 (60.6 / 66.3)" in listed
    assert cli.main(["presets", "--name", "ogbench/cube-double-play/task3"]) == 0
    shown = json.loads(capsys.readouterr().out)["ogbench/cube-double-play/task3"]
    assert shown["run"]["task"] == "cube-double-play-singletask-task3-v0"
    assert "policy.train_budget.step_size" in shown["ours"]
    assert cli.main(["presets", "--name", "cube"]) == 1


def test_amortised_variants():
    plain, amortized = preset("ogbench/scene-play/task2"), preset("ogbench/scene-play-avgf/task2")
    assert amortized.policy == {**plain.policy, "amortized": True, "particles": 5}
    assert amortized.train == {**plain.train, "max_gradient_norm": 1.0}
    assert (amortized.run, amortized.ours, amortized.paper) == (plain.run, plain.ours, None)
    assert "demo/reacher-avgf" not in presets
