"""profiling/roofline.py: operations held against ceilings. Rates are measured to exist, not to be of a size."""

import dataclasses
import json

import pytest
import torch
from test_profiling import run_module, tiny_flags

from profiling import roofline
from profiling.ops.registry import OPS
from profiling.roofline import H200, Ceilings, Placed, Work
from profiling.worker import Sizes

CPU = torch.device("cpu")
MACHINE = Ceilings("a machine", memory=10.0, cache=5.0, launch=0.5, matrix={"float32": 100.0})


@pytest.mark.parametrize(
    ("work", "bound", "seconds"),
    [
        (Work("float32", flops=1000.0, bytes=20.0, weight_bytes=5.0, launches=2), "matrix", 10.0),
        (Work("float32", flops=100.0, bytes=20.0, weight_bytes=5.0, launches=2), "memory", 2.0),
        (Work("float32", flops=100.0, bytes=10.0, weight_bytes=15.0, launches=2), "cache", 3.0),
        (Work("float32", flops=100.0, bytes=10.0, weight_bytes=5.0, launches=8), "launches", 4.0),
    ],
)
def test_the_ceiling_that_asks_for_most_is_the_bound(work, bound, seconds):
    placed = Placed("an op", "paper", work, 2.0 * seconds, MACHINE.bounds(work))
    assert placed.bound == bound
    assert placed.bounds[bound] == pytest.approx(seconds)
    assert placed.fraction == pytest.approx(0.5)
    assert placed.to_dict()["bound"] == bound


def test_what_was_not_measured_has_no_fraction():
    work = Work("float32", 1.0, 1.0, 0.0, 1)
    assert Placed("an op", "paper", work, None, MACHINE.bounds(work)).fraction is None


def test_weights_are_read_once_for_every_block_of_rows():
    op, sizes = OPS["behavior_flow"], Sizes()
    few, many = (
        roofline.work(op, dataclasses.replace(sizes, batch=batch), torch.bfloat16, 1).weight_bytes
        for batch in (256, 512)
    )
    assert many == pytest.approx(2.0 * few)
    # Ten Euler steps of 40 blocks of 64 rows, all of the network's inner weights each.
    inner = 3 * 512 * 512 * 2
    assert few == pytest.approx(10 * 40 * inner, rel=0.05)
    assert roofline.work(OPS["select_particle"], sizes, torch.float32, 1).weight_bytes == 0.0


def test_the_floors_of_a_flow_are_those_of_its_products():
    placed = {one.op: one for one in roofline.floors(["critic_value_and_score", "select_particle"])}
    flow = placed["critic_value_and_score"]
    assert flow.bounds["matrix"] == pytest.approx(flow.work.flops / H200.matrix["bfloat16"])
    assert flow.seconds is None
    assert placed["select_particle"].work.flops < flow.work.flops


def test_ceilings_of_this_machine_are_rates():
    found = roofline.Ceilings(
        "here",
        roofline.copy_rate(CPU),
        roofline.cache_rate(CPU),
        roofline.launch_seconds(CPU),
        {"float32": roofline.matrix_rate(torch.float32, CPU)},
    )
    assert found.memory > 1e8
    assert found.cache > 1e8
    assert 1e-8 < found.launch < 1e-2
    assert found.matrix["float32"] > 1e8


def test_launches_do_not_depend_on_the_number_of_states():
    pytest.importorskip("triton")
    op = OPS["critic_value_and_score"]
    sizes = Sizes(5, 3, batch=4, particles=5, hidden=24, layers=2)
    found = [
        roofline.launches_of(op, dataclasses.replace(sizes, batch=batch), torch.float32, CPU, "triton")
        for batch in (3, 400)
    ]
    assert found[0] == found[1] > 0


def test_the_command_prints_records_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    names = ["critic_value_and_score", "td_target"]
    flags = ["--device", "cpu", "--threads", 1, "--seconds", 300, "--out", tmp_path, "--ops", *names, *tiny_flags()]
    done = run_module("profiling.roofline", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "roofline-cpu.json").read_text(encoding="utf-8"))
    assert found["sizes"]["hidden"] < 512
    assert {op["op"] for op in found["ops"]} == set(names)
    for op in found["ops"]:
        assert op["seconds"] > 0.0
        assert op["fraction"] == pytest.approx(op["bounds"][op["bound"]] / op["seconds"])
        assert op["launches"] > 0
    assert (tmp_path / "roofline-cpu.png").read_bytes().startswith(b"\x89PNG")
    # Without a GPU, what is known of one is named an estimate.
    assert "Not yet measured on a GPU. Estimates" in done.stdout
    assert "flow_step_kernel" in done.stdout


def test_the_streaming_kernel_reads_every_weight(monkeypatch):
    pytest.importorskip("triton")
    from profiling.stream_kernel import BLOCK, stream

    if torch.cuda.is_available():
        pytest.skip("the interpreter is not used where there is a GPU")
    weights = torch.zeros(3 * BLOCK)
    weights[::BLOCK] = torch.tensor([1.0, 2.0, 4.0])
    weights[-1] = 8.0
    assert stream(weights, 5).tolist() == [15.0] * 5
    with pytest.raises(ValueError, match="weights has shape"):
        stream(torch.zeros(BLOCK + 1), 1)
    with pytest.raises(ValueError, match="programs is 0"):
        stream(weights, 0)
