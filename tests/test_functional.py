"""The functional API: what it refuses and how it says so, dtypes, and the choice of a backend."""

import copy

import oracle
import pytest
import torch

import vgf_fast as vgf
from vgf_fast import functional, reference
from vgf_fast.backends import choice
from vgf_fast.networks import EnsembleMLP, VelocityField

CRITIC = EnsembleMLP(4, 2, (8,), generator=torch.Generator().manual_seed(0))
VELOCITY = VelocityField(4, 2, (8,), generator=torch.Generator().manual_seed(0))
STATES = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
PARTICLES = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
BUDGET = vgf.TransportBudget(2, 0.1, 0.1)


@pytest.mark.parametrize(
    ("states", "particles", "error", "message"),
    [
        (STATES[:, :3], PARTICLES, ValueError, r"observations has shape \(3, 3\), expected \(\*, 4\)"),
        (STATES[0], PARTICLES, ValueError, r"observations has shape \(4,\), expected \(B, O\)"),
        (STATES.numpy(), PARTICLES, TypeError, r"observations is a ndarray, expected a torch.Tensor of shape \(B, O\)"),
        (STATES.long(), PARTICLES, TypeError, r"observations has dtype torch.int64, expected a floating dtype"),
        (STATES, PARTICLES[:2], ValueError, r"particles has shape \(2, 5, 2\), expected \(3, N >= 1, A\)"),
        (STATES, PARTICLES[:, :0], ValueError, r"particles has shape \(3, 0, 2\)"),
        (STATES, PARTICLES[:, :, :1], ValueError, r"particles has shape \(3, 5, 1\), expected \(\*, \*, 2\)"),
        (STATES, PARTICLES[0], ValueError, r"particles has shape \(5, 2\), expected \(B, N, A\)"),
        (STATES.to("meta"), PARTICLES, ValueError, r"observations is on meta, but the critic is on cpu"),
        (STATES, PARTICLES.to("meta"), ValueError, r"particles is on meta, but the critic is on cpu"),
    ],
)
def test_wrong_tensors(states, particles, error, message):
    with pytest.raises(error, match=message):
        vgf.value_gradient_flow(CRITIC, states, particles, BUDGET)
    with pytest.raises(
        error, match=message.replace("particles has", "actions has").replace("particles is", "actions is")
    ):
        vgf.critic_value_and_score(CRITIC, states, particles)
    message = message.replace("particles", "noise").replace("the critic", "the velocity field")
    with pytest.raises(error, match=message):
        vgf.behavior_flow(VELOCITY, states, particles, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: vgf.critic_value_and_score(VELOCITY, STATES, PARTICLES), TypeError, "critic is a VelocityField"),
        (lambda: vgf.critic_value_and_score(CRITIC, STATES, PARTICLES, "max"), ValueError, "q_aggregation is 'max'"),
        (lambda: vgf.behavior_flow(CRITIC, STATES, PARTICLES, 3), TypeError, "velocity is a EnsembleMLP"),
        (lambda: vgf.behavior_flow(VELOCITY, STATES, PARTICLES, 0), ValueError, "steps is 0, expected an integer >= 1"),
        (
            lambda: vgf.value_gradient_flow(CRITIC, STATES, PARTICLES, 3),
            TypeError,
            "budget is a int, expected a Transp",
        ),
        (
            lambda: vgf.value_gradient_flow(CRITIC, STATES, PARTICLES, BUDGET, optimizer="sgd"),
            ValueError,
            "optimizer is 'sgd', expected one of 'adam', 'ascent'",
        ),
        (lambda: vgf.svgd_direction(PARTICLES, PARTICLES[:2], 0.1), ValueError, r"score has shape \(2, 5, 2\)"),
        (lambda: vgf.svgd_direction(PARTICLES, PARTICLES, 0.0), ValueError, "temperature is 0.0"),
        (lambda: vgf.svgd_direction(PARTICLES, PARTICLES, float("nan")), ValueError, "temperature is nan"),
        (
            lambda: vgf.select_particle(PARTICLES, torch.zeros(3, 4)),
            ValueError,
            r"q has shape \(3, 4\), expected \(3, 5\)",
        ),
        (lambda: vgf.select_particle(PARTICLES, torch.zeros(3, 5), "best"), ValueError, "mode is 'best'"),
        (
            lambda: vgf.td_target(torch.zeros(2, 3, 5), torch.zeros(3), torch.zeros(2), 0.9),
            ValueError,
            r"masks has shape \(2,\), expected \(3,\)",
        ),
        (
            lambda: vgf.svgd_direction(PARTICLES, PARTICLES, 0.1, backend="cuda"),
            ValueError,
            "backend is 'cuda', expected",
        ),
        (lambda: vgf.TransportBudget(-1), ValueError, r"TransportBudget.steps is -1, expected an integer >= 0"),
        (
            lambda: vgf.TransportBudget(1, 0.1, 0),
            ValueError,
            r"TransportBudget.temperature is 0, expected a number in \[1e-12, 1e\+12\]",
        ),
        (lambda: vgf.VGFConfig(3, 0), ValueError, "VGFConfig.action_dim is 0"),
        (lambda: vgf.VGFConfig(3, 2, hidden_dims=()), ValueError, "VGFConfig.hidden_dims is"),
        (lambda: vgf.VGFConfig(3, 2, activation="tanh"), ValueError, "VGFConfig.activation is 'tanh', expected one of"),
        (
            lambda: vgf.VGFConfig.from_dict({"observation_dim": 3, "action_dim": 2, "partices": 4}),
            ValueError,
            "'partices' \\(did you mean 'particles'\\?\\)",
        ),
        (lambda: vgf.VGFConfig.from_dict({"action_dim": 2}), ValueError, "needs observation_dim"),
        (
            lambda: vgf.TrainConfig(discount=1.5),
            ValueError,
            r"TrainConfig.discount is 1.5, expected a number in \[0, 1\]",
        ),
        (lambda: vgf.TrainConfig(critic_loss="iql-q"), ValueError, "TrainConfig.critic_loss is 'iql-q'"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_configurations_survive_a_round_trip():
    config = vgf.VGFConfig(3, 2, hidden_dims=(7,), test_budget=vgf.TransportBudget(0, 0.2, 0.3), repulsion=False)
    assert vgf.VGFConfig.from_dict(config.to_dict()) == config
    train = vgf.TrainConfig(critic_loss="sql", tau=0.1)
    assert vgf.TrainConfig.from_dict(train.to_dict()) == train


def test_nothing_given_is_written_and_the_trajectory_is_whole():
    particles = PARTICLES.clone()
    result = vgf.value_gradient_flow(CRITIC, STATES, particles, BUDGET, return_trajectory=True)
    assert torch.equal(particles, PARTICLES)
    assert result.trajectory.shape == (3, 3, 5, 2)
    assert torch.equal(result.trajectory[0], PARTICLES)
    assert torch.equal(result.trajectory[-1], result.particles)
    assert result.q.shape == (2, 3, 5)
    assert vgf.value_gradient_flow(CRITIC, STATES, particles, BUDGET, evaluate=False).q is None


def test_no_steps_is_no_movement():
    result = vgf.value_gradient_flow(CRITIC, STATES, PARTICLES, vgf.TransportBudget(0, 0.1, 0.1))
    assert torch.equal(result.particles, PARTICLES)


def test_particles_move_uphill_and_no_further_than_the_budget():
    """Without repulsion, Adam's steps are at most about eps each, and Q rises."""
    before, _ = vgf.critic_value_and_score(CRITIC, STATES, PARTICLES)
    budget = vgf.TransportBudget(5, 0.01, 0.1)
    result = vgf.value_gradient_flow(CRITIC, STATES, PARTICLES, budget, repulsion=False)
    assert (result.q.mean(dim=0) - before.mean(dim=0)).mean() > 0
    assert (result.particles - PARTICLES).abs().max() <= 5 * 0.01 * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_particles_are_float32_at_least(dtype):
    expected = torch.promote_types(dtype, torch.float32)
    result = vgf.value_gradient_flow(CRITIC, STATES, PARTICLES.to(dtype), BUDGET)
    assert result.particles.dtype == expected
    assert result.q.dtype == torch.float32
    assert vgf.svgd_direction(PARTICLES.to(dtype), PARTICLES.to(dtype), 0.1).dtype == expected
    assert vgf.behavior_flow(VELOCITY, STATES, PARTICLES.to(dtype), 2).dtype == expected


def test_empty_batches():
    states, particles = torch.zeros(0, 4), torch.zeros(0, 5, 2)
    assert vgf.behavior_flow(VELOCITY, states, particles, 2).shape == (0, 5, 2)
    result = vgf.value_gradient_flow(CRITIC, states, particles, BUDGET)
    assert result.q.shape == (2, 0, 5)
    action, index = vgf.select_particle(result.particles, result.q.mean(dim=0))
    assert action.shape == (0, 2)
    assert index.shape == (0,)


def test_selection_draws_from_the_generator():
    q = torch.zeros(2000, 5)
    particles = torch.zeros(2000, 5, 1)
    for mode in ("softmax", "random"):
        draws = [vgf.select_particle(particles, q, mode, 1.0, torch.Generator().manual_seed(s))[1] for s in (0, 0, 1)]
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert (draws[0].bincount(minlength=5) - 400).abs().max() < 100


class TestBackends:
    CPU = torch.device("cpu")
    CUDA = torch.device("cuda")

    def test_auto_is_torch_on_a_cpu_and_triton_on_a_gpu(self):
        assert functional.resolve_backend("auto", self.CPU, 10, 8, torch.float32) == "torch"
        assert functional.resolve_backend("auto", self.CUDA, 10, 8, torch.float32) == "triton"

    def test_triton_needs_a_gpu_or_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(ValueError, match="on cpu: Triton needs a GPU, or its interpreter"):
            functional.resolve_backend("triton", self.CPU, 10, 8, torch.float32)

    @pytest.mark.parametrize(
        ("particles", "width", "dtype", "message"),
        [
            (129, 8, torch.float32, "particles is 129, the kernels' limit is 128"),
            (10, 129, torch.float32, "the action dimension is 129, the kernels' limit is 128"),
            (10, 8, torch.float64, "the particles are torch.float64"),
        ],
    )
    def test_limits_are_named_and_auto_steps_back_to_torch_once(self, particles, width, dtype, message, caplog):
        with pytest.raises(ValueError, match=message):
            functional.resolve_backend("triton", self.CUDA, particles, width, dtype)
        choice._say_fallback.cache_clear()
        for _ in range(3):
            assert functional.resolve_backend("auto", self.CUDA, particles, width, dtype) == "torch"
        assert [record.message for record in caplog.records if message in record.message] != []
        assert len(caplog.records) == 1

    @pytest.mark.parametrize("optimizer", ["adam", "ascent"])
    def test_a_flow_with_the_kernels_equals_the_torch_backends(self, optimizer, device):
        """Also the policy and the learner, which choose the backend once for all they call."""
        critic = copy.deepcopy(CRITIC).to(device)
        states, particles = STATES.to(device), PARTICLES.to(device)
        results = [
            vgf.value_gradient_flow(
                critic, states, particles, BUDGET, optimizer=optimizer, return_trajectory=True, backend=backend
            )
            for backend in ("triton", "torch")
        ]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_policy_and_learner_with_the_kernels_equal_the_torch_backend(self, device):
        config = vgf.VGFConfig(4, 2, hidden_dims=(8,), behavior_hidden_dims=(8,), particles=5, behavior_steps=2)
        batch = {
            "observations": STATES.to(device),
            "actions": PARTICLES[:, 0].to(device),
            "next_observations": STATES.to(device),
            "rewards": torch.ones(3, device=device),
            "masks": torch.ones(3, device=device),
        }
        actions, targets = [], []
        for backend in ("triton", "torch"):
            policy = vgf.VGFPolicy(config, device=device, backend=backend)
            actions.append(policy.sample_actions(STATES.to(device), noise=PARTICLES.to(device)))
            targets.append(vgf.Learner(policy).update(batch)["target_mean"])
        torch.testing.assert_close(*actions, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(*targets, rtol=1e-4, atol=1e-5)

    def test_triton_not_installed(self, monkeypatch):
        monkeypatch.setattr(choice, "triton_installed", lambda: False)
        with pytest.raises(ValueError, match=r"pip install 'vgf_fast\[triton\]'"):
            functional.resolve_backend("triton", self.CUDA, 10, 8, torch.float32)

    @pytest.mark.parametrize(
        ("critic", "particles", "message"),
        [
            (EnsembleMLP(4, 2, (8,)), torch.zeros(3, 129, 2), "particles is 129, the kernels' limit is 128"),
            (
                EnsembleMLP(4, 129, (8,)),
                torch.zeros(3, 5, 129),
                "the action dimension is 129, the kernels' limit is 128",
            ),
            (EnsembleMLP(4, 2, (8, 1025)), PARTICLES, "the widest hidden layer has 1025 units, the kernels' limit is"),
            (CRITIC, PARTICLES.double(), "the particles are torch.float64"),
            (copy.deepcopy(CRITIC).double(), PARTICLES, "the weights are torch.float64, the kernels take float32 and"),
            (copy.deepcopy(CRITIC).half(), PARTICLES, "the weights are torch.float16"),
        ],
    )
    def test_what_the_kernels_cannot_take_is_refused_by_name(self, critic, particles, message, device):
        critic, states, particles = copy.deepcopy(critic).to(device), STATES.to(device), particles.to(device)
        with pytest.raises(ValueError, match=message):
            vgf.value_gradient_flow(critic, states, particles, BUDGET, backend="triton")
        with pytest.raises(ValueError, match=message):
            vgf.critic_value_and_score(critic, states, particles, backend="triton")
        if device == "cpu":
            assert vgf.value_gradient_flow(critic, states, particles, BUDGET).particles.shape == particles.shape

    def test_networks_run_in_the_kernels(self, device):
        from launches import count_launches

        critic, velocity = copy.deepcopy(CRITIC).to(device), copy.deepcopy(VELOCITY).to(device)
        states, particles = STATES.to(device), PARTICLES.to(device)
        with count_launches() as launched:
            vgf.critic_value_and_score(critic, states, particles, backend="triton")
        ready, step = ["packing_kernel", "state_share_kernel"], ["rows_kernel", "rows_kernel", "product_kernel"]
        assert launched == [*ready, *step, "flow_step_kernel"]
        with count_launches() as launched:
            vgf.behavior_flow(velocity, states, particles, 2, backend="triton")
        assert launched == [*ready, *3 * ["euler_kernel"]]
        with count_launches() as launched:
            vgf.value_gradient_flow(critic, states, particles, BUDGET, backend="triton")
        assert launched == [*ready, *2 * [*step, "flow_step_kernel"], "rows_kernel", "rows_kernel"]

    @pytest.mark.parametrize("bare", [False, True])
    @pytest.mark.parametrize("aggregation", ["mean", "min"])
    def test_kernels_equal_the_torch_backend(self, aggregation, bare, device):
        critic, velocity = copy.deepcopy(CRITIC).to(device), copy.deepcopy(VELOCITY).to(device)
        if bare:
            critic, velocity = critic.stacked(), velocity.stacked()
        states, particles = STATES.to(device), PARTICLES.to(device)
        for call in (
            lambda backend: vgf.critic_value_and_score(critic, states, particles, aggregation, backend=backend),
            lambda backend: (vgf.behavior_flow(velocity, states, particles, 3, backend=backend),),
        ):
            for ours, theirs in zip(call("triton"), call("torch"), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("layout", oracle.LAYOUTS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts_and_dtypes_of_the_input(self, dtype, layout, device):
        critic, velocity = copy.deepcopy(CRITIC).to(device), copy.deepcopy(VELOCITY).to(device)
        states, particles = STATES.to(device, dtype), PARTICLES.to(device, dtype)
        awkward = [oracle.arrange(t, layout)[0].requires_grad_() for t in (states, particles)]
        for call in (
            lambda *tensors: vgf.critic_value_and_score(critic, *tensors, backend="triton"),
            lambda *tensors: (vgf.behavior_flow(velocity, *tensors, 3, backend="triton"),),
            lambda *tensors: vgf.value_gradient_flow(critic, *tensors, BUDGET, backend="triton")[:2],
        ):
            for ours, theirs in zip(call(*awkward), call(states, particles), strict=True):
                assert torch.equal(ours, theirs)
                assert not ours.requires_grad

    def test_an_empty_batch_in_the_kernels(self, device):
        states, particles = torch.zeros(0, 4, device=device), torch.zeros(0, 5, 2, device=device)
        critic, velocity = copy.deepcopy(CRITIC).to(device), copy.deepcopy(VELOCITY).to(device)
        q, score = vgf.critic_value_and_score(critic, states, particles, backend="triton")
        assert (q.shape, score.shape) == ((2, 0, 5), (0, 5, 2))
        assert vgf.behavior_flow(velocity, states, particles, 2, backend="triton").shape == (0, 5, 2)
        assert vgf.value_gradient_flow(critic, states, particles, BUDGET, backend="triton").q.shape == (2, 0, 5)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU looking at the weights would wait for it")
    @pytest.mark.parametrize(("group", "value"), [("weights", float("nan")), ("biases", float("inf"))])
    def test_broken_weights_are_named_where_looking_costs_no_wait(self, group, value):
        critic, velocity = copy.deepcopy(CRITIC), copy.deepcopy(VELOCITY)
        for module in (critic, velocity):
            with torch.no_grad():
                getattr(module, group)[1].view(-1)[3 % getattr(module, group)[1].numel()] = value
        message = rf"critic's {group}\[1\] has values that are not finite"
        with pytest.raises(ValueError, match=message):
            vgf.critic_value_and_score(critic, STATES, PARTICLES, backend="triton")
        with pytest.raises(ValueError, match=message):
            vgf.value_gradient_flow(critic, STATES, PARTICLES, BUDGET, backend="triton")
        with pytest.raises(ValueError, match=message.replace("critic", "velocity")):
            vgf.behavior_flow(velocity, STATES, PARTICLES, 2, backend="triton")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's products of bfloat16 are wrong")
    def test_bfloat16_weights_run_in_pytorch_where_kernels_are_interpreted(self):
        critic, velocity = copy.deepcopy(CRITIC).bfloat16(), copy.deepcopy(VELOCITY).bfloat16()
        for call in (
            lambda backend: vgf.critic_value_and_score(critic, STATES, PARTICLES, backend=backend),
            lambda backend: (vgf.behavior_flow(velocity, STATES, PARTICLES, 3, backend=backend),),
            lambda backend: vgf.value_gradient_flow(critic, STATES, PARTICLES, BUDGET, backend=backend)[:2],
        ):
            for ours, theirs in zip(call("triton"), call("torch"), strict=True):
                assert torch.equal(ours, theirs)

    def test_a_float64_flow_on_the_triton_backend_is_refused(self):
        with pytest.raises(ValueError, match="the particles are torch.float64"):
            vgf.value_gradient_flow(CRITIC, STATES, PARTICLES.double(), BUDGET, backend="triton")
        assert reference.svgd_direction(PARTICLES.double(), PARTICLES.double(), 0.1).dtype == torch.float64
