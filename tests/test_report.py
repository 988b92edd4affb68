"""profiling/report.py: what the records are made into. (That the committed pages are up to date: test_profiling.py.)"""

import json

import pytest
from test_profiling import load_profiling

load_profiling()
from profiling import report, tables  # noqa: E402
from profiling.tables import learned, speed  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A repository with no records yet."""
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    return tmp_path


def write(path, **methods):
    """A file of records of both benchmarks: method -> (ratio to the release's time, to eager PyTorch's)."""
    lines = []
    for benchmark in ("update", "act"):
        for method, (jax, eager) in methods.items():
            record = {
                "date": "2026-01-01", "benchmark": benchmark, "method": method.replace("_", "-"), "device": "a chip",
                "p50": 1.0, "ratio_to_jax": jax, "ratio_to_eager": eager, "peak_bytes": 2**20, "threads": 2,
            }  # fmt: skip
            lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def test_times_are_the_releases_where_it_was_there(results):
    write(results / "a.jsonl", ours_float32=(0.5, 0.25), eager_float32=(2.0, 1.0), jax_release=(1.0, 0.5))
    text = speed.times(results / "a.jsonl")
    assert "| vgf_fast, float32 | 0.50 | 0.50 | 1 |" in text
    assert "| public JAX release, jit, float32 | 1.00 | 1.00 | 1 |" in text
    assert "An update takes, of the release's time, 0.50 in float32. One action takes, " in text
    assert text.endswith("Threads: 2. Record: `a.jsonl` (2026-01-01, a chip).")


def test_times_are_eager_pytorchs_where_it_was_not(results):
    write(results / "a.jsonl", ours_float32=(None, 0.25), ours_bfloat16=(None, 0.125), eager_float32=(None, 1.0))
    text = speed.times(results / "a.jsonl")
    assert "| vgf_fast, float32 | 0.25 | 0.25 | 1 |" in text
    assert "| plain PyTorch with autograd, float32 | 1.00 | 1.00 | 1 |" in text
    assert "An update takes, of plain PyTorch's time, 0.25 in float32 and 0.12 in bfloat16. " in text


def test_a_run_cut_short_has_what_was_measured(results):
    write(results / "a.jsonl", ours_float32=(None, None))
    lines = (results / "a.jsonl").read_text().splitlines()
    (results / "a.jsonl").write_text(lines[1] + "\n")
    text = speed.times(results / "a.jsonl")
    assert "| vgf_fast, float32 |  |  | 1 |" in text
    assert "takes" not in text


def result(label, mean):
    return {"label": label, "return_mean": mean, "return_low": mean - 1, "return_high": mean + 1}


def test_the_demo_and_the_release_side_by_side(results):
    for seed in (0, 1):
        record = {
            "demo": {"seed": seed, "updates": 2000},
            "data": {"return_mean": -54.0, "return_low": -55.0, "return_high": -53.0},
            "results": [result("bc", -40.0 - seed), result("L=0", -17.0), result("L=10", -12.0)],
        }
        (results / f"reacher_seed{seed}.json").write_text(json.dumps(record))
    text = learned.demonstration(results)
    assert "| the data's own controller | -54.0 (-55.0 to -53.0) | -54.0 (-55.0 to -53.0) |" in text
    assert "| behaviour cloning | -40.0 (-41.0 to -39.0) | -41.0 (-42.0 to -40.0) |" in text
    assert "| L = 0, best of N | " in text
    assert "| L = 10 | " in text
    assert "`reacher_seed0.json`, `reacher_seed1.json`" in text
    assert learned.beside_the_release(results) == "Not yet measured."
    for seed in (0, 1):
        methods = {
            name: {
                "first_update_seconds": first,
                "other_updates_seconds": seconds + seed,
                "results": [result("bc", -40.0 - seed), result("L=10", mean - seed)],
            }
            for name, first, seconds, mean in (("ours", 0.3, 50.0, -12.0), ("release", 25.0, 60.0, -13.0))
        }
        record = {"demo": {"seed": seed, "updates": 2000}, "threads": 1, "ratio": 0.8 + seed / 10, "methods": methods}
        (results / f"release_seed{seed}.json").write_text(json.dumps(record))
    text = learned.beside_the_release(results)
    assert "| L = 10 | -12.0, -13.0 | -13.0, -14.0 |" in text
    assert "| seconds of the first update, which compiles | 0.3, 0.3 | 25.0, 25.0 |" in text
    assert "| seconds of all others | 50, 51 | 60, 61 |" in text
    assert "median over turns: 0.80, 0.90. Threads: 1." in text
    assert "2,000 updates each by turns" in text


def test_every_page_is_written_and_then_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPOSITORY", tmp_path)
    monkeypatch.setattr(report, "PAGES", {"a.md": {"one": lambda: "1"}, "docs/b.md": {"one": lambda: "2"}})
    monkeypatch.setattr(report, "draw", lambda check: True)
    (tmp_path / "docs").mkdir()
    pages = [tmp_path / name for name in report.PAGES]
    for path in pages:
        path.write_text("x <!-- one --><!-- /one --> y\n")
    assert report.main(["--check"]) == 1
    assert pages[0].read_text() == "x <!-- one --><!-- /one --> y\n"
    assert report.main([]) == 0
    assert pages[0].read_text() == "x <!-- one -->\n1\n<!-- /one --> y\n"
    assert pages[1].read_text() == "x <!-- one -->\n2\n<!-- /one --> y\n"
    before = {path: path.stat().st_mtime_ns for path in pages}
    assert report.main([]) == report.main(["--check"]) == 0
    assert {path: path.stat().st_mtime_ns for path in pages} == before
    monkeypatch.setattr(report, "draw", lambda check: False)
    assert report.main(["--check"]) == 1


@pytest.fixture
def prediction(results):
    """A prediction of two kernels, one of them in two variants."""
    row = {"launches": 3, "microseconds": 10.0, "registers": 64, "spilled_bytes": 0}
    kernels = [
        {"kernel": "product_kernel", **row},
        {"kernel": "rows_kernel", **row, "microseconds": 11.0, "spilled_bytes": 4},
        {"kernel": "product_kernel", **row, "launches": 1, "registers": 200},
    ]
    record = {
        "triton": "3.9.0",
        "target": "sm_90",
        "precision": "bfloat16",
        "update": {"launches": 7, "one chain": 90.4, "two branches": 60.0, "kernels": kernels},
        "act": {"launches": 3, "one chain": 30.0, "kernels": kernels[1:2]},
    }
    (results / "predicted.json").write_text(json.dumps(record))
    return results / "predicted.json"


def test_a_prediction_is_called_one(prediction, results):
    text = speed.predicted(prediction, results / "gpu.jsonl")
    assert text.startswith("| predicted, not measured | launches | us in one chain | us on two branches |\n")
    assert "| one update | 7 | 90 | 60 |" in text
    assert "| one action | 3 | 30 |  |" in text
    assert (
        "| `product_kernel` | one update | 4 | 40 | 200 | 0 |\n| `rows_kernel` | one update | 3 | 33 | 64 | 4 |" in text
    )
    assert "\n\nPredicted, not measured: an H200, by a model of the machine code for sm_90 of Triton 3.9.0" in text
    assert text.endswith("Record: `predicted.json`, from `python -m profiling.predict --write`.")


def test_a_prediction_stands_beside_what_a_gpu_took(prediction, results):
    write(results / "gpu.jsonl", ours_bfloat16=(0.5, 0.5), ours_float32=(0.5, 0.5))
    path = results / "gpu.jsonl"
    path.write_text(path.read_text().replace('"p50": 1.0', '"p50": 8e-05'))
    text = speed.predicted(prediction, path)
    assert "| us on two branches | us measured | error of the model, % |" in text
    assert "| one update | 7 | 90 | 60 | 80 | -25 |" in text
    assert "| one action | 3 | 30 |  | 80 | -62 |" in text
    assert text.endswith("from `python -m profiling.predict --write`. Record: `gpu.jsonl` (2026-01-01, a chip).")
    (update, *_) = path.read_text().splitlines()
    path.write_text(update + "\n")
    assert "| one action | 3 | 30 |  |  |  |" in speed.predicted(prediction, path)


def test_without_a_prediction_it_says_so(results):
    assert speed.predicted(results / "predicted.json", results / "gpu.jsonl") == "Not yet predicted."


def test_every_section_names_records_that_are_there_or_of_a_gpu():
    for sections in report.PAGES.values():
        for section in sections.values():
            for file in section.files:
                assert (report.RESULTS / file).exists() or file in ("gpu.jsonl", "roofline-cuda.json"), file
