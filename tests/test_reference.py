"""The torch backend against automatic differentiation and PyTorch's own layers, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from release import relative_error

from vgf_fast import reference
from vgf_fast.networks import EnsembleMLP, GaussianBehavior, VelocityField

F64 = torch.float64
sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(0, 4),
        "particles": st.integers(1, 9),
        "action": st.integers(1, 5),
        "observation": st.integers(1, 7),
        "members": st.integers(1, 4),
        "hidden": st.lists(st.integers(3, 19), min_size=1, max_size=4).map(tuple),
        "layer_norm": st.booleans(),
        "activation": st.sampled_from(["relu", "gelu", "swish"]),
        "aggregation": st.sampled_from(["mean", "min"]),
        "seed": st.integers(0, 2**16),
    }
)


def randomised(module, generator):
    """The module in float64 with no parameter at its special initial value."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return module


def plain_mlp(module, x):
    """The same networks out of torch.nn.functional, a member at a time, concatenated input: [R, in] -> [E, R, out]."""
    outputs = []
    for e in range(module.weights[0].shape[0]):
        h = x
        for i, (weight, bias) in enumerate(zip(module.weights, module.biases, strict=True)):
            h = torch.nn.functional.linear(h, weight[e].T, bias[e])
            if i + 1 == len(module.weights):
                break
            if len(module.norm_scales):
                h = torch.nn.functional.layer_norm(
                    h, h.shape[-1:], module.norm_scales[i][e], module.norm_biases[i][e], 1e-6
                )
            h = {
                "relu": torch.relu,
                "gelu": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
                "swish": lambda y: y * torch.sigmoid(y),
            }[module.activation](h)
        outputs.append(h)
    return torch.stack(outputs)


def make_critic(s, generator):
    critic = EnsembleMLP(
        s["observation"], s["action"], s["hidden"], s["members"], s["layer_norm"], s["activation"], generator
    )
    return randomised(critic, generator)


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_critic_value_and_score_equal_automatic_differentiation(s):
    check_value_and_score(s, lambda score, truth: relative_error(score, truth) < 1e-9)


def test_score_where_layer_norm_leaves_none():
    """LayerNorm of two units is -1 and 1 whatever they are: the gradient's terms are of order 1 and cancel."""
    sizes = {"batch": 1, "particles": 1, "action": 1, "observation": 1, "members": 3, "hidden": (17, 2)}
    s = {**sizes, "layer_norm": True, "activation": "relu", "aggregation": "mean", "seed": 146}
    check_value_and_score(s, lambda score, truth: (score - truth).abs().max() < 1e-14 and truth.abs().max() < 1e-6)


def check_value_and_score(s, close):
    generator = torch.Generator().manual_seed(s["seed"])
    critic = make_critic(s, generator)
    observations = torch.randn(s["batch"], s["observation"], generator=generator, dtype=F64)
    actions = torch.randn(s["batch"], s["particles"], s["action"], generator=generator, dtype=F64)

    leaf = actions.clone().requires_grad_()
    states = observations.unsqueeze(1).expand(-1, s["particles"], -1)
    q = plain_mlp(critic, torch.cat([states, leaf], dim=2).flatten(0, 1)).view(s["members"], *actions.shape[:2])
    (q.mean(dim=0) if s["aggregation"] == "mean" else q.min(dim=0).values).sum().backward()

    at_states = reference.CriticAtStates(critic.stacked(), observations)
    values, score = at_states.values_and_score(actions, s["aggregation"])
    assert relative_error(values, q.detach()) < 1e-11
    assert close(score, leaf.grad)
    assert torch.equal(at_states.values(actions), values)
    assert not values.requires_grad
    assert not score.requires_grad


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(1, 5))
def test_behavior_flow_equals_plain_euler_steps(s, steps):
    generator = torch.Generator().manual_seed(s["seed"])
    velocity = VelocityField(s["observation"], s["action"], s["hidden"], s["layer_norm"], s["activation"], generator)
    randomised(velocity, generator)
    observations = torch.randn(s["batch"], s["observation"], generator=generator, dtype=F64)
    noise = torch.randn(s["batch"], s["particles"], s["action"], generator=generator, dtype=F64)
    states = observations.unsqueeze(1).expand(-1, s["particles"], -1)
    x = noise
    for k in range(steps):
        time = torch.full((*x.shape[:2], 1), k / steps, dtype=F64)
        x = x + plain_mlp(velocity, torch.cat([states, x, time], dim=2).flatten(0, 1))[0].view_as(x) / steps
    particles = reference.behavior_flow(velocity.stacked(), observations, noise, steps)
    assert relative_error(particles, x.clamp(-1, 1).detach()) < 1e-11


