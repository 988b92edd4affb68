"""How many launches an update and an action take on the Triton backend, at the paper's sizes."""

import pytest
from test_profiling import load_profiling

pytest.importorskip("triton")

load_profiling()
from profiling import launches  # noqa: E402


def test_update():
    found = launches.update_launches()
    assert found.total <= 25, found
    assert found.triton.total() == 15, found
    assert "item" not in found.torch
    assert "_local_scalar_dense" not in found.torch, "an update waits for the device"


@pytest.mark.parametrize(("batch", "limit"), [(1, 4), (256, 12)])
def test_action(batch, limit):
    found = launches.act_launches(batch)
    assert found.total <= limit, found
    assert "_local_scalar_dense" not in found.torch, "acting waits for the device"


def test_eager_pytorch_takes_many_more():
    assert launches.eager_update_launches().total > 20 * launches.update_launches().total
