"""The CPU's compiled form of the torch backend against the plain one, and its compilation."""

import logging
import multiprocessing
import os
import platform

import networks
import oracle
import pytest
import torch
from properties import assume, given, settings, st
from release import relative_error
from tolerances import BOUNDS, within_twice

from vgf_fast import VGFConfig, VGFPolicy, reference
from vgf_fast.backends import native
from vgf_fast.backends import torch as torch_backend
from vgf_fast.flow import Flow

F32 = torch.float32
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or native.library() is None, reason="needs a CPU and a C compiler"
)
OBSERVATION_DIM = 7


def scales(weights, states, actions):
    """The largest sums of absolute values of the terms that the last product of q and of the score adds up."""
    members, rows = len(weights.weights[0]), actions.shape[0] * actions.shape[1]
    x = torch.cat([states.repeat_interleave(actions.shape[1], 0), actions.flatten(0, 1)], dim=1)
    # The last activations: the head replaced by the identity. The gradient of the first layer: inputs added to it.
    width, last = weights.weights[0].shape[2], weights.weights[-1].shape[1]
    head, add = (torch.eye(n, dtype=x.dtype).expand(members, -1, -1) for n in (last, width))
    zero = torch.zeros(members, last, dtype=x.dtype)
    h = reference.mlp_forward(
        weights._replace(weights=(*weights.weights[:-1], head), biases=(*weights.biases[:-1], zero)), x
    )
    first = torch.cat([weights.weights[0], add], dim=1)
    added = torch.zeros(rows, width, dtype=x.dtype, requires_grad=True)
    q = reference.mlp_forward(weights._replace(weights=(first, *weights.weights[1:])), torch.cat([x, added], dim=1))
    rest = weights.weights[0][:, states.shape[1] :].abs().transpose(1, 2)
    gradients = torch.stack([torch.autograd.grad(member.sum(), added, retain_graph=True)[0].abs() for member in q])
    return (h.abs() @ weights.weights[-1].abs()).max().item(), (gradients @ rest).max().item()


def check(module, states, actions, aggregation, many=False):
    """Against float64, relative to ``scales``; where there are ``many`` rows, within twice PyTorch's error too."""
    weights = module.stacked()
    at_states = native.NativeCriticAtStates(weights, states, actions.shape[1])
    found = at_states.values_and_score(actions, aggregation)
    plain = reference.CriticAtStates(weights, states).values_and_score(actions, aggregation)
    exact, states, actions64 = networks.exact(module), states.double(), actions.double()
    truth = reference.CriticAtStates(exact, states).values_and_score(actions64, aggregation)
    for name, value, right, theirs, scale in zip(
        ("critic_value", "critic_score"), found, truth, plain, scales(exact, states, actions64), strict=True
    ):
        assert value.dtype == F32
        assert value.shape == right.shape
        assert ((value.double() - right).abs() / scale).max().item() < BOUNDS[name][F32]
        if many:
            within_twice(value, theirs, right)
    assert torch.equal(at_states.values(actions), found[0])
    assert torch.equal(at_states.score(actions, aggregation), found[1])


@settings(max_examples=60, deadline=None)
@given(
    states=st.integers(1, 5),
    particles=st.integers(1, 17),
    action_dim=st.integers(1, 9),
    widths=st.lists(st.sampled_from([16, 32, 48, 80, 144]), min_size=1, max_size=5),
    members=st.integers(1, 4),
    layer_norm=st.booleans(),
    activation=st.sampled_from(["relu", "gelu", "swish"]),
    aggregation=st.sampled_from(["mean", "min"]),
    seed=st.integers(0, 9),
)
def test_critic(states, particles, action_dim, widths, members, layer_norm, activation, aggregation, seed):
    module = networks.critic(OBSERVATION_DIM, action_dim, widths, members, layer_norm, activation, seed)
    check(module, *networks.states_and_actions(states, particles, OBSERVATION_DIM, action_dim, seed), aggregation)


@pytest.mark.parametrize("particles", [10, 13, 128, 255])
def test_critic_at_the_papers_width(particles):
    module = networks.critic(OBSERVATION_DIM, 8, (512, 512, 512))
    check(module, *networks.states_and_actions(1, particles, OBSERVATION_DIM, 8), "mean", many=True)


