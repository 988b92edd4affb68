"""The critic kernel against the closed-form gradients in float64, PyTorch in float32, and the release's numbers."""

import networks
import oracle
import pytest
import torch
from properties import given, settings, st
from release import FLOWS, load_flow, relative_error
from tolerances import BOUNDS, F32, assert_accurate

pytest.importorskip("triton")

from vgf_fast.kernels import sequence

from vgf_fast import reference

seeds = st.integers(0, 2**16)
batches = st.one_of(
    st.tuples(st.integers(0, 8), st.integers(1, 12)),
    st.tuples(st.just(2), st.sampled_from([64, 65, 128])),
)
# LayerNorm of a handful of numbers magnifies rounding in any arithmetic.
widths = st.one_of(
    st.lists(st.integers(8, 40), min_size=1, max_size=6).map(tuple),
    st.sampled_from([(16,), (512, 17), (300,), (1024,), (33, 257)]),
)


def values_and_score(module, states, actions, aggregation, **options):
    with oracle.nan_filled_empty():
        return sequence.values_and_score(networks.packed(module), states, actions, aggregation, **options)


def truth_and_plain(module, states, actions, aggregation):
    exact, plain = (
        reference.CriticAtStates(weights, states.to(dtype)).values_and_score(actions.to(dtype), aggregation)
        for weights, dtype in ((networks.exact(module), torch.float64), (module.stacked(), torch.float32))
    )
    return exact, plain


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batches,
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    widths,
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from(["relu", "gelu", "swish"]),
    st.sampled_from(["mean", "min"]),
    st.sampled_from(networks.LAYERS),
    seeds,
)
def test_any_size(batch, sizes, hidden, members, layer_norm, activation, aggregation, layers, seed):
    module = networks.critic(*sizes, hidden, members, layer_norm, activation, seed)
    states, actions = networks.states_and_actions(*batch, *sizes, seed)
    q, score = values_and_score(module, states, actions, aggregation, layers=layers)
    (q_truth, score_truth), _ = truth_and_plain(module, states, actions, aggregation)
    assert q.shape == q_truth.shape
    assert score.shape == score_truth.shape
    assert relative_error(q, q_truth) < BOUNDS["critic_value"][F32]
    assert relative_error(score, score_truth) < BOUNDS["critic_score"][F32]


# states, particles, observation and action dimension, hidden widths: each at its largest, beside odd ones.
LARGEST = [
    ((2, 128), (512, 128), (33, 17, 40, 16, 9, 24)),
    ((5, 13), (511, 63), (1024,)),
    ((2, 3), (3, 64), (1023, 16)),
]


@pytest.mark.parametrize(("batch", "sizes", "hidden"), LARGEST)
def test_the_largest_sizes(batch, sizes, hidden):
    module = networks.critic(*sizes, hidden, 2, True, "swish", seed=1)
    states, actions = networks.states_and_actions(*batch, *sizes, seed=2)
    result = values_and_score(module, states, actions, "min")
    exact, plain = truth_and_plain(module, states, actions, "min")
    for name, value, truth, other in zip(("critic_value", "critic_score"), result, exact, plain, strict=True):
        assert_accurate(name, value, truth, other, truth.abs().max())


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize(("layer_norm", "activation"), [(True, "relu"), (False, "swish"), (True, "gelu")])
def test_as_accurate_as_pytorch(layer_norm, activation, aggregation):
    module = networks.critic(29, 8, (64, 48, 64), 2, layer_norm, activation, seed=3)
    states, actions = networks.states_and_actions(40, 10, 29, 8, seed=4)
    result = values_and_score(module, states, actions, aggregation)
    exact, plain = truth_and_plain(module, states, actions, aggregation)
    for name, value, truth, other in zip(("critic_value", "critic_score"), result, exact, plain, strict=True):
        assert_accurate(name, value, truth, other, truth.abs().max())


@pytest.mark.parametrize("hidden", [(1,), (3, 1, 2)])
def test_widths_of_a_few(hidden):
    module = networks.critic(3, 2, hidden, 2, False, "swish")
    states, actions = networks.states_and_actions(5, 3, 3, 2)
    result = values_and_score(module, states, actions, "min")
    exact, plain = truth_and_plain(module, states, actions, "min")
    for name, value, truth, other in zip(("critic_value", "critic_score"), result, exact, plain, strict=True):
        assert_accurate(name, value, truth, other, truth.abs().max())


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    module = networks.critic(6, 5, (24, 24))
    states, actions = networks.states_and_actions(7, 3, 6, 5)
    expected = values_and_score(module, states, actions, "mean")
    result = values_and_score(module, oracle.arrange(states, layout)[0], oracle.arrange(actions, layout)[0], "mean")
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_members_that_agree_share_the_first_ones_gradient():
    module = networks.critic(4, 3, (16, 16), members=3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    states, actions = networks.states_and_actions(3, 4, 4, 3)
    _, smallest = values_and_score(module, states, actions, "min")
    _, mean = values_and_score(module, states, actions, "mean")
    assert relative_error(smallest, mean) < BOUNDS["critic_score"][F32]


@pytest.mark.parametrize("layers", networks.LAYERS)
def test_another_configuration_gives_the_same(layers):
    module = networks.critic(6, 5, (24, 30, 20))
    states, actions = networks.states_and_actions(9, 5, 6, 5)
    expected = values_and_score(module, states, actions, "mean")
    result = values_and_score(module, states, actions, "mean", layers=layers)
    assert relative_error(result[0], expected[0]) < BOUNDS["critic_value"][F32]
    assert relative_error(result[1], expected[1]) < BOUNDS["critic_score"][F32]


@pytest.mark.parametrize("name", FLOWS)
def test_the_releases_scores(name):
    flow = load_flow(name, torch.float32)
    for particles, score in zip(flow["particles"][:-1], flow["score"], strict=True):
        states = flow["obs"].to(networks.DEVICE)
        _, result = values_and_score(
            flow.critic.to(networks.DEVICE), states, particles.to(networks.DEVICE), flow.meta["vgf_q_agg"]
        )
        assert relative_error(result.cpu(), score) < BOUNDS["release_score"][F32]
