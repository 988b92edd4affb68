"""A whole action in one launch, against the torch backend in float64 and the release's numbers.

Flows of 0, 1, 2, ... steps give a trajectory, of which every step is checked from the kernel's own particles.
"""

import contextlib
import dataclasses
import threading
from unittest import mock

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
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder
from vgf_fast.kernels import acting, behavior_flow, launch

import vgf_fast as vgf
from vgf_fast import reference

interpreted = pytest.mark.skipif(networks.DEVICE != "cpu", reason="needs Triton's interpreter")
EULER_STEPS = 2
widths = st.one_of(st.lists(st.integers(8, 33), min_size=1, max_size=3).map(tuple), st.just((9, 8, 9, 8, 9, 16)))
activations = st.sampled_from(["relu", "gelu", "swish"])


def act(velocity, critic, states, noise, steps, **options):
    arguments = (EULER_STEPS, steps, STEP_SIZE, TEMPERATURE)
    with oracle.nan_filled_empty():
        return acting.act(networks.packed(velocity), networks.packed(critic), states, noise, *arguments, **options)


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
    options = {"selection": mode, "selection_temperature": 0.3, "value_aggregation": aggregation}
    result = act(velocity, critic, states, noise, 1, uniform=uniform, **options)
    check_choice(critic, states, result, aggregation, mode, 0.3, uniform)


def test_noise_drawn_inside():
    """The numbers that the behaviour flow's kernel draws from the same seed."""
    velocity, critic = networks.velocity(5, 3, (24, 24)), networks.critic(5, 3, (24, 24), seed=1)
    states, _ = networks.states_and_actions(4, 10, 5, 3)
    seed = torch.tensor([7], device=networks.DEVICE)
    result = act(velocity, critic, states, None, 0, particles=10, seed=seed)
    packed = networks.packed(velocity)
    expected = behavior_flow.behavior_flow(packed, states, None, EULER_STEPS, particles=10, seed=seed)
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
        return acting.act(
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
            value_aggregation=meta["select_q_agg"],
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


# --- many programs ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def programs_in_turns(order):
    """While it lasts, the acting kernel's programs run in turns, in this order, each up to its next atomic operation.

    One program after another, as the interpreter has it, would wait for ever at the first barrier of the grid.
    """
    call, set_grid_idx = GridExecutor.__call__, InterpreterBuilder.set_grid_idx
    create_atomic_rmw = InterpreterBuilder.create_atomic_rmw
    condition = threading.Condition()
    alive, failures, turn = list(order), [], [order[0]]

    def pass_on(program):
        following = alive[(alive.index(program) + 1) % len(alive)]
        turn[0] = following
        condition.notify_all()

    def atomic(builder, *args, **kwargs):
        result = create_atomic_rmw(builder, *args, **kwargs)
        program = turn[0]
        with condition:
            pass_on(program)
            condition.wait_for(lambda: turn[0] == program)
        if failures:
            raise RuntimeError("another program failed")
        set_grid_idx(builder, program, 0, 0)
        return result

    def execute(executor, *args, **kwargs):
        kernel = executor.fn
        if kernel.__name__ != "acting_kernel":
            return call(executor, *args, **kwargs)

        def all_programs(**arguments):
            executor.fn = lambda **arguments: None

            def run(program):
                with condition:
                    condition.wait_for(lambda: turn[0] == program)
                set_grid_idx(builder[0], program, 0, 0)
                try:
                    kernel(**arguments)
                except Exception as error:
                    failures.append(error)
                with condition:
                    if len(alive) > 1:
                        pass_on(program)
                    alive.remove(program)

            threads = [threading.Thread(target=run, args=(program,), daemon=True) for program in order]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if failures:
                raise failures[0]

        builder = []

        def first_program(interpreter_builder, *index):
            if not builder:
                # Only now: until here the executor reads the kernel's signature.
                builder.append(interpreter_builder)
                executor.fn = all_programs
            set_grid_idx(interpreter_builder, *index)

        with mock.patch.object(InterpreterBuilder, "set_grid_idx", first_program):
            return call(executor, *args, **kwargs)

    with (
        mock.patch.object(GridExecutor, "__call__", execute),
        mock.patch.object(InterpreterBuilder, "create_atomic_rmw", atomic),
    ):
        yield


@interpreted
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (2, 0, 4, 1, 3)])
@pytest.mark.parametrize("depths", [(1, 1), (2, 2), (3, 4)])
def test_many_programs(order, depths):
    """The same bits as by one program, whatever the order between barriers; the counter is ready again afterwards."""
    velocity = networks.velocity(5, 3, (40,) * depths[0])
    critic = networks.critic(5, 3, (40,) * depths[1], seed=1)
    states, noise = networks.states_and_actions(3, 7, 5, 3)
    expected = act(velocity, critic, states, noise, 2, q_aggregation="min")
    config = launch.acting(21, 2, 64, 64, torch.float32, 7, processors=5)
    assert config.programs == len(order)
    counter = torch.zeros(1, dtype=torch.int32)
    for _ in range(2):
        with programs_in_turns(order):
            result = act(velocity, critic, states, noise, 2, q_aggregation="min", config=config, counter=counter)
        assert counter.item() in (0, -(2**31))
        for name in expected._fields:
            assert torch.equal(getattr(result, name), getattr(expected, name)), name


