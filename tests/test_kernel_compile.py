"""The kernels compile for every architecture, without a GPU, within its registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "profiling" / "results" / "resources.json"
# PyTorch 2.11 brings this Triton.
RESULTS_OLD = REPOSITORY / "profiling" / "results" / "resources-3.6.json"
# One process each; the halves take about as long.
TARGETS = (("sm_80", "sm_90"), ("sm_100", "gfx942"))
SCENARIOS = (
    "flow bf16",
    "acting bf16",
    "sizes of one",
    "training bf16",
    "particles float32",
    "nearest bf16",
    "token flow",
)
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
# Kernels whose time is that of their matrix products: these must be of the unit's full rate.
HOT = ("product_kernel",)


def run_resources(targets, folder):
    """The tool in a process of its own: in Triton's interpreter nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-W", "ignore", "-m", "profiling.resources", *targets]
    for scenario in SCENARIOS:
        command += ["--scenario", scenario]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """What each kernel takes: target -> rows of the tool's."""
    processes = [run_resources(targets, tmp_path_factory.mktemp("triton")) for targets in TARGETS]
    rows = []
    for process in processes:
        output, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        rows += [json.loads(line) for line in output.splitlines()]
    return {target: [row for row in rows if row["target"] == target] for target in SHARED_BYTES}


def committed(path=RESULTS):
    return json.loads(path.read_text(encoding="utf-8"))


def assert_fits(row):
    assert row["registers"] > 0, row
    assert row["shared_bytes"] <= SHARED_BYTES[row["target"]], row
    if row["paper_size"]:
        assert row["spilled_bytes"] == 0, row


def assert_on_the_matrix_unit(row):
    if row["has_product"]:
        assert row["matrix_instructions"] > 0, row
    # Few rows or columns wait for what is read, whatever multiplies them.
    is_large = row["num_warps"] == 8 if row["kernel"] == "nearest_lists_kernel" else min(row["tile"], default=0) >= 64
    if row["kernel"] in (*HOT, "nearest_lists_kernel") and is_large:
        assert row["full_rate"] > 0, row


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_every_kernel_fits(resources, target):
    rows = resources[target]
    assert {row["kernel"] for row in rows} >= {
        *HOT,
        "first_layer_kernel",
        "head_kernel",
        "weight_gradient_kernel",
        "flow_step_kernel",
        "nearest_lists_kernel",
        "nearest_merge_kernel",
        "token_distances_kernel",
        "token_direction_kernel",
    }
    for row in rows:
        assert_fits(row)


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_products_run_on_the_matrix_unit(resources, target):
    for row in resources[target]:
        assert_on_the_matrix_unit(row)


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_as_in_the_committed_table(resources, target):
    """A change of registers or shared memory is a change to look at: python -m profiling.resources --write."""
    table = committed()
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is of Triton {table['triton']}, this is {triton.__version__}")
    expected = [row for row in table["rows"] if row["target"] == target and row["scenario"] in SCENARIOS]
    assert resources[target] == expected


def test_the_committed_table_is_whole():
    """Both dtypes and every variant, also those that are not compiled here."""
    rows = committed()["rows"]
    assert {row["target"] for row in rows} == set(SHARED_BYTES)
    for target in SHARED_BYTES:
        assert {row["scenario"] for row in rows if row["target"] == target} >= {
            *(f"{part} {dtype}" for part in ("flow", "acting", "training") for dtype in ("bf16", "tf32")),
            *(f"{part} bf16, median differentiated" for part in ("flow", "acting")),
            *("flow bf16, 128 particles", "particles float32", "particles bf16"),
        }
    for row in rows:
        assert_fits(row)
        assert_on_the_matrix_unit(row)


def test_nothing_spills_under_an_older_triton():
    table = committed(RESULTS_OLD)
    assert table["triton"].startswith("3.6.")
    assert {row["target"] for row in table["rows"]} == {"sm_90"}
    assert {"flow bf16", "acting bf16", "training bf16"} <= {row["scenario"] for row in table["rows"]}
    for row in table["rows"]:
        assert_fits(row)
