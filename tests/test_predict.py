"""profiling/sass.py, graph_time.py and predict.py: the models say what their rules imply; no GPU is needed."""

import os
import pickle
import subprocess
import sys

import pytest
from test_profiling import REPOSITORY, load_profiling

load_profiling()
from profiling import graph_time, predict, sass  # noqa: E402
from profiling.graph_time import Node, graph_us  # noqa: E402
from profiling.sass import H200, Instruction, Kernel, Time  # noqa: E402

NONE = 7  # no barrier is set
COMPILE = """
import pickle, sys
import torch
from profiling import predict, resources
from vgf_fast.kernels.launch import ProductTile
from vgf_fast.kernels.product import product

x = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
with resources.recorded() as launches:
    for rows in (64, 128):
        tile = ProductTile(64, 64, 16, 4, 2)
        a = torch.zeros(1, rows, 64, dtype=torch.bfloat16)
        product(a, x, torch.zeros(1, rows, 64), precision="tf32", tile=tile)
compiled = resources.compile_launch(launches[0], "sm_90")
result = {
    "cubin": compiled.asm["cubin"],
    "shared": compiled.metadata.shared,
    "grids": [launch.grid for launch in launches],
    "keys": [launch.key for launch in launches],
    "numbers": launches[0].numbers(),
    "trips": [
        (launch.kernel.__name__, predict.TRIPS.get(launch.kernel.__name__, lambda numbers: [])(launch.numbers()))
        for work in predict.works().values()
        for launch in work.launches
    ],
    "predicted": predict.predict(predict.Work([launches[0], launches[1], launches[0]], 2, True)),
}
pickle.dump(result, open(sys.argv[1], "wb"))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A product of 64 columns, compiled for sm_90 by a process of its own: in Triton's interpreter nothing is."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("compiled")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    command = [sys.executable, "-W", "ignore", "-c", COMPILE, str(folder / "found")]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return pickle.loads((folder / "found").read_bytes())


@pytest.fixture(scope="module")
def product(compiled):
    """The same as the model reads it."""
    return sass.read(compiled["cubin"], compiled["shared"], warps=4)


class TestCompiledProduct:
    def test_its_registers_and_its_loop_are_read(self, product):
        assert 16 <= product.registers <= 255
        assert product.spilled_bytes == 0
        assert product.shared_bytes > 0
        assert len(product.loops) == 1
        assert sum(product.mix()[kind] for kind in ("HGMMA", "HMMA") if kind in product.mix()) > 0
        assert product.code[-1].opcode == "EXIT"
        # Constants are loaded at once, and the model knows of nothing else that it leaves aside.
        assert {i.opcode.split(".")[0] for i in product.code if i.kind == "OTHER"} <= {"LDC", "WARPGROUP"}

    def test_more_turns_take_longer(self, product):
        few, more, most = (sass.launch_time(product, 1, [turns]).microseconds for turns in (4, 32, 60))
        assert few < more < most
        assert most - more == pytest.approx(more - few, rel=0.01)

    def test_more_programs_than_processors_take_longer(self, product):
        resident = H200.processors * product.programs_per_processor()
        one, full, two = (sass.launch_time(product, n, [4]) for n in (1, H200.processors, H200.processors + 1))
        assert one.microseconds == full.microseconds < two.microseconds
        assert sass.launch_time(product, resident + 1, [4]).microseconds > one.microseconds
        assert full.l2_bytes == pytest.approx(H200.processors * one.l2_bytes)

    def test_fewer_registers_let_more_programs_in(self, product):
        fat, thin = product._replace(registers=255), product._replace(registers=32, shared_bytes=0)
        assert fat.programs_per_processor() < thin.programs_per_processor() <= H200.programs

    def test_the_launch_is_described_as_it_was_made(self, compiled):
        assert compiled["grids"] == [(1, 1, 1), (1, 2, 1)]
        assert compiled["keys"][0] == compiled["keys"][1]
        assert (compiled["numbers"]["K"], compiled["numbers"]["BLOCK_K"]) == (64, 16)
        assert predict.TRIPS["product_kernel"](compiled["numbers"]) == [4]

    def test_turns_of_loops_are_known_of_every_launch_of_an_update_and_an_action(self, compiled):
        assert set(predict.TRIPS) <= {name for name, _ in compiled["trips"]}

        def counts(trips):
            for one in trips:
                yield from counts([one[0], *one[1]]) if isinstance(one, tuple) else [one]

        for name, trips in compiled["trips"]:
            assert all(isinstance(count, int) and count >= 0 for count in counts(trips)), (name, trips)

    def test_launches_become_rows_and_a_whole(self, compiled):
        rows, whole = compiled["predicted"]
        by_programs = {row.programs: row for row in rows}
        assert {programs: row.launches for programs, row in by_programs.items()} == {1: 2, 2: 1}
        assert {row.kernel for row in rows} == {"product_kernel"}
        alone = 2 * by_programs[1].microseconds + by_programs[2].microseconds + 2 * predict.TORCH_LAUNCH.microseconds
        # Five launches in a chain have four gaps between them; PyTorch's are the other branch's.
        assert whole["one chain"] == pytest.approx(alone + 4 * H200.launch_us, abs=0.1)
        ours = alone - 2 * predict.TORCH_LAUNCH.microseconds + 2 * H200.launch_us
        assert whole["two branches"] == pytest.approx(ours, abs=0.1)


# --- a listing made by hand ------------------------------------------------------------------------------------------


def control(stall=1, write=NONE, read=NONE, wait=0):
    return stall | write << 5 | read << 8 | wait << 11


def listing(*entries):
    """What nvdisasm prints of instructions (text, control bits) and of labels."""
    lines, address = [], 0
    for entry in entries:
        if isinstance(entry, str):
            lines.append(f"{entry}:")
        else:
            lines += [
                f"        /*{address:04x}*/   {entry[0]} ;  /* 0x0000000000000000 */",
                f"   /* 0x{entry[1] << 41:016x} */",
            ]
            address += 16
    return "\n".join(lines)


def kernel(*entries, warps=4):
    code = sass._instructions(listing(*entries))
    return Kernel(32, 0, 0, warps, code, sass._loops(code))


def cycles(one, trips=(), programs=1):
    return sass.launch_time(one, programs, list(trips)).microseconds * H200.clock_ghz * 1e3


NEST = (
    ("MOV R1, c[0x0][0x28]", control(2)),
    ".L_x_0",
    ("IADD3 R2, R2, 0x1, RZ", control(4)),
    ".L_x_1",
    ("FFMA R4, R4, R5, R6", control(6)),
    ("@P0 BRA `(.L_x_1)", control(5)),
    ("@P1 BRA `(.L_x_0)", control(5)),
    ("EXIT", control(5)),
)


class TestListing:
    def test_addresses_control_bits_and_labels(self):
        code = sass._instructions(listing(*NEST))
        assert [i.address for i in code] == [0, 16, 32, 48, 64, 80]
        assert [i.control & 15 for i in code] == [2, 4, 6, 5, 5, 5]
        assert [i.target for i in code] == [None, None, None, 32, 16, None]
        assert [i.kind for i in code] == ["INT", "INT", "FP", "BRANCH", "BRANCH", "BRANCH"]

    def test_loops_are_nested_by_their_addresses(self):
        (outer,) = kernel(*NEST).loops
        (inner,) = outer.inner
        assert (outer.first, outer.last, inner.first, inner.last) == (16, 64, 32, 48)
        assert [i.address for i in outer.own()] == [16, 64]

    @pytest.mark.parametrize(
        ("text", "kind", "moved", "written"),
        [
            ("@!P0 LDG.E.128.CONSTANT R4, [R2.64]", "LDG", 16, ("R4", "R5", "R6", "R7")),
            ("STS.64 [R3], R8", "STS", 8, ()),
            ("LDS.U16 R9, [R3+0x10]", "LDS", 2, ("R9",)),
            ("IMAD.WIDE R2, R3, 0x4, R6", "INT", 4, ("R2", "R3")),
            ("BAR.SYNC.DEFER_BLOCKING 0x0", "BAR", 4, ()),
            ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", "HGMMA", 4, ("R24",)),
            ("UIADD3 UR4, UR4, 0x1, URZ", "UNIFORM", 4, ()),
            ("FROB R1, R2", "OTHER", 4, ("R1",)),
        ],
    )
    def test_instructions(self, text, kind, moved, written):
        one = Instruction(0, text)
        assert (one.kind, one.bytes, one.written) == (kind, moved, written)

    def test_a_matrix_instruction_takes_its_pipe_for_its_columns(self):
        assert Instruction(0, "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24").pipe == ("tensor", 64.0)
        assert Instruction(0, "HMMA.16816.F32.BF16 R4, R8, R10, R4").pipe == ("tensor", 8.0)


class TestCycles:
    def test_straight_code_takes_its_stalls(self):
        code = [("MOV R1, R2", control(5))] * 10
        assert cycles(kernel(*code, ("EXIT", control(5)))) == pytest.approx(55)

    def test_a_loop_takes_its_turns(self):
        one = kernel(*NEST)
        # Of the inner loop 11 cycles a turn, of the outer one 9 and what is within.
        assert cycles(one, [(1, [101])]) - cycles(one, [(1, [1])]) == pytest.approx(1100)
        assert cycles(one, [(11, [2])]) - cycles(one, [(1, [2])]) == pytest.approx(10 * (9 + 22))

    def test_a_load_is_waited_for(self):
        load, use = ("LDS R4, [R2]", control(1, write=0)), ("FADD R5, R4, R4", control(1, wait=1))
        waiting = cycles(kernel(load, use, ("EXIT", control(1))))
        assert waiting >= H200.shared_latency
        independent = ("FADD R5, R6, R6", control(1))
        assert cycles(kernel(load, independent, ("EXIT", control(1)))) < H200.shared_latency

    def test_a_barrier_waits_for_the_last_warp(self):
        work = [("MOV R1, R2", control(10))] * 4
        end = ("EXIT", control(1))
        without = cycles(kernel(*work, end, warps=16))
        with_barrier = cycles(kernel(*work, ("BAR.SYNC 0x0", control(1)), end, warps=16))
        assert with_barrier >= without + H200.barrier

    def test_a_forward_branch_over_a_call_is_taken(self):
        slow = (
            ("@P0 BRA `(.L_x_9)", control(1)),
            ("CALL.REL.NOINC 0x100", control(15)),
            ("MOV R1, R2", control(15)),
            ".L_x_9",
            ("EXIT", control(1)),
        )
        assert [i.address for i in sass._straight(kernel(*slow).code)] == [0, 48]

    def test_what_lies_before_the_wait_is_done_ahead(self):
        work = [("MOV R1, R2", control(10))] * 4
        one = kernel(*work, ("ACQBULK", control(1)), *work, ("EXIT", control(1)))
        time = sass.launch_time(one, 1, [])
        assert time.ahead_us * H200.clock_ghz * 1e3 == pytest.approx(40)
        assert time.microseconds * H200.clock_ghz * 1e3 == pytest.approx(82)
        assert sass.launch_time(kernel(*work, ("EXIT", control(1))), 1, []).ahead_us == 0.0

    def test_programs_of_a_processor_share_what_l1_holds(self):
        one = kernel(("LDG.E R4, [R2.64]", control(1)), ("EXIT", control(1)))
        programs = 4 * H200.processors

        def bytes_read(*tensors):
            return sass.launch_time(one, programs, [], tensors).l2_bytes

        asked = programs * 4 * 4 * sass.LANES
        assert bytes_read() == asked
        # A small tensor is read once by every processor, a large one as often as it is asked for.
        assert bytes_read(256) == 256 * H200.processors
        assert bytes_read(2**30) == asked

    def test_programs_beside_each_other_share_the_memory_pipe(self):
        loads = [("LDG.E.128 R4, [R2.64]", control(1))] * 64
        one = kernel(*loads, ("EXIT", control(1)))
        assert cycles(one, programs=8 * H200.processors) > 4 * cycles(one)


# --- the graph -------------------------------------------------------------------------------------------------------


def launch(us=10.0, processors=1.0, l2=0.0, ahead=0.0):
    """A launch that keeps so many processors busy all its time and reads at a rate of bytes a second."""
    return Time(microseconds=us, ahead_us=ahead, processor_us=us * processors, l2_bytes=l2 * us * 1e-6)


class TestGraph:
    def test_a_chain_takes_its_launches_and_gaps(self):
        chain = {"a": Node(launch(), "main"), "b": Node(launch(), "main", ("a",)), "c": Node(launch(), "main", ("b",))}
        assert graph_us(chain) == pytest.approx(30.0 + 2 * H200.launch_us)
        ahead = {name: node._replace(dependent=True) for name, node in chain.items()}
        assert graph_us(ahead) == pytest.approx(30.0 + 2 * H200.dependent_launch_us)

    def test_what_a_launch_made_ahead_does_before_its_wait_takes_no_time(self):
        chain = {"a": Node(launch(), "main"), "b": Node(launch(ahead=4.0), "main", ("a",), dependent=True)}
        assert graph_us(chain) == pytest.approx(10.0 + H200.dependent_launch_us + 6.0)
        not_ahead = chain | {"b": chain["b"]._replace(dependent=False)}
        assert graph_us(not_ahead) == pytest.approx(10.0 + H200.launch_us + 10.0)

    def test_two_branches_run_at_once_and_are_joined(self):
        nodes = {
            "a": Node(launch(10.0), "main"),
            "b": Node(launch(6.0), "side"),
            "c": Node(launch(5.0), "main", ("a", "b")),
        }
        assert graph_us(nodes) == pytest.approx(10.0 + H200.launch_us + 5.0)
        late = nodes | {"b": Node(launch(20.0), "side")}
        assert graph_us(late) == pytest.approx(20.0 + H200.join_us + 5.0)

    @pytest.mark.parametrize(
        "half", [{"l2": 0.75 * H200.l2_bytes_per_s}, {"processors": 0.75 * H200.processors}], ids=["L2", "processors"]
    )
    def test_what_two_ask_for_together_is_shared(self, half):
        one = launch(10.0, **half)
        assert graph_us({"a": Node(one, "main")}) == pytest.approx(10.0)
        assert graph_us({"a": Node(one, "main"), "b": Node(one, "side")}) == pytest.approx(15.0)

    def test_a_launch_alone_again_is_as_fast_as_alone(self):
        busy = {"l2": H200.l2_bytes_per_s}
        nodes = {"a": Node(launch(10.0, **busy), "main"), "b": Node(launch(5.0, **busy), "side")}
        # Both at half speed until the shorter one is done, at 10; the longer has 5 left.
        assert graph_us(nodes) == pytest.approx(15.0)

    def test_a_cycle_is_an_error(self):
        nodes = {"a": Node(launch(), "main", ("b",)), "b": Node(launch(), "main", ("a",))}
        with pytest.raises(ValueError, match="nodes wait for each other: a, b"):
            graph_us(nodes)

    def test_an_empty_graph_takes_no_time(self):
        assert graph_us({}) == 0.0

    def test_gaps_depend_on_the_branch(self):
        node, before = Node(launch(), "main", dependent=True), Node(launch(), "side")
        assert graph_time._gap(node, before, H200) == H200.join_us
        assert graph_time._gap(node, before._replace(branch="main"), H200) == H200.dependent_launch_us


# --- the whole -------------------------------------------------------------------------------------------------------


class Named:
    def __init__(self, name):
        self.__name__ = name


def made(name, span, **options):
    """A launch as it is recorded, as far as the graph asks."""
    asked = {"kernel": Named(name), "options": options, "span": span}
    return predict.Launch(**dict.fromkeys(predict.Launch._fields) | asked)


def test_the_behavior_model_is_a_branch_beside_the_critic():
    flow, loss, step = (
        made("euler", "vgf/behavior_flow"),
        made("loss", "vgf/behavior_loss"),
        made("step", "vgf/flow_step/0", launch_pdl=True),
    )
    timed = [(one, launch()) for one in (flow, step, loss)]
    chain = dict(predict._chains(timed, 1, branched=False))
    assert list(chain) == ["torch 0", "euler 0", "step 1", "loss 2"]
    assert [node.after for node in chain.values()] == [(), ("torch 0",), ("euler 0",), ("step 1",)]
    branched = dict(predict._chains(timed, 1, branched=True))
    # The drawing comes last: it is for the next batch.
    assert list(branched) == ["torch 0", "step 0", "loss 1", "euler 2"]
    assert {name: (node.branch, node.after) for name, node in branched.items()} == {
        "torch 0": ("behavior", ()),
        "step 0": ("critic", ()),
        "loss 1": ("behavior", ("torch 0",)),
        "euler 2": ("behavior", ("loss 1",)),
    }
    assert [node.dependent for node in branched.values()] == [False, True, False, False]


def test_the_committed_record_is_a_prediction():
    record = predict.json.loads(predict.RESULTS.read_text(encoding="utf-8"))
    assert record["measured"] is False
    assert record["machine"] == H200._asdict()
    assert 0.0 < record["update"]["two branches"] < record["update"]["one chain"]
    for work in ("update", "act"):
        rows = [predict.Row(**row) for row in record[work]["kernels"]]
        assert sum(row.launches for row in rows) < record[work]["launches"]
        assert all(row.microseconds > 0.0 and row.registers > 0 for row in rows)
