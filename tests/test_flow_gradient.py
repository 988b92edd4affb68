"""Gradients through the flow: against finite differences, and against a differentiable flow written out here."""

import math

import networks
import oracle
import pytest
import torch
from properties import given, settings, st
from release import relative_error
from tolerances import BOUNDS, F32, within_twice

import vgf_fast as vgf
from vgf_fast.backends import operators

F64 = torch.float64
EXACT = {"flow_gradient": "exact"}
many = settings(max_examples=30, deadline=None, derandomize=True)


def critic(members=2, layer_norm=True, activation="gelu", sizes=(3, 2), widths=(6, 5), dtype=F64, seed=0):
    return networks.critic(*sizes, widths, members, layer_norm, activation, seed).to(dtype)


def velocity(layer_norm=False, activation="swish", sizes=(3, 2), widths=(6, 5), dtype=F64, seed=0):
    module = networks.velocity(*sizes, widths, layer_norm, activation, seed).to(dtype)
    with torch.no_grad():
        # So that not all particles end at the clip.
        module.weights[-1].mul_(0.2)
    return module


def inputs(batch=2, particles=4, sizes=(3, 2), dtype=F64, scale=0.9, seed=0):
    states, x = networks.states_and_actions(batch, particles, *sizes, seed)
    return states.to(dtype).requires_grad_(), (scale * x).to(dtype).requires_grad_()


# --- a differentiable flow, written out ------------------------------------------------------------------------------


def plain_score(module, states, x, aggregation):
    a = x.flatten(0, 1)
    q = module(states.repeat_interleave(x.shape[1], dim=0), a).unflatten(1, x.shape[:2])
    value = q.min(dim=0).values if aggregation == "min" else q.mean(dim=0)
    return q, torch.autograd.grad(value.sum(), x, create_graph=True)[0]


