"""Forward pass, losses and every gradient of the training kernels, against automatic differentiation in float64."""

import copy

import networks
import oracle
import pytest
import torch
from launches import count_launches
from properties import given, settings, st
from release import relative_error
from tolerances import BF16, BOUNDS, F32, assert_accurate

pytest.importorskip("triton")

from vgf_fast.kernels import optimizer, training
from vgf_fast.kernels.packing import Stack
from vgf_fast.kernels.training import mlp, mlp_loss

from vgf_fast import reference

# Unused columns of a tile hold whatever was in memory, and the interpreter warns where a GPU is silent.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LOSSES = {"squared": reference.td_loss, "expectile": reference.expectile_loss, "sql": reference.sql_loss}
WEIGHT = 0.7
# LayerNorm of a handful of numbers magnifies rounding in any arithmetic.
widths = st.lists(st.integers(8, 40), min_size=1, max_size=6).map(tuple)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 is wrong in Triton's interpreter")


def stack_of(module):
    return Stack(*module.stacked(), module.observation_dim, module.action_dim)


def make_batch(batch, observation_dim, action_dim, outputs, seed, time=False):
    """Observations, actions, time or None, target [batch, outputs]."""
    generator = torch.Generator().manual_seed(seed)
    s, a, y = (torch.randn(batch, n, generator=generator) for n in (observation_dim, action_dim, outputs))
    t = torch.rand(batch, 1, generator=generator) if time else None
    return tuple(None if x is None else x.to(networks.DEVICE) for x in (s, a, t, y))


def gradients(module, inputs, function):
    """What ``function`` of fresh leaves returns, and its first result's gradients: parameters, then inputs."""
    module.zero_grad()
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    results[0].backward()
    grads = [parameter.grad for parameter in module.parameters()]
    return [r.detach() for r in results], grads + [leaf.grad for leaf in leaves if leaf is not None]


def torch_loss(module, loss, target):
    """Loss and outputs [E, B, OUT] by PyTorch's operations in the dtype of the module."""

    def function(s, a, t):
        out = reference.mlp_forward(module.stacked(), torch.cat([s, a] if t is None else [s, a, t], dim=1))
        y = target.to(out.dtype)
        if out.shape[2] > 1:
            return reference.flow_matching_loss(out[0], y), out
        weight = () if loss == "squared" else (WEIGHT,)
        return LOSSES[loss](out[..., 0], y[:, 0], *weight), out

    return function


def kernel_loss(module, loss, target, **options):
    def function(s, a, t):
        with oracle.nan_filled_empty():
            return mlp_loss(stack_of(module), s, a, target, loss, WEIGHT, t, **options)

    return function


def in_float64(module, inputs, loss, target):
    double = copy.deepcopy(module).double()
    return gradients(double, [None if x is None else x.double() for x in inputs], torch_loss(double, loss, target))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    widths,
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["relu", "gelu", "swish"]),
    st.sampled_from(list(LOSSES)),
    st.integers(0, 2**16),
)
def test_any_critic(batch, sizes, hidden, members, layer_norm, activation, loss, seed):
    module = networks.critic(*sizes, hidden, members, layer_norm, activation, seed)
    *inputs, target = make_batch(batch, *sizes, 1, seed)
    results, grads = gradients(module, inputs, kernel_loss(module, loss, target))
    truths, grad_truths = in_float64(module, inputs, loss, target)
    assert relative_error(results[0], truths[0]) < BOUNDS["training_loss"][F32]
    assert relative_error(results[1], truths[1]) < BOUNDS["critic_value"][F32]
    for grad, truth in zip(grads, grad_truths, strict=True):
        assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


@pytest.mark.parametrize(("hidden", "layer_norm"), [((512, 17), True), ((1024,), True), ((33, 257), False)])
def test_wide_layers(hidden, layer_norm):
    module = networks.critic(3, 2, hidden, 1, layer_norm)
    *inputs, target = make_batch(5, 3, 2, 1, 0)
    _, grads = gradients(module, inputs, kernel_loss(module, "squared", target))
    _, truths = in_float64(module, inputs, "squared", target)
    for grad, truth in zip(grads, truths, strict=True):
        assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


