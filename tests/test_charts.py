"""The report's charts: a picture knows the numbers it shows, and is drawn anew only for others."""

import pytest
from test_profiling import load_profiling

load_profiling()
from profiling import charts, report  # noqa: E402
from profiling.charts import Bars, Curve  # noqa: E402

PANELS = [Bars("One update", "multiples", {"vgf_fast": 0.5, "a peer": 1.0})]
CURVES = [Curve("flow", [10, 100, 1000], [1.0, 3.0, 20.0]), Curve("update", [10, 100], [1.0, 5.0])]


@pytest.fixture(autouse=True)
def _needs_matplotlib():
    pytest.importorskip("matplotlib")


def test_a_chart_is_drawn_anew_for_other_numbers_alone(tmp_path):
    path = tmp_path / "docs" / "bars.png"
    charts.time_by_method(path, PANELS)
    assert charts.stored_digest(path) == charts.digest(PANELS)
    first = path.stat().st_mtime_ns
    charts.time_by_method(path, PANELS)
    assert path.stat().st_mtime_ns == first
    other = [PANELS[0]._replace(values={"vgf_fast": 0.4, "a peer": 1.0})]
    charts.time_by_method(path, other)
    assert charts.stored_digest(path) == charts.digest(other) != charts.digest(PANELS)
    assert [file.name for file in path.parent.iterdir()] == ["bars.png"]


def test_cost_against_rows_carries_its_numbers(tmp_path):
    path = tmp_path / "cost.png"
    charts.cost_against_rows(path, CURVES, "Cost", "time")
    assert charts.stored_digest(path) == charts.digest([CURVES, "Cost", "time"])
    assert charts.stored_digest(path) != charts.digest([CURVES, "Cost", "energy"])


@pytest.mark.parametrize("content", [None, b"", b"no picture", charts.SIGNATURE, charts.SIGNATURE + b"\0\0\0\5tEXt"])
def test_what_is_no_picture_of_ours_has_no_digest(tmp_path, content):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    assert charts.stored_digest(path) is None


def test_the_report_redraws_what_is_stale(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path)
    assert not report.draw(check=True)
    assert list(tmp_path.iterdir()) == []
    assert not report.draw(check=False)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert tmp_path / "update_time.png" in before
    assert report.draw(check=False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(report, "update_bars", lambda: PANELS)
    assert not report.draw(check=True)
    assert not report.draw(check=False)
    assert charts.stored_digest(tmp_path / "update_time.png") == charts.digest(PANELS)
