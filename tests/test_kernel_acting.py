"""Whole actions of few states, layer by layer over many programs, against the torch backend in float64 and the release.

Flows of 0, 1, 2, ... steps give a trajectory, of which every step is checked from the kernel's own particles.
"""

import networks
import oracle
import pytest
import torch
from launches import count_launches
from properties import given, settings, st
from release import FLOWS, load_flow, relative_error
from tolerances import BOUNDS, F32

pytest.importorskip("triton")

from test_kernel_flow_step import AMBIGUOUS, STEP_SIZE, TEMPERATURE, check_steps
from vgf_fast.kernels import launch, sequence

import vgf_fast as vgf
from vgf_fast import reference

FEW, MANY = launch.Layers(True), launch.Layers(False)
EULER_STEPS = 2
widths = st.one_of(st.lists(st.integers(8, 33), min_size=1, max_size=3).map(tuple), st.just((9, 8, 9, 8, 9, 16)))
activations = st.sampled_from(["relu", "gelu", "swish"])


def act(velocity, critic, states, noise, steps, **options):
    arguments = (EULER_STEPS, steps, STEP_SIZE, TEMPERATURE)
    options = {"layers": FEW} | options
    with oracle.nan_filled_empty():
        return sequence.act(networks.packed(velocity), networks.packed(critic), states, noise, *arguments, **options)


def check_behavior(velocity, states, noise, particles):
    truth = reference.behavior_flow(networks.exact(velocity), states.double(), noise.double(), EULER_STEPS)
    assert relative_error(particles, truth) < BOUNDS["behavior_flow"][F32]


def check_choice(critic, states, result, aggregation="min", mode="max", temperature=1.0, uniform=None):
    truth = reference.CriticAtStates(networks.exact(critic), states.double()).values(result.particles.double())
    assert relative_error(result.q, truth) < BOUNDS["critic_value"][F32]
    values = reference.aggregate(result.q, aggregation)
    action, index = reference.select_particle(result.particles, values, mode, temperature, uniform)
    assert torch.equal(result.chosen_index, index)
    assert torch.equal(result.action, action)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.tuples(st.integers(0, 16), st.integers(1, 2)),
        st.tuples(st.integers(1, 2), st.integers(3, 20)),
        st.tuples(st.just(1), st.sampled_from([33, 64, 128])),
    ),
    st.tuples(st.integers(1, 70), st.integers(1, 20)),
    widths,
    widths,
    st.integers(1, 2),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    activations,
    activations,
    st.sampled_from(["mean", "min"]),
    st.integers(0, 2**16),
)
def test_any_size(shape, sizes, hidden_v, hidden_c, members, norms, activation_v, activation_c, aggregation, seed):
    velocity = networks.velocity(*sizes, hidden_v, norms[0], activation_v, seed)
    critic = networks.critic(*sizes, hidden_c, members, norms[1], activation_c, seed)
    states, noise = networks.states_and_actions(*shape, *sizes, seed)
    options = {"q_aggregation": aggregation, "repulsion": norms[2], "optimizer": "ascent"}
    # A relu's slope jumps where rounding decides, so that its flow has no certain next step.
    steps = 0 if activation_c == "relu" else 1
    runs = [act(velocity, critic, states, noise, count, **options) for count in range(steps + 1)]
    assert runs[-1].action.shape == (shape[0], sizes[1])
    if shape[0] == 0:
        return
    check_behavior(velocity, states, noise, runs[0].particles)
    check_steps(
        critic,
        states,
        torch.stack([run.particles for run in runs]),
        aggregation,
        "ascent",
        repulsion=norms[2],
    )
    check_choice(critic, states, runs[-1])