def test_the_trained_forward_pass_has_the_gradients_of_plain_layers():
    generator = torch.Generator().manual_seed(0)
    for activation in ("relu", "gelu", "swish"):
        for layer_norm in (True, False):
            critic = randomised(EnsembleMLP(5, 3, (9, 7), 3, layer_norm, activation, generator), generator)
            x = torch.randn(6, 8, generator=generator, dtype=F64)
            weight = torch.randn(3, 6, 1, generator=generator, dtype=F64)
            gradients = [
                torch.autograd.grad((output * weight).sum(), list(critic.parameters()))
                for output in (reference.mlp_forward(critic.stacked(), x), plain_mlp(critic, x))
            ]
            for ours, plain in zip(*gradients, strict=True):
                assert relative_error(ours, plain) < 1e-11


def release_direction(x, score, temperature, bandwidth_gradient, kernel="rbf"):
    """phi as defined: automatic gradient of sum_ij K(x_i, stop(x_j)), with the median in it or held constant."""
    batch, n, _ = x.shape
    leaf = x.clone().requires_grad_()
    distances = (leaf[:, :, None] - x.detach()[:, None]).square().sum(dim=-1)
    ordered = distances.reshape(batch, n * n).sort(dim=1, stable=True).values
    median = (ordered[:, (n * n - 1) // 2] + ordered[:, n * n // 2]) / 2
    h = (median if bandwidth_gradient else median.detach()) / (2 * math.log(n + 1))
    gamma = 1 / (1e-6 + 2 * torch.where(h > 1e-12, h, torch.full_like(h, 1e-12)))
    scaled = gamma.view(-1, 1, 1) * distances
    matrix = torch.exp(-scaled) if kernel == "rbf" else (1 + scaled) ** -0.5
    matrix.sum().backward()
    return (matrix.detach() @ score / temperature - leaf.grad) / n


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 4),
    st.integers(1, 13),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["rbf", "imq"]),
    st.floats(0.05, 2.0),
    st.integers(0, 999),
)
def test_svgd_direction_equals_automatic_differentiation(
    batch, n, width, bandwidth_gradient, kernel, temperature, seed
):
    generator = torch.Generator().manual_seed(seed)
    x, score = (torch.randn(batch, n, width, generator=generator, dtype=F64) for _ in range(2))
    phi = reference.svgd_direction(x, score, temperature, bandwidth_gradient, kernel=kernel)
    assert relative_error(phi, release_direction(x, score, temperature, bandwidth_gradient, kernel)) < 1e-9


@pytest.mark.parametrize("n", [4, 5, 8, 10])
def test_svgd_direction_with_tied_distances(n):
    generator = torch.Generator().manual_seed(n)
    # Particles in few corners of the square, as clipping leaves them: many pairs are exactly as far apart.
    x = torch.randint(0, 2, (64, n, 2), generator=generator).to(F64) * 2 - 1
    score = torch.randn(64, n, 2, generator=generator, dtype=F64)
    for bandwidth_gradient in (False, True):
        truth = release_direction(x, score, 0.1, bandwidth_gradient)
        assert relative_error(reference.svgd_direction(x, score, 0.1, bandwidth_gradient), truth) < 1e-9


def test_simplified_direction_is_the_kernel_mean_of_the_score():
    x, score = torch.randn(2, 3, 6, 4, dtype=F64).unbind()
    kernel, _, _ = reference.kernel_matrix(x)
    phi = reference.svgd_direction(x, score, 0.1, repulsion=False)
    assert relative_error(phi, torch.einsum("bij,bja->bia", kernel, score) / 6) < 1e-12


def test_clumped_particles_keep_their_direction_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = 0.7 + 1e-4 * torch.randn(8, 10, 6, generator=generator, dtype=F64)
    x = x.float().double()
    score = torch.zeros_like(x)
    truth = reference.svgd_direction(x, score, 0.1)
    assert relative_error(reference.svgd_direction(x.float(), score.float(), 0.1), truth) < 1e-5


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
def test_particle_steps_equal_pytorchs_optimisers(optimizer):
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(3, 5, 2, generator=generator, dtype=F64)
    expected = torch.nn.Parameter(x.clone())
    kind = {"adam": torch.optim.Adam, "ascent": torch.optim.SGD}[optimizer]
    theirs = kind([expected], lr=0.05, maximize=True)
    moments = [torch.zeros_like(x), torch.zeros_like(x)] if optimizer == "adam" else [None, None]
    for step in range(1, 5):
        score = torch.randn(x.shape, generator=generator, dtype=F64)
        expected.grad = reference.svgd_direction(expected.detach(), score, 0.2)
        theirs.step()
        expected.data.clamp_(-1, 1)
        reference.svgd_step_(x, score, *moments, step, 0.05, 0.2, optimizer=optimizer)
        assert relative_error(x, expected.detach()) < 1e-12


