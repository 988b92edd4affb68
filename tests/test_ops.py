"""profiling/ops: every implementation of every operation computes the reference; work is what is counted.

Also the two benchmarks that use it, on a tiny shape. Nothing is timed for its own sake.
"""

import dataclasses
import math

import pytest
import torch
from test_profiling import REPOSITORY, run_module, tiny_flags
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from profiling import compare, records, scaling
from profiling.ops import check, timing
from profiling.ops.op import GRIDS, Prepared, obstacle
from profiling.ops.registry import OPS
from profiling.worker import Sizes
from vgf_fast.backends import native

# Unused columns of a tile hold whatever was in memory, and the interpreter warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

CPU = torch.device("cpu")
TINY = Sizes(5, 3, batch=4, particles=5, behavior_steps=2, flow_steps=2, hidden=24, layers=2, members=2)
SHAPES = {
    "tiny": TINY,
    "one state": dataclasses.replace(TINY, batch=1),
    "one particle": dataclasses.replace(TINY, particles=1),
    "three members": dataclasses.replace(TINY, hidden=17, members=3, layers=3, behavior_steps=3, flow_steps=1),
}
EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


def build(op, sizes=TINY, dtype=torch.float32, seed=0):
    return op.build(sizes, dtype, CPU, torch.Generator().manual_seed(seed))


class Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products as PyTorch does; its own counter dislikes some graphs."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


# --- correctness -----------------------------------------------------------------------------------------------------


@EVERY_OP
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("implementation", ["torch", "eager"])
def test_every_implementation_computes_the_reference(op, shape, implementation):
    assert check.check(op, [implementation], SHAPES[shape], torch.float32, CPU, 0) == {implementation: None}


@EVERY_OP
def test_the_kernels_compute_the_reference(op):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are not interpreted here: bench ops checks them on the GPU")
    shape = dataclasses.replace(TINY, batch=3, behavior_steps=1, flow_steps=1)
    assert check.check(op, ["triton"], shape, torch.float32, CPU, 0) == {"triton": None}


@EVERY_OP
def test_what_the_compiler_is_given_is_one_graph_and_computes_the_reference(op):
    found = check.check(op, ["compile"], TINY, torch.float32, CPU, 0, compiler="eager")
    assert found == {"compile": None}


@EVERY_OP
@pytest.mark.parametrize("implementation", ["torch", "eager"])
def test_bfloat16_errs_no_more_than_pytorch(op, implementation):
    if torch.bfloat16 not in op.dtypes:
        pytest.skip("it has no matrix products of weights")
    shape = dataclasses.replace(TINY, batch=16, hidden=64)
    assert check.check(op, [implementation], shape, torch.bfloat16, CPU, 0) == {implementation: None}


def broken(op, by=1e-3):
    """The operation, its torch backend wrong by a relative error."""

    def library(inputs, backend):
        prepared = op.library(inputs, backend)

        def run():
            return {name: t * (1.0 + by) if t.is_floating_point() else t + 1 for name, t in prepared.run().items()}

        def state():
            return {name: t * (1.0 + by) for name, t in prepared.state().items()}

        return Prepared(run, state)

    return dataclasses.replace(op, library=library)


@EVERY_OP
def test_what_is_wrong_is_refused(op):
    found = check.check(broken(op), ["torch", "eager"], TINY, torch.float32, CPU, 0)
    assert " errs by " in found["torch"]
    assert found["eager"] is None


def test_what_is_wrong_is_not_timed(capsys):
    op = broken(OPS["behavior_flow"])
    found = timing.measure(op, "tiny", TINY, torch.float32, CPU, ["torch", "eager"], rounds=2, seconds=1.0, seed=0)
    wrong, right = found
    assert (wrong.method, wrong.p50, wrong.rounds, wrong.timer) == ("torch-float32", None, 0, None)
    assert "particles errs by 1.0e-03" in wrong.fault
    assert right.p50 > 0.0
    timing.show(found)
    assert "torch-float32 is not timed, particles errs by" in capsys.readouterr().out


def test_what_raises_is_refused():
    op = dataclasses.replace(OPS["td_target"], library=lambda inputs, backend: 1 // 0)
    found = check.check(op, ["torch"], TINY, torch.float32, CPU, 0)
    assert found == {"torch": "ZeroDivisionError: integer division or modulo by zero"}


def test_outputs_of_another_name_shape_or_value_are_refused():
    op = OPS["select_particle"]
    inputs = build(op)
    truth = check.truth(op, inputs)
    right = op.reference(inputs)

    def fault(**outputs):
        return check.fault(op, Prepared(lambda: outputs), truth)

    assert fault(**right) is None
    assert fault(action=right["action"]) == "outputs are ['action'], expected ['action', 'index']"
    assert fault(action=right["action"][:, :1], index=right["index"]).startswith("action has shape (4, 1)")
    assert fault(action=right["action"] * math.nan, index=right["index"]) == "action has values that are not finite"
    assert fault(action=right["action"], index=right["index"] + 1) == "index differs from the reference"


def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="implementation is 'magic', expected one of triton, torch, eager, compile"):
        OPS["td_target"].prepare("magic", build(OPS["td_target"]))