@pytest.mark.parametrize(
    ("sizes", "hidden_v", "hidden_c"),
    [
        ((512, 64), (33, 17, 40, 16, 9, 24), (24, 9, 16, 40, 17, 33)),
        ((511, 16), (16,), (1023,)),
        ((3, 1), (1023,), (16,)),
    ],
)
def test_the_largest_sizes(sizes, hidden_v, hidden_c):
    velocity = networks.velocity(*sizes, hidden_v, True, "swish", seed=3)
    critic = networks.critic(*sizes, hidden_c, 2, True, "swish", seed=1)
    states, noise = networks.states_and_actions(2, 3, *sizes, seed=2)
    result = act(velocity, critic, states, noise, 1, optimizer="ascent")
    x = reference.behavior_flow(networks.exact(velocity), states.double(), noise.double(), EULER_STEPS)
    budget = (1, STEP_SIZE, TEMPERATURE, "mean", False, True, "ascent")
    truth = reference.value_gradient_flow(networks.exact(critic), states.double(), x, *budget)
    assert relative_error(result.particles, truth.particles) < BOUNDS["flow_step"][F32]
    check_choice(critic, states, result)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("bandwidth_gradient", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_every_mode(aggregation, bandwidth_gradient, optimizer, activation):
    velocity = networks.velocity(11, 6, (32, 24), seed=3)
    critic = networks.critic(11, 6, (32, 24, 32), 2, activation=activation, seed=1)
    states, noise = networks.states_and_actions(2, 8, 11, 6, seed=2)
    options = {"q_aggregation": aggregation, "bandwidth_gradient": bandwidth_gradient, "optimizer": optimizer}
    runs = [act(velocity, critic, states, noise, steps, **options) for steps in range(4)]
    trajectory = torch.stack([run.particles for run in runs])
    exempt = check_steps(critic, states, trajectory, aggregation, optimizer, bandwidth_gradient=bandwidth_gradient)
    assert exempt < 0.01 * trajectory.numel()
    for run in runs:
        check_choice(critic, states, run)


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize("mode", ["max", "softmax", "random"])
def test_selection(mode, aggregation):
    velocity, critic = networks.velocity(5, 3, (24, 24)), networks.critic(5, 3, (24, 24), seed=1)
    states, noise = networks.states_and_actions(15, 10, 5, 3)
    uniform = torch.linspace(0.01, 0.99, 15, device=networks.DEVICE)
    choice = sequence.Select(mode, 0.3, uniform, aggregation)
    result = act(velocity, critic, states, noise, 1, selection=choice)
    check_choice(critic, states, result, aggregation, mode, 0.3, uniform)


def test_noise_drawn_inside():
    """The numbers that the behaviour flow's kernel draws from the same seed."""
    velocity, critic = networks.velocity(5, 3, (24, 24)), networks.critic(5, 3, (24, 24), seed=1)
    states, _ = networks.states_and_actions(4, 10, 5, 3)
    seed = torch.tensor([7], device=networks.DEVICE)
    result = act(velocity, critic, states, None, 0, particles=10, seed=seed)
    packed = networks.packed(velocity)
    expected = sequence.behavior_flow(packed, states, None, EULER_STEPS, particles=10, seed=seed)
    assert relative_error(result.particles, expected) < BOUNDS["behavior_flow"][F32]
    other = act(velocity, critic, states, None, 0, particles=10, seed=seed + 1)
    assert not torch.equal(result.particles, other.particles)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    velocity, critic = networks.velocity(6, 5, (24, 24)), networks.critic(6, 5, (24, 24), seed=1)
    states, noise = networks.states_and_actions(7, 3, 6, 5)
    expected = act(velocity, critic, states, noise, 1)
    arranged = (oracle.arrange(states, layout)[0], oracle.arrange(noise, layout)[0])
    result = act(velocity, critic, *arranged, 1)
    for name in expected._fields:
        assert torch.equal(getattr(result, name), getattr(expected, name))


def test_broken_states_show():
    velocity, critic = networks.velocity(6, 5, (24, 24)), networks.critic(6, 5, (24, 24), seed=1)
    states, noise = networks.states_and_actions(7, 3, 6, 5)
    states[4, 1] = float("nan")
    result = act(velocity, critic, states, noise, 1)
    assert result.particles[4].isnan().all()
    assert result.action[[0, 1, 2, 3, 5, 6]].isfinite().all()
    assert result.q[:, [0, 1, 2, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("name", FLOWS)
def test_the_releases_actions(name, record_property):
    release = load_flow(name, torch.float32)
    meta, velocity, critic = release.meta, release.velocity.to(networks.DEVICE), release.critic.to(networks.DEVICE)
    states, noise = release["obs"].to(networks.DEVICE), release["noise"].to(networks.DEVICE)

    def run(steps, part):
        return sequence.act(
            networks.packed(velocity),
            networks.packed(critic),
            states[part],
            noise[part],
            meta["bc_flow_steps"],
            steps,
            meta["lr"],
            meta["alpha"],
            meta["vgf_q_agg"],
            True,
            selection=sequence.Select(q_aggregation=meta["select_q_agg"]),
            layers=FEW,
        )

    parts = [slice(first, first + 16) for first in range(0, len(states), 16)]
    drawn = torch.cat([run(0, part).particles for part in parts]).cpu()
    assert relative_error(drawn, release["init"]) < BOUNDS["behavior_flow"][F32]
    results = [run(meta["L"], part) for part in parts]
    phi = release["phi_bandwidth_grad"]
    is_certain = (phi.abs() > AMBIGUOUS * phi.abs().amax(dim=(2, 3), keepdim=True)).all(dim=0)
    print(f"sign-ambiguous entries of {name}: {(~is_certain).sum()} of {is_certain.numel()}")
    record_property("sign_ambiguous", int((~is_certain).sum()))
    # A flipped particle pulls its neighbours of the same state along.
    certain_states = is_certain.all(dim=(1, 2))
    assert certain_states.double().mean() > 0.5
    particles = torch.cat([result.particles for result in results]).cpu()
    error = (particles - release["particles"][-1])[certain_states].abs().max()
    assert error < BOUNDS["release_trajectory"][F32]
    q = torch.cat([result.q for result in results], dim=1).cpu()
    assert (
        relative_error(q[:, certain_states], release["q_members"][:, certain_states])
        < (BOUNDS["release_trajectory"][F32])
    )
    index = torch.cat([result.chosen_index for result in results]).cpu()
    assert torch.equal(index[certain_states], release["best_index"][certain_states])


# --- configurations, checks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_warps", [1, 2, 4])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (16, 32), (32, 64)])
def test_every_configuration(block_m, block_n, num_warps, monkeypatch):
    velocity, critic = networks.velocity(5, 3, (60, 33)), networks.critic(5, 3, (60, 33), seed=1)
    states, noise = networks.states_and_actions(2, 10, 5, 3)
    expected = act(velocity, critic, states, noise, 1)
    monkeypatch.setattr(launch, "small_tile", lambda width: launch.SmallTile(block_m, block_n, num_warps))
    result = act(velocity, critic, states, noise, 1)
    assert relative_error(result.particles, expected.particles) < BOUNDS["flow_step"][F32]
    check_choice(critic, states, result)


def test_few_rows_are_told_by_their_number():
    assert launch.layers(1).few
    assert launch.layers(160).few
    assert not launch.layers(161).few


@pytest.mark.parametrize("selection", ["max", "softmax"])
@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("batch", [3, 17])
def test_the_policys_actions(batch, behavior, selection):
    """The same by layers over many programs as by products and rows."""
    config = vgf.VGFConfig(
        5,
        3,
        hidden_dims=(24, 24),
        behavior_hidden_dims=(24, 24),
        particles=6,
        behavior=behavior,
        behavior_steps=2,
        selection=selection,
    )
    states, noise = networks.states_and_actions(batch, 6, 5, 3)
    actions = {}
    for one_launch in (True, False):
        policy = vgf.VGFPolicy(config, networks.DEVICE, "triton", cuda_graph=False, one_launch=one_launch)
        generator = torch.Generator(networks.DEVICE).manual_seed(1)
        with count_launches() as names:
            actions[one_launch] = policy.sample_actions(states, 1, noise, generator)
        assert ("small_kernel" in names) == one_launch
        # The action's gradient is one in either way.
        assert (names.count("product_kernel") == 1) == one_launch
    assert relative_error(actions[True], actions[False]) < BOUNDS["release_trajectory"][F32]


class TestChecks:
    def setup_method(self):
        self.velocity, self.critic = networks.velocity(5, 3, (16,)), networks.critic(5, 3, (16,), seed=1)
        self.states, self.noise = networks.states_and_actions(2, 4, 5, 3)

    def refuse(self, match, **changes):
        arguments = {"velocity": self.velocity, "critic": self.critic, "states": self.states, "noise": self.noise}
        arguments |= {"steps": 1} | changes
        with pytest.raises(ValueError, match=match):
            act(**arguments)

    def test_shapes(self):
        self.refuse(r"observations has shape \(2, 4\)", states=self.states[:, :4])
        self.refuse(r"noise has shape \(1, 4, 3\)", noise=self.noise[:1])
        self.refuse(r"noise has shape \(2, 4\)", noise=self.noise[..., 0])
        self.refuse("noise has 129 particles", noise=self.noise[:, :1].expand(-1, 129, -1))
        self.refuse(r"observations has shape \(2, 5\), expected \(2, 4\)", velocity=networks.velocity(4, 3, (16,)))
        self.refuse("widest hidden layer", critic=networks.critic(5, 3, (1025,)))

    def test_dtypes(self):
        self.refuse("observations has dtype torch.float64", states=self.states.double())
        self.refuse("noise has dtype torch.float64", noise=self.noise.double())

    def test_values(self):
        self.refuse("steps is -1", steps=-1)
        self.refuse("epilogue.mode is 'best'", selection=sequence.Select("best"))
        self.refuse("optimizer is 'sgd'", optimizer="sgd")
        self.refuse("q_aggregation is 'max'", q_aggregation="max")
        self.refuse("epilogue.q_aggregation is 'max'", selection=sequence.Select(q_aggregation="max"))
        self.refuse("uniform is None", selection=sequence.Select("softmax"))
        self.refuse("epilogue.temperature is 0.0", selection=sequence.Select(temperature=0.0))
        self.refuse("noise and seed", seed=torch.tensor([1], device=networks.DEVICE))
        self.refuse("particles is None", noise=None, seed=torch.tensor([1], device=networks.DEVICE))


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_fifty_times(precision, batch):
    """Bit-equal results; in full precision those of the torch backend."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    velocity, critic = networks.velocity(29, 8, (512,) * 4), networks.critic(29, 8, (512,) * 4, seed=1)
    packed = networks.packed(velocity, dtype), networks.packed(critic, dtype)
    states, noise = networks.states_and_actions(batch, 10, 29, 8)
    products = "tf32" if precision == "bf16" else precision
    arguments = (*packed, states, noise, 10, 3, STEP_SIZE, TEMPERATURE)

    def run(**options):
        return sequence.act(*arguments, optimizer="ascent", precision=products, **options)

    runs = [run() for _ in range(50)]
    for repeated in runs[1:]:
        for name in repeated._fields:
            assert torch.equal(getattr(repeated, name), getattr(runs[0], name))
    if precision == "ieee":
        x = reference.behavior_flow(networks.exact(velocity), states.double(), noise.double(), 10)
        budget = (3, STEP_SIZE, TEMPERATURE, "mean", False, True, "ascent")
        truth = reference.value_gradient_flow(networks.exact(critic), states.double(), x, *budget)
        assert relative_error(runs[0].particles, truth.particles) < BOUNDS["release_trajectory"][F32]
        assert relative_error(runs[0].q, truth.q) < BOUNDS["release_trajectory"][F32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_as_a_graph():
    """A CUDA graph of the launches, replayed with new noise in place."""
    velocity, critic = networks.velocity(29, 8, (512,) * 4), networks.critic(29, 8, (512,) * 4, seed=1)
    packed = networks.packed(velocity, torch.bfloat16), networks.packed(critic, torch.bfloat16)
    states, noise = networks.states_and_actions(4, 10, 29, 8)
    arguments = (*packed, states, noise, 10, 3, STEP_SIZE, TEMPERATURE)
    sequence.act(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sequence.act(*arguments)
    for seed in range(20):
        noise.copy_(networks.states_and_actions(4, 10, 29, 8, seed)[1])
        expected = sequence.act(*arguments)
        graph.replay()
        assert torch.equal(captured.action, expected.action)
