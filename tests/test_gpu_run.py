"""profiling/gpu.py: the run on a GPU, tried without one; what a part said is kept whatever becomes of it."""

import json
import sys

import pytest
import torch
from test_profiling import load_profiling

load_profiling()
from profiling import first_minutes, gpu  # noqa: E402

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose run takes minutes")


def lines(path):
    """The JSON lines of a part's log; what a library writes beside them is not one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """Logs of a dry run, part by part."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("dry")
    assert gpu.main(["--dry-run", "--out", str(folder)]) == 0
    return {name: lines(folder / f"gpu-{name}.txt") for name in first_minutes.PARTS}


@without_a_gpu
class TestDryRun:
    def test_every_part_is_done_and_says_something(self, dry_run, tmp_path):
        assert [part.name for part in gpu.parts(tmp_path, dry=True)] == list(first_minutes.PARTS)
        assert all(dry_run.values())
        assert not [row for rows in dry_run.values() for row in rows if "error" in row and "what" not in row]

    def test_kernels_are_compiled_without_a_gpu(self, dry_run):
        facts, compiled = dry_run["compile"]
        assert (facts["torch"], facts["gpu"]) == (torch.__version__, None)
        assert compiled["kernels"] > 0
        assert compiled["failed"] == 0

    def test_errors_are_against_float64_and_bits_repeat(self, dry_run):
        behavior, flow, steps = dry_run["accuracy"]
        for row in (behavior, flow):
            assert row["bit_equal"]
            # In float32, which is what is computed without a GPU.
            assert row["error"] <= max(2.0 * row["pytorch"], 1e-6)
        assert steps["critic_loss"]["triton"] == pytest.approx(steps["critic_loss"]["torch"], rel=1e-5)

    def test_actions_updates_and_fit_are_timed(self, dry_run):
        timed = [row for row in dry_run["running"] if "what" in row]
        assert [row["what"] for row in timed] == ["act", "update", "fit"]
        assert not any(row["cuda_graph"] for row in timed)

    def test_time_by_kernel_is_there_for_both_works(self, dry_run):
        rows = dry_run["kernels"]
        assert {row["work"] for row in rows if "kernel" in row} == {"update", "act"}
        assert [row["work"] for row in rows if row.get("what") == "replay"] == ["update", "act"]

    def test_every_question_is_asked(self, dry_run):
        assert {row["question"] for row in dry_run["questions"]} == {"product", "gap", "branches", "alone", "small"}
        # Nothing is timed without a GPU.
        assert {row["microseconds"] for row in dry_run["questions"]} == {None}


def test_a_question_that_fails_leaves_the_others(monkeypatch):
    pytest.importorskip("triton")
    from profiling import questions

    def broken(timer, dtype, emit):
        raise RuntimeError("no such launch\nof many lines")

    for name in ("gaps", "branches", "alone", "few_rows"):
        monkeypatch.setattr(questions, name, broken)
    monkeypatch.setattr(questions, "products", lambda timer, dtype, emit: emit(question="product", microseconds=1.0))
    rows = []
    questions.ask(torch.device("cpu"), torch.float32, True, lambda **row: rows.append(row))
    assert rows[0] == {"question": "product", "microseconds": 1.0}
    assert rows[1:] == [{"question": "broken", "error": "RuntimeError('no such launch\\nof many lines')"}] * 4


def test_without_a_gpu_only_tiny_sizes_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny runs without"):
        first_minutes.Bench(tiny=False)
    bench = first_minutes.Bench(tiny=True)
    assert (bench.sizes, bench.dtype, bench.calls(20), bench.graphs) == (first_minutes.TINY, torch.float32, 1, (False,))


def with_parts(monkeypatch, tmp_path, *parts):
    """Exit status of a run of parts: (name, Python code, seconds)."""
    chosen = [gpu.Part(name, ["-c", code], seconds) for name, code, seconds in parts]
    monkeypatch.setattr(gpu, "parts", lambda out, jax_release, dry: chosen)
    return gpu.main(["--dry-run", "--out", str(tmp_path)])


def test_a_part_that_runs_out_of_time_keeps_its_lines_and_the_next_one_runs(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 1.0)
    slow = "import time; print('first'); print('second'); time.sleep(600)"
    status = with_parts(monkeypatch, tmp_path, ("a slow, one", slow, 5.0), ("next", "print('third')", 600.0))
    assert status == 1
    assert (tmp_path / "gpu-a-slow-one.txt").read_text().startswith("first\nsecond\n")
    assert (tmp_path / "gpu-next.txt").read_text() == "third\n"
    printed = capfd.readouterr().out
    assert "a slow, one: out of time" in printed
    assert "next: done" in printed
    assert "not well: a slow, one" in printed


def test_a_part_that_fails_is_named(monkeypatch, tmp_path, capfd):
    assert with_parts(monkeypatch, tmp_path, ("broken", "print('begun'); raise SystemExit(3)", 600.0)) == 1
    assert (tmp_path / "gpu-broken.txt").read_text() == "begun\n"
    assert "broken: exit status 3" in capfd.readouterr().out


def test_without_time_left_no_part_begins(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0.5)
    assert with_parts(monkeypatch, tmp_path, ("late", "print('begun')", 600.0)) == 1
    assert list(tmp_path.iterdir()) == []
    assert "late: no time left" in capfd.readouterr().out


def test_a_line_is_on_disk_while_the_part_goes_on(tmp_path):
    log, seen = tmp_path / "log.txt", tmp_path / "seen.txt"
    # The part itself waits until its first line is in the log: were lines kept back, it would run out of time.
    program = (
        "import pathlib, time\nprint('first', flush=True)\n"
        f"while 'first' not in pathlib.Path({str(log)!r}).read_text(): time.sleep(0.01)\n"
        f"pathlib.Path({str(seen)!r}).write_text('yes')"
    )
    assert gpu.run([sys.executable, "-c", program], 60.0, log) == 0
    assert seen.read_text() == "yes"


def test_a_gpu_has_its_peers_its_tests_and_the_sanitizer(tmp_path):
    names = [part.name for part in gpu.parts(tmp_path)]
    assert names[: len(first_minutes.PARTS)] == list(first_minutes.PARTS)
    assert names[len(first_minutes.PARTS) :] == [
        "update beside its peers",
        "act beside its peers",
        "tests, marked",
        "tests, kernels",
        "sanitizer",
    ]
    assert all("--jax-release" in part.command for part in gpu.parts(tmp_path, "release") if "peers" in part.name)
