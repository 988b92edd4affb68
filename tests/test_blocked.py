"""The CPU's blocked form of the torch backend against the plain one: rows in chunks, members one by one."""

import networks
import pytest
import torch
from release import relative_error

from vgf_fast import reference
from vgf_fast.backends import blocked
from vgf_fast.backends import torch as torch_backend

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not blocked._multiplies(torch.float32), reason="needs a CPU with oneDNN"
)
OBSERVATION_DIM, ACTION_DIM = 7, 3
BOUND = 4e-6


def values_and_score(module, states, actions, aggregation):
    weights = module.stacked()
    at_states = blocked.BlockedCriticAtStates(
        blocked.block(weights, OBSERVATION_DIM, actions.shape[0] * actions.shape[1], backward=True), states
    )
    q, score = at_states.values_and_score(actions, aggregation)
    assert torch.equal(at_states.values(actions), q)
    assert torch.equal(at_states.score(actions, aggregation), score)
    return q, score


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize(
    ("widths", "members", "layer_norm", "activation"),
    [
        ((40, 24, 40), 2, True, "relu"),
        ((33, 20), 3, False, "relu"),
        ((40, 24), 2, True, "gelu"),
        ((24,), 1, False, "swish"),
    ],
)
@pytest.mark.parametrize(("batch", "particles"), [(0, 5), (1, 1), (130, 10), (2, 700)])
def test_critic(batch, particles, widths, members, layer_norm, activation, aggregation, monkeypatch):
    """One chunk, several with a rest, and a state with more rows than a chunk."""
    monkeypatch.setattr(blocked, "CHUNK_ENTRIES", 24 * 640)
    module = networks.critic(OBSERVATION_DIM, ACTION_DIM, widths, members, layer_norm, activation)
    states, actions = networks.states_and_actions(batch, particles, OBSERVATION_DIM, ACTION_DIM)
    q, score = values_and_score(module, states, actions, aggregation)
    exact = reference.CriticAtStates(networks.exact(module), states.double())
    q_truth, score_truth = exact.values_and_score(actions.double(), aggregation)
    assert q.dtype == score.dtype == torch.float32
    assert relative_error(q, q_truth) < BOUND
    assert relative_error(score, score_truth) < BOUND


@pytest.mark.parametrize(("layer_norm", "activation"), [(False, "relu"), (True, "swish")])
@pytest.mark.parametrize(("batch", "particles"), [(0, 5), (1, 1), (130, 10)])
def test_behavior_flow(batch, particles, layer_norm, activation):
    module = networks.velocity(OBSERVATION_DIM, ACTION_DIM, (40, 24), layer_norm, activation)
    states, noise = networks.states_and_actions(batch, particles, OBSERVATION_DIM, ACTION_DIM)
    weights = blocked.block(module.stacked(), OBSERVATION_DIM, 100, backward=False)
    truth = reference.behavior_flow(networks.exact(module), states.double(), noise.double(), 4)
    assert relative_error(blocked.behavior_flow(weights, states, noise, 4), truth) < BOUND


def test_it_is_taken_where_rows_are_many():
    module = networks.critic(OBSERVATION_DIM, ACTION_DIM, (24, 24))
    states, actions = networks.states_and_actions(60, 10, OBSERVATION_DIM, ACTION_DIM)
    weights = module.stacked()
    assert isinstance(torch_backend.critic_at_states(weights, states, 10), blocked.BlockedCriticAtStates)
    assert isinstance(torch_backend.critic_at_states(weights, states, 1), reference.CriticAtStates)
    assert isinstance(torch_backend.critic_at_states(weights.to(torch.float64), states, 10), reference.CriticAtStates)
    plain = reference.CriticAtStates(weights, states).score(actions)
    assert relative_error(torch_backend.critic_at_states(weights, states, 10).score(actions), plain) < BOUND


@pytest.mark.skipif(not blocked._multiplies(torch.bfloat16), reason="this CPU has no bfloat16 products")
def test_bfloat16():
    module = networks.critic(OBSERVATION_DIM, ACTION_DIM, (64, 64))
    states, actions = networks.states_and_actions(130, 10, OBSERVATION_DIM, ACTION_DIM)
    truth = reference.CriticAtStates(networks.exact(module), states.double()).score(actions.double())
    weights = module.stacked().to(torch.bfloat16)
    ours = torch_backend.critic_at_states(weights, states, 10).score(actions)
    plain = reference.CriticAtStates(weights, states).score(actions)
    errors = [(score.double() - truth).square().mean().sqrt().item() for score in (ours, plain)]
    assert errors[0] < 1.2 * errors[1]


def test_without_the_operators_the_plain_form_is_taken(monkeypatch):
    blocked._multiplies.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module = networks.critic(OBSERVATION_DIM, ACTION_DIM, (24, 24))
    states, _ = networks.states_and_actions(60, 10, OBSERVATION_DIM, ACTION_DIM)
    assert isinstance(torch_backend.critic_at_states(module.stacked(), states, 10), reference.CriticAtStates)
    blocked._multiplies.cache_clear()
