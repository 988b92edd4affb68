"""The fused flow step against the torch backend in float64, and the release's numbers.

A trajectory is checked step by step, each from the kernel's own particles: Adam divides by the size of the direction,
so that rounding of a direction near zero becomes a step the other way, and whole trajectories part.
"""

import networks
import oracle
import pytest
import torch
from properties import given, settings, st
from release import FLOWS, load_flow, relative_error
from tolerances import BOUNDS, F32

pytest.importorskip("triton")

from vgf_fast.kernels import sequence, svgd

from vgf_fast import reference

STEP_SIZE, TEMPERATURE = 0.1, 0.5
# A direction smaller than this, relative to the largest, has no certain sign in float32.
AMBIGUOUS = 1e-4
many = settings(max_examples=12, deadline=None, derandomize=True)
shapes = st.one_of(
    st.tuples(st.integers(0, 8), st.integers(1, 12)),
    st.tuples(st.integers(1, 3), st.sampled_from([33, 64, 65, 128])),
    st.tuples(st.just(70), st.integers(1, 3)),
)


def flow(module, states, particles, steps, **options):
    with oracle.nan_filled_empty():
        return sequence.value_gradient_flow(
            networks.packed(module), states, particles, steps, STEP_SIZE, TEMPERATURE, **options
        )


def check_steps(module, states, trajectory, aggregation, optimizer, **modes):
    """Every step of a trajectory against one in float64 from the step before; returns how many entries were exempt."""
    at_states = reference.CriticAtStates(networks.exact(module), states.double())
    m = v = torch.zeros_like(trajectory[0], dtype=torch.float64)
    exempt = 0
    for step, (before, after) in enumerate(
        zip(trajectory[:-1].double(), trajectory[1:].double(), strict=True), start=1
    ):
        score = at_states.score(before, aggregation)
        phi = reference.svgd_direction(before, score, TEMPERATURE, **modes)
        if optimizer == "adam":
            m, v = 0.9 * m + 0.1 * phi, 0.999 * v + 0.001 * phi.square()
            change = m / (1.0 - 0.9**step) / ((v / (1.0 - 0.999**step)).sqrt() + 1e-8)
        else:
            change = phi
        expected = (before + STEP_SIZE * change).clamp(-1.0, 1.0)
        is_certain = (phi.abs() > AMBIGUOUS * phi.abs().max()) if optimizer == "adam" else torch.ones_like(phi).bool()
        exempt += (~is_certain).sum().item()
        error = (after - expected).abs()[is_certain].amax() if is_certain.any() else 0.0
        scale = max(1.0, STEP_SIZE * change.abs().max().item())
        assert error <= BOUNDS["flow_step"][F32] * scale, (step, error)
    return exempt


@many
@given(
    shapes,
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.lists(st.integers(8, 40), min_size=1, max_size=3).map(tuple),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["gelu", "swish"]),
    st.sampled_from(["mean", "min"]),
    st.booleans(),
    st.sampled_from(networks.LAYERS),
    st.integers(0, 2**16),
)
def test_any_size(shape, sizes, hidden, members, layer_norm, activation, aggregation, repulsion, layers, seed):
    module = networks.critic(*sizes, hidden, members, layer_norm, activation, seed)
    states, particles = networks.states_and_actions(*shape, *sizes, seed)
    options = {"q_aggregation": aggregation, "repulsion": repulsion, "optimizer": "ascent", "layers": layers}
    result = flow(module, states, particles, 2, return_trajectory=True, **options)
    assert torch.equal(result.trajectory[0], particles)
    assert torch.equal(result.trajectory[-1], result.particles)
    if shape[0]:
        check_steps(module, states, result.trajectory, aggregation, "ascent", repulsion=repulsion)
    truth = reference.CriticAtStates(networks.exact(module), states.double()).values(result.particles.double())
    assert relative_error(result.q, truth) < BOUNDS["critic_value"][F32]


