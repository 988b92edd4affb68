"""The learning experiments: the data set of the random search, the records, and the README's tables of them."""

import dataclasses
import json

import numpy as np
import pytest

h5py = pytest.importorskip("h5py")
gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("ogbench")

from profiling import learning, locomotion, tables  # noqa: E402
from profiling.tables import learned  # noqa: E402
from vgf_fast.data import d4rl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
TASK = "d4rl/halfcheetah-medium-replay-v2"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A search of three iterations, and three episodes of 12 steps."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        sizes = {"ITERATIONS": 3, "FIRST": 0, "DIRECTIONS": 2, "BEST": 1, "SEARCH_STEPS": 6, "EPISODE_STEPS": 12}
        for name, size in sizes.items():
            patch.setattr(locomotion, name, size)
        first = locomotion.make(folder / "first", 3, 0)
        again = locomotion.make(folder / "again", 3, 0)
        assert first.read_bytes() == again.read_bytes() != locomotion.make(folder / "other", 3, 1).read_bytes()
    return first


def test_the_file_is_of_the_simulator(data):
    with h5py.File(data) as file:
        arrays = {name: file[name][()] for name in file}
    assert np.flatnonzero(arrays["timeouts"]).tolist() == [11, 23, 35]
    assert not arrays["terminals"].any()
    assert np.abs(arrays["actions"]).max() <= 1.0
    environment = locomotion.make_env()
    observation, _ = environment.reset(seed=1)
    for row in range(12, 24):
        np.testing.assert_allclose(arrays["observations"][row], observation, rtol=1e-6, atol=1e-6)
        observation, reward, *_ = environment.step(arrays["actions"][row])
        assert arrays["rewards"][row] == pytest.approx(reward, rel=1e-6)
    environment.close()


def test_the_search_gets_better(monkeypatch):
    for name, size in {"ITERATIONS": 12, "SEARCH_STEPS": 60}.items():
        monkeypatch.setattr(locomotion, name, size)
    environment = locomotion.make_env()
    found = locomotion.search(environment, 0)
    first, last = (
        np.mean([locomotion.rollout(environment, one, 60, seed)[0] for seed in range(3)])
        for one in found[:: len(found) - 1]
    )
    environment.close()
    assert last > first + 5.0


@pytest.fixture
def small(monkeypatch):
    """Networks, runs and episodes of next to nothing."""
    tiny = {"hidden_dims": [8], "behavior_hidden_dims": [8], "particles": 2, "behavior_steps": 1}
    task = {
        "policy": {**tiny, **learning._budgets(1, 0.1, 0.1)},
        "train": {"batch_size": 4},
        "run": {"task": TASK, "steps": 4, "eval_episodes": 2},
        "data": "make it",
        "tuning": "nothing was tried",
        "online": learning.TASKS["halfcheetah"]["online"],
    }
    online = {**learning.ONLINE, "steps": 8, "warm_up": 2, "buffer_size": 50, "eval_interval": 4, "eval_episodes": 2}
    monkeypatch.setitem(learning.TASKS, "halfcheetah", task)
    monkeypatch.setattr(learning, "ONLINE", {**online, "eval_flow_steps": [0, 1]})
    monkeypatch.setattr(learning, "FLOW_STEPS", [0, 1])
    real = d4rl.make_env
    monkeypatch.setattr(d4rl, "make_env", lambda task: gymnasium.wrappers.TimeLimit(real(task), 5))


