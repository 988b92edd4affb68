"""The demo: its controller against the simulator, its data, its files, and that what it shows is learnt."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch

from vgf_fast.cli import main
from vgf_fast.cli.console import name_of
from vgf_fast.envs.evaluation import EvaluationResult, evaluate
from vgf_fast.experiments import demo
from vgf_fast.policy import VGFPolicy

pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")
pytest.importorskip("matplotlib")

TINY = ["--episodes", "6", "--updates", "16", "--eval-episodes", "4", "--curve-episodes", "2", "--flow-steps", "0", "2"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The directory of a tiny demo."""
    out = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--out", str(out), "--seed", "3", *TINY]) == 0
    return out


def test_the_controller_is_the_simulators_jacobian_transposed():
    env = demo.make_env().unwrapped
    env.reset(seed=0)

    def fingertip(angles):
        env.set_state(np.concatenate([angles, target]), np.zeros(4))
        return env.get_body_com("fingertip")[:2].copy()

    rng = np.random.default_rng(0)
    for _ in range(5):
        angles, velocities = rng.uniform(-2.0, 2.0, size=2), rng.normal(size=2)
        target = np.zeros(2)
        # So near that nothing is clipped.
        target = fingertip(angles) + rng.normal(0.0, 0.01, size=2)
        jacobian = (
            np.stack([fingertip(angles + one) - fingertip(angles - one) for one in 1e-4 * np.eye(2)], axis=1) / 2e-4
        )
        expected = demo.GAIN * jacobian.T @ (target - fingertip(angles)) - demo.DAMPING * velocities
        env.set_state(np.concatenate([angles, target]), np.concatenate([velocities, np.zeros(2)]))
        torque = demo.controller(env._get_obs()[None])
        np.testing.assert_allclose(torque[0], expected, atol=1e-5)
        assert np.abs(torque).max() < 1.0
    env.close()


def test_the_controller_alone_reaches():
    env = demo.make_env()
    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        for _ in range(demo.STEPS):
            observation, _, _, truncated, _ = env.step(demo.controller(observation[None])[0])
        assert truncated
        assert np.linalg.norm(observation[8:10]) < 0.02
    env.close()


def test_data():
    dataset, returns = demo.collect(45, seed=0)
    statistics = dataset.statistics()
    assert (statistics.transitions, statistics.trajectories) == (45 * demo.STEPS, 45)
    assert statistics.return_mean == pytest.approx(returns.mean(), rel=1e-5)
    # Noise drowns the controller: about -54 an episode, five a step of torque alone.
    assert -57.0 < returns.mean() < -51.0
    assert torch.equal(dataset.masks, torch.ones(len(dataset)))
    inner = ~dataset.terminals[:-1]
    assert torch.equal(dataset.next_observations[:-1][inner], dataset.observations[1:][inner])
    # Episodes begin at different places, and end where the next does not begin.
    starts = dataset.observations[:: demo.STEPS]
    assert len(torch.unique(starts, dim=0)) == 45
    again, _ = demo.collect(45, seed=0)
    assert torch.equal(again.observations, dataset.observations)
    assert torch.equal(again.actions, dataset.actions)
    other, _ = demo.collect(3, seed=1)
    assert len(other) == 3 * demo.STEPS
    assert not torch.equal(other.observations[0], dataset.observations[0])


def test_what_is_written(shown):
    from matplotlib.image import imread

    for name in ("learning_curve.png", "particles.png"):
        pixels = imread(shown / name)[..., :3]
        assert min(pixels.shape[:2]) > 500
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    record = json.loads((shown / "results.json").read_text())
    assert [result["label"] for result in record["results"]] == ["bc", "L=0", "L=2"]
    assert all(len(result["returns"]) == 4 and result["length_mean"] == demo.STEPS for result in record["results"])
    assert [point["updates"] for point in record["curve"]][::3] == [0, 1, 2, 3, 4, 6, 8, 12, 16]
    assert [point["label"] for point in record["curve"]][:3] == ["bc", "L=0", "L=5"]
    assert record["compared"] == ["bc", "L=0", "L=2"]
    policy = VGFPolicy.from_pretrained(shown / "policy")
    assert json.loads(json.dumps(policy.config.to_dict())) == record["policy"]
    # The saved policy is the one in the table.
    results = evaluate(policy, demo.make_env, episodes=4, flow_steps=(2,), seed=4, num_envs=4)
    assert list(results[0].returns) == record["results"][2]["returns"]