@pytest.mark.parametrize("kind", ["critic", "velocity"])
def test_the_largest_sizes(kind):
    """512 observations, 64 action entries, six layers; more rows than a block has, and a row left over."""
    sizes, hidden = (512, 64), (33, 17, 40, 16, 9, 24)
    if kind == "critic":
        module = networks.critic(*sizes, hidden, 2, True, "swish")
    else:
        module = networks.velocity(*sizes, hidden, True, "swish")
    outputs = module.weights[-1].shape[2]
    *inputs, target = make_batch(33, *sizes, outputs, 0, time=kind == "velocity")
    results, grads = gradients(module, inputs, kernel_loss(module, "squared", target))
    truths, grad_truths = in_float64(module, inputs, "squared", target)
    assert relative_error(results[0], truths[0]) < BOUNDS["training_loss"][F32]
    for grad, truth in zip(grads, grad_truths, strict=True):
        assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.integers(1, 70),
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    widths,
    st.booleans(),
    st.sampled_from(["relu", "gelu", "swish"]),
    st.integers(0, 2**16),
)
def test_any_velocity_field(batch, sizes, hidden, layer_norm, activation, seed):
    module = networks.velocity(*sizes, hidden, layer_norm, activation, seed)
    *inputs, target = make_batch(batch, *sizes, sizes[1], seed, time=True)
    results, grads = gradients(module, inputs, kernel_loss(module, "squared", target))
    truths, grad_truths = in_float64(module, inputs, "squared", target)
    assert relative_error(results[0], truths[0]) < BOUNDS["training_loss"][F32]
    assert relative_error(results[1], truths[1]) < BOUNDS["behavior_flow"][F32]
    for grad, truth in zip(grads, grad_truths, strict=True):
        assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


@pytest.mark.parametrize("dtype", [F32, pytest.param(BF16, marks=ON_GPU)])
@pytest.mark.parametrize(
    ("kind", "layer_norm", "activation", "loss"),
    [
        ("critic", True, "relu", "squared"),
        ("critic", True, "gelu", "expectile"),
        ("critic", False, "swish", "sql"),
        ("velocity", False, "relu", "squared"),
        ("velocity", True, "swish", "squared"),
    ],
)
def test_as_accurate_as_pytorch(kind, layer_norm, activation, loss, dtype):
    hidden = (64, 48, 64)
    if kind == "critic":
        module = networks.critic(29, 8, hidden, 2, layer_norm, activation, seed=3)
    else:
        module = networks.velocity(29, 8, hidden, layer_norm, activation, seed=3)
    *inputs, target = make_batch(80, 29, 8, 1 if kind == "critic" else 8, 4, time=kind == "velocity")
    results, grads = gradients(module, inputs, kernel_loss(module, loss, target, dtype=dtype, precision="ieee"))

    def plain_in_dtype(s, a, t):
        x = torch.cat([s, a] if t is None else [s, a, t], dim=1)
        out = reference.mlp_forward(module.stacked().to(dtype), x).float()
        weight = () if loss == "squared" else (WEIGHT,)
        if kind == "velocity":
            return reference.flow_matching_loss(out[0], target), out
        return LOSSES[loss](out[..., 0], target[:, 0], *weight), out

    plain, plain_grads = gradients(module, inputs, plain_in_dtype)
    truths, grad_truths = in_float64(module, inputs, loss, target)
    names = ["training_loss", "critic_value"] + ["training_gradient"] * len(grads)
    for name, value, truth, other in zip(
        names, results + grads, truths + grad_truths, plain + plain_grads, strict=True
    ):
        assert value.dtype == F32
        if dtype == F32:
            assert_accurate(name, value, truth, other, truth.abs().max())
        else:
            assert relative_error(value, truth) < 2.0 * relative_error(other, truth) + 2**-8


