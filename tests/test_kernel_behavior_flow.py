"""The behaviour flow kernel against the torch backend in float64 and float32, and the release's numbers."""

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


def draw(module, states, noise, steps, **options):
    with oracle.nan_filled_empty():
        return sequence.behavior_flow(networks.packed(module), states, noise, steps, **options)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 8), st.integers(1, 40)),
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    st.lists(st.integers(8, 40), min_size=1, max_size=4).map(tuple),
    st.booleans(),
    st.sampled_from(["relu", "gelu", "swish"]),
    st.integers(1, 6),
    st.sampled_from(networks.LAYERS),
    st.integers(0, 2**16),
)
def test_any_size(batch, sizes, hidden, layer_norm, activation, steps, layers, seed):
    module = networks.velocity(*sizes, hidden, layer_norm, activation, seed)
    states, noise = networks.states_and_actions(*batch, *sizes, seed)
    x = draw(module, states, noise, steps, layers=layers)
    truth = reference.behavior_flow(networks.exact(module), states.double(), noise.double(), steps)
    assert x.shape == truth.shape
    assert relative_error(x, truth) < BOUNDS["behavior_flow"][F32]


@pytest.mark.parametrize(
    ("batch", "sizes", "hidden"),
    [((2, 128), (512, 128), (33, 17, 40, 16, 9, 24)), ((5, 13), (511, 63), (1024,)), ((2, 3), (3, 64), (1023, 16))],
)
def test_the_largest_sizes(batch, sizes, hidden):
    module = networks.velocity(*sizes, hidden, True, "swish", seed=1)
    states, noise = networks.states_and_actions(*batch, *sizes, seed=2)
    truth = reference.behavior_flow(networks.exact(module), states.double(), noise.double(), 2)
    plain = reference.behavior_flow(module.stacked(), states, noise, 2)
    assert_accurate("behavior_flow", draw(module, states, noise, 2), truth, plain, truth.abs().max())


def test_as_accurate_as_pytorch():
    module = networks.velocity(29, 8, (64, 48, 64), seed=3)
    states, noise = networks.states_and_actions(40, 10, 29, 8, seed=4)
    truth = reference.behavior_flow(networks.exact(module), states.double(), noise.double(), 10)
    plain = reference.behavior_flow(module.stacked(), states, noise, 10)
    assert_accurate("behavior_flow", draw(module, states, noise, 10), truth, plain, truth.abs().max())


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    module = networks.velocity(6, 5, (24, 24))
    states, noise = networks.states_and_actions(7, 3, 6, 5)
    expected = draw(module, states, noise, 2)
    result = draw(module, oracle.arrange(states, layout)[0], oracle.arrange(noise, layout)[0], 2)
    assert torch.equal(result, expected)


def test_noise_drawn_inside():
    """Standard normal, the same for the same seed whatever the blocks, another for another seed."""
    module = networks.velocity(3, 4, (16,))
    with torch.no_grad():
        module.weights[-1].zero_()
        module.biases[-1].zero_()
    states, _ = networks.states_and_actions(400, 1, 3, 4)
    seed = torch.tensor([7], device=networks.DEVICE)
    x = draw(module, states, None, 1, particles=5, seed=seed)
    assert torch.equal(x[:20], draw(module, states[:20], None, 1, particles=5, seed=seed))
    assert not torch.equal(x, draw(module, states, None, 1, particles=5, seed=seed + 1))
    # Clipped to [-1, 1]: 31.7 % at the ends; 8,000 draws, four standard errors.
    assert (x.abs() == 1.0).double().mean().item() == pytest.approx(0.3173, abs=4 * (0.3173 * 0.6827 / 8000) ** 0.5)
    assert x.mean().item() == pytest.approx(0.0, abs=4 * (0.516 / 8000) ** 0.5)
    assert len(x.unique()) > 5000


def test_noise_or_a_seed():
    module = networks.velocity(3, 4, (16,))
    states, noise = networks.states_and_actions(2, 3, 3, 4)
    with pytest.raises(ValueError, match="noise and seed"):
        draw(module, states, noise, 1, seed=torch.tensor([1]))
    with pytest.raises(ValueError, match="particles is None"):
        draw(module, states, None, 1, seed=torch.tensor([1]))


@pytest.mark.parametrize("name", FLOWS)
def test_the_releases_particles(name):
    flow = load_flow(name, torch.float32)
    x = draw(
        flow.velocity.to(networks.DEVICE),
        flow["obs"].to(networks.DEVICE),
        flow["noise"].to(networks.DEVICE),
        flow.meta["bc_flow_steps"],
    )
    assert relative_error(x.cpu(), flow["init"]) < BOUNDS["behavior_flow"][F32]
