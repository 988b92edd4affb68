"""Gradient, Adam and Polyak average in one launch, against the same steps by PyTorch in float64 and its fused Adam."""

import copy

import networks
import oracle
import pytest
import torch
from launches import count_launches
from release import relative_error
from tolerances import BOUNDS, F32

pytest.importorskip("triton")

from test_kernel_training import make_batch, stack_of, training_launches
from vgf_fast.kernels import packing
from vgf_fast.kernels.training import Batch, mlp_loss, training_step_

from vgf_fast import reference

# Unused columns of a tile hold whatever was in memory, and the interpreter warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

RATE, TAU, WEIGHT = 3e-3, 0.005, 0.7
LOSSES = {"squared": reference.td_loss, "expectile": reference.expectile_loss, "sql": reference.sql_loss}


def adam_of(module):
    return torch.optim.Adam(module.parameters(), lr=RATE, eps=1e-8, fused=True)


def kernel_step(module, target_module, adam, batch, loss="squared"):
    stack = stack_of(module)
    targets = () if target_module is None else stack_of(target_module).parameters
    with oracle.nan_filled_empty():
        (packed,) = packing.pack_many([stack])
        return training_step_(stack, packed, batch, adam, loss, WEIGHT, targets, TAU)


def torch_step(module, target_module, adam, batch, loss="squared"):
    """The same in the dtype of the module."""
    dtype = module.dtype
    s, a, t, noise, y = (None if x is None else x.to(dtype) for x in batch)
    if noise is None:
        q = module(s, a)
        value = LOSSES[loss](q, y[:, 0], *(() if loss == "squared" else (WEIGHT,)))
        metrics = (value, q[0].mean(), y.mean())
    else:
        x, y = reference.flow_matching_inputs(a, noise, t)
        v = module(s, x, t)
        value = reference.flow_matching_loss(v, y)
        metrics = (value, v.mean(), y.mean())
    adam.zero_grad()
    value.backward()
    if target_module is not None:
        reference.polyak_(list(target_module.parameters()), list(module.parameters()), TAU)
    adam.step()
    return torch.stack(metrics).detach()


def moments(adam, module):
    return [adam.state[p][key] for p in module.parameters() for key in ("exp_avg", "exp_avg_sq")]


def assert_close_step(module, adam, truth, truth_adam, start):
    """Parameters by how far they moved, moments by their size, and step counters exactly."""
    for p, expected, before in zip(module.parameters(), truth.parameters(), start, strict=True):
        moved = (expected - before).abs().max()
        assert (p - expected).abs().max() < BOUNDS["adam_step"][F32] * moved + 2**-23 * p.abs().max()
    for value, expected in zip(moments(adam, module), moments(truth_adam, truth), strict=True):
        assert relative_error(value, expected) < 2.0 * BOUNDS["training_gradient"][F32]
    steps = {adam.state[p]["step"].item() for p in module.parameters()}
    assert steps == {truth_adam.state[p]["step"].item() for p in truth.parameters()}


@pytest.mark.parametrize(
    ("batch", "sizes", "hidden", "members", "layer_norm", "activation", "loss"),
    [
        (37, (5, 3), (24, 40), 2, True, "gelu", "squared"),
        (1, (3, 2), (17,), 3, False, "swish", "expectile"),
        (70, (66, 9), (9, 33, 70), 1, True, "gelu", "sql"),
    ],
)
def test_three_steps_of_a_critic(batch, sizes, hidden, members, layer_norm, activation, loss):
    module, target = (networks.critic(*sizes, hidden, members, layer_norm, activation, seed) for seed in (0, 5))
    adam = adam_of(module)
    for step in range(3):
        s, a, _, y = make_batch(batch, *sizes, 1, step)
        exact, exact_target, start = (
            copy.deepcopy(module).double(),
            copy.deepcopy(target).double(),
            [p.detach().clone() for p in module.parameters()],
        )
        exact_adam = adam_of(exact)
        if step > 0:
            exact_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
        metrics = kernel_step(module, target, adam, Batch(s, a, target=y), loss)
        truth = torch_step(exact, exact_target, exact_adam, Batch(s, a, target=y), loss)
        assert (metrics - truth).abs().max() < 2e-6 * truth.abs().max()
        assert_close_step(module, adam, exact, exact_adam, start)
        for p, expected in zip(target.parameters(), exact_target.parameters(), strict=True):
            assert relative_error(p, expected) < 2**-22


