"""Numbers that are not finite in the precision they are used in are refused on a CPU, and named."""

import contextlib

import networks
import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast.backends import native

NAN, INF = float("nan"), float("inf")
STATES, PARTICLES = networks.states_and_actions(3, 6, 5, 3)


def made(**options):
    sizes = {"observation_dim": 5, "action_dim": 3, "hidden_dims": (32, 32), "behavior_hidden_dims": (32,)}
    return vgf.VGFPolicy(vgf.VGFConfig(**sizes, particles=6, **options))


def put(tensor, value, place=0):
    tensor = tensor.clone()
    tensor.view(-1)[place] = value
    return tensor


@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_noise(value, behavior):
    noise = put(PARTICLES, value, 20)
    with pytest.raises(ValueError, match="noise has NaN or infinity in row 1"):
        made(behavior=behavior).sample_actions(STATES, noise=noise)


@pytest.mark.parametrize("amortized", [False, True])
@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("compiled", [True, False])
def test_every_weight(compiled, behavior, amortized):
    """Wherever one of a network that acts is not a number."""
    policy = made(behavior=behavior, amortized=amortized)
    plain = contextlib.nullcontext if compiled else native.off
    for name, parameter in policy.named_parameters():
        if name.startswith("target_critic"):
            continue
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.fill_(NAN)
        with plain(), pytest.raises(ValueError, match="not finite|NaN"):
            policy.sample_actions(STATES)
        with torch.no_grad():
            parameter.copy_(before)
    assert policy.sample_actions(STATES).isfinite().all()


def test_the_weight_is_named():
    policy = made()
    with torch.no_grad():
        policy.critic.weights[1][0, 3, 4] = NAN
    with pytest.raises(ValueError, match=r"critic's weights\[1\] has values that are not finite"):
        policy.sample_actions(STATES, flow_steps=0)


def test_observations_in_the_dtype_of_the_weights():
    large = np.full(5, 1e5, np.float32)
    assert made().sample_actions(large).isfinite().all()
    with pytest.raises(ValueError, match="observations has NaN or infinity in row 0, expected .* torch.float16"):
        made().half().sample_actions(large)
    with pytest.raises(ValueError, match="observations reaches 3e\\+38, expected smaller numbers"):
        made().sample_actions(np.full(5, 3e38))


def test_sums_that_overflow_are_no_error():
    assert vgf.td_target(torch.zeros(2, 4, 3), torch.full((4,), 3e38), torch.ones(4), 0.9).eq(3e38).all()
    action, _ = vgf.select_particle(PARTICLES, torch.full((3, 6), 3e38))
    assert torch.equal(action, PARTICLES[:, 0])


CRITIC, VELOCITY = networks.critic(5, 3, (32, 32)), networks.velocity(5, 3, (32,))
BUDGET = vgf.TransportBudget(2, 0.1, 0.1)
Q = torch.zeros(2, 3, 6)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("observations", lambda x: vgf.critic_value_and_score(CRITIC, put(STATES, x), PARTICLES)),
        ("actions", lambda x: vgf.critic_value_and_score(CRITIC, STATES, put(PARTICLES, x))),
        ("particles", lambda x: vgf.svgd_direction(put(PARTICLES, x), PARTICLES, 0.1)),
        ("score", lambda x: vgf.svgd_direction(PARTICLES, put(PARTICLES, x), 0.1)),
        ("observations", lambda x: vgf.behavior_flow(VELOCITY, put(STATES, x), PARTICLES, 2)),
        ("noise", lambda x: vgf.behavior_flow(VELOCITY, STATES, put(PARTICLES, x), 2)),
        ("observations", lambda x: vgf.value_gradient_flow(CRITIC, put(STATES, x), PARTICLES, BUDGET)),
        ("particles", lambda x: vgf.value_gradient_flow(CRITIC, STATES, put(PARTICLES, x), BUDGET)),
        ("particles", lambda x: vgf.value_gradient_flow(CRITIC, STATES, put(PARTICLES, x), BUDGET, evaluate=False)),
        ("q", lambda x: vgf.select_particle(PARTICLES, put(Q[0], x))),
        ("q", lambda x: vgf.td_target(put(Q[:1], x), torch.zeros(3), torch.ones(3), 0.9)),
        ("rewards", lambda x: vgf.td_target(Q, put(torch.zeros(3), x), torch.ones(3), 0.9)),
        ("masks", lambda x: vgf.td_target(Q + 1.0, torch.zeros(3), put(torch.ones(3), x), 0.9)),
    ],
)
def test_operations(name, call):
    assert call(0.25) is not None
    for value in (NAN, INF):
        with pytest.raises(ValueError, match=f"{name} has NaN or infinity in row 0"):
            call(value)


@pytest.mark.parametrize("value", [1e-40, 1e-20, 0.0, -1.0, NAN, INF, 1e30])
def test_temperatures(value):
    """Quotients and their squares have to fit float32."""
    for call in (
        lambda: vgf.TransportBudget(temperature=value),
        lambda: vgf.VGFConfig(3, 2, selection_temperature=value),
        lambda: vgf.svgd_direction(PARTICLES, PARTICLES, value),
        lambda: vgf.select_particle(PARTICLES, Q[0], "softmax", value),
    ):
        with pytest.raises(ValueError, match=r"temperature is .*, expected a number in \[1e-12, 1e\+12\]"):
            call()


def test_the_extremes_that_are_taken_give_numbers():
    for temperature in (1e-12, 1e12):
        for step_size in (0.0, 1e-40, 1e12):
            budget = vgf.TransportBudget(3, step_size, temperature)
            for optimizer in ("adam", "ascent"):
                result = vgf.value_gradient_flow(CRITIC, STATES, PARTICLES, budget, optimizer=optimizer)
                assert result.particles.isfinite().all()
        chosen, _ = vgf.select_particle(PARTICLES, torch.arange(18.0).view(3, 6), "softmax", temperature)
        assert chosen.isfinite().all()
    with pytest.raises(ValueError, match=r"TransportBudget.step_size is 1e\+39, expected a number in"):
        vgf.TransportBudget(step_size=1e39)
    for discount in (NAN, INF, -0.1, 2.0):
        with pytest.raises(ValueError, match="discount is"):
            vgf.td_target(Q, torch.zeros(3), torch.ones(3), discount)


def test_training_is_left_to_notice_by_its_losses():
    policy = made()
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=3))
    with torch.no_grad():
        policy.critic.weights[0].fill_(NAN)
    batch = {"observations": STATES, "next_observations": STATES, "actions": PARTICLES[:, 0]}
    metrics = learner.update({**batch, "rewards": torch.zeros(3), "masks": torch.ones(3)})
    assert metrics["critic_loss"].isnan()