@pytest.mark.parametrize("aggregation", ["mean", "min"])
@pytest.mark.parametrize(("states", "particles"), [(26, 10), (300, 1), (5, 61), (2, 128)])
@pytest.mark.parametrize(
    ("widths", "members", "layer_norm", "activation"),
    [((64, 48, 16, 112), 2, True, "relu"), ((32,), 3, True, "swish"), ((80, 32), 1, False, "gelu")],
)
def test_many_rows_in_chunks(widths, members, layer_norm, activation, states, particles, aggregation):
    """Chunks of several states and of one, the last one shorter; panels of 32 columns and of 16."""
    module = networks.critic(OBSERVATION_DIM, 3, widths, members, layer_norm, activation)
    check(module, *networks.states_and_actions(states, particles, OBSERVATION_DIM, 3), aggregation)


def test_rows_do_not_depend_on_their_number():
    """A state's numbers are the same alone, with the weights in place, and among many, with them packed."""
    critic, velocity = networks.critic(OBSERVATION_DIM, 3, (64, 48)), networks.velocity(OBSERVATION_DIM, 3, (64, 48))
    states, actions = networks.states_and_actions(40, 10, OBSERVATION_DIM, 3)
    many = native.NativeCriticAtStates(critic.stacked(), states, 10).values(actions)
    one = native.NativeCriticAtStates(critic.stacked(), states[7:8], 10).values(actions[7:8])
    torch.testing.assert_close(one[:, 0], many[:, 7], rtol=1e-6, atol=1e-6)
    many = native.behavior_flow(velocity.stacked(), states, actions, 3)
    one = native.behavior_flow(velocity.stacked(), states[7:8], actions[7:8], 3)
    torch.testing.assert_close(one[0], many[7], rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    states=st.sampled_from([1, 2, 3, 4, 90]),
    particles=st.integers(1, 17),
    action_dim=st.integers(1, 9),
    widths=st.lists(st.sampled_from([16, 48, 80]), min_size=1, max_size=4),
    layer_norm=st.booleans(),
    activation=st.sampled_from(["relu", "gelu", "swish"]),
    steps=st.integers(0, 4),
)
def test_behavior_flow(states, particles, action_dim, widths, layer_norm, activation, steps):
    module = networks.velocity(OBSERVATION_DIM, action_dim, widths, layer_norm, activation)
    observations, noise = networks.states_and_actions(states, particles, OBSERVATION_DIM, action_dim)
    before = noise.clone()
    found = native.behavior_flow(module.stacked(), observations, noise, steps)
    truth = reference.behavior_flow(networks.exact(module), observations.double(), noise.double(), steps)
    assert torch.equal(noise, before)
    assert relative_error(found, truth) < BOUNDS["behavior_flow"][F32]


def bfloat16_errors(batch, widths=(64, 48), layer_norm=True, activation="relu"):
    """(ours, PyTorch's, exact) of values, score and behaviour flow, from weights in bfloat16."""
    critic = networks.critic(OBSERVATION_DIM, 3, widths, 2, layer_norm, activation)
    velocity = networks.velocity(OBSERVATION_DIM, 3, widths, layer_norm, activation)
    states, actions = networks.states_and_actions(batch, 10, OBSERVATION_DIM, 3)
    weights, field = critic.stacked().to(torch.bfloat16), velocity.stacked().to(torch.bfloat16)
    exact = reference.CriticAtStates(weights.to(torch.float64), states.double())
    ours = native.NativeCriticAtStates(weights, states, 10).values_and_score(actions)
    plain = reference.CriticAtStates(weights, states).values_and_score(actions)
    yield from zip(ours, plain, exact.values_and_score(actions.double()), strict=True)
    moved = native.behavior_flow(field, states, actions, 4)
    with native.off():
        plain = reference.behavior_flow(field, states, actions, 4)
        yield moved, plain, reference.behavior_flow(field.to(torch.float64), states.double(), actions.double(), 4)


def test_few_rows_in_bfloat16():
    """The weights' rounding is all that it costs: products, sums and activations are float32."""
    for ours, theirs, truth in bfloat16_errors(3):
        within_twice(ours, theirs, truth)
        assert relative_error(ours, truth) < 1e-5


