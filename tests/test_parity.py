"""Against the numbers of the public release: the torch backend in float64, the public API on the kernels in float32."""

import json

import numpy as np
import oracle
import pytest
import torch
from release import DATA, FLOWS, below, load_flow, relative_error
from tolerances import BOUNDS, F32

import vgf_fast as vgf
from vgf_fast import reference
from vgf_fast.reference_checkpoint import load_mlp

BOUND = 1e-9


@pytest.fixture(params=FLOWS)
def flow(request):
    return load_flow(request.param)


def test_behavior_flow(flow):
    particles = reference.behavior_flow(flow.velocity.stacked(), flow["obs"], flow["noise"], flow.meta["bc_flow_steps"])
    assert relative_error(particles, flow["init"]) < BOUND


def test_every_flow_step(flow):
    meta = flow.meta
    critic = reference.CriticAtStates(flow.critic.stacked(), flow["obs"])
    for step in range(meta["L"]):
        particles, score = flow["particles"][step], flow["score"][step]
        assert relative_error(critic.values_and_score(particles, meta["vgf_q_agg"])[1], score) < BOUND
        assert relative_error(reference.kernel_matrix(particles)[0], flow["kernel"][step]) < BOUND
        phi = reference.svgd_direction(particles, score, meta["alpha"])
        assert relative_error(phi, flow["phi"][step]) < BOUND
        phi = reference.svgd_direction(particles, score, meta["alpha"], bandwidth_gradient=True)
        assert relative_error(phi, flow["phi_bandwidth_grad"][step]) < BOUND


def test_whole_trajectory(flow):
    meta = flow.meta
    budget = vgf.TransportBudget(meta["L"], meta["lr"], meta["alpha"])
    result = vgf.value_gradient_flow(
        flow.critic,
        flow["obs"],
        flow["init"],
        budget,
        meta["vgf_q_agg"],
        bandwidth_gradient=True,
        return_trajectory=True,
    )
    assert relative_error(result.trajectory, flow["particles"]) < BOUND
    assert relative_error(result.particles, flow["particles"][-1]) < BOUND
    assert relative_error(result.q, flow["q_members"]) < BOUND


def test_the_bandwidths_gradient_is_what_the_release_adds():
    flow = load_flow("paper_small")
    phi = reference.svgd_direction(flow["particles"][0], flow["score"][0], flow.meta["alpha"])
    assert relative_error(phi, flow["phi_bandwidth_grad"][0]) > 1e-2


def test_selection_and_targets(flow):
    aggregation = flow.meta["select_q_agg"]
    particles = flow["particles"][-1]
    q = reference.CriticAtStates(flow.critic.stacked(), flow["obs"]).values(particles)
    assert relative_error(reference.aggregate(q, aggregation), flow["q_eval"]) < BOUND
    action, index = vgf.select_particle(particles, reference.aggregate(q, aggregation))
    assert torch.equal(index, flow["best_index"])
    assert relative_error(action, flow["action"]) < BOUND

    target_q = reference.CriticAtStates(flow.target_critic.stacked(), flow["obs"]).values(particles)
    assert relative_error(reference.aggregate(target_q, aggregation), flow["target_q"]) < BOUND
    zeros, ones = torch.zeros(len(particles)).double(), torch.ones(len(particles)).double()
    for reduce in ("mean", "max"):
        target = vgf.td_target(target_q, zeros, ones, 1.0, aggregation, reduce)
        assert relative_error(target, flow[f"target_{reduce}"]) < BOUND


def test_three_updates():
    with np.load(DATA / "update_td_mean.npz") as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(bytes(arrays["meta"]))
    config = {**meta["config"], "ob_dims": [meta["O"]]}
    policy_config, train_config = vgf.config_from_reference(config)
    policy = vgf.VGFPolicy.from_reference_parameters(below("before/", arrays), config).double()
    learner = vgf.Learner(policy, train_config)
    for step in range(meta["steps"]):
        noise = below(f"step{step}/noise/", arrays)
        info = learner.update(below(f"step{step}/batch/", arrays), noise)
        expected_info = below(f"step{step}/info/", arrays)
        assert expected_info.keys() <= info.keys()
        for name, value in expected_info.items():
            assert info[name].item() == pytest.approx(float(value), rel=1e-8)
        expected = vgf.VGFPolicy(policy_config).double()
        for module, prefix in (("critic", "critic"), ("target_critic", "target_critic"), ("behavior", "bc")):
            load_mlp(getattr(expected, module), below(f"step{step}/after/", arrays), prefix)
        for (name, parameter), truth in zip(policy.named_parameters(), expected.parameters(), strict=True):
            assert relative_error(parameter.detach(), truth.detach()) < 1e-8, (step, name)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("flow_steps", [0, 3])
