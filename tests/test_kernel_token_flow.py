"""The SVGD direction between whole responses, by the kernels and by blocked PyTorch, against float64."""

import math

import oracle
import pytest
import torch
from properties import given, settings, st
from races import race_detector
from tolerances import BF16, F16, F32, assert_accurate

pytest.importorskip("triton")

from vgf_fast.kernels import launch
from vgf_fast.kernels import token_flow as kernel

from vgf_fast import reference
from vgf_fast.llm import token_flow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("triton", "torch")

seeds = st.integers(0, 2**16)
layouts = st.sampled_from(oracle.LAYOUTS)
sizes = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(0, 90)),
    st.tuples(st.integers(10, 34), st.integers(1, 60)),
    st.tuples(st.sampled_from([63, 64, 65, 127, 128]), st.integers(1, 9)),
)
some = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Either backend, over several blocks or programs."""
    monkeypatch.setattr(token_flow, "_BLOCK", 1000)
    monkeypatch.setattr(launch, "processors", lambda device: 2)
    monkeypatch.setattr(launch, "TOKEN_FLOW_CHUNK", 96)
    return request.param


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def check(backend, x, g, temperature=0.5, repulsion=True):
    with oracle.nan_filled_empty():
        phi = token_flow.token_svgd_direction(x, g, temperature, repulsion, backend=backend)
    assert phi.is_contiguous()
    if x.shape[1] == 0:
        assert phi.shape == x.shape
        return
    truth = oracle.svgd_direction(x[None], g[None], temperature, False, repulsion)
    plain = reference.svgd_direction(x[None].float(), g[None].float(), temperature, False, repulsion)
    assert_accurate("token_svgd_direction", phi, truth.phi[0], plain[0], truth.scale[0])


@some
@given(sizes, layouts, layouts, st.booleans(), st.sampled_from([0.05, 1.0, 30.0]), seeds)
def test_kernel_any_size_and_layout(size, x_layout, g_layout, repulsion, temperature, seed):
    x, _ = oracle.arrange(normal(*size, seed=seed), x_layout)
    g, _ = oracle.arrange(normal(*size, seed=seed + 1), g_layout)
    check("triton", x, g, temperature, repulsion)


@some
@given(sizes, layouts, layouts, st.booleans(), st.sampled_from([0.05, 1.0, 30.0]), seeds)
def test_torch_any_size_and_layout(size, x_layout, g_layout, repulsion, temperature, seed):
    x, _ = oracle.arrange(normal(*size, seed=seed), x_layout)
    g, _ = oracle.arrange(normal(*size, seed=seed + 1), g_layout)
    check("torch", x, g, temperature, repulsion)


@pytest.mark.parametrize("n", [1, 4, 33])
def test_several_programs_and_chunks(backend, n):
    """More dimensions than a program's, the last one's not whole, and more than are summed at a time."""
    width = {1: 600, 4: 700, 33: 300}[n]
    check(backend, normal(n, width), normal(n, width, seed=1))


def test_responses_close_together_far_from_zero(backend):
    x = 5.0 + 1e-3 * normal(8, 70)
    check(backend, x, normal(8, 70, seed=1))


def test_equal_responses(backend):
    """Some at one place: their distance is exactly 0. All at one place: the kernel is 1 everywhere."""
    x = normal(6, 70)
    x[3] = x[1]
    check(backend, x, normal(6, 70, seed=1))
    same = normal(1, 70).expand(5, 70)
    g = normal(5, 70, seed=1)
    phi = token_flow.token_svgd_direction(same, g, 0.5, backend=backend)
    torch.testing.assert_close(phi, g.mean(dim=0, keepdim=True).expand(5, 70) / 0.5)


def test_one_response_far_from_the_others(backend):
    x = normal(7, 70)
    x[0] += 1e4
    check(backend, x, normal(7, 70, seed=1))


@pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
def test_dtypes(backend, x_dtype):
    check(backend, normal(5, 70, dtype=x_dtype), normal(5, 70, seed=1, dtype=F16))


def test_what_is_not_a_number_is_seen(backend):
    x, g = normal(5, 70), normal(5, 70, seed=1)
    x[2, 60] = math.nan
    assert token_flow.token_svgd_direction(x, g, 0.5, backend=backend).isnan().all()
    g[3, 7] = math.nan
    phi = token_flow.token_svgd_direction(normal(5, 70), g, 0.5, backend=backend)
    assert phi[:, 7].isnan().all()
    assert phi.isnan().sum() == 5


def test_runs_are_equal_to_the_bit(backend):
    x, g = normal(9, 70), normal(9, 70, seed=1)
    runs = [token_flow.token_svgd_direction(x, g, 0.5, backend=backend) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_float64_is_torch():
    x, g = normal(5, 300).double(), normal(5, 300, seed=1).double()
    truth = oracle.svgd_direction(x[None], g[None], 0.5)
    torch.testing.assert_close(token_flow.token_svgd_direction(x, g, 0.5), truth.phi[0], rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="backend='triton' cannot run: the particles are torch.float64"):
        token_flow.token_svgd_direction(x, g, 0.5, backend="triton")


class TestOp:
    @pytest.mark.parametrize("width", [0, 30])
    def test_registration(self, width):
        x, g = normal(3, width), normal(3, width, seed=1)
        for repulsion in (True, False):
            torch.library.opcheck(torch.ops.vgf_fast.token_svgd_direction, (x, g, 0.5, repulsion))

    def test_compile_without_a_graph_break(self):
        def function(x, g):
            return kernel.token_svgd_direction(x * 2.0, g, 0.5)

        x, g = normal(3, 40), normal(3, 40, seed=1)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, g), function(x, g))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
    def test_no_races(self, monkeypatch):
        monkeypatch.setattr(launch, "processors", lambda device: 2)
        with race_detector():
            kernel.token_svgd_direction(normal(5, 300), normal(5, 300, seed=1), 0.5)


class TestErrors:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"particles": torch.zeros(4)}, r"particles has shape \(4,\), expected \(N"),
            ({"score": torch.zeros(2, 5)}, r"score has shape \(2, 5\), expected \(2, 4\)"),
            ({"temperature": 0.0}, "temperature is 0.0, expected a number > 0"),
            ({"score": torch.zeros(2, 4, device="meta")}, "score is on meta"),
        ],
    )
    def test_values(self, changed, message):
        values = {"particles": torch.zeros(2, 4), "score": torch.zeros(2, 4), "temperature": 1.0} | changed
        values = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
            for name, value in values.items()
        }
        for function in (token_flow.token_svgd_direction, kernel.token_svgd_direction):
            with pytest.raises(ValueError, match=message):
                function(**values)

    def test_limits_of_the_kernel(self):
        with pytest.raises(ValueError, match="particles is 129 of them, expected 1 to 128"):
            kernel.token_svgd_direction(normal(129, 2), normal(129, 2), 1.0)
        with pytest.raises(ValueError, match="score has dtype torch.float64"):
            kernel.token_svgd_direction(normal(2, 2), normal(2, 2).double(), 1.0)

    def test_types(self):
        with pytest.raises(TypeError, match="particles is a list, expected a torch.Tensor of shape"):
            token_flow.token_svgd_direction([], normal(2, 2), 1.0)
        with pytest.raises(TypeError, match="score has dtype torch.int64, expected a floating dtype"):
            token_flow.token_svgd_direction(normal(2, 2), normal(2, 2).long(), 1.0)


def test_every_size_has_a_launch_configuration():
    for amd in (False, True):
        for n in range(1, launch.MAX_PARTICLES + 1):
            for width in (1, 1000, 10**6, 2**31 - 1):
                config = launch.token_flow(n, width, 132, amd)
                programs = -(-width // config.span)
                assert config.span % 64 == 0
                assert programs * n * n <= launch.TOKEN_FLOW_DISTANCES