def test_records_are_what_the_runs_gave(data, small, tmp_path, capsys):
    arguments = ["halfcheetah", "--data", str(data), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert learning.main([*arguments, "--seeds", "0..1"]) == 0
    record = json.loads((tmp_path / "out" / "halfcheetah.json").read_text())
    assert (record["metric"], record["seeds"], record["trajectories"]) == ("normalised score", [0, 1], 3)
    assert list(record["methods"]) == ["bc", "L=0", "L=1"]
    for label, found in record["methods"].items():
        rows = [
            line.split(",")
            for seed in (0, 1)
            for line in (tmp_path / "work" / "halfcheetah" / f"seed_{seed}" / "eval.csv").read_text().splitlines()
        ]
        column = rows[0].index("normalized_mean")
        assert found["scores"] == [float(row[column]) for row in rows if row[1] == label]
        assert found["mean"] == pytest.approx(np.mean(found["scores"]))
        assert found["low"] <= found["mean"] <= found["high"]
    gains = np.subtract(record["methods"]["L=1"]["scores"], record["methods"]["L=0"]["scores"])
    assert record["gain"]["scores"] == gains.tolist()
    # The data's own returns, in the simulator's rewards.
    with h5py.File(data) as file:
        rewards = file["rewards"][()].reshape(3, 12)[:, :11].sum(axis=1)
    low, high = d4rl.REFERENCE_RETURNS["halfcheetah"]
    assert record["data"]["mean"] == pytest.approx(np.mean(100.0 * (rewards - low) / (high - low)), rel=1e-5)
    assert str(tmp_path) not in json.dumps(record)

    assert learning.main([*arguments, "--seeds", "0..1"]) == 0
    assert capsys.readouterr().out.count("done already") == 2

    assert learning.main([*arguments, "--seeds", "0..1", "--online"]) == 0
    online = json.loads((tmp_path / "out" / "halfcheetah-online.json").read_text())
    assert list(online["scores"]) == ["0", "4", "8"]
    assert all(list(by_label) == ["L=0", "L=1"] for by_label in online["scores"].values())
    # Before the first step it is the offline policy that is evaluated.
    assert len(online["scores"]["0"]["L=1"]["scores"]) == 2


def test_success_of_the_data(tmp_path, monkeypatch):
    from vgf_fast.envs.generate import generate

    generate("pointmaze-medium-navigate", tmp_path, episodes=4, steps_per_episode=300, processes=1, progress=False)
    task = learning.tasks.load(learning.TASKS["pointmaze"]["run"]["task"], tmp_path)
    masks = task.train.masks.clone()
    masks[:] = 1.0
    masks[[5, 299, 700]] = 0.0
    task.train.masks.copy_(masks)
    monkeypatch.setattr(learning.tasks, "load", lambda *given: task)
    # The last of an episode's 299 transitions ends it.
    assert learning.data_scores("pointmaze", tmp_path, "success, %") == [100.0, 100.0, 100.0, 0.0]


@dataclasses.dataclass
class Found:
    """A record made up for the tables."""

    task: str
    gain: float

    def write(self, folder):
        def score(mean):
            return {"mean": mean, "low": mean - 1.0, "high": mean + 1.0, "scores": [mean]}

        record = {
            "task": self.task, "metric": "success, %", "seeds": [0, 1, 2], "fixed": 3, "best": 5,
            "data_command": "make it", "tuning": "nothing was tried",
            "settings": {"run": {"eval_episodes": 25}}, "data": score(1.0), "gain": score(self.gain),
            "methods": {"bc": score(2.0), "L=0": score(3.0), "L=3": score(4.0), "L=5": score(6.0)},
        }  # fmt: skip
        (folder / f"{self.task}.json").write_text(json.dumps(record))


def test_the_table_says_where_the_flow_does_not_win(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    assert learned.learned(tmp_path) == learned.online(tmp_path) == "Not yet measured."
    for task, gain in (("one", 2.0), ("two", 0.5), ("three", -3.0)):
        Found(task, gain).write(tmp_path)
    text = learned.learned(tmp_path)
    assert "|  | one, success, % | three, success, % | two, success, % |" in text
    assert "| VGF, best L by these numbers | L = 5: 6.0 (5.0 to 7.0) |" in text
    assert "| +2.0 (1.0 to 3.0) | -3.0 (-4.0 to -2.0) | +0.5 (-0.5 to 1.5) |" in text
    assert "The L of the training beats best of N in one. " in text
    assert "The L of the training loses to best of N in three. The interval of its gain includes 0 in two." in text
    assert "(one: nothing was tried; three: nothing was tried; two: nothing was tried)" in text
    assert "| seeds, episodes each | 3, 25 | 3, 25 | 3, 25 |" in text
    scores = {str(step): {"L=3": {"mean": step, "low": 0.0, "high": 9.0, "scores": [step]}} for step in (0, 5000)}
    online = {"task": "one", "metric": "success, %", "seeds": [0], "command": "python -m it", "scores": scores}
    (tmp_path / "one-online.json").write_text(json.dumps(online))
    assert learned.learned(tmp_path) == text
    assert "| 5,000 | 5000.0 (0.0 to 9.0) |" in learned.online(tmp_path)
