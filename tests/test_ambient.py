"""What a caller has switched on in PyTorch changes no result, and nothing made under it is of another kind."""

import ast
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

import vgf_fast as vgf
from vgf_fast import functional
from vgf_fast.backends import native
from vgf_fast.data.dataset import Dataset
from vgf_fast.data.replay import ReplayBuffer

REPOSITORY = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def switched(switch, on, off):
    switch(on)
    try:
        yield
    finally:
        switch(off)


STATES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "wide dtype": lambda: switched(torch.set_default_dtype, torch.float64, torch.float32),
    "narrow dtype": lambda: switched(torch.set_default_dtype, torch.float16, torch.float32),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, True, False),
    "threads": lambda: switched(torch.set_num_threads, 3, 1),
}
CONFIGURATIONS = {
    "flow": {"behavior_layer_norm": True},
    "gaussian": {"behavior": "gaussian", "gaussian_tanh": True, "selection": "softmax"},
    "amortized": {"amortized": True, "flow_q_aggregation": "min", "activation": "gelu"},
}
SIZES = {"observation_dim": 5, "action_dim": 3, "hidden_dims": (32, 32), "behavior_hidden_dims": (32,), "particles": 6}


def transitions(count=200):
    """As a user has them: arrays in memory, made whatever the state."""
    random = np.random.default_rng(0)
    return {
        "observations": random.standard_normal((count, 5)).astype(np.float32),
        "actions": random.uniform(-1.0, 1.0, (count, 3)).astype(np.float32),
        "next_observations": random.standard_normal((count, 5)).astype(np.float32),
        "rewards": random.standard_normal(count).astype(np.float32),
        "masks": np.ones(count, np.float32),
    }


def everything(configuration, folder):
    """A policy's whole life; every number it ends in."""
    policy = vgf.VGFPolicy(vgf.VGFConfig(**SIZES, **CONFIGURATIONS[configuration]))
    random = np.random.default_rng(1)
    found = [policy.sample_actions(random.standard_normal(5)), policy.sample_actions(random.standard_normal((60, 5)))]
    found.append(torch.from_numpy(policy.predict(random.standard_normal((2, 5)))[0]))
    dataset = Dataset.from_arrays(**transitions())
    learner = vgf.Learner(policy, vgf.TrainConfig(batch_size=16, max_gradient_norm=1.0))
    learner.update({name: array[:16] for name, array in transitions().items()})
    learner.update({name: torch.from_numpy(array[:16]) for name, array in transitions().items()})
    learner.update({name: array[:16].tolist() for name, array in transitions().items()})
    records = learner.fit(dataset, 2, progress=False)
    learner = vgf.Learner.resume(learner.save(folder))
    learner.update(dataset.take([0, 5, 7]))
    buffer = ReplayBuffer.of(dataset, 300)
    buffer.add(np.ones(5), np.ones(3), np.ones(5), 1.0, 0.0)
    learner.update(buffer.sample(4, torch.Generator("cpu").manual_seed(0)))
    policy = vgf.VGFPolicy.from_pretrained(learner.policy.save_pretrained(folder)).to(torch.float32)
    found.append(policy.select_action({"observation.state": random.standard_normal(5)}))
    found += [parameter.detach() for parameter in learner.policy.parameters()]
    found.append(np.array([float(value) for record in records for value in record.values()]))
    return [np.asarray(one) for one in found], learner


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return {name: everything(name, tmp_path_factory.mktemp(name))[0] for name in CONFIGURATIONS}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("state", STATES)
def test_a_policys_life_is_the_same(state, configuration, expected, tmp_path):
    with STATES[state]():
        found, learner = everything(configuration, tmp_path)
    for number, (one, other) in enumerate(zip(found, expected[configuration], strict=True)):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), number
    # And what was made there serves on.
    learner.update({name: array[:4] for name, array in transitions().items()})
    assert not any(parameter.is_inference() for parameter in learner.policy.parameters())


def operations():
    """Every operation of the functional API, with and without gradients."""
    random = torch.Generator("cpu").manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random, device="cpu", dtype=torch.float32)

    policy = vgf.VGFPolicy(vgf.VGFConfig(**SIZES))
    states, x, score = draw(7, 5), draw(7, 6, 3).clamp(-1.0, 1.0), draw(7, 6, 3)
    found = [*vgf.critic_value_and_score(policy.critic, states, x), vgf.behavior_flow(policy.behavior, states, x, 3)]
    found += [vgf.svgd_direction(x, score, 0.1), vgf.svgd_direction(x, score, 0.1, bandwidth_gradient=True)]
    result = vgf.value_gradient_flow(policy.critic, states, x, policy.config.test_budget)
    found += [result.particles, result.q, vgf.td_target(result.q, draw(7), draw(7), 0.9)]
    found += vgf.select_particle(result.particles, result.q[0], "softmax", generator=random)
    if not torch.is_inference_mode_enabled() and torch.is_grad_enabled():
        start = x.clone().requires_grad_()
        options = {"bandwidth_gradient": True, "flow_gradient": "exact"}
        moved = vgf.value_gradient_flow(policy.critic, states, start, policy.config.test_budget, **options)
        found += torch.autograd.grad(moved.particles.square().sum(), start)
        drawn = vgf.behavior_flow(policy.behavior, states, start, 3, flow_gradient="exact")
        found += torch.autograd.grad(drawn.square().sum(), start)
        q, slope = vgf.critic_value_and_score(policy.critic, states, start, flow_gradient="exact")
        found += torch.autograd.grad(q.sum() + slope.square().sum(), start)
    return [tensor.detach().clone() for tensor in found]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("state", STATES)