def test_losses_by_their_definitions():
    generator = torch.Generator().manual_seed(0)
    q, y = torch.randn(3, 40, generator=generator, dtype=F64), torch.randn(40, generator=generator, dtype=F64)
    td = expectile = sql = 0.0
    for b in range(40):
        for e in range(3):
            u = (y[b] - q[e, b]).item()
            td += u * u / 40
            expectile += (0.9 if u >= 0 else 0.1) * u * u / 40
            term = u / (2 * 0.9) + 1
            sql += (0.9 * (term * term if term > 0 else 0.0) - u) / 40
    assert reference.td_loss(q, y).item() == pytest.approx(td, rel=1e-12)
    assert reference.expectile_loss(q, y, 0.9).item() == pytest.approx(expectile, rel=1e-12)
    assert reference.sql_loss(q, y, 0.9).item() == pytest.approx(sql, rel=1e-12)


@pytest.mark.parametrize("tanh", [False, True])
def test_gaussian_likelihood_equals_torch_distributions(tanh):
    from torch.distributions import Independent, Normal, TransformedDistribution
    from torch.distributions.transforms import TanhTransform

    generator = torch.Generator().manual_seed(0)
    mean, actions = torch.randn(2, 30, 4, generator=generator, dtype=F64).unbind()
    actions = actions.tanh() * 0.99
    log_std = torch.tensor([-7.0, -1.0, 0.5, 3.0], dtype=F64)
    distribution = Normal(mean, log_std.clamp(-5, 2).exp())
    if tanh:
        distribution = TransformedDistribution(distribution, TanhTransform())
    truth = Independent(distribution, 1).log_prob(actions)
    assert relative_error(reference.gaussian_log_likelihood(mean, log_std, actions, tanh), truth) < 1e-10
    noise = torch.randn(30, 6, 4, generator=generator, dtype=F64)
    draws = reference.gaussian_sample(mean, log_std, noise, tanh)
    expected = mean[:, None] + log_std.clamp(-5, 2).exp() * noise
    assert relative_error(draws, (expected.tanh() if tanh else expected).clamp(-1, 1)) < 1e-12


def test_gaussian_behavior_starts_near_a_zero_mean():
    behavior = GaussianBehavior(7, 3, (32, 32), generator=torch.Generator().manual_seed(0))
    assert behavior(torch.randn(50, 7)).abs().max() < 0.5
    assert torch.equal(behavior.log_std, torch.zeros(3))


def test_initialisation_is_fan_average_uniform():
    critic = EnsembleMLP(29, 8, (256, 512), 2, generator=torch.Generator().manual_seed(0))
    for weight in critic.weights:
        limit = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        assert weight.abs().max() <= limit
        assert weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.1)
    assert not torch.equal(critic.weights[0][0], critic.weights[0][1])
    assert all(not bias.any() for bias in critic.biases)


def test_selection():
    particles = torch.arange(24.0).view(2, 4, 3)
    q = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    action, index = reference.select_particle(particles, q)
    assert index.tolist() == [1, 0]
    assert torch.equal(action, particles[[0, 1], [1, 0]])
    # The softmax of log(1 : 1 : 2) draws the third particle for the upper half of the unit interval.
    q = torch.log(torch.tensor([[1.0, 1.0, 2.0]])).expand(5, -1)
    uniform = torch.tensor([0.0, 0.24, 0.26, 0.51, 0.99])
    _, index = reference.select_particle(torch.zeros(5, 3, 1), q, "softmax", 1.0, uniform)
    assert index.tolist() == [0, 0, 1, 2, 2]
    _, index = reference.select_particle(torch.zeros(5, 3, 1), q, "random", 1.0, uniform)
    assert index.tolist() == [0, 0, 0, 1, 2]


def test_td_target():
    q = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 5.0], [6.0, 1.0]]], dtype=F64)
    rewards, masks = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    assert reference.td_target(q, rewards, masks, 0.5).tolist() == [1 + 0.5 * 1.0, 2.0]
    assert reference.td_target(q, rewards, masks, 0.5, "mean", "max").tolist() == [1 + 0.5 * 3.5, 2.0]


def test_bfloat16_is_as_close_to_float64_as_pytorchs_own_layers_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    critic = EnsembleMLP(29, 8, (64, 64, 64, 64), generator=generator)
    observations = torch.randn(64, 29, generator=generator)
    actions = torch.rand(64, 10, 8, generator=generator) * 2 - 1
    ours = reference.CriticAtStates(critic.stacked().to(torch.bfloat16), observations).values_and_score(actions)

    def with_autograd(dtype):
        leaf = actions.to(dtype).requires_grad_()
        states = observations.to(dtype).unsqueeze(1).expand(-1, 10, -1)
        q = plain_mlp(critic.to(dtype), torch.cat([states, leaf], dim=2).flatten(0, 1)).view(2, 64, 10)
        q.mean(dim=0).sum().backward()
        return q.detach().double(), leaf.grad.double()

    theirs, truth = with_autograd(torch.bfloat16), with_autograd(torch.float64)
    # Weights rounded to bfloat16 on the way are the same for both: what differs is the arithmetic.
    for mine, plain, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - exact).norm() <= 2 * (plain - exact).norm()
