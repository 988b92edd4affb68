"""The gates that kernels must pass do close: a wrong mask, an unwritten entry and a spill are each found.

That a dropped barrier is found is in test_races.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import oracle
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

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


SPILLING = """
import json, torch
from unittest import mock
from profiling import resources
from vgf_fast.kernels import launch
wide = launch.BlockLaunch(block_m=64, block_n=512, block_k=64, rows=16, num_warps=4, num_stages=1)
with mock.patch.object(launch, "rows_block", return_value=wide), resources.recorded() as launches:
    resources.flow(torch.bfloat16)
found = next(x for x in launches if x.kernel.__name__ == "critic_kernel")
print(json.dumps(resources.resources(resources.compile_launch(found, "sm_90"), "sm_90")))
"""


def test_a_spill_is_reported(tmp_path):
    """A tile of 64 x 512 in four warps does not fit their registers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", SPILLING]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout)["spilled_bytes"] > 0