def plain_kernel(rows, columns, n):
    """K of two copies of the particles of every state, each with its own place in the graph."""
    distances = torch.stack([(rows[:, i : i + 1] - columns).square().sum(dim=2) for i in range(n)], dim=1)
    ordered = distances.flatten(1).sort(dim=1, stable=True).values
    median = (ordered[:, (n * n - 1) // 2] + ordered[:, n * n // 2]) / 2.0
    bandwidth = torch.clamp(median / (2.0 * math.log(n + 1.0)), min=1e-12)
    gamma = (1.0 / (1e-6 + 2.0 * bandwidth)).view(-1, 1, 1)
    return distances, gamma


def plain_matrix(distances, gamma, kernel):
    return torch.exp(-gamma * distances) if kernel == "rbf" else (1.0 + gamma * distances) ** -0.5


def plain_direction(x, score, temperature, bandwidth_gradient, repulsion, kernel="rbf"):
    n = x.shape[1]
    distances, gamma = plain_kernel(x, x, n)
    matrix = plain_matrix(distances, gamma, kernel)
    if not repulsion:
        return matrix @ score / n
    if bandwidth_gradient:
        rows = x.clone()
        distances, gamma = plain_kernel(rows, x, n)
        repulsive = -torch.autograd.grad(plain_matrix(distances, gamma, kernel).sum(), rows, create_graph=True)[0]
    else:
        steep = 2.0 * gamma * matrix if kernel == "rbf" else gamma * matrix**3
        repulsive = (steep.unsqueeze(3) * (x.unsqueeze(2) - x.unsqueeze(1))).sum(dim=2)
    return (matrix @ score / temperature + repulsive) / n


def plain_flow(
    module,
    states,
    x,
    budget,
    aggregation="mean",
    bandwidth_gradient=False,
    repulsion=True,
    optimizer="adam",
    kernel="rbf",
):
    """Particles, q and trajectory with the graph of everything that was done."""
    path, m, v = [x], 0.0, 0.0
    for step in range(1, budget.steps + 1):
        # A node of its own: the score's derivative stops here, the gradient through the score does not.
        x = x.clone()
        _, score = plain_score(module, states, x, aggregation)
        change = plain_direction(x, score, budget.temperature, bandwidth_gradient, repulsion, kernel)
        if optimizer == "adam":
            m, v = 0.9 * m + 0.1 * change, 0.999 * v + 0.001 * change**2
            change = m / (1.0 - 0.9**step) / ((v / (1.0 - 0.999**step)).sqrt() + 1e-8)
        x = (x + budget.step_size * change).clamp(-1.0, 1.0)
        path.append(x)
    return x, plain_score(module, states, x.clone(), aggregation)[0], torch.stack(path)


def plain_behavior(module, states, noise, steps):
    n = noise.shape[1]
    x, rows = noise.flatten(0, 1), states.repeat_interleave(n, dim=0)
    for k in range(steps):
        x = x + module(rows, x, x.new_full((len(x), 1), k / steps)) / steps
    return x.clamp(-1.0, 1.0).unflatten(0, noise.shape[:2])


def gradients(outputs, leaves, seed=0):
    """Gradients of a random linear form of the outputs."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=F64).to(t.device, t.dtype) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


# --- exact gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "steps", "step_size", "network", "options"),
    [
        ((2, 4), 2, 0.05, {}, {}),
        ((2, 4), 2, 0.05, {}, {"bandwidth_gradient": True}),
        ((1, 3), 2, 0.05, {"activation": "swish"}, {"q_aggregation": "min"}),
        ((1, 3), 3, 0.05, {"activation": "swish", "layer_norm": False}, {"optimizer": "ascent"}),
        ((2, 3), 2, 0.05, {"activation": "relu"}, {"optimizer": "ascent", "bandwidth_gradient": True}),
        ((2, 4), 2, 0.05, {"members": 1}, {"repulsion": False}),
        ((2, 1), 2, 0.05, {"layer_norm": False}, {}),
        ((2, 2), 1, 0.05, {"members": 3}, {"q_aggregation": "min", "bandwidth_gradient": True}),
        ((2, 4), 2, 0.05, {}, {"kernel": "imq"}),
        ((2, 3), 2, 0.05, {}, {"kernel": "imq", "bandwidth_gradient": True}),
        ((2, 4), 0, 0.05, {}, {}),
        ((2, 4), 3, 0.6, {}, {}),
    ],
)
def test_the_flow_against_finite_differences(shape, steps, step_size, network, options):
    module, (states, x) = critic(**network), inputs(*shape)
    budget = vgf.TransportBudget(steps, step_size, 0.3)

    def flow(states, x):
        return tuple(vgf.value_gradient_flow(module, states, x, budget, return_trajectory=True, **options, **EXACT))

    if step_size > 0.5:
        assert (flow(states, x)[0].abs() == 1.0).any()
    assert torch.autograd.gradcheck(flow, (states, x), fast_mode=True)


def test_one_whole_jacobian():
    module, leaves = critic(), inputs(1, 3)
    budget = vgf.TransportBudget(2, 0.05, 0.3)

    def flow(states, x):
        return vgf.value_gradient_flow(module, states, x, budget, bandwidth_gradient=True, **EXACT)[:2]

    assert torch.autograd.gradcheck(flow, leaves)


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize(("activation", "layer_norm"), [("gelu", True), ("swish", False), ("relu", True)])
def test_the_critic_against_finite_differences(activation, layer_norm, aggregation):
    module = critic(layer_norm=layer_norm, activation=activation)
    assert torch.autograd.gradcheck(
        lambda *leaves: vgf.critic_value_and_score(module, *leaves, aggregation, **EXACT), inputs(), fast_mode=True
    )


@pytest.mark.parametrize(("activation", "layer_norm"), [("gelu", True), ("swish", False)])
def test_the_behavior_flow_against_finite_differences(activation, layer_norm):
    module, leaves = velocity(layer_norm, activation), inputs(scale=2.0)
    particles = vgf.behavior_flow(module, *leaves, 3, **EXACT)
    is_clipped = particles.abs() == 1.0
    assert is_clipped.any()
    assert not is_clipped.all()
    assert torch.autograd.gradcheck(lambda *leaves: vgf.behavior_flow(module, *leaves, 3, **EXACT), leaves)


@many
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7)),
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([("relu", True), ("gelu", False), ("gelu", True), ("swish", True)]),
    st.sampled_from(["mean", "min"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["adam", "ascent"]),
    st.integers(0, 2**16),
)
def test_any_size_against_autograd(
    shape, sizes, widths, members, steps, layers, aggregation, bandwidth_gradient, repulsion, optimizer, seed
):
    module = critic(members, layers[1], layers[0], sizes, widths, seed=seed)
    leaves = inputs(*shape, sizes, seed=seed)
    budget = vgf.TransportBudget(steps, 0.05, 0.4)
    options = (aggregation, bandwidth_gradient, repulsion, optimizer)
    ours = vgf.value_gradient_flow(module, *leaves, budget, *options, return_trajectory=True, **EXACT)
    theirs = plain_flow(module, *leaves, budget, *options)
    for value, truth in zip(ours, theirs, strict=True):
        assert relative_error(value, truth) < 1e-9
    for value, truth in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        assert relative_error(value, truth) < 1e-6
    q, score = vgf.critic_value_and_score(module, *leaves, aggregation, **EXACT)
    for value, truth in zip(
        gradients((q, score), leaves), gradients(plain_score(module, *leaves, aggregation), leaves), strict=True
    ):
        assert relative_error(value, truth) < 1e-9
    field = velocity(layers[1], layers[0], sizes, widths, seed=seed)
    particles, truth = vgf.behavior_flow(field, *leaves, 3, **EXACT), plain_behavior(field, *leaves, 3)
    for value, expected in zip(gradients([particles], leaves), gradients([truth], leaves), strict=True):
        assert relative_error(value, expected) < 1e-9


def test_a_direction_of_zero_has_the_identitys_gradient():
    """Where Adam's root has no derivative; the step's own is that of the direction, here zero, by 1e-8."""
    module, leaves = critic(), inputs(3, 1)
    with torch.no_grad():
        module.weights[-1].zero_()
    result = vgf.value_gradient_flow(module, *leaves, vgf.TransportBudget(3), evaluate=False, **EXACT)
    grad_states, grad_x = torch.autograd.grad(result.particles.sum(), leaves)
    assert torch.equal(grad_x, torch.ones_like(grad_x))
    assert torch.equal(grad_states, torch.zeros_like(grad_states))


def test_gradients_do_not_depend_on_how_states_are_taken_together(monkeypatch):
    module, field, leaves = critic(), velocity(), inputs(5, 3)

    def all_gradients():
        flow = vgf.value_gradient_flow(module, *leaves, vgf.TransportBudget(2), return_trajectory=True, **EXACT)
        return (
            *gradients(flow, leaves),
            *gradients(vgf.critic_value_and_score(module, *leaves, **EXACT), leaves),
            *gradients([vgf.behavior_flow(field, *leaves, 2, **EXACT)], leaves),
        )

    together = all_gradients()
    monkeypatch.setattr(operators, "_CHUNK_ENTRIES", 2 * 3 * 2 * 6)
    for value, expected in zip(all_gradients(), together, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)


def test_only_the_particles_of_every_step_are_kept():
    module, (states, x) = critic(), inputs(3, 4)
    parameters = {parameter.data_ptr() for parameter in module.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        vgf.value_gradient_flow(module, states, x, vgf.TransportBudget(5), **EXACT)
    assert sum(kept) == states.numel() + 6 * x.numel()


# --- the other modes, and what is no gradient ------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), [("torch", F64), ("triton", F32)])
def test_identity_passes_the_gradient_of_the_particles_on(backend, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    module, field, leaves = critic(dtype=dtype), velocity(dtype=dtype), inputs(dtype=dtype)
    options = {"backend": backend}
    budget = vgf.TransportBudget(2)
    result = vgf.value_gradient_flow(
        module, *leaves, budget, return_trajectory=True, flow_gradient="identity", **options
    )
    plain = vgf.value_gradient_flow(module, *leaves, budget, return_trajectory=True, **options)
    for value, expected in zip(result, plain, strict=True):
        assert torch.equal(value, expected)
    states, x = leaves
    weight = torch.arange(x.numel(), dtype=dtype, device=x.device).view_as(x)
    for output, times in ((result.particles, 1), (result.trajectory.sum(dim=0), 3)):
        found = torch.autograd.grad((weight * output).sum(), leaves, retain_graph=True, allow_unused=True)
        assert found[0] is None or not found[0].any()
        assert torch.equal(found[1], times * weight)
    found = torch.autograd.grad(result.q.mean(dim=0).sum(), leaves, allow_unused=True)
    assert found[0] is None or not found[0].any()
    torch.testing.assert_close(found[1], vgf.critic_value_and_score(module, states, plain.particles, **options)[1])
    particles = vgf.behavior_flow(field, *leaves, 3, flow_gradient="identity", **options)
    found = torch.autograd.grad((weight * particles).sum(), leaves, allow_unused=True)
    assert found[0] is None or not found[0].any()
    assert torch.equal(found[1], weight)


def test_there_is_no_graph_unless_asked_for_and_never_one_to_the_weights():
    module, field, leaves = critic(), velocity(), inputs()
    assert not any(t.requires_grad for t in vgf.value_gradient_flow(module, *leaves, vgf.TransportBudget(1))[:2])
    assert not any(t.requires_grad for t in vgf.critic_value_and_score(module, *leaves))
    assert not vgf.behavior_flow(field, *leaves, 2).requires_grad
    result = vgf.value_gradient_flow(module, *leaves, vgf.TransportBudget(1), **EXACT)
    (result.particles.sum() + result.q.sum() + vgf.behavior_flow(field, *leaves, 2, **EXACT).sum()).backward()
    assert all(parameter.grad is None for net in (module, field) for parameter in net.parameters())
    assert all(leaf.grad is not None for leaf in leaves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda *leaves: vgf.value_gradient_flow(critic(), *leaves, vgf.TransportBudget(1), flow_gradient="full"),
            "flow_gradient is 'full', expected one of 'none', 'identity', 'exact'",
        ),
        (lambda *leaves: vgf.behavior_flow(velocity(), *leaves, 1, flow_gradient=None), "flow_gradient is None"),
        (
            lambda *leaves: vgf.critic_value_and_score(critic(), *leaves, flow_gradient="identity"),
            "flow_gradient is 'identity', expected one of 'none', 'exact'",
        ),
    ],
)
def test_wrong_modes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())


def test_second_derivatives_are_refused():
    leaves = inputs()
    q, score = vgf.critic_value_and_score(critic(), *leaves, **EXACT)
    (first,) = torch.autograd.grad(q.sum() + score.square().sum(), leaves[1], create_graph=True)
    with pytest.raises(RuntimeError, match="critic_value_and_score_backward.* no autograd formula"):
        first.sum().backward()


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    module, leaves = critic(), inputs(3, 4)
    budget = vgf.TransportBudget(2)
    awkward = [oracle.arrange(leaf.detach(), layout)[0].requires_grad_() for leaf in leaves]
    expected, found = (
        gradients(vgf.value_gradient_flow(module, *pair, budget, return_trajectory=True, **EXACT), pair)
        for pair in (leaves, awkward)
    )
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_tensors(dtype):
    leaves = inputs(dtype=dtype)
    result = vgf.value_gradient_flow(critic(dtype=torch.bfloat16), *leaves, vgf.TransportBudget(1), **EXACT)
    assert result.particles.dtype == result.q.dtype == torch.float32
    for gradient, leaf in zip(gradients(result[:2], leaves), leaves, strict=True):
        assert gradient.dtype == leaf.dtype == dtype
        assert gradient.isfinite().all()


def test_an_empty_batch():
    leaves = inputs(0, 3)
    result = vgf.value_gradient_flow(critic(), *leaves, vgf.TransportBudget(2), **EXACT)
    for output in (result.particles, result.q, vgf.behavior_flow(velocity(), *leaves, 2, **EXACT)):
        for gradient, leaf in zip(torch.autograd.grad(output.sum(), leaves, retain_graph=True), leaves, strict=True):
            assert gradient.shape == leaf.shape


# --- the kernels' forward pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
def test_the_kernels_forward_pass_has_the_same_gradients(optimizer):
    """Backward passes are one and the same: what differs is rounding of the particles they start from."""
    pytest.importorskip("triton")
    from launches import count_launches

    sizes, budget = (5, 3), vgf.TransportBudget(3, 0.05, 0.5)
    net = {"sizes": sizes, "widths": (16, 24)}
    leaves = {dtype: inputs(6, 5, sizes, dtype) for dtype in (F32, F64)}
    found = {}
    for dtype, backend in ((F32, "triton"), (F32, "torch"), (F64, "torch")):
        pair, choice = leaves[dtype], {"backend": backend, **EXACT}
        with oracle.nan_filled_empty():
            flow = vgf.value_gradient_flow(critic(dtype=dtype, **net), *pair, budget, optimizer=optimizer, **choice)
            valued = vgf.critic_value_and_score(critic(dtype=dtype, **net), *pair, **choice)
            drawn = vgf.behavior_flow(velocity(dtype=dtype, **net), *pair, 3, **choice)
        with count_launches() as launched:
            gradient = [*gradients(flow[:2], pair), *gradients(valued, pair), *gradients([drawn], pair)]
        assert launched == []
        found[dtype, backend] = gradient
    for ours, theirs, truth in zip(found[F32, "triton"], found[F32, "torch"], found[F64, "torch"], strict=True):
        assert relative_error(ours, truth) < BOUNDS["flow_gradient"][F32]
        within_twice(ours, theirs, truth)


# --- operators and torch.compile -------------------------------------------------------------------------------------


def operator_calls(dtype, backend):
    """Every operator with the arguments of every mode."""
    net, field, (states, x) = critic(dtype=dtype), velocity(dtype=dtype), inputs(dtype=dtype)
    q, v = (operators.flat(module.stacked().detach()) for module in (net, field))
    options = (2, 0.05, 0.3, "mean", False, True, "adam", "rbf")
    yield operators.critic_op, (*q, states, x, "min", backend)
    for mode in ("exact", "identity"):
        yield operators.behavior_op, (*v, states, x, 2, backend, mode)
        yield operators.flow_op, (*q, states, x, *options, False, True, backend, mode)
    yield operators.flow_op, (*q, states, x, *options, True, False, backend, "identity")
    yield operators.flow_op, (*q, states.detach(), x.detach(), *options, False, False, backend, "none")


@pytest.mark.parametrize("number", range(7))
def test_operators_are_registered_as_torch_expects(number):
    operator, arguments = list(operator_calls(F64, "torch"))[number]
    torch.library.opcheck(operator, arguments)


def test_operators_of_the_kernels_are_registered_as_torch_expects():
    pytest.importorskip("triton")
    for operator, arguments in list(operator_calls(F32, "triton"))[:3]:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("mode", "backend", "dtype"),
    [(mode, *backend) for mode in ("none", "identity", "exact") for backend in (("torch", F64), ("triton", F32))],
)
def test_compiled_without_graph_breaks(mode, backend, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    module, field, leaves = critic(dtype=dtype), velocity(dtype=dtype), inputs(dtype=dtype)
    budget, chosen = vgf.TransportBudget(2), {"backend": backend}
    score_mode = "exact" if mode == "exact" else "none"

    def everything(states, noise):
        x = vgf.behavior_flow(field, states, noise, 2, flow_gradient=mode, **chosen)
        x = vgf.value_gradient_flow(module, states, x, budget, evaluate=False, flow_gradient=mode, **chosen).particles
        q, score = vgf.critic_value_and_score(module, states, x, "min", flow_gradient=score_mode, **chosen)
        q_mean, fixed = q.detach().mean(dim=0), (x.detach(), score.detach())
        phi = vgf.svgd_direction(*fixed, 0.3, **chosen)
        action, _ = vgf.select_particle(fixed[0], q_mean, **chosen)
        return x, q, score, phi, action, vgf.td_target(q.detach(), q_mean[:, 0], q_mean[:, 1], 0.9, **chosen)

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*leaves)
    eager = everything(*leaves)
    for value, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(value, expected)
        assert value.requires_grad == expected.requires_grad
    if mode != "none":
        # Straight-through gradients reach the noise alone.
        outputs, reached = (3, leaves) if mode == "exact" else (1, leaves[1:])
        found, expected = (gradients(values[:outputs], reached) for values in (compiled, eager))
        torch.testing.assert_close(found, expected)