@pytest.mark.parametrize(
    ("shape", "sizes", "hidden"),
    [((2, 128), (512, 128), (33, 17, 40, 16, 9, 24)), ((3, 21), (511, 63), (1023,))],
)
def test_the_largest_sizes(shape, sizes, hidden):
    module = networks.critic(*sizes, hidden, 2, True, "swish", seed=1)
    states, particles = networks.states_and_actions(*shape, *sizes, seed=2)
    result = flow(module, states, particles, 1, return_trajectory=True, q_aggregation="min")
    check_steps(module, states, result.trajectory, "min", "adam")
    truth = reference.CriticAtStates(networks.exact(module), states.double()).values(result.particles.double())
    assert relative_error(result.q, truth) < BOUNDS["critic_value"][F32]


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("bandwidth_gradient", [False, True])
@pytest.mark.parametrize("aggregation", ["mean", "min"])
def test_every_mode(aggregation, bandwidth_gradient, optimizer):
    module = networks.critic(11, 6, (40, 32, 40), 2, seed=1)
    states, particles = networks.states_and_actions(7, 10, 11, 6, seed=2)
    result = flow(
        module,
        states,
        particles,
        3,
        q_aggregation=aggregation,
        bandwidth_gradient=bandwidth_gradient,
        optimizer=optimizer,
        return_trajectory=True,
    )
    exempt = check_steps(
        module, states, result.trajectory, aggregation, optimizer, bandwidth_gradient=bandwidth_gradient
    )
    assert exempt < 0.01 * result.trajectory.numel()


@pytest.mark.parametrize("particles", [1, 2, 10, 40])
def test_equal_to_the_step_kernel(particles):
    """The flow step against the SVGD step by itself, on the very same scores."""
    module = networks.critic(5, 3, (16, 16), seed=5)
    states, x = networks.states_and_actions(5, particles, 5, 3, seed=6)
    result = flow(module, states, x, 1, bandwidth_gradient=True)
    _, score = sequence.values_and_score(networks.packed(module), states, x)
    moved = x.clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    svgd.svgd_step_(moved, score, m, v, 1, STEP_SIZE, TEMPERATURE, True)
    assert relative_error(result.particles, moved) < BOUNDS["flow_step"][F32]


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize(("aggregation", "reduce"), [("min", "mean"), ("mean", "max")])
def test_td_target_by_another_critic(steps, aggregation, reduce):
    module, target = (networks.critic(5, 3, (24, 24), seed=seed) for seed in (1, 2))
    states, particles = networks.states_and_actions(8, 10, 5, 3)
    # Columns of the states, strided as a dataset's fields are.
    rewards, masks = states[:, 0], (states > 0.0).float()[:, 1]
    epilogue = sequence.TDTarget(rewards, masks, 0.9, aggregation, reduce)
    result = flow(module, states, particles, steps, evaluator=networks.packed(target), epilogue=epilogue)
    q = reference.CriticAtStates(networks.exact(target), states.double()).values(result.particles.double())
    truth = reference.td_target(q, rewards.double(), masks.double(), 0.9, aggregation, reduce)
    assert relative_error(result.q, q) < BOUNDS["critic_value"][F32]
    assert relative_error(result.chosen, truth) < BOUNDS["critic_value"][F32]


@pytest.mark.parametrize("mode", ["max", "softmax", "random"])
@pytest.mark.parametrize("steps", [0, 1])
def test_selection(steps, mode):
    module = networks.critic(5, 3, (24, 24), seed=1)
    states, particles = networks.states_and_actions(15, 10, 5, 3)
    uniform = torch.linspace(0.01, 0.99, 15, device=networks.DEVICE)
    epilogue = sequence.Select(mode, 0.3, None if mode == "max" else uniform, "min")
    result = flow(module, states, particles, steps, epilogue=epilogue)
    values = reference.aggregate(result.q, "min")
    action, index = reference.select_particle(result.particles, values, mode, 0.3, uniform)
    assert torch.equal(result.chosen_index, index)
    assert torch.equal(result.chosen, action)


def test_nothing_but_the_update_when_no_value_is_asked_for():
    module = networks.critic(5, 3, (24, 24), seed=1)
    states, particles = networks.states_and_actions(7, 10, 5, 3)
    kept = particles.clone()
    with_values = flow(module, states, particles, 2)
    without = flow(module, states, particles, 2, evaluate=False)
    assert without.q is None
    assert torch.equal(without.particles, with_values.particles)
    assert torch.equal(flow(module, states, particles, 0, evaluate=False).particles, particles)
    assert torch.equal(particles, kept)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    module = networks.critic(6, 5, (24, 24))
    states, particles = networks.states_and_actions(7, 3, 6, 5)
    expected = flow(module, states, particles, 2).particles
    result = flow(module, oracle.arrange(states, layout)[0], oracle.arrange(particles, layout)[0], 2).particles
    assert torch.equal(result, expected)


