"""How many launches an update and an action take on the Triton backend, at the paper's sizes."""

import pytest
from test_profiling import load_profiling

pytest.importorskip("triton")

load_profiling()
from profiling import launches  # noqa: E402


def test_update():
    """Of a batch of 256: 10 Euler steps of 3 products, 5 flow steps of 15 launches, values, two training steps."""
    found = launches.update_launches()
    assert found.triton == {
        "packing_kernel": 1,
        "state_share_kernel": 3,
        "euler_kernel": 11,
        "product_kernel": 10 * 3 + 5 * 7 + 3 + 2 * 6,
        "rows_kernel": 5 * 7 + 4 + 2 * 6,
        "flow_step_kernel": 6,
        "first_layer_kernel": 2,
        "head_kernel": 2,
        "weight_gradient_kernel": 2,
    }
    assert found.torch.total() <= 9, found
    assert "item" not in found.torch
    assert "_local_scalar_dense" not in found.torch, "an update waits for the device"


@pytest.mark.parametrize(
    ("batch", "layers", "rows"),
    [
        (1, {"small_kernel": 10 * 3 + 5 * 6 + 3, "product_kernel": 5}, 5 * 2 + 2),
        (16, {"small_kernel": 10 * 3 + 5 * 6 + 3, "product_kernel": 5}, 5 * 2 + 2),
        (256, {"product_kernel": 10 * 3 + 5 * 7 + 3}, 5 * 7 + 4),
    ],
)
def test_action(batch, layers, rows):
    found = launches.act_launches(batch)
    assert found.triton == {
        "packing_kernel": 1,
        "state_share_kernel": 2,
        "euler_kernel": 11,
        **layers,
        "rows_kernel": rows,
        "flow_step_kernel": 6,
    }
    assert found.torch.total() <= 1, found
    assert "_local_scalar_dense" not in found.torch, "acting waits for the device"


def test_eager_pytorch_takes_many_more():
    assert launches.eager_update_launches().total > 10 * launches.update_launches().total