@pytest.mark.parametrize(("layer_norm", "activation"), [(True, "relu"), (False, "gelu"), (True, "swish")])
@pytest.mark.parametrize("widths", [(64, 48, 112), (32,)])
def test_many_rows_in_bfloat16(widths, layer_norm, activation):
    """Only what is multiplied is rounded: no worse than PyTorch, which rounds every sum too."""
    if not native.library().vgf_has_bfloat16():
        pytest.skip("this CPU has no products of bfloat16")
    for ours, theirs, truth in bfloat16_errors(100, widths, layer_norm, activation):
        errors = [(t.double() - truth).square().mean().sqrt().item() for t in (ours, theirs)]
        assert 0.0 < errors[0] < errors[1]
        # Rounding turns some units of relu on or off, and their gradients with them.
        assert errors[0] < (0.2 if activation == "relu" else 0.02) * truth.square().mean().sqrt().item()


@pytest.mark.parametrize("batch", [2, 40])
def test_threads_change_no_bit(batch, monkeypatch):
    module = networks.critic(OBSERVATION_DIM, 3, (144, 80, 48), members=3)
    states, actions = networks.states_and_actions(batch, 11, OBSERVATION_DIM, 3)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads_for", lambda products, threads=threads: threads)
        at_states = native.NativeCriticAtStates(module.stacked(), states, 11)
        assert at_states.threads == threads
        found.append(at_states.values_and_score(actions, "min"))
    for q, score in found[1:]:
        assert torch.equal(q, found[0][0])
        assert torch.equal(score, found[0][1])


@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
def test_far_from_zero(activation):
    """Where the activations saturate, and beyond what float32's exponential can hold."""
    module = networks.critic(OBSERVATION_DIM, 3, (32, 32), layer_norm=False, activation=activation)
    with torch.no_grad():
        module.weights[0].mul_(200.0)
    check(module, *networks.states_and_actions(4, 8, OBSERVATION_DIM, 3), "mean")


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "swish"])
def test_not_a_number_shows(activation, layer_norm):
    module = networks.critic(OBSERVATION_DIM, 3, (32, 32), layer_norm=layer_norm, activation=activation)
    for dtype, batch in ((F32, 1), (F32, 90), (torch.bfloat16, 90)):
        weights = module.stacked().to(dtype)
        states, actions = networks.states_and_actions(batch, 3, OBSERVATION_DIM, 3)
        actions[0, 1, 2] = torch.nan
        check_broken(weights, states, actions)


