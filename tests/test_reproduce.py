"""reproduce: several seeds of a preset to one table; killed anywhere, the same call ends with the same files."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("ogbench")
pytest.importorskip("tyro")
from vgf_fast.common import interrupts
from vgf_fast.envs.generate import generate
from vgf_fast.experiments import reproduce
from vgf_fast.experiments.presets import PaperScore, preset
from vgf_fast.experiments.settings import layered

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
PRESET = "ogbench/pointmaze-medium-navigate"
SETTINGS = (
    "policy.hidden_dims=[16, 16]", "policy.behavior_hidden_dims=[16, 16]", "policy.particles=3",
    "policy.behavior_steps=2", "train.batch_size=16", "run.steps=60", "run.eval_interval=20", "run.log_interval=20",
    "run.checkpoint_interval=20", "run.eval_episodes=2", "run.eval_flow_steps=[0, 3]", "run.eval_num_envs=2",
    "run.tensorboard=false",
)  # fmt: skip
FILES = (reproduce.EVALUATIONS, reproduce.SUMMARY, reproduce.CURVE)


class Silent:
    def __init__(self):
        self.lines = []

    def line(self, text):
        self.lines.append(text)

    def results(self, title, results):
        self.lines.append(title)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generate("pointmaze-medium-navigate", folder, episodes=2, validation_episodes=1, seed=0, processes=1)
    return folder


def sections(data, *more):
    found = layered(PRESET, None, (*SETTINGS, *more), {})
    found["run"]["dataset_dir"] = str(data)
    return found


def content(out):
    return {name: (out / name).read_bytes() for name in FILES if name != reproduce.CURVE}


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    paper = PaperScore(90.0, 80.0, 70.0)
    return out, reproduce.reproduce(out, sections(data), (0, 3), paper, Silent(), progress=False)


def test_the_table(whole):
    out, found = whole
    assert (found.metric, found.seeds, found.steps) == ("success, %", (0, 3), 60)
    assert [cell.flow_steps for cell in found.cells] == [0, 3]
    for cell in found.cells:
        assert len(cell.scores) == 2
        assert cell.low <= cell.mean <= cell.high
        assert cell.mean == pytest.approx(sum(cell.scores) / 2)
    assert found.fixed == found.cells[1]
    assert found.best.mean == max(cell.mean for cell in found.cells)
    rows = reproduce.read_evaluations(out, (0, 3))
    assert {(row["seed"], row["step"], row["label"]) for row in rows} == {
        (seed, step, label) for seed in (0, 3) for step in (20, 40, 60) for label in ("L=0", "L=3")
    }
    header, lines = reproduce.table(found)
    assert header[1] == "success, %"
    assert [line[0] for line in lines] == [
        "L = 0", "L = 3", "fixed L = 3, the preset's", f"best L = {found.best.flow_steps}, chosen by these numbers",
        "paper, VGF", "paper, FQL", "paper, IQL",
    ]  # fmt: skip
    assert json.loads((out / reproduce.SUMMARY).read_text())["paper"]["vgf"] == 90.0
    assert (out / reproduce.CURVE).read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again(whole, data):
    out, found = whole
    before = content(out)
    policies = [path.stat().st_mtime_ns for path in sorted(out.glob("seed_*/policy/model.safetensors"))]
    reporter = Silent()
    again = reproduce.reproduce(out, sections(data), (0, 3), found.paper, reporter, progress=False)
    assert again == found
    assert content(out) == before
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("seed_*/policy/model.safetensors"))] == policies
    assert reporter.lines[-2:] == ["seed 0: done already", "seed 3: done already"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT], ids=["kill", "interrupt"])
def test_killed_and_called_again_it_is_the_same_table(whole, data, tmp_path, sent):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "vgf_fast.cli", "reproduce", "--preset", PRESET, "--seeds", "0,3", "--out", str(out)),
        *("--dataset-dir", str(data), "--set", *SETTINGS),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    # Somewhere in the first seed, after its first checkpoint.
    begun = out / "seed_0" / "checkpoint" / "learner.safetensors"
    deadline = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=120)
    assert begun.exists(), errors
    assert not (out / reproduce.SUMMARY).exists()
    if sent == signal.SIGINT:
        assert process.returncode == interrupts.INTERRUPTED
        assert f"go on with: the same vgf-fast reproduce --out {out}" in errors
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "seed 0: going on after update" in done.stdout
    evaluations = (out / reproduce.EVALUATIONS).read_bytes()
    assert evaluations == content(whole[0])[reproduce.EVALUATIONS]
    mine, theirs = (json.loads((folder / reproduce.SUMMARY).read_text()) for folder in (out, whole[0]))
    assert {**mine, "paper": None} == {**theirs, "paper": None}


def test_other_settings_are_refused(whole, data):
    with pytest.raises(ValueError, match=r"policy.particles is 4, but .* was begun with 3: leave it"):
        reproduce.reproduce(whole[0], sections(data, "policy.particles=4"), (0,), None, Silent(), progress=False)
    with pytest.raises(ValueError, match="expected evaluations: a reproduction is a table of them"):
        reproduce.reproduce(whole[0], sections(data, "run.eval_interval=0"), (0,), None, Silent(), progress=False)


@pytest.mark.parametrize(("text", "seeds"), [("0..3", (0, 1, 2, 3)), ("5", (5,)), ("0, 3,2..4", (0, 3, 2, 4))])
def test_seeds(text, seeds):
    assert reproduce.parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "3..1", "a", "1...2", "-1"])
def test_bad_seeds(text):
    with pytest.raises(ValueError, match=r"--seeds is .*, expected such as 0..7 or 0,3,5"):
        reproduce.parse_seeds(text)


def test_the_paper_is_in_the_presets():
    assert preset("ogbench/puzzle-4x4-play/task2").paper == PaperScore(45, 17, 7, "mean of the five tasks")
    assert preset("d4rl/hopper-medium-v2").paper == PaperScore(97.9, 60.6, 66.3)
    assert preset("d4rl/hopper-medium-expert-v2").paper is None


@pytest.mark.parametrize("level", [0.0, 40.0, 100.0])
def test_the_curve_shows_every_line_and_no_success_that_cannot_be(level):
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb

    flow_steps = (0, 1, 2, 3)
    cells = tuple(reproduce.Cell(one, level, level, level, (level, level)) for one in flow_steps)
    summary = reproduce.Summary("success, %", (0, 1), 60, cells, None, cells[0], (level,) * 4, None)
    figure = reproduce.curve(summary, (20, 40, 60), flow_steps, lambda one, step: [level, level])
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0.0 <= low < high <= 100.0
    axes.get_legend().remove()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    for line in axes.get_lines():
        near = np.abs(pixels - 255.0 * np.array(to_rgb(line.get_color()))).max(axis=2) < 12.0
        assert near.sum() > 200, line.get_label()
