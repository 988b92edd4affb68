"""Packed weights: one launch writes every entry, padding included, and nothing stale survives."""

import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from properties import given, settings, st

pytest.importorskip("triton")

from launches import count_launches
from oracle import nan_filled_empty
from vgf_fast.kernels import packing, packing_kernel, tables

widths = st.integers(1, 40)


def make_stack(generator, members, inputs, hidden, output, observation_dim, action_dim, layer_norm, device):
    normal = functools.partial(torch.randn, generator=generator)
    sizes = (inputs, *hidden, output)
    weights = [normal(members, i, o).to(device) for i, o in itertools.pairwise(sizes)]
    biases = [normal(members, o).to(device) for o in sizes[1:]]
    scales, shifts = ([normal(members, o).to(device) for o in hidden if layer_norm] for _ in range(2))
    return packing.Stack(weights, biases, scales, shifts, "relu", observation_dim, action_dim)


def assert_packed(stack, packed, dtype):
    o, a = stack.observation_dim, stack.action_dim
    hidden = [w.shape[2] for w in stack.weights[:-1]]
    expected = {
        "state": [(stack.weights[0][:, :o], packed.state)],
        "action": [(stack.weights[0][:, o : o + a], packed.action)],
        "time": [(stack.weights[0][:, o + a :], packed.time.unsqueeze(1))],
        "hidden": [(w, packed.hidden[:, i]) for i, w in enumerate(stack.weights[1:-1])],
        "head": [(stack.weights[-1], packed.head), (stack.biases[-1], packed.head_bias)],
        "biases": [(b, packed.vectors[:, i, 0]) for i, b in enumerate(stack.biases[:-1])],
    }
    for i, _ in enumerate(hidden):
        for j, group in ((1, stack.norm_scales), (2, stack.norm_biases)):
            source = group[i] if group else packed.vectors.new_zeros(packed.members, 0)
            expected["biases"].append((source, packed.vectors[:, i, j]))
    for name, pairs in expected.items():
        for source, target in pairs:
            truth = torch.zeros_like(target)
            truth[tuple(slice(size) for size in source.shape)] = source.to(target.dtype)
            assert torch.equal(target, truth), name
    assert packed.dtype == dtype
    assert packed.hidden_dims == tuple(hidden)
    assert packed.padded_width >= max(*hidden, 16)
    assert math.log2(packed.padded_width).is_integer()


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    members=st.integers(1, 3),
    observation_dim=st.integers(1, 70),
    action_dim=st.integers(0, 20),
    time=st.booleans(),
    hidden=st.lists(widths, min_size=1, max_size=4),
    output=st.integers(1, 20),
    layer_norm=st.booleans(),
)
def test_any_stack_with_another_in_one_launch(members, observation_dim, action_dim, time, hidden, output, layer_norm):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    inputs = observation_dim + action_dim + time
    stacks = [
        make_stack(generator, members, inputs, hidden, output, observation_dim, action_dim, layer_norm, device),
        make_stack(generator, 1, 3, (8,), 1, 2, 1, True, device),
    ]
    with nan_filled_empty(), count_launches() as launches:
        packed = packing.pack_many(stacks)
    assert launches == ["packing_kernel"]
    for stack, mlp in zip(stacks, packed, strict=True):
        assert_packed(stack, mlp, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_that_pytorch_packs_in_the_interpreter(dtype, device):
    stack = make_stack(torch.Generator().manual_seed(0), 2, 6, (5, 17), 3, 4, 1, True, device)
    with nan_filled_empty():
        packed = packing.pack(*stack, dtype=dtype)
    assert_packed(stack, packed, dtype)


def test_bfloat16_parameters_take_one_launch(device):
    """A policy cast to bfloat16 packs its weights at every action."""
    stack = make_stack(torch.Generator().manual_seed(0), 2, 6, (5, 17), 3, 4, 1, True, device)
    groups = [[tensor.to(torch.bfloat16) for tensor in group] for group in stack[:4]]
    with nan_filled_empty(), count_launches() as launches:
        packed = packing.pack(*groups, *stack[4:], dtype=torch.bfloat16)
    assert launches == ["packing_kernel"]
    assert_packed(packing.Stack(*groups, *stack[4:]), packed, torch.bfloat16)


def test_changed_parameters_are_packed_afresh_into_the_same_memory(device):
    stack = make_stack(torch.Generator().manual_seed(0), 2, 6, (5, 17), 3, 4, 1, True, device)
    packed = packing.pack(*stack)
    for step in range(2):
        for parameter in stack.parameters:
            parameter.add_(1.0)
        if step == 1:  # other tensors, whose addresses are new
            stack.weights[1] = stack.weights[1].transpose(1, 2).contiguous().transpose(1, 2)
        again = packing.pack(*stack, out=packed)
        assert again.state.data_ptr() == packed.state.data_ptr()
        assert_packed(stack, packed, torch.float32)


def test_wrong_outputs_are_refused(device):
    generator = torch.Generator().manual_seed(0)
    stack = make_stack(generator, 2, 6, (5, 17), 3, 4, 1, True, device)
    other = make_stack(generator, 2, 6, (5, 16), 3, 4, 1, True, device)
    packed = packing.pack(*stack)
    with pytest.raises(ValueError, match="out's matrices has shape"):
        packing.pack(*other, out=packed)
    same_padding = make_stack(generator, 2, 6, (6, 17), 3, 4, 1, True, device)
    with pytest.raises(ValueError, match=r"out was packed from other sizes.*widths \(6, 17\)"):
        packing.pack(*same_padding, out=packed)
    with pytest.raises(ValueError, match=r"out's matrices has dtype torch.float32, expected torch.float64"):
        packing.pack(*stack, dtype=torch.float64, out=packed)
    with pytest.raises(ValueError, match="out has 1 packed stacks, expected 2"):
        packing.pack_many([stack, stack], out=[packed])


def test_tables_are_made_once_and_the_oldest_forgotten(monkeypatch):
    monkeypatch.setattr(tables, "CACHED_TABLES", 2)
    monkeypatch.setattr(tables, "_tables", tables.OrderedDict())
    made = []

    def table(key):
        return tables.device_table(key, torch.device("cpu"), lambda: made.append(key) or [[key]])

    for key in (1, 2, 1, 3, 1, 2):
        assert table(key).tolist() == [[key]]
    assert made == [1, 2, 3, 2]


def test_a_table_not_seen_before_cannot_be_captured():
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        pytest.raises(RuntimeError, match="run it once uncaptured"),
    ):
        tables.device_table("unseen", torch.device("cuda", 0), lambda: [[1]])


def test_a_parameter_beyond_32_bit_offsets_is_refused():
    packing_kernel.check_span(torch.empty_strided((1000, 1000), (2**21, 1), device="meta"))
    with pytest.raises(ValueError, match=r"a parameter has strides \(2147484, 1\), so that it spans 2\*\*31"):
        packing_kernel.check_span(torch.empty_strided((1001, 1000), (2147484, 1), device="meta"))