# --- configurations, checks, registration ----------------------------------------------------------------------------


@pytest.mark.parametrize("num_warps", [1, 4, 16])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_every_configuration(tile, num_warps):
    velocity, critic = networks.velocity(5, 3, (60, 33)), networks.critic(5, 3, (60, 33), seed=1)
    states, noise = networks.states_and_actions(2, 10, 5, 3)
    expected = act(velocity, critic, states, noise, 1)
    config = launch.ActingLaunch(1, 16, tile, tile, num_warps)
    result = act(velocity, critic, states, noise, 1, config=config)
    assert relative_error(result.particles, expected.particles) < BOUNDS["flow_step"][F32]
    check_choice(critic, states, result)


@pytest.mark.parametrize(
    ("rows", "members", "width", "processors"),
    [(10, 2, 512, 132), (160, 2, 512, 132), (1, 1, 16, 132), (2048, 3, 1024, 304)],
)
def test_the_grid_is_no_larger_than_the_processors_or_the_work(rows, members, width, processors):
    for dtype in (torch.bfloat16, torch.float32):
        config = launch.acting(rows, members, width, width, dtype, 10, processors)
        items = -(-rows // config.block_m) * members * (width // config.critic_tile)
        assert config.programs == min(processors, items)
        assert width % config.critic_tile == 0


def test_when_one_launch_is_taken():
    """A few states of wide networks on a whole GPU, and never in the interpreter, whose grid is one program."""

    def is_taken(batch, width, dtype=torch.bfloat16, processors=132, particles=10, action_dim=8, amd=False):
        return launch.acts_in_one_launch(batch, particles, 2, width, width, dtype, processors, action_dim, amd)

    assert is_taken(1, 512)
    assert is_taken(4, 512)
    assert is_taken(16, 1024, torch.float32)
    assert not is_taken(16, 512)
    assert not is_taken(1, 64)
    assert not is_taken(1, 512, processors=1)
    assert not is_taken(0, 512)
    assert not is_taken(17, 1024)
    assert not is_taken(1, 512, particles=129)
    # Where the actions' weights do not fit into shared memory.
    assert is_taken(1, 1024, action_dim=32)
    assert not is_taken(1, 1024, action_dim=33)
    assert not is_taken(1, 1024, torch.float32, action_dim=17)
    assert is_taken(1, 512, action_dim=64, amd=True)
    assert not is_taken(1, 1024, action_dim=33, amd=True)


@pytest.mark.parametrize("selection", ["max", "softmax"])
@pytest.mark.parametrize("behavior", ["flow", "gaussian"])
@pytest.mark.parametrize("batch", [3, 17])
def test_the_policys_actions(batch, behavior, selection):
    """The same by one launch as by several; two launches where it can be used, the packing of weights included."""
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
        assert ("acting_kernel" in names) == (one_launch and behavior == "flow" and batch <= 16)
        if "acting_kernel" in names:
            assert len(names) == 2
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
        self.refuse(r"observations has shape \(17, 5\)", states=self.states[:1].expand(17, -1))
        self.refuse(r"noise has shape \(1, 4, 3\)", noise=self.noise[:1])
        self.refuse(r"noise has shape \(2, 4\)", noise=self.noise[..., 0])
        self.refuse("particles is 129", noise=self.noise[:, :1].expand(-1, 129, -1))
        self.refuse("velocity has 4 \\+ 3 inputs", velocity=networks.velocity(4, 3, (16,)))
        self.refuse("widest hidden layer", critic=networks.critic(5, 3, (1025,)))
        velocity, critic = networks.velocity(5, 33, (513,)), networks.critic(5, 33, (16,))
        noise = self.noise[..., :1].expand(-1, -1, 33)
        self.refuse(
            "33 action entries in torch.float32 do not fit into shared memory",
            velocity=velocity,
            critic=critic,
            noise=noise,
        )

    def test_dtypes(self):
        self.refuse("observations has dtype torch.float64", states=self.states.double())
        self.refuse("noise has dtype torch.float64", noise=self.noise.double())

    def test_values(self):
        self.refuse("flow_steps is -1", steps=-1)
        self.refuse("selection is 'best'", selection="best")
        self.refuse("optimizer is 'sgd'", optimizer="sgd")
        self.refuse("q_aggregation is 'max'", q_aggregation="max")
        self.refuse("value_aggregation is 'max'", value_aggregation="max")
        self.refuse("uniform is None", selection="softmax")
        self.refuse("selection_temperature is 0.0", selection_temperature=0.0)
        self.refuse("noise and seed", seed=torch.tensor([1], device=networks.DEVICE))
        self.refuse("particles is None", noise=None, seed=torch.tensor([1], device=networks.DEVICE))
        self.refuse("counter has shape", counter=torch.zeros(2, dtype=torch.int32, device=networks.DEVICE))


def test_opcheck():
    velocity = networks.packed(networks.velocity(5, 3, (16,)))
    critic = networks.packed(networks.critic(5, 3, (16,), seed=1))
    states, noise = networks.states_and_actions(2, 4, 5, 3)
    config = launch.acting(8, 2, 16, 16, torch.float32, 4, launch.processors(states.device))
    counter = torch.zeros(1, dtype=torch.int32, device=networks.DEVICE)
    torch.library.opcheck(
        acting._act,
        (
            *(states, noise, None, counter, list(velocity[:8]), list(critic[:8]), 4, 3),
            *(False, "relu", True, "relu", 2, 1, 0.1, 0.5, "mean", False, True, "adam", "max", 1.0, "min"),
            *(launch.precision(torch.float32), config.entries()),
        ),
    )


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 7, 16])
@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
def test_the_whole_grid_fifty_times(precision, batch):
    """Bit-equal results by all processors; in full precision those of the torch backend and of one program."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    velocity, critic = networks.velocity(29, 8, (512,) * 4), networks.critic(29, 8, (512,) * 4, seed=1)
    packed = networks.packed(velocity, dtype), networks.packed(critic, dtype)
    states, noise = networks.states_and_actions(batch, 10, 29, 8)
    products = "tf32" if precision == "bf16" else precision
    arguments = (*packed, states, noise, 10, 3, STEP_SIZE, TEMPERATURE)

    def run(**options):
        return acting.act(*arguments, optimizer="ascent", precision=products, **options)

    runs = [run() for _ in range(50)]
    for repeated in runs[1:]:
        for name in repeated._fields:
            assert torch.equal(getattr(repeated, name), getattr(runs[0], name))
    processors = launch.processors(states.device)
    config = launch.acting(batch * 10, 2, 512, 512, dtype, 10, processors)
    assert config.programs > 1
    alone = run(config=dataclasses.replace(config, programs=1))
    assert torch.equal(alone.particles, runs[0].particles)
    if precision == "ieee":
        x = reference.behavior_flow(networks.exact(velocity), states.double(), noise.double(), 10)
        budget = (3, STEP_SIZE, TEMPERATURE, "mean", False, True, "ascent")
        truth = reference.value_gradient_flow(networks.exact(critic), states.double(), x, *budget)
        assert relative_error(runs[0].particles, truth.particles) < BOUNDS["release_trajectory"][F32]
        assert relative_error(runs[0].q, truth.q) < BOUNDS["release_trajectory"][F32]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replayed_as_a_graph():
    """A CUDA graph of the launch, replayed with new noise in place: no memory is set between its replays."""
    velocity, critic = networks.velocity(29, 8, (512,) * 4), networks.critic(29, 8, (512,) * 4, seed=1)
    packed = networks.packed(velocity, torch.bfloat16), networks.packed(critic, torch.bfloat16)
    states, noise = networks.states_and_actions(4, 10, 29, 8)
    arguments = (*packed, states, noise, 10, 3, STEP_SIZE, TEMPERATURE)
    acting.act(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = acting.act(*arguments)
    for seed in range(20):
        noise.copy_(networks.states_and_actions(4, 10, 29, 8, seed)[1])
        expected = acting.act(*arguments)
        graph.replay()
        assert torch.equal(captured.action, expected.action)