@pytest.mark.parametrize(("layer_norm", "hidden"), [(True, (24, 40)), (False, (12,))])
def test_gradients_of_a_function_of_outputs_and_loss(layer_norm, hidden):
    """The op is a node like any other: upstream gradients reach its loss and its outputs."""
    module = networks.critic(5, 3, hidden, 2, layer_norm, "gelu")
    *inputs, target = make_batch(37, 5, 3, 1, 0)

    def of(function):
        def composed(*leaves):
            loss, out = function(*leaves)
            return 2.5 * loss + out.sin().sum(), out

        return composed

    _, grads = gradients(module, inputs, of(kernel_loss(module, "sql", target)))
    double = copy.deepcopy(module).double()
    wide = [None if x is None else x.double() for x in inputs]
    _, truths = gradients(double, wide, of(torch_loss(double, "sql", target)))
    for grad, truth in zip(grads, truths, strict=True):
        assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


def test_outputs_alone_and_only_the_gradients_asked_for():
    module = networks.velocity(5, 3, (24, 40))
    s, a, t, _ = make_batch(37, 5, 3, 3, 0, time=True)
    a.requires_grad_()
    with oracle.nan_filled_empty():
        out = mlp(stack_of(module), s, a, t)
        (grad,) = torch.autograd.grad(out.square().sum(), a)
    assert all(parameter.grad is None for parameter in module.parameters())
    exact = reference.mlp_forward(networks.exact(module), torch.cat([s, a, t], dim=1).double())
    (truth,) = torch.autograd.grad(exact.square().sum(), a)
    assert relative_error(out, exact) < BOUNDS["behavior_flow"][F32]
    assert relative_error(grad, truth) < BOUNDS["training_gradient"][F32]


def test_an_empty_batch():
    module = networks.critic(5, 3, (24, 40))
    out = mlp(stack_of(module), torch.zeros(0, 5, device=networks.DEVICE), torch.zeros(0, 3, device=networks.DEVICE))
    assert out.shape == (2, 0, 1)
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    module = networks.velocity(6, 5, (24, 24))
    *inputs, target = make_batch(35, 6, 5, 5, 0, time=True)
    results, grads = gradients(module, inputs, kernel_loss(module, "squared", target))
    arranged = [oracle.arrange(x, layout)[0] for x in (*inputs, target)]
    module.zero_grad()
    with oracle.nan_filled_empty():
        loss, _ = mlp_loss(stack_of(module), arranged[0], arranged[1], arranged[3], "squared", WEIGHT, arranged[2])
    loss.backward()
    assert torch.equal(loss, results[0])
    for parameter, grad in zip(module.parameters(), grads[:-3], strict=True):
        assert torch.equal(parameter.grad, grad)


