"""The kernels compile for every architecture, without a GPU, within its registers and shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "aot_compile.py"
# One process each; the halves take about as long.
TARGETS = (("sm_80", "sm_90"), ("sm_100", "gfx942"))
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
VARIANTS = 13


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """What each variant takes: target -> rows of the script's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(SCRIPT), *targets],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for targets in TARGETS
    ]
    rows = []
    for process in processes:
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        rows += json.loads(output)
    return {target: [row for row in rows if row["target"] == target] for target in SHARED_BYTES}


@pytest.mark.parametrize("target", SHARED_BYTES)
def test_every_variant_fits(resources, target):
    rows = resources[target]
    assert len(rows) == VARIANTS
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        assert row["shared"] <= SHARED_BYTES[target], row
        assert row["registers"] > 0, row


def test_scalar_registers_on_amd(resources):
    """They spill into lanes of vector registers, not memory; only the 128 rows of the largest size make them."""
    for row in resources["gfx942"]:
        assert row["scalar_spills"] == 0 or " 128 " in row["variant"], row