def test_broken_particles_show():
    module = networks.critic(6, 5, (24, 24))
    states, particles = networks.states_and_actions(7, 3, 6, 5)
    particles[4, 1, 2] = float("nan")
    result = flow(module, states, particles, 1)
    assert result.particles[4].isnan().all()
    assert result.particles[[0, 1, 2, 3, 5, 6]].isfinite().all()


@pytest.mark.parametrize("name", FLOWS)
def test_the_releases_flow(name, record_property):
    """Step by step from the release's own particles, then the whole trajectory with its certain entries."""
    release = load_flow(name, torch.float32)
    meta, module = release.meta, release.critic.to(networks.DEVICE)
    states = release["obs"].to(networks.DEVICE)
    with oracle.nan_filled_empty():
        result = sequence.value_gradient_flow(
            networks.packed(module),
            states,
            release["particles"][0].to(networks.DEVICE),
            meta["L"],
            meta["lr"],
            meta["alpha"],
            meta["vgf_q_agg"],
            True,
            return_trajectory=True,
        )
    phi = release["phi_bandwidth_grad"]
    is_certain = (phi.abs() > AMBIGUOUS * phi.abs().amax(dim=(2, 3), keepdim=True)).all(dim=0)
    print(f"sign-ambiguous entries of {name}: {(~is_certain).sum()} of {is_certain.numel()}")
    record_property("sign_ambiguous", int((~is_certain).sum()))
    # A flipped particle pulls its neighbours of the same state along.
    is_certain &= is_certain.all(dim=(1, 2), keepdim=True)
    assert is_certain.double().mean() > 0.5
    error = (result.trajectory.cpu() - release["particles"]).abs()[:, is_certain].max()
    assert error < BOUNDS["release_trajectory"][F32]
    if is_certain.all():
        assert relative_error(result.q.cpu(), release["q_members"]) < BOUNDS["release_trajectory"][F32]


