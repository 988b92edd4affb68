"""What only a GPU can show: bfloat16 and tf32 on the matrix unit, large shapes, repeatability, graphs, sanitizers."""

import shutil
import subprocess
import sys

import networks
import pytest
import torch
from tolerances import within_twice

pytest.importorskip("triton")

from vgf_fast.kernels import launch, nearest_token, sequence, token_flow

import vgf_fast as vgf
from vgf_fast import reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
WIDTHS = (512, 512, 512, 512)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}


@pytest.fixture(params=list(DTYPES))
def compute(request):
    """A dtype of products; PyTorch's own float32 products are tf32 meanwhile."""
    launch.set_float32_precision("tf32")
    torch.backends.cuda.matmul.allow_tf32 = True
    yield DTYPES[request.param]
    torch.backends.cuda.matmul.allow_tf32 = False


def inputs(batch=256, particles=10):
    return networks.states_and_actions(batch, particles, 29, 8, seed=1)


class TestAccuracy:
    """Errors against float64, at most twice those of PyTorch's own operations in the same dtype."""

    @pytest.mark.parametrize("aggregation", ["mean", "min"])
    def test_critic(self, compute, aggregation):
        module = networks.critic(29, 8, WIDTHS, seed=2)
        states, actions = inputs()
        ours = sequence.values_and_score(networks.packed(module, compute), states, actions, aggregation)
        theirs = reference.CriticAtStates(module.stacked().to(compute), states).values_and_score(actions, aggregation)
        exact = networks.exact(module)
        truth = reference.CriticAtStates(exact, states.double()).values_and_score(actions.double(), aggregation)
        for value, plain, right in zip(ours, theirs, truth, strict=True):
            within_twice(value, plain, right)

    def test_behavior_flow(self, compute):
        module = networks.velocity(29, 8, WIDTHS, seed=2)
        states, noise = inputs()
        ours = sequence.behavior_flow(networks.packed(module, compute), states, noise, 10)
        theirs = reference.behavior_flow(module.stacked().to(compute), states, noise, 10)
        truth = reference.behavior_flow(networks.exact(module), states.double(), noise.double(), 10)
        within_twice(ours, theirs, truth)

    def test_one_flow_step(self, compute):
        module = networks.critic(29, 8, WIDTHS, seed=2)
        states, particles = inputs()
        budget = (1, 0.1, 0.5, "mean", False, True, "ascent")
        ours = sequence.value_gradient_flow(networks.packed(module, compute), states, particles, *budget)
        theirs = reference.value_gradient_flow(module.stacked().to(compute), states, particles, *budget)
        truth = reference.value_gradient_flow(networks.exact(module), states.double(), particles.double(), *budget)
        within_twice(ours.particles, theirs.particles, truth.particles)
        within_twice(ours.q, theirs.q, truth.q)


def test_65536_rows(compute):
    """The same rows in one large batch and in small ones."""
    module = networks.critic(29, 8, WIDTHS, seed=2)
    packed = networks.packed(module, compute)
    states, actions = inputs(6554)
    q, score = sequence.values_and_score(packed, states, actions)
    for start in (0, 3000, 6500):
        part = slice(start, start + 54)
        q_part, score_part = sequence.values_and_score(packed, states[part], actions[part])
        assert torch.equal(q[:, part], q_part)
        assert torch.equal(score[part], score_part)


def test_peak_memory_of_65536_rows():
    """Beyond inputs and outputs at most a tenth of what eager autograd takes."""
    module = networks.critic(29, 8, WIDTHS, seed=2)
    packed = networks.packed(module, torch.bfloat16)
    states, actions = inputs(6554)

    def peak(function):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        kept = sum(t.numel() * t.element_size() for t in results)
        return torch.cuda.max_memory_allocated() - before - kept

    def eager():
        weights, x = module.stacked().to(torch.bfloat16), actions.clone().requires_grad_()
        rows = states.repeat_interleave(10, dim=0)
        q = reference.member_values(weights, rows, x.view(-1, 8))
        return q, torch.autograd.grad(q.mean(dim=0).sum(), x)[0]

    assert peak(lambda: sequence.values_and_score(packed, states, actions)) <= 0.1 * peak(eager)