def test_twice_is_bit_for_bit_the_same():
    module = networks.critic(6, 5, (40, 24))
    *inputs, target = make_batch(100, 6, 5, 1, 0)
    first, second = (gradients(module, inputs, kernel_loss(module, "squared", target)) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


def training_launches(depth):
    """Of a pass forward and backward with the weights' gradients: 4 D - 1."""
    forward = ["first_layer_kernel", *["rows_kernel", "product_kernel"] * (depth - 1), "head_kernel"]
    return [*forward, *["product_kernel", "rows_kernel"] * (depth - 1), "weight_gradient_kernel"]


def test_launches():
    module = networks.critic(6, 5, (40, 24))
    s, a, _, target = make_batch(10, 6, 5, 1, 0)
    with count_launches() as launches:
        mlp_loss(stack_of(module), s, a, target)[0].backward()
    # The last layer's backward pass is by itself, for the gradient of its outputs comes from elsewhere.
    first, last = training_launches(2)[:4], training_launches(2)[4:]
    assert launches == ["packing_kernel", *first, "head_kernel", *last]


def forward_arguments(module, batch, time):
    s, a, t, y = make_batch(batch, module.observation_dim, module.action_dim, module.weights[-1].shape[2], 0, time)
    parameters = [parameter.detach().clone().requires_grad_() for parameter in stack_of(module).parameters]
    flags = (len(module.norm_scales) > 0, module.activation, "squared", 0.5, F32, "ieee")
    return (s.requires_grad_(), a.requires_grad_(), t, y, parameters, *flags)


@pytest.mark.parametrize("kind", ["critic", "velocity"])
def test_opcheck(kind):
    module = networks.critic(3, 2, (8, 12)) if kind == "critic" else networks.velocity(3, 2, (8,))
    arguments = forward_arguments(module, 5, kind == "velocity")
    torch.library.opcheck(training._mlp_forward, arguments)
    with torch.no_grad():
        _, _, dout, left, z, matrices, vectors = training._mlp_forward(*arguments)
    layout = stack_of(module).layout
    sizes = (layout.inputs, list(layout.widths), layout.layer_norm, module.activation, "ieee")
    for input_gradient in (True, False):
        saved = (dout, arguments[0].detach(), arguments[1].detach(), left, z, matrices, vectors)
        torch.library.opcheck(training._mlp_backward, (*saved, *sizes, input_gradient))


def test_opcheck_of_the_training_step():
    module = networks.velocity(3, 2, (8,))
    adam = torch.optim.Adam(module.parameters(), fused=True)
    stack = stack_of(module)
    state = optimizer.adam_state(adam, stack.parameters)
    packed = networks.packed(module)
    s, a, t, noise = make_batch(5, 3, 2, 2, 0, time=True)
    lists = [[x.detach().clone() for x in group] for group in state[:4]]
    flags = (False, "relu", "squared", 0.5, 1e-3, 0.0, "ieee")
    torch.library.opcheck(
        training._mlp_training_step_, (s, a, t, noise, None, list(packed.tensors), *lists, [], *flags)
    )


def test_compiles_without_a_graph_break():
    module = networks.critic(5, 3, (24, 16))
    *inputs, target = make_batch(9, 5, 3, 1, 0)
    expected = gradients(module, inputs, kernel_loss(module, "expectile", target))

    def function(s, a, t):
        loss, out = mlp_loss(stack_of(module), s, a, target, "expectile", WEIGHT, t)
        return loss, out

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    result = gradients(module, inputs, compiled)
    for a, b in zip(result[0] + result[1], expected[0] + expected[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"observations": torch.zeros(4, 6)}, r"the first layer takes 8 inputs, expected .* 6 \+ 3"),
        ({"actions": torch.zeros(4, 3).double()}, "actions has dtype torch.float64, expected torch.float32"),
        ({"target": torch.zeros(4)}, r"target has shape \(4,\), expected \(4, 1\)"),
        ({"time": torch.zeros(4, 1)}, "time is given, but the first layer takes 8 inputs"),
        ({"loss": "huber"}, "loss is 'huber', expected one of 'squared', 'expectile', 'sql'"),
        ({"loss": "sql", "weight": 0.0}, "weight is 0.0, expected a number > 0"),
        (
            {"observations": torch.zeros(0, 5), "actions": torch.zeros(0, 3), "target": torch.zeros(0, 1)},
            "actions is empty",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    module = networks.critic(5, 3, (24, 16))
    arguments = {"observations": torch.zeros(4, 5), "actions": torch.zeros(4, 3), "target": torch.zeros(4, 1)}
    arguments = {
        name: value.to(networks.DEVICE) if isinstance(value, torch.Tensor) else value
        for name, value in (arguments | change).items()
    }
    stack = stack_of(module)
    if "observations" in change:
        stack = stack._replace(observation_dim=change["observations"].shape[1])
    with pytest.raises(ValueError, match=message):
        mlp_loss(stack, **arguments)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (networks.critic(5, 3, (1025,)), "the widest hidden layer has 1025 units, expected at most 1024"),
        (networks.critic(5, 129, (8,)), "actions and outputs have 129 and 1 columns, expected at most 128"),
        (networks.critic(5, 3, (8,)).double(), "a parameter has dtype torch.float64"),
    ],
)
def test_networks_beyond_the_kernels_limits(module, message):
    s, a, _, target = make_batch(4, 5, module.action_dim, 1, 0)
    with pytest.raises(ValueError, match=message):
        mlp_loss(stack_of(module), s, a, target)