@pytest.mark.parametrize(("sizes", "layer_norm"), [((5, 3), False), ((70, 17), True), ((2, 1), False)])
def test_three_steps_of_a_velocity_field(sizes, layer_norm):
    module = networks.velocity(*sizes, (24, 18), layer_norm, "swish")
    adam = adam_of(module)
    for step in range(3):
        s, a, t, noise = make_batch(33, *sizes, sizes[1], step, time=True)
        exact, start = copy.deepcopy(module).double(), [p.detach().clone() for p in module.parameters()]
        exact_adam = adam_of(exact)
        if step > 0:
            exact_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
        metrics = kernel_step(module, None, adam, Batch(s, a, t, noise))
        truth = torch_step(exact, None, exact_adam, Batch(s, a, t, noise))
        assert (metrics - truth).abs().max() < 2e-6 * truth.abs().max()
        assert_close_step(module, adam, exact, exact_adam, start)


def test_bias_corrections_of_many_steps():
    """The kernel's powers of the decay rates: one step from states that count up to a million."""
    for count in (1.0, 9.0, 500.0, 12345.0, 999_999.0):
        module = networks.critic(3, 2, (16,), activation="swish")
        adam, s, a, _, y = adam_of(module), *make_batch(9, 3, 2, 1, 0)
        kernel_step(module, None, adam, Batch(s, a, target=y))
        for p in module.parameters():
            adam.state[p]["step"].fill_(count)
        exact, start = copy.deepcopy(module).double(), [p.detach().clone() for p in module.parameters()]
        exact_adam = adam_of(exact)
        exact_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
        kernel_step(module, None, adam, Batch(s, a, target=y))
        torch_step(exact, None, exact_adam, Batch(s, a, target=y))
        assert_close_step(module, adam, exact, exact_adam, start)


def test_pytorchs_optimiser_goes_on_from_the_kernels_and_the_other_way_round():
    s, a, _, y = make_batch(20, 4, 2, 1, 0)
    batch, results = Batch(s, a, target=y), []
    for order in ((kernel_step, torch_step, kernel_step), (torch_step, kernel_step, torch_step)):
        module, target = networks.critic(4, 2, (24, 16)), networks.critic(4, 2, (24, 16), seed=5)
        adam = adam_of(module)
        for step in order:
            step(module, target, adam, batch)
        results.append([*module.parameters(), *target.parameters(), *moments(adam, module)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one.detach(), other.detach()) < 1e-5


def test_two_launches_and_the_plain_path_agree():
    s, a, _, y = make_batch(20, 4, 2, 1, 0)
    fused, plain = networks.critic(4, 2, (24, 16)), networks.critic(4, 2, (24, 16))
    adams = adam_of(fused), adam_of(plain)
    with count_launches() as launches:
        kernel_step(fused, None, adams[0], Batch(s, a, target=y))
    assert launches == ["packing_kernel", *training_launches(2)]
    mlp_loss(stack_of(plain), s, a, y)[0].backward()
    adams[1].step()
    for one, other in zip(moments(adams[0], fused), moments(adams[1], plain), strict=True):
        assert relative_error(one, other) < 2**-22
    for one, other in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-4 * RATE


def test_wrong_arguments_change_nothing():
    module, other = networks.critic(4, 2, (24, 16)), networks.critic(4, 2, (24, 17))
    s, a, _, y = make_batch(5, 4, 2, 1, 0)
    before = [p.detach().clone() for p in module.parameters()]
    cases = [
        (Batch(s, a, target=y), networks.packed(other), adam_of(module), (), "packed has widths"),
        (Batch(s, a), networks.packed(module), adam_of(module), (), "noise and target are both"),
        (
            Batch(s, a, target=y),
            networks.packed(module),
            torch.optim.Adam(module.parameters(), betas=(0.5, 0.999)),
            (),
            r"betas is \(0.5, 0.999\), expected \(0.9, 0.999\)",
        ),
        (
            Batch(s, a, target=y),
            networks.packed(module),
            adam_of(module),
            stack_of(other).parameters,
            "a target parameter has shape",
        ),
        (Batch(s, a, noise=a), networks.packed(module), adam_of(module), (), "noise is given, expected a network"),
    ]
    for batch, packed, adam, targets, message in cases:
        with pytest.raises(ValueError, match=message):
            training_step_(stack_of(module), packed, batch, adam, targets=targets)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))