def test_operations_are_the_same(state, compiled):
    with contextlib.nullcontext() if compiled else native.off():
        right = operations()
        with STATES[state]():
            found = operations()
    for number, (one, other) in enumerate(zip(found, right, strict=False)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), number


def test_a_traced_function_leaves_autocast():
    random = torch.Generator("cpu").manual_seed(0)
    x, score = torch.randn(2, 3, 4, 2, generator=random)
    traced = torch.compile(functional.svgd_direction, fullgraph=True, backend="eager")
    right = traced(x, score, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(traced(x, score, 0.1), right)


def test_traced_acting_reads_no_memory_of_what_stands_for_tensors():
    policy = vgf.VGFPolicy(vgf.VGFConfig(**SIZES))
    random = torch.Generator("cpu").manual_seed(0)
    states, noise = torch.randn(2, 5, generator=random), torch.randn(2, 6, 3, generator=random)
    traced = torch.compile(lambda states: policy.sample_actions(states, noise=noise), backend="eager")
    torch.testing.assert_close(traced(states), policy.sample_actions(states, noise=noise), rtol=1e-4, atol=1e-5)


# --- tensors made ----------------------------------------------------------------------------------------------------

WITH_DTYPE = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye", "tensor", "from_file"}
WITHOUT = {"arange", "randint", "randperm", "as_tensor", "asarray", "tril_indices", "triu_indices"}  # dtype from values


def test_every_tensor_that_is_made_names_its_device_and_dtype():
    """Else a default of the caller's decides."""
    found = []
    for folder in ("vgf_fast", "kernels"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
                    continue
                name = ast.unparse(node.func).removeprefix("torch.")
                given = {keyword.arg for keyword in node.keywords}
                needed = {"device", "dtype"} if name in WITH_DTYPE else {"device"} if name in WITHOUT else set()
                if needed - given or (name == "Generator" and not node.args and "device" not in given):
                    found.append(f"{path.relative_to(REPOSITORY)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


# --- the gate before C -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "dtype"),
    [
        (torch.zeros(6, dtype=torch.bfloat16), torch.float32),
        (torch.zeros(5), torch.float32),
        (torch.zeros(6, device="meta"), torch.float32),
        (torch.zeros(3, 2).t(), torch.float32),
        (torch.zeros(12)[::2], torch.float32),
        (torch._neg_view(torch.zeros(6)), torch.float32),
    ],
)
def test_a_buffer_that_is_not_what_c_reads_is_refused(tensor, dtype):
    with pytest.raises(ValueError, match="a buffer is .* expected 6 entries of torch.float32, contiguous, on cpu"):
        native._address("a buffer", tensor, dtype, 6)
    assert native._address("a buffer", torch.zeros(2, 3), dtype, 6) > 0


def test_networks_whose_layers_do_not_fit_are_refused():
    """C would read beyond them."""
    critic = vgf.VGFPolicy(vgf.VGFConfig(**SIZES)).critic.stacked()
    states, actions = torch.zeros(2, 5), torch.zeros(2, 6, 3)
    for field, value in (
        ("weights", (critic.weights[0], critic.weights[1][:, :16].contiguous(), critic.weights[2])),
        ("weights", (critic.weights[0], critic.weights[1].double(), critic.weights[2])),
        ("weights", (*critic.weights[:2], critic.weights[2][:1])),
        ("biases", (critic.biases[0], critic.biases[1][:1], critic.biases[2])),
        ("norm_scales", (critic.norm_scales[0], critic.norm_scales[1][:, :8])),
        ("norm_biases", critic.norm_biases[:1]),
    ):
        with pytest.raises(ValueError, match=field):
            vgf.critic_value_and_score(critic._replace(**{field: value}), states, actions)
    with pytest.raises(ValueError, match="activation is 'tanh', expected one of 'relu', 'gelu', 'swish'"):
        vgf.critic_value_and_score(critic._replace(activation="tanh"), states, actions)
    wide = critic._replace(
        weights=(*critic.weights[:2], torch.zeros(2, 32, 2)), biases=(*critic.biases[:2], torch.zeros(2, 2))
    )
    with pytest.raises(ValueError, match="the critic has 2 outputs, expected 1"):
        vgf.critic_value_and_score(wide, states, actions)