def check_broken(weights, states, actions):
    if weights.weights[0].dtype == torch.bfloat16 and not native.library().vgf_has_bfloat16():
        return
    for aggregation in ("mean", "min"):
        ours = native.NativeCriticAtStates(weights, states, 3).values_and_score(actions, aggregation)
        plain = reference.CriticAtStates(weights, states).values_and_score(actions, aggregation)
        assert ours[0].isnan().all(0)[0].tolist() == [False, True, False]
        for mine, theirs in zip(ours, plain, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


def test_strided_particles():
    module = networks.critic(OBSERVATION_DIM, 3, (32, 32))
    states, wide = networks.states_and_actions(2, 10, OBSERVATION_DIM, 6)
    actions = wide[:, ::2, ::2]
    weights = module.stacked()
    ours = native.NativeCriticAtStates(weights, states, 5).score(actions)
    assert torch.equal(ours, native.NativeCriticAtStates(weights, states, 5).score(actions.contiguous()))


def test_it_reads_the_weights_as_they_are_now():
    """A weight changed through ``.data`` has no new version; nothing here keeps a copy of it."""
    policy = VGFPolicy(VGFConfig(observation_dim=OBSERVATION_DIM, action_dim=3, hidden_dims=(32, 32)))
    states, actions = networks.states_and_actions(1, 4, OBSERVATION_DIM, 3)
    before = torch_backend.critic_at_states(policy.critic.stacked(), states, 4).score(actions)
    policy.critic.weights[1].data.mul_(2.0)
    after = torch_backend.critic_at_states(policy.critic.stacked(), states, 4).score(actions)
    assert not torch.equal(before, after)


def test_where_it_is_taken():
    module = networks.critic(OBSERVATION_DIM, 3, (32, 16))
    weights = module.stacked()
    states, _ = networks.states_and_actions(2, 1, OBSERVATION_DIM, 3)

    def form(weights, particles=5):
        return type(torch_backend.critic_at_states(weights, states, particles))

    assert form(weights) is form(weights.to(torch.bfloat16)) is native.NativeCriticAtStates
    assert form(weights, 200) is native.NativeCriticAtStates
    has_bfloat16 = bool(native.library().vgf_has_bfloat16())
    assert (form(weights.to(torch.bfloat16), 200) is native.NativeCriticAtStates) == has_bfloat16
    odd = networks.critic(OBSERVATION_DIM, 3, (33, 16)).stacked()
    strided = weights._replace(weights=tuple(w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights.weights))
    for other in (odd, strided, weights.to(torch.float64), weights.to(torch.float16)):
        assert form(other) is reference.CriticAtStates


# bandwidth_gradient, repulsion and the particle kernel
MODES = [(False, True, "rbf"), (True, True, "rbf"), (False, False, "rbf"), (False, True, "imq"), (True, True, "imq")]


def draw(states, particles, action_dim, seed, clumps=0):
    """Particles and scores; the first ``clumps`` particles of a state are one and the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(states, particles, action_dim, generator=generator) * 2.0 - 1.0
    x[:, :clumps] = x[:, :1]
    return x, 3.0 * torch.randn(x.shape, generator=generator)


def moved(x, score, mode, optimizer="adam", step_size=0.1, temperature=0.3, steps=1):
    flow = native.FlowSteps(x.clone(), Flow(step_size, temperature, "mean", *mode[:2], optimizer, mode[2]))
    for _ in range(steps):
        flow.step(score)
    return flow


@settings(max_examples=80, deadline=None)
@given(
    states=st.integers(1, 4),
    particles=st.one_of(st.integers(1, 20), st.sampled_from([64, 127, 128])),
    action_dim=st.integers(1, 9),
    clumps=st.sampled_from([0, 0, 2, 8]),
    mode=st.sampled_from(MODES),
    temperature=st.sampled_from([0.1, 1.0]),
    seed=st.integers(0, 9),
)
def test_direction(states, particles, action_dim, clumps, mode, temperature, seed):
    x, score = draw(states, particles, action_dim, seed, clumps)
    truth = oracle.svgd_direction(x, score, temperature, *mode)
    if mode[0]:
        # Rounding may take one entry for another as the median.
        assume(bool((truth.gap > 1e-5).all()))
    phi = moved(x, score, mode, temperature=temperature).moments[0] / (1.0 - reference.ADAM_BETA1)
    assert ((phi.double() - truth.phi).abs() <= BOUNDS["svgd_direction"][F32] * truth.scale).all()


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("states", "particles"), [(3, 10), (200, 7), (1, 1), (2, 128)])
def test_steps_of_particles(states, particles, mode, optimizer):
    """Three steps, each from where the one before ended."""
    x, score = draw(states, particles, 5, 1)
    flow = native.FlowSteps(x.clone(), Flow(0.05, 0.3, "mean", *mode[:2], optimizer, mode[2]))
    exact, moments = x.double(), [torch.zeros(x.shape, dtype=torch.float64) for _ in range(2)]
    for step in range(1, 4):
        before = flow.x.double()
        exact.copy_(before)
        flow.step(score)
        reference.svgd_step_(exact, score.double(), *moments, step, 0.05, 0.3, *mode[:2], optimizer, mode[2])
        # Adam divides by the root of a square: next to zero, rounding decides.
        truth = oracle.svgd_direction(before, score, 0.3, *mode)
        clear = truth.phi.abs() > 1e-4 * truth.scale
        if mode[0]:
            clear &= (truth.gap > 1e-5).view(-1, 1, 1)
        assert clear.double().mean() > 0.4 or particles == 1
        assert ((flow.x - exact)[clear].abs() < 1e-5).all()
        assert flow.x.abs().max() <= 1.0
        if optimizer == "adam":
            for mine, theirs in zip(flow.moments, moments, strict=True):
                theirs.copy_(mine)
        else:
            assert flow.moments.numel() == 0


def test_particles_that_are_not_numbers_show():
    """A broken particle or score breaks its state, and no other."""
    for mode in MODES:
        for broken in (torch.nan, torch.inf):
            x, score = draw(3, 6, 2, 0)
            x[1, 2, 0] = broken
            found = moved(x, score, mode).x
            assert found.isnan().flatten(1).all(1).tolist() == [False, True, False]
            assert found.isnan().flatten(1).any(1).tolist() == [False, True, False]
        x, score = draw(3, 6, 2, 0)
        score[1, 2, 0] = torch.nan
        assert moved(x, score, mode).x[..., 0].isnan().all(1).tolist() == [False, True, False]


def test_threads_move_particles_alike(monkeypatch):
    x, score = draw(40, 9, 3, 0)
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(native, "threads_for", lambda products, threads=threads: threads)
        found.append(moved(x, score, (True, True, "rbf"), steps=3).x)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("optimizer", ["adam", "ascent"])
def test_a_whole_flow(optimizer):
    """Compiled code and PyTorch's operators, over the public function's way; the particles given are left alone."""
    module = networks.critic(OBSERVATION_DIM, 3, (32, 32))
    states, particles = networks.states_and_actions(4, 8, OBSERVATION_DIM, 3)
    strided = particles.transpose(0, 1).contiguous().transpose(0, 1)
    arguments = (3, Flow(0.02, 0.5, "min", False, True, optimizer))
    found = torch_backend.value_gradient_flow(module.stacked(), states, strided, *arguments, return_trajectory=True)
    with native.off():
        plain = torch_backend.value_gradient_flow(
            module.stacked(), states, particles, *arguments, return_trajectory=True
        )
    assert torch.equal(strided, particles)
    assert found.trajectory.shape == plain.trajectory.shape == (4, *particles.shape)
    assert (found.particles - plain.particles).abs().median() < 1e-6
    torch.testing.assert_close(found.q, plain.q, rtol=1e-2, atol=1e-2)


def test_particles_it_leaves_to_pytorch():
    x, _ = draw(2, 8, 3, 0)
    assert native.supports_particles(x)
    with native.off():
        assert not native.supports_particles(x)
    for other in (x.double(), x.bfloat16(), x[:, ::2], x[:0], torch.zeros(1, 129, 2)):
        assert not native.supports_particles(other)


def test_arithmetic_alone_is_counted():
    library = native.library()
    assert library.vgf_peak(100, 0, 2) == 2 * library.vgf_peak(100, 0, 1) == 4 * library.vgf_peak(50, 0, 1) > 0.0
    assert library.vgf_peak(100, 1, 1) == (2 * library.vgf_peak(100, 0, 1) if library.vgf_has_bfloat16() else 0.0)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache of its own, and nothing found yet."""
    monkeypatch.setenv("VGF_FAST_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def act():
    policy = VGFPolicy(VGFConfig(observation_dim=4, action_dim=2, hidden_dims=(32, 32)), backend="torch")
    return policy.sample_actions(torch.ones(4), generator=torch.Generator().manual_seed(0))


def test_without_a_compiler_pytorch_does_the_same(fresh, monkeypatch, caplog):
    caplog.set_level("INFO", "vgf_fast")
    broken = fresh / "cc"
    broken.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    broken.chmod(0o755)
    action = act()
    assert native.library() is not None
    assert [path.suffix for path in native.cache_directory().iterdir()] == [".so"]
    for variable, value, said in (
        ("VGF_FAST_NATIVE", "0", "VGF_FAST_NATIVE is 0"),
        ("CC", "gcc '", 'CC is "gcc \'", expected a command'),
        ("CC", "no-such-compiler", "no C compiler: no-such-compiler"),
        ("CC", str(broken), f"{broken} failed: no such target"),
        ("VGF_FAST_CACHE", str(broken / "cache"), str(broken / "cache")),
    ):
        caplog.clear()
        native.library.cache_clear()
        with monkeypatch.context() as context:
            context.setenv(variable, value)
            same = [act(), act()][1]
            assert native.library() is None
            assert said in native.state()
        (told,) = [record.getMessage() for record in caplog.records if record.levelname == "INFO"]
        assert said in told
        assert relative_error(same, action.double()) < 1e-4


@pytest.mark.skipif(platform.machine() != "x86_64", reason="options of the compiler for x86-64")
@pytest.mark.parametrize("without", ["-mno-avx512f", "-mno-avx"])
def test_on_a_cpu_of_narrower_vectors(fresh, monkeypatch, without):
    """Vectors of eight and of four numbers, tiles for sixteen registers, and no products of bfloat16."""
    monkeypatch.setenv("CC", f"gcc {without}")
    library = native.library()
    if library is None:
        pytest.skip("needs gcc")
    assert not library.vgf_has_bfloat16()
    module = networks.critic(OBSERVATION_DIM, 3, (64, 48, 16), activation="gelu")
    for batch in (3, 40):
        check(module, *networks.states_and_actions(batch, 10, OBSERVATION_DIM, 3), "min")
    velocity = networks.velocity(OBSERVATION_DIM, 3, (64, 48))
    states, noise = networks.states_and_actions(3, 10, OBSERVATION_DIM, 3)
    truth = reference.behavior_flow(networks.exact(velocity), states.double(), noise.double(), 4)
    assert (
        relative_error(native.behavior_flow(velocity.stacked(), states, noise, 4), truth) < BOUNDS["behavior_flow"][F32]
    )
    x, score = draw(3, 10, 3, 0)
    truth = oracle.svgd_direction(x, score, 0.3)
    phi = moved(x, score, (False, True, "rbf")).moments[0] / (1.0 - reference.ADAM_BETA1)
    assert ((phi.double() - truth.phi).abs() <= BOUNDS["svgd_direction"][F32] * truth.scale).all()


def test_a_damaged_library_is_made_again(fresh):
    path = native.build()
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert native.build().read_bytes() == whole
    assert native.library() is not None


def test_few_products_and_busy_cores_take_fewer_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(native, "_CORES", 4)
    products = [n * native.PRODUCTS_PER_THREAD for n in (0, 1, 3, 100)]
    for running, expected in ((0, [1, 1, 3, 4]), (4, [1, 1, 3, 4]), (5, [1, 1, 2, 3]), (12, [1, 1, 1, 1])):
        monkeypatch.setattr(native, "_running", lambda running=running: running)
        assert [native.threads_for(count) for count in products] == expected


def test_no_product_of_the_states_is_a_batch_that_mkl_shares_out(monkeypatch):
    """Where nothing else takes a second thread, its batched product would."""

    def refuse(*arguments, **options):
        raise AssertionError("a batched product")

    for name in ("baddbmm", "bmm", "matmul"):
        monkeypatch.setattr(torch, name, refuse)
    states, actions = networks.states_and_actions(1, 10, OBSERVATION_DIM, 3)
    native.NativeCriticAtStates(networks.critic(OBSERVATION_DIM, 3, (32, 32)).stacked(), states, 10).score(actions)
    native.behavior_flow(networks.velocity(OBSERVATION_DIM, 3, (32, 32)).stacked(), states, actions, 2)


def test_what_runs_is_counted():
    assert native._running() >= os.path.exists("/proc/loadavg")


def test_what_is_compiled_already_needs_no_compiler(monkeypatch, tmp_path):
    path = native.build()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert native.build() == path
    assert native.state() == f"available: {path}"


def build_at_once(barrier, queue):
    """The library's path, and what was said at the level that is seen without any set-up of logging."""
    said = []
    logger = logging.getLogger("vgf_fast")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    barrier.wait()
    queue.put((native.build(), said))


def test_of_several_processes_one_compiles_and_says_so(fresh, monkeypatch):
    log, compiler = fresh / "log", fresh / "cc"
    compiler.write_text(
        f'#!/bin/sh\nsleep 0.2\necho "$@" >> {log}\nwhile [ $# -gt 1 ]; do shift; [ "$1" = -o ] && echo > "$2"; done\n'
        "exit 0\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=build_at_once, args=(barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len({path for path, _ in found}) == 1
    assert len(log.read_text().splitlines()) == 2  # compile, link
    (message,) = [message for _, said in found for message in said]
    assert str(native.cache_directory()) in message