def test_triton_without_a_gpu_is_an_obstacle(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert obstacle("triton", CPU).startswith("Triton ")
    assert obstacle("torch", CPU) is None


# --- work ------------------------------------------------------------------------------------------------------------


def counted(op, implementation, sizes):
    prepared = op.prepare(implementation, build(op, sizes))
    with Products() as products:
        prepared.run()
    return products.flops


@EVERY_OP
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_the_plain_implementation_are_counted(op, shape):
    assert op.matmul_flops(SHAPES[shape], False) == counted(op, "eager", SHAPES[shape])


@pytest.mark.parametrize("name", ["critic_value_and_score", "behavior_flow", "flow_step", "value_gradient_flow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_more_products_are_needed_than_the_library_does(name, shape):
    op, sizes = OPS[name], SHAPES[shape]
    # Its repulsion is a second product by the kernel matrix; the pairs are counted apart.
    extra = {"flow_step": 1, "value_gradient_flow": sizes.flow_steps}.get(name, 0)
    direction = OPS["svgd_direction"].matmul_flops(sizes, True)
    # In compiled code no operator shows.
    with native.off():
        assert op.matmul_flops(sizes, True) + extra * direction == counted(op, "torch", sizes)


@EVERY_OP
def test_bytes_are_those_of_inputs_and_outputs(op):
    for dtype in op.dtypes:
        inputs = build(op, dtype=dtype)
        outputs = op.prepare("torch", inputs.clone()).run().values()
        moved = op.bytes_of(inputs) + sum(t.numel() * t.element_size() for t in outputs)
        if op.name == "svgd_step":
            moved += 3 * inputs.data["particles"].numel() * 4
        if op.name.endswith("training_step"):
            # Parameters and both moments are read and written, the target critic too.
            parameters = sum(t.numel() for t in getattr(inputs.policy, next(iter(op.networks))).parameters())
            moved += 4 * parameters * (6 if op.name.startswith("critic") else 5)
        assert op.bytes(TINY, dtype) == moved


def test_a_larger_problem_is_more_work():
    for op in OPS.values():
        assert op.flops(GRIDS["64k rows"]) >= op.flops(GRIDS["paper"]) >= op.flops(GRIDS["one state"])
        assert op.bytes(GRIDS["wide"], torch.float32) >= op.bytes(GRIDS["paper"], torch.float32) > 0
    rows = GRIDS["64k rows"]
    assert rows.batch * rows.particles == 2**16


def test_inputs_are_the_seeds():
    op = OPS["flow_step"]
    first, same, other = build(op), build(op), build(op, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(op.tensors(first), op.tensors(same), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(op.tensors(first), op.tensors(other), strict=True))


# --- the benchmarks --------------------------------------------------------------------------------------------------


def test_a_check_takes_fewer_states_where_all_would_take_too_long():
    op = OPS["value_gradient_flow"]
    assert timing.check_sizes(op, TINY, CPU) == TINY
    few = timing.check_sizes(op, GRIDS["64k rows"], CPU)
    assert dataclasses.replace(few, batch=8192) == GRIDS["64k rows"]
    assert op.flops(few) <= timing.CHECK_FLOPS["cpu"] < op.flops(dataclasses.replace(few, batch=2 * few.batch))


def test_implementations_take_turns(monkeypatch):
    calls = []

    class Logged:
        def __init__(self, name):
            self.name = name

        def seconds(self):
            calls.append(self.name)
            return 1.0

    times = timing.take_turns({name: Logged(name) for name in "abc"}, 3, math.inf)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert times == {name: [1.0] * 3 for name in "abc"}


def test_bench_ops_writes_records(tmp_path):
    out = tmp_path / "ops.jsonl"
    names = ["svgd_direction", "critic_training_step"]
    flags = ["--device", "cpu", "--threads", 1, "--quick", "--out", out, *tiny_flags()]
    done = run_module("profiling.bench", "ops", "--ops", *names, "--implementations", "torch", "eager", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.read(out)
    assert [(r.op, r.method) for r in found] == [(n, f"{m}-float32") for n in names for m in ("torch", "eager")]
    for record in found:
        assert (record.benchmark, record.grid, record.timer) == (f"op {record.op}", "given", "perf_counter")
        assert (record.rounds, record.fault, record.clocks) == (2, None, None)
        assert 0.0 < record.p20 <= record.p50 <= record.p80
        assert record.flop_rate == record.flops / record.p50
        assert record.byte_rate == record.moved_bytes / record.p50 > 0.0
        # A few kilobytes: the copies do not exceed any cache, so it is overwritten.
        assert record.rotated_bytes < record.cache_bytes < record.flushed_bytes
        assert record.op in done.stdout
    assert compare.main([str(out), str(out)]) == 0


def test_a_copy_of_the_inputs_is_used_by_turns_until_the_cache_is_exceeded(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 100_000)
    op = OPS["svgd_direction"]
    rotation = timing.Rotation.make(op, dataclasses.replace(TINY, batch=200), torch.float32, CPU, 0)
    assert rotation.flush is None
    assert rotation.rotated_bytes > 100_000
    first, second, *_ = rotation.inputs
    assert not torch.equal(first.data["particles"], second.data["particles"])
    rotation = timing.Rotation.make(op, TINY, torch.float32, CPU, 0)
    assert (len(rotation.inputs), rotation.flush.numel()) == (timing.MAX_COPIES, 200_000)


def test_bench_names_what_it_does_not_know():
    done = run_module("profiling.bench", "ops", "--ops", "sorting", "--device", "cpu")
    assert done.returncode == 1
    assert "--ops is 'sorting', expected one of 'critic_value_and_score'" in done.stderr


def test_bench_scaling_writes_records_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "scaling.jsonl", tmp_path / "scaling.png"
    flags = ["--device", "cpu", "--threads", 1, "--quick", "--seconds", 300, "--out", out, "--plot", picture]
    chosen = ["--factors", "states", "steps", "--ops", "value_gradient_flow", "update"]
    done = run_module("profiling.bench", "scaling", *chosen, *flags, *tiny_flags())
    assert done.returncode == 0, done.stdout + done.stderr
    found = records.read(out)
    assert {(r.benchmark, r.op) for r in found} == {
        (f"scaling {factor}", op) for factor in ("states", "steps") for op in ("value_gradient_flow", "update")
    }
    by_name = {(curve.factor, curve.op): curve for curve in scaling.curves(found)}
    assert by_name["states", "update"].x == [1, 4, 16]
    assert by_name["steps", "value_gradient_flow"].x == [0, 1, 2]
    assert all(record.flops > 0 and record.p50 > 0.0 and record.grid is None for record in found)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert compare.main([str(out), str(out)]) == 0


class TestExponents:
    def test_overhead_is_told_from_growth(self):
        x = [1, 4, 16, 64, 256, 1024]
        fitted = scaling.fit(x, [2.0 + 0.01 * value**1.3 for value in x])
        assert fitted.exponent == pytest.approx(1.3, abs=0.01)
        assert fitted.overhead == pytest.approx(2.0, rel=0.02)
        assert fitted.scale == pytest.approx(0.01, rel=0.05)

    def test_overhead_is_never_negative(self):
        x = [1, 2, 4, 8, 16]
        fitted = scaling.fit(x, [max(value - 0.5, 0.01) for value in x])
        assert fitted.overhead >= 0.0

    def test_three_points_tell_no_exponent(self):
        assert scaling.fit([1, 2, 3], [1.0, 2.0, 3.0]) is None

    def test_slope_of_the_upper_half(self):
        assert scaling.upper_slope([0, 1, 2, 4, 8], [9.0, 9.0, 1.0, 4.0, 16.0]) == pytest.approx(2.0)
        assert scaling.upper_slope([0, 1], [1.0, 2.0]) is None

    def test_points_stop_where_the_time_does(self):
        factor = scaling.FACTORS["steps"]
        chosen, missing = scaling.points(factor, "behavior_flow", TINY, 1e9, 1.0)
        assert list(chosen) == [1, 2, 4, 8, 16, 32]
        assert missing == []
        assert chosen[8].behavior_steps == 8
        call = scaling.flops("behavior_flow", chosen[1])
        chosen, missing = scaling.points(factor, "behavior_flow", TINY, scaling.MIN_ROUNDS * call, 1.0)
        assert (list(chosen), missing) == ([1], [2, 4, 8, 16, 32])


def test_older_records_are_still_read():
    found = records.read(REPOSITORY / "profiling" / "results" / "cpu.jsonl")
    assert found
    assert all(record.op is None and record.flop_rate is None for record in found if record.benchmark == "update")
