"""What no memory can hold is refused before it is asked for, naming the sizes."""

import pytest
import torch

import vgf_fast as vgf
from vgf_fast.common import memory
from vgf_fast.data.replay import ReplayBuffer

GIB = 2**30
MESSAGE = r"need at least [\d,]+\.\d GiB, and cpu has 8\.0"


@pytest.fixture(autouse=True)
def eight_gib(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device="cpu": 8 * GIB if device == "cpu" else None)


def make_policy(particles, **options):
    config = vgf.VGFConfig(3, 2, hidden_dims=(16,), behavior_hidden_dims=(16,), particles=particles, **options)
    return vgf.VGFPolicy(config)


def transitions(size):
    states, numbers = torch.zeros(size, 3), torch.zeros(size)
    return {
        "observations": states, "actions": torch.zeros(size, 2), "next_observations": states, "rewards": numbers,
        "masks": numbers,
    }  # fmt: skip


CRITIC = make_policy(2).critic
# Without memory of their own: any size.
STATES, MANY = torch.zeros(1, 3), torch.zeros(1, 1, 2).expand(1, 200_000, 2)
HUGE_STATES, HUGE = torch.zeros(1, 3).expand(10**8, 3), torch.zeros(1, 1, 2).expand(10**8, 100, 2)
CALLS = {
    "act": lambda: make_policy(200_000).sample_actions(torch.zeros(3)),
    "predict": lambda: make_policy(10**12).predict(torch.zeros(3).numpy()),
    "act, states": lambda: make_policy(10_000).sample_actions(HUGE_STATES[: 10**5]),
    "act, best of N": lambda: make_policy(10**10).sample_actions(torch.zeros(3), flow_steps=0),
    "update": lambda: vgf.Learner(make_policy(200_000)).update(transitions(4)),
    "fit": lambda: vgf.Learner(make_policy(10), vgf.TrainConfig(batch_size=10**12)).fit(
        vgf.Dataset.from_arrays(**transitions(4)), 1
    ),
    "svgd_direction": lambda: vgf.svgd_direction(MANY, MANY, 1.0),
    "value_gradient_flow": lambda: vgf.value_gradient_flow(CRITIC, STATES, MANY, vgf.TransportBudget(1)),
    "trajectory": lambda: vgf.value_gradient_flow(
        CRITIC, STATES, MANY[:, :100], vgf.TransportBudget(10**8), return_trajectory=True
    ),
    "critic_value_and_score": lambda: vgf.critic_value_and_score(CRITIC, HUGE_STATES, HUGE),
    "behavior_flow": lambda: vgf.behavior_flow(make_policy(2).behavior, HUGE_STATES, HUGE, 1),
    "float64": lambda: vgf.critic_value_and_score(
        make_policy(2).critic.double(),
        HUGE_STATES[:1].double().expand(10**6, 3),
        HUGE[:1].double().expand(10**6, 100, 2),
    ),
    "weights": lambda: vgf.VGFPolicy(vgf.VGFConfig(3, 2, hidden_dims=(10**6, 10**6))),
    "replay": lambda: ReplayBuffer(10**12, 3, 2),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_cannot_fit_is_refused(call):
    with pytest.raises(ValueError, match=MESSAGE):
        CALLS[call]()


def test_the_message_names_particles_and_states():
    with pytest.raises(ValueError, match=r"200000 particles for each of 1 states \(action_dim 2, torch.float32\)"):
        make_policy(200_000).sample_actions(torch.zeros(3))


def test_what_fits_is_not_refused(monkeypatch):
    """Nor where nobody knows how much memory there is."""
    assert make_policy(300).sample_actions(torch.zeros(4, 3)).shape == (4, 2)
    monkeypatch.setattr(memory, "total_memory", lambda device: None)
    memory.check_fits("all particles of the world", 10**30, torch.device("cpu"))


def test_the_estimate_is_a_lower_bound_of_what_is_held():
    """Of the pairs of particles, three of which are held at once."""
    x = torch.zeros(2, 300, 3)
    need = memory.flow_bytes((2, 300, 3), x.dtype, x.device, pairs=True)
    assert need >= 3 * 2 * 300 * 300 * 4
    assert memory.flow_bytes((2, 128, 3), x.dtype, x.device, pairs=True) < 2 * 128 * 128 * 4


HAVE = memory.total_memory()


def test_this_machine_says_what_it_has():
    assert HAVE > GIB // 4