def test_actions_of_a_release_checkpoint(flow_steps, backend, device, record_property):
    if backend == "triton":
        pytest.importorskip("triton")
    folder = DATA / "reference_checkpoint"
    policy = vgf.VGFPolicy.from_reference_checkpoint(folder / "params_3.pkl", folder / "config.json")
    with np.load(folder / "expected.npz") as file:
        observations, noise, expected = (file[f"{name}{flow_steps}"] for name in ("obs", "noise", "act"))
    policy.backend = backend
    policy.to(device)
    actions = policy.sample_actions(observations, flow_steps=flow_steps, noise=noise).cpu().numpy()
    policy.to("cpu")
    policy.backend = "torch"
    # Adam's first step is eps * sign(phi): only where phi is nearly zero may rounding flip it.
    phi = _first_direction(policy, observations, noise)
    ambiguous = (
        (phi.abs() < 1e-5 * phi.abs().max()).any(dim=1).numpy() if flow_steps else np.zeros(expected.shape, bool)
    )
    print(f"sign-ambiguous entries of L={flow_steps}: {ambiguous.sum()} of {ambiguous.size}")
    record_property("sign_ambiguous", int(ambiguous.sum()))
    assert ambiguous.mean() < 0.05
    assert np.abs(actions - expected)[~ambiguous].max() < 1e-4


def _first_direction(policy, observations, noise):
    states, noise = torch.from_numpy(observations), torch.from_numpy(noise)
    particles = policy.draw_particles(states, noise)
    _, score = vgf.critic_value_and_score(policy.critic, states, particles, policy.config.flow_q_aggregation)
    return vgf.svgd_direction(particles, score, policy.config.test_budget.temperature, bandwidth_gradient=True)


class TestKernels:
    """The public functions with backend="triton", in float32; three updates of the learner: test_learner_kernels."""

    @pytest.fixture(params=FLOWS)
    def release(self, request, device):
        pytest.importorskip("triton")
        flow = load_flow(request.param, torch.float32)
        arrays = {name: tensor.to(device) for name, tensor in flow.arrays.items()}
        networks = {
            name: module.to(device) for name, module in flow._asdict().items() if isinstance(module, torch.nn.Module)
        }
        return flow._replace(arrays=arrays, **networks)

    def test_behavior_flow(self, release):
        steps = release.meta["bc_flow_steps"]
        with oracle.nan_filled_empty():
            particles = vgf.behavior_flow(release.velocity, release["obs"], release["noise"], steps, backend="triton")
        assert relative_error(particles, release["init"]) < BOUNDS["release_particles"][F32]

    def test_every_flow_step(self, release):
        meta = release.meta
        for step in range(meta["L"]):
            particles, score = release["particles"][step], release["score"][step]
            with oracle.nan_filled_empty():
                _, ours = vgf.critic_value_and_score(
                    release.critic, release["obs"], particles, meta["vgf_q_agg"], backend="triton"
                )
            assert relative_error(ours, score) < BOUNDS["release_score"][F32]
            for name, bandwidth_gradient in (("phi", False), ("phi_bandwidth_grad", True)):
                with oracle.nan_filled_empty():
                    phi = vgf.svgd_direction(particles, score, meta["alpha"], bandwidth_gradient, backend="triton")
                assert relative_error(phi, release[name][step]) < BOUNDS["release_direction"][F32]

    def test_whole_trajectory(self, release, request, record_property):
        meta = release.meta
        with oracle.nan_filled_empty():
            result = vgf.value_gradient_flow(
                release.critic,
                release["obs"],
                release["init"],
                vgf.TransportBudget(meta["L"], meta["lr"], meta["alpha"]),
                meta["vgf_q_agg"],
                bandwidth_gradient=True,
                return_trajectory=True,
                backend="triton",
            )
        assert torch.equal(result.trajectory[-1], result.particles)
        phi = release["phi_bandwidth_grad"]
        # Adam's steps are the direction's sign at first: of an entry near zero, rounding decides it.
        is_certain = (phi.abs() > 1e-4 * phi.abs().amax(dim=(2, 3), keepdim=True)).all(dim=0)
        name = request.node.callspec.params["release"]
        print(f"sign-ambiguous entries of {name}: {(~is_certain).sum()} of {is_certain.numel()}")
        record_property("sign_ambiguous", int((~is_certain).sum()))
        # A flipped particle pulls its neighbours of the same state along.
        states = is_certain.all(dim=2).all(dim=1)
        assert states.double().mean() > 0.5
        bound = BOUNDS["release_trajectory"][F32]
        assert relative_error(result.trajectory[:, states], release["particles"][:, states]) < bound
        assert relative_error(result.q[:, states], release["q_members"][:, states]) < bound

    def test_selection_and_targets(self, release):
        aggregation, particles = release.meta["select_q_agg"], release["particles"][-1]
        for critic, name in ((release.critic, "q_eval"), (release.target_critic, "target_q")):
            with oracle.nan_filled_empty():
                q, _ = vgf.critic_value_and_score(critic, release["obs"], particles, aggregation, backend="triton")
            values = reference.aggregate(q, aggregation)
            assert relative_error(values, release[name]) < BOUNDS["release_score"][F32]
            if name == "q_eval":
                action, index = vgf.select_particle(particles, values, backend="triton")
                assert torch.equal(index, release["best_index"])
                assert torch.equal(action, release["action"])
        zeros, ones = torch.zeros_like(q[0, :, 0]), torch.ones_like(q[0, :, 0])
        for reduce in ("mean", "max"):
            target = vgf.td_target(q, zeros, ones, 1.0, aggregation, reduce, backend="triton")
            assert relative_error(target, release[f"target_{reduce}"]) < BOUNDS["release_score"][F32]