class TestBadInput:
    """Each launcher of the networks' kernels says what is wrong before anything is launched."""

    MODULE = networks.critic(6, 3, (16,))
    VELOCITY = networks.velocity(6, 3, (16,))

    def inputs(self, batch=4, particles=5, observation_dim=6, action_dim=3):
        return networks.states_and_actions(batch, particles, observation_dim, action_dim)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"observation_dim": 7}, r"observations has shape \(4, 7\), expected \(4, 6\)"),
            ({"action_dim": 2}, r"has shape \(4, 5, 2\), expected \(4, 5, 3\)"),
            ({"particles": 129}, r"has 129 particles a state, expected 1 to 128"),
        ],
    )
    @pytest.mark.parametrize("kernel", ["critic", "behavior_flow", "flow"])
    def test_shapes(self, kernel, sizes, message):
        self.check(kernel, *self.inputs(**sizes), message)

    @pytest.mark.parametrize("kernel", ["critic", "behavior_flow", "flow"])
    def test_dtypes_and_batches(self, kernel):
        states, rows = self.inputs()
        self.check(kernel, states.double(), rows, "observations has dtype torch.float64")
        self.check(kernel, states, rows.double(), "has dtype torch.float64")
        self.check(kernel, states[:3], rows, r"has shape \(4, 5, 3\), expected \(3, 5, 3\)")

    def check(self, kernel, states, rows, message, module=MODULE, velocity=VELOCITY):
        critic_weights, velocity = networks.packed(module), networks.packed(velocity)
        launchers = {
            "critic": lambda: sequence.values_and_score(critic_weights, states, rows),
            "flow": lambda: sequence.value_gradient_flow(critic_weights, states, rows, 1, STEP_SIZE, TEMPERATURE),
            "behavior_flow": lambda: sequence.behavior_flow(velocity, states, rows, 1),
        }
        with pytest.raises(ValueError, match=message):
            launchers[kernel]()

    def test_networks_of_the_wrong_kind(self):
        states, rows = self.inputs()
        critic_weights, velocity = networks.packed(self.MODULE), networks.packed(self.VELOCITY)
        with pytest.raises(ValueError, match="expected a critic's one"):
            sequence.values_and_score(velocity, states, rows)
        with pytest.raises(ValueError, match="mlp has 1 outputs, expected one an action entry, 3"):
            sequence.behavior_flow(critic_weights, states, rows, 1)
        other = networks.packed(networks.critic(6, 3, (40,)))
        with pytest.raises(ValueError, match="evaluator has weights of shape"):
            flow(self.MODULE, states, rows, 1, evaluator=other)

    def test_what_the_choice_needs(self):
        states, rows = self.inputs()
        with pytest.raises(ValueError, match="uniform is None"):
            flow(self.MODULE, states, rows, 1, epilogue=sequence.Select("softmax"))
        with pytest.raises(ValueError, match="rewards has shape"):
            flow(self.MODULE, states, rows, 1, epilogue=sequence.TDTarget(states, states, 0.9))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"q_aggregation": "max"}, "q_aggregation is 'max', expected 'mean' or 'min'"),
            ({"optimizer": "sgd"}, "optimizer is 'sgd', expected 'adam' or 'ascent'"),
            ({"steps": -1}, "steps is -1, expected an integer >= 0"),
            ({"temperature": 0.0}, "temperature is 0.0, expected a number > 0"),
            (
                {"epilogue": sequence.Select("best")},
                "epilogue.mode is 'best', expected 'max' or 'softmax'",
            ),
            ({"epilogue": sequence.Select(temperature=-1.0)}, "epilogue.temperature is -1.0, expected a number > 0"),
            ({"epilogue": sequence.Select(q_aggregation="max")}, "epilogue.q_aggregation is 'max', expected"),
            (
                {"epilogue": sequence.Select("random", uniform=torch.zeros(4, dtype=torch.float64))},
                "uniform has dtype torch.float64, expected torch.float32",
            ),
            (
                {"epilogue": sequence.Select("random", uniform=torch.zeros(4, device="meta"))},
                "uniform is on meta, expected",
            ),
            (
                {"epilogue": sequence.TDTarget(torch.zeros(4), torch.zeros(4).int(), 0.9)},
                "masks has dtype torch.int32, expected",
            ),
            (
                {"epilogue": sequence.TDTarget(torch.zeros(4), torch.zeros(4, device="meta"), 0.9)},
                "masks is on meta, expected",
            ),
            (
                {"epilogue": sequence.TDTarget(torch.zeros(4), torch.zeros(4), 0.9, reduce="median")},
                "epilogue.reduce is 'median', expected 'mean' or 'max'",
            ),
        ],
    )
    def test_choices_of_a_flow(self, options, message):
        epilogue = options.get("epilogue")
        if epilogue is not None:
            # To the device, but for what is to be found elsewhere.
            options = {
                "epilogue": type(epilogue)(
                    *(x.to(networks.DEVICE) if torch.is_tensor(x) and x.device.type != "meta" else x for x in epilogue)
                )
            }
        arguments = {"steps": 1, "step_size": STEP_SIZE, "temperature": TEMPERATURE} | options
        with pytest.raises(ValueError, match=message):
            sequence.value_gradient_flow(networks.packed(self.MODULE), *self.inputs(), **arguments)

    @pytest.mark.parametrize("kernel", ["critic", "behavior_flow", "flow"])
    def test_devices(self, kernel):
        states, rows = self.inputs()
        self.check(kernel, states.to("meta"), rows, "observations is on meta, expected (cpu|cuda:0), the device of the")
        self.check(kernel, states, rows.to("meta"), "(actions|noise|particles) is on meta, expected")

    def test_seeds_and_aggregations(self):
        states, rows = self.inputs()
        velocity, critic_weights = networks.packed(self.VELOCITY), networks.packed(self.MODULE)
        for seed, message in (
            (torch.zeros(2, dtype=torch.int64), r"seed has shape \(2,\), expected \(1,\)"),
            (torch.zeros(1), "seed has dtype torch.float32, expected torch.int64"),
            (torch.zeros(1, dtype=torch.int64, device="meta"), "seed is on meta, expected"),
        ):
            place = seed if seed.device.type == "meta" else seed.to(networks.DEVICE)
            with pytest.raises(ValueError, match=message):
                sequence.behavior_flow(velocity, states, None, 1, particles=5, seed=place)
        with pytest.raises(ValueError, match="q_aggregation is 'max', expected 'mean' or 'min'"):
            sequence.values_and_score(critic_weights, states, rows, "max")

    @pytest.mark.parametrize("kernel", ["critic", "behavior_flow", "flow"])
    @pytest.mark.parametrize(
        ("action_dim", "width", "message"),
        [
            (129, 16, "has 129 columns, expected at most 128"),
            (3, 1025, "the widest hidden layer takes 2048 columns, expected 1024 or less"),
        ],
    )
    def test_networks_beyond_the_kernels_limits(self, kernel, action_dim, width, message):
        module, velocity = (make(6, action_dim, (width,)) for make in (networks.critic, networks.velocity))
        self.check(kernel, *self.inputs(action_dim=action_dim), message, module, velocity)