def test_repeated_runs_are_bit_equal(compute):
    module = networks.critic(29, 8, WIDTHS, seed=2)
    packed = networks.packed(module, compute)
    states, particles = inputs()
    rewards = torch.ones(256, device="cuda")
    epilogue = sequence.TDTarget(rewards, rewards, 0.99)
    runs = [sequence.value_gradient_flow(packed, states, particles, 5, 0.1, 0.5, epilogue=epilogue) for _ in range(20)]
    for run in runs[1:]:
        assert torch.equal(run.particles, runs[0].particles)
        assert torch.equal(run.chosen, runs[0].chosen)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_as_with_the_torch_backend(precision):
    """Losses of the first updates; later ones part, as any two roundings do."""
    config = vgf.VGFConfig(29, 8)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(256, 29, generator=generator).cuda()
    batch = {
        "observations": states,
        "actions": (torch.rand(256, 8, generator=generator) * 2.0 - 1.0).cuda(),
        "next_observations": states.roll(1, 0),
        "rewards": torch.ones(256).cuda(),
        "masks": torch.ones(256).cuda(),
    }
    losses = []
    for backend in ("triton", "torch"):
        policy = vgf.VGFPolicy(config, device="cuda", backend=backend)
        learner = vgf.Learner(policy, vgf.TrainConfig(precision=precision))
        losses.append([learner.update(batch)["critic_loss"].item() for _ in range(5)])
    bound = {"float32": 1e-3, "bfloat16": 3e-2}[precision]
    assert losses[0] == pytest.approx(losses[1], rel=bound)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("rows", [3, 200])
def test_nearest_tokens(compute, metric, rows):
    """The list's spare places make up for the rounding of products: tokens and scores are those of float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    queries, table = (torch.randn(n, 384, generator=generator, device="cuda").to(compute) for n in (rows, 30_522))
    scores, tokens = nearest_token.nearest_token(queries, table, 20, metric)
    q, e = queries.double(), table.double()
    if metric == "l2":
        truth = -torch.cdist(q, e).square()
    else:
        truth = q @ e.T
        if metric == "cosine":
            truth /= q.norm(dim=1, keepdim=True) * e.norm(dim=1)
    right = truth.topk(20)
    assert (tokens == right.indices).float().mean() >= 0.999
    torch.testing.assert_close(scores.double(), truth.gather(1, tokens), rtol=1e-5, atol=1e-5)
    again = nearest_token.nearest_token(queries, table, 20, metric)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], tokens)


def test_peak_memory_of_nearest_tokens():
    """A hundredth of the scores of all tokens, for a vocabulary of 128,256 in bfloat16."""
    queries = torch.randn(4096, 256, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(128_256, 256, device="cuda", dtype=torch.bfloat16)
    nearest_token.nearest_token(queries[:64], table)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest_token.nearest_token(queries, table)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4096 * 128_256 * 2 / 100


@pytest.mark.parametrize("particles", [8, 128])
def test_direction_between_responses(particles):
    generator = torch.Generator("cuda").manual_seed(0)
    x, g = (torch.randn(particles, 64 * 768, generator=generator, device="cuda") for _ in range(2))
    phi = token_flow.token_svgd_direction(x, g, 0.5)
    truth = reference.svgd_direction(x[None].double(), g[None].double(), 0.5)[0]
    plain = reference.svgd_direction(x[None], g[None], 0.5)[0]
    within_twice(phi, plain, truth)
    for _ in range(5):
        assert torch.equal(token_flow.token_svgd_direction(x, g, 0.5), phi)


SANITIZED = """
import sys
sys.path.insert(0, {tests!r})
import torch, networks
from vgf_fast.kernels import nearest_token, sequence, token_flow
states, x = networks.states_and_actions(7, 5, 6, 3)
packed = networks.packed(networks.critic(6, 3, (32, 32)), torch.bfloat16)
velocity = networks.packed(networks.velocity(6, 3, (32, 32)), torch.bfloat16)
x = sequence.behavior_flow(velocity, states, x, 2)
sequence.values_and_score(packed, states, x)
rewards = torch.ones(7, device="cuda")
sequence.value_gradient_flow(packed, states, x, 2, 0.1, 0.5, epilogue=sequence.TDTarget(rewards, rewards, 0.9))
sequence.value_gradient_flow(packed, states, x, 2, 0.1, 0.5, "min", True, epilogue=sequence.Select())
queries, table = torch.randn(70, 33, device="cuda"), torch.randn(900, 33, device="cuda")
for rows in (3, 70):
    nearest_token.nearest_token(queries[:rows], table, 5, "cosine", table[:, 0] > 0, table[:, 0])
token_flow.token_svgd_direction(queries[:5], queries[5:10], 0.5)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool, request):
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    script = SANITIZED.format(tests=str(request.path.parent))
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    if "Device not supported" in result.stdout + result.stderr:
        pytest.skip("compute-sanitizer does not support this device")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
