"""The gates that kernels must pass do close: each of many ways to break one fails a test, and a spill is reported."""

import ast
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import networks
import oracle
import pytest
import torch

pytest.importorskip("triton")

import test_kernel_behavior_flow
import test_kernel_critic
import test_kernel_flow_step
import test_kernel_optimizer
import test_races
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

REPOSITORY = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _copy_and_sum_kernel(x_ptr, out_ptr, N, STORED: tl.constexpr, LOADED: tl.constexpr):
    """Right if STORED and LOADED are 0: how many entries too many are stored and loaded."""
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs, mask=offs < N + LOADED, other=0.0)
    tl.store(out_ptr + offs, x + 0.0 * tl.sum(x), mask=offs < N + STORED)


def copied(stored=0, loaded=0):
    x, _ = oracle.arrange(torch.arange(6.0, device=DEVICE).view(1, 6), "columns")
    with oracle.nan_filled_empty():
        out = torch.empty(6, device=DEVICE)
    _copy_and_sum_kernel[(1,)](x, out, 6, STORED=stored, LOADED=loaded)
    return out


def test_an_entry_left_out_stays_nan():
    assert torch.equal(copied(), torch.arange(6.0, device=DEVICE))
    assert copied(stored=-1).isnan().any()


def test_an_entry_read_past_the_end_is_nan():
    """Inputs lie in a buffer of NaN."""
    assert copied(loaded=1).isnan().all()


# --- the library's own kernels, broken -------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
TESTS = (test_kernel_behavior_flow, test_kernel_critic, test_kernel_flow_step, test_races)
numbers = itertools.count()
BARRIER = re.compile(r"(?m)^( +)tl\.debug_barrier\(\)$")


@pytest.fixture
def use_copy(tmp_path, monkeypatch):
    """Make the tests run a copy of the kernels in which one file is changed."""

    def use(file, change):
        name = f"copied_kernels_{next(numbers)}"
        folder = tmp_path / name
        folder.mkdir()
        for path in (REPOSITORY / "kernels").glob("*.py"):
            text = path.read_text(encoding="utf-8")
            if path.name == file:
                changed = change(text)
                assert changed != text, "nothing to change: the kernel is another one now"
                text = changed
            # Operators are registered once a name.
            (folder / path.name).write_text(text.replace("vgf_fast::", f"{name}::"), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        package = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, package)
        spec.loader.exec_module(package)
        for module in TESTS:
            monkeypatch.setattr(module, "sequence", importlib.import_module(f"{name}.sequence"))
        training = importlib.import_module(f"{name}.training")
        monkeypatch.setattr(test_kernel_optimizer, "training_step_", training.training_step_)

    yield use
    for name in [name for name in sys.modules if name.startswith("copied_kernels_")]:
        del sys.modules[name]


def without_barrier(number):
    def change(text):
        barrier = list(BARRIER.finditer(text))[number]
        return text[: barrier.start()] + barrier.group(1) + "pass" + text[barrier.end() :]

    return change


def replaced(old, new):
    return lambda text: text.replace(old, new, 1)


def barriers(file):
    return len(BARRIER.findall((REPOSITORY / "kernels" / file).read_text(encoding="utf-8")))


def races(*runs):
    """How many of the runs of test_races.py, of a sequence with and without LayerNorm, find a race."""
    errors = []
    for run, layer_norm in itertools.product(runs, (True, False)):
        try:
            test_races.test_networks(run, layer_norm, "few")
        except (AssertionError, InterpreterError) as error:
            errors.append(str(error))
    assert all("Race" in error or "a load" in error or "a store" in error for error in errors), errors
    return len(errors)


BARRIERS = [(file, number) for file in ("flow_step.py", "formulas.py") for number in range(barriers(file))]


def test_only_a_flow_step_has_barriers():
    assert len(BARRIERS) == 2
    files = [path.name for path in (REPOSITORY / "kernels").glob("*.py") if barriers(path.name)]
    assert {"flow_step.py", "formulas.py"} <= set(files)
    assert not {"product.py", "rows.py", "small.py", "behavior_flow.py", "state_share.py"} & set(files)


@interpreted
@pytest.mark.parametrize(("file", "number"), BARRIERS)
def test_every_barrier_of_a_flow_step_is_missed(use_copy, file, number):
    use_copy(file, without_barrier(number))
    assert races("flow") == 2


def few_rows():
    test_kernel_critic.test_another_configuration_gives_the_same(networks.LAYERS[2])


def many_rows():
    test_kernel_critic.test_another_configuration_gives_the_same(networks.LAYERS[1])


def accurate_critic():
    test_kernel_critic.test_as_accurate_as_pytorch(True, "gelu", "mean")