def test_it_repeats_and_tells_what_it_does(shown, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--seed", "3", *TINY]) == 0
    assert (tmp_path / "results.json").read_bytes() == (shown / "results.json").read_bytes()
    printed = capsys.readouterr().out
    for text in ("collecting 6 episodes", "the data's own controller", "behaviour cloning", "L = 2", "95 % interval"):
        assert text in printed
    assert re.search("^L = 0, best of N .*behaviour cloning.*: the intervals ", printed, re.MULTILINE)
    assert re.search("^L = 2 .*L = 0, best of N.*: the intervals ", printed, re.MULTILINE)
    assert f"written to {tmp_path}: learning_curve.png, particles.png, results.json, policy/" in printed


def test_mistakes(tmp_path, capsys, monkeypatch):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--updates", "0"]) == 1
    assert capsys.readouterr().err == "error: updates is 0, expected an integer >= 1\n"
    monkeypatch.setitem(sys.modules, "mujoco", None)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 1
    assert "pip install 'vgf_fast[envs]'" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


def test_the_flow_beats_cloning_after_a_few_hundred_updates():
    """A fifth of the demo; the full one is bc -38, L = 0 -17, L = 5 -13."""
    config = demo.DemoConfig(updates=400)
    dataset, _ = demo.collect(120, seed=0)
    learner = demo.make_learner(config)
    learner.fit(dataset, config.updates, log_interval=1000, progress=False)
    cloned, best, moved = evaluate(
        learner.policy, demo.make_env, episodes=20, flow_steps=(0, 5), num_envs=20, behavior_cloning=True
    )
    assert cloned.return_high < best.return_low
    assert moved.return_mean > best.return_mean
    assert moved.return_low > -20.0


def test_the_picture():
    config = demo.DemoConfig()
    dataset, _ = demo.collect(20, seed=0)
    policy = demo.make_learner(config).policy
    picture = demo.picture(policy, dataset, seed=0)
    assert picture.trajectory.shape == (demo.PICTURE_FLOW_STEPS + 1, policy.config.particles, 2)
    assert np.abs(picture.trajectory).max() <= 1.0
    assert picture.q.shape == (demo.PICTURE_GRID, demo.PICTURE_GRID)

    def value(action):
        """Of the grid, at its nearest point: rows are the second torque."""
        column, row = (int(np.abs(picture.grid - one).argmin()) for one in action)
        return picture.q[row, column]

    # The chosen particle is the best, and they moved up, to the grid's own precision.
    ends = [value(action) for action in picture.trajectory[-1]]
    spread = picture.q.max() - picture.q.min()
    assert ends[picture.chosen] >= max(ends) - 0.05 * spread
    assert np.mean(ends) > np.mean([value(action) for action in picture.trajectory[0]])


def result(label, steps, low, high):
    values = dict.fromkeys([field.name for field in dataclasses.fields(EvaluationResult)])
    own = {"label": label, "flow_steps": steps, "episodes": 60, "return_low": low, "return_high": high}
    return EvaluationResult(**{**values, **own})


def test_whether_intervals_are_apart():
    worse, good, better = result("bc", 0, -40, -38), result("L=0", 0, -18, -16), result("L=5", 5, -13, -12)
    far = result("L=10", 10, -19, -11)
    assert demo._compare([worse, good, better, far]) == (("bc", "L=0", "L=5"), True)
    assert demo._compare([worse, good, result("L=5", 5, -17, -12)]) == (("bc", "L=0", "L=5"), False)
    # In another order they are no success.
    assert demo._compare([result("bc", 0, -5, -4), good, better]) == (("bc", "L=0", "L=5"), False)
    assert demo._compare([worse, good]) == (("bc", "L=0"), True)


def test_the_verdict_says_which_and_what_it_means():
    worse, good = result("bc", 0, -40, -38), result("L=0", 0, -18, -16)
    for better, sentence in (
        (result("L=5", 5, -13, -12), "L = 5 is better than L = 0, best of N: the intervals are apart"),
        (
            result("L=5", 5, -17, -12),
            "L = 5 and L = 0, best of N: the intervals overlap, so that 60 episodes do not tell which is better",
        ),
        (
            result("L=5", 5, -30, -20),
            "L = 5 is worse than L = 0, best of N, though it should be better: the intervals are apart",
        ),
    ):
        first = "L = 0, best of N is better than behaviour cloning: the intervals are apart"
        assert demo.verdict([better, worse, good], name_of) == [first, sentence]
