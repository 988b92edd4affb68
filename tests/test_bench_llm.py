"""The benchmark of the nearest-token search: its methods find the same tokens, and its records become a table."""

import dataclasses

import pytest
import torch

from profiling import llm, records, tables
from profiling.bench import main
from profiling.tables import speed


@pytest.mark.parametrize("k", [1, 5])
def test_methods_find_the_same_tokens(k):
    search = llm.Search(20, 300, 12, k)
    found = [llm.prepare(method, search, "cpu", 3)().reshape(20, k) for method in llm.METHODS]
    for tokens in found[1:]:
        assert torch.equal(tokens, found[0])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Records of a smoke test, each method in its process."""
    path = tmp_path_factory.mktemp("llm") / "llm.jsonl"
    assert main(["llm", "--quick", "--threads", "1", "--device", "cpu", "--out", str(path)]) == 0
    return path


def test_every_method_is_recorded(written):
    found = {record.method: record for record in records.read(written)}
    assert tuple(found) == llm.METHODS
    assert found["cdist"].ratio_to_eager == 1.0
    for record in found.values():
        assert record.sizes == llm.QUICK._asdict()
        assert record.rounds == 2
        assert record.p50 > 0.0
        assert record.peak_bytes >= record.built_bytes > 0
        assert record.dtype == "float32"


def test_the_table(written, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "REPOSITORY", tmp_path)
    path = tmp_path / "llm-cpu.jsonl"
    assert speed.nearest(path) == "Not yet measured."
    found = {"ours": (0.5, 3), "cdist": (1.0, 100), "matmul": (0.9, 60)}
    changed = [
        dataclasses.replace(record, ratio_to_eager=ratio, built_bytes=0, peak_bytes=mib * 2**20)
        for record in records.read(written)
        for ratio, mib in [found[record.method]]
    ]
    records.append(path, changed)
    table = speed.nearest(path)
    assert "| 16 x 500 x 8, k = 1 | 0.50 / 3 | 1.00 / 100 | 0.90 / 60 |" in table
    assert "Record: `llm-cpu.jsonl`" in table


def test_a_process_that_died_is_an_error(monkeypatch):
    monkeypatch.setattr(llm.sys, "executable", "false")
    plan = type("Plan", (), {"device": "cpu", "threads": 1, "seed": 0})
    with llm.serving("ours", llm.QUICK, plan) as server, pytest.raises(RuntimeError, match="ended with status 1"):
        server.ask("call")