def particle_step():
    test_kernel_flow_step.test_equal_to_the_step_kernel(10)


def flow_selection():
    test_kernel_flow_step.test_selection(0, "max")


def behavior_layouts():
    test_kernel_behavior_flow.test_layouts("columns")


def training_steps():
    test_kernel_optimizer.test_three_steps_of_a_velocity_field((2, 1), False)


# What is broken, in which file, and the test that must fail. Nothing here stores too much: it would be to live memory.
MASKS = {
    "the last particle's score not stored": (
        "flow_step.py",
        "score, mask=(offs_n < N)[:, None]",
        "score, mask=(offs_n < N - 1)[:, None]",
        accurate_critic,
    ),
    "the last row's value not stored": (
        "rows.py",
        "q, mask=in_rows)",
        "q, mask=offs_m < shape.rows - 1)",
        accurate_critic,
    ),
    "the last row's activation not stored": (
        "rows.py",
        "mask=in_rows[:, None])\n\n\n# --- launcher",
        "mask=(offs_m < shape.rows - 1)[:, None])\n\n\n# --- launcher",
        many_rows,
    ),
    "the last row of a product not stored": (
        "product.py",
        "mask=(offs_m < rows)[:, None]",
        "mask=(offs_m < rows - 1)[:, None]",
        many_rows,
    ),
    "the last of few rows not stored": (
        "small.py",
        "mask=in_rows[:, None]",
        "mask=(offs_m < shape.rows - 1)[:, None]",
        few_rows,
    ),
    "padding in LayerNorm's variance": (
        "formulas.py",
        "centred = tl.where(in_width[None, :], z - mean[:, None], 0.0)",
        "centred = z - mean[:, None]",
        accurate_critic,
    ),
    "padding among the distances": (
        "formulas.py",
        'tl.where(in_n[:, None] & in_n[None, :], distances, float("inf"))',
        "distances",
        particle_step,
    ),
    "moments read before they are there": (
        "flow_step.py",
        "tl.where(step.number > 1.0, N, 0)",
        "N",
        particle_step,
    ),
    "padding among the particles to choose from": (
        "selection.py",
        "in_n = offs_n < N\n    if MODE",
        "in_n = offs_n < N + 1\n    if MODE",
        flow_selection,
    ),
    "rows past the batch in the loss": (
        "training_layers.py",
        "dout = tl.where(in_batch, slope /",
        "dout = tl.where(in_rows, slope /",
        training_steps,
    ),
    "the first layer's last input not kept": (
        "training_layers.py",
        "a.to(dtype), mask=writes)",
        "a.to(dtype), mask=writes & (wide_r < sizes.action_dim - 1))",
        training_steps,
    ),
    "a step not counted": (
        "training_layers.py",
        "in_range = offs < counters",
        "in_range = offs < counters - 1",
        training_steps,
    ),
    "noise read past its last column": (
        "behavior_flow.py",
        "x = tl.load(x_ptrs, mask=in_a, other=0.0)",
        "x = tl.load(x_ptrs, mask=in_a | (offs_r == shape.action_dim)[None, :], other=0.0)",
        behavior_layouts,
    ),
}


@interpreted
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("broken", MASKS)
def test_a_wrong_mask_is_noticed(use_copy, broken):
    file, old, new, check = MASKS[broken]
    use_copy(file, replaced(old, new))
    with pytest.raises((AssertionError, InterpreterError)):
        check()


@interpreted
@pytest.mark.parametrize("check", dict.fromkeys(check for *_, check in MASKS.values()))
def test_a_copy_that_is_not_broken_passes(use_copy, check):
    use_copy("launch.py", lambda text: text + "\n")
    assert races("behavior_flow") == 0
    check()


def test_device_functions_have_no_default_arguments():
    """Triton 3.6 does not make a constant of a default that is a string, and fails where Triton 3.9 compiles."""
    for path in (REPOSITORY / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                assert not node.args.defaults, f"{path.name}: {node.name}"


# --- spills ----------------------------------------------------------------------------------------------------------

SPILLING = """
import json, torch
from unittest import mock
from profiling import resources
from vgf_fast.kernels import launch
wide = launch.ProductTile(block_m=128, block_n=256, block_k=64, num_warps=4, num_stages=1)
with mock.patch.object(launch, "product_tile", return_value=wide), resources.recorded() as launches:
    resources.flow(torch.bfloat16)
found = next(x for x in launches if x.kernel.__name__ == "product_kernel")
print(json.dumps(resources.resources(resources.compile_launch(found, "sm_90"), "sm_90")))
"""


def test_a_spill_is_reported(tmp_path):
    """A tile of 128 x 256 in four warps does not fit their registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", SPILLING]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["spilled_bytes"] > 0
