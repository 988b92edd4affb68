"""The SVGD kernels against automatic differentiation in float64, PyTorch in float32, and the release's numbers."""

import math

import oracle
import pytest
import torch
from properties import assume, given, settings, st
from release import FLOWS, load_flow
from tolerances import BF16, BOUNDS, F16, F32, assert_accurate

pytest.importorskip("triton")

from vgf_fast.kernels import launch, svgd

from vgf_fast import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = {
    "paper": {},
    "release": {"bandwidth_gradient": True},
    "imq": {"kernel": "imq"},
    "imq_release": {"kernel": "imq", "bandwidth_gradient": True},
    "simplified": {"repulsion": False},
    "simplified_release": {"repulsion": False, "bandwidth_gradient": True},
}
# In float32 two entries of D closer than this may change places, and the bandwidth's gradient with them.
SEPARATE = 1e-5

seeds = st.integers(0, 2**16)
sizes = st.one_of(
    st.tuples(st.integers(0, 5), st.integers(1, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 64)),
    st.tuples(st.just(1), st.sampled_from([63, 64, 65, 100, 127, 128]), st.integers(1, 9)),
)
many = settings(max_examples=20, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def particles_like(kind, batch, n, width, seed=0):
    """Spread out; close together far from zero; or clipped, many of them at one corner or another."""
    x = normal(batch, n, width, seed=seed)
    if kind == "clumped":
        return 0.7 + 1e-4 * x
    return (0.5 * x if kind == "spread" else 4.0 * x).clamp(-1.0, 1.0)


def check_direction(x, g, temperature, mode):
    with oracle.nan_filled_empty():
        phi = svgd.svgd_direction(x, g, temperature, **MODES[mode])
    truth = oracle.svgd_direction(x, g, temperature, **MODES[mode])
    plain = reference.svgd_direction(x.float(), g.float(), temperature, **MODES[mode])
    assert phi.is_contiguous()
    assert_accurate("svgd_direction", phi, truth.phi, plain, truth.scale)


class TestDirection:
    @many
    @given(
        sizes,
        st.sampled_from(list(MODES)),
        st.sampled_from(["spread", "clumped", "clipped"]),
        st.sampled_from(oracle.LAYOUTS),
        st.sampled_from(oracle.LAYOUTS),
        st.sampled_from([0.05, 1.0, 30.0]),
        seeds,
    )
    def test_any_size_layout_and_spread(self, size, mode, kind, x_layout, g_layout, temperature, seed):
        x, _ = oracle.arrange(particles_like(kind, *size, seed=seed), x_layout)
        g, _ = oracle.arrange(normal(*size, seed=seed + 1), g_layout)
        if MODES[mode].get("bandwidth_gradient"):
            assume((oracle.svgd_direction(x, g, temperature).gap > SEPARATE).all())
        check_direction(x, g, temperature, mode)

    @many
    @given(st.integers(1, 3), st.integers(2, 20), st.integers(1, 3), st.sampled_from([1, 2, 8]), seeds)
    def test_ties_are_broken_by_row_major_order(self, batch, n, width, steps, seed):
        """On a coarse grid distances are exact and many are equal: which entry is the median decides the gradient."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(-steps, steps + 1, (batch, n, width), generator=generator).to(DEVICE) / steps
        check_direction(x, normal(batch, n, width, seed=seed), 1.0, "release")

    def test_a_tie_among_thousands(self):
        """Every pair is equally far from every other: the middle entries lie deep among their equals."""
        n = 64
        x = torch.eye(n, device=DEVICE).unsqueeze(0)
        check_direction(x, normal(1, n, n), 1.0, "release")

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("n", [2, 5, 10])
    def test_all_particles_in_one_place(self, n, mode):
        """The bandwidth is at its lower bound: the kernel is 1 everywhere and nothing flows through the median."""
        x = normal(3, 1, 4).expand(3, n, 4)
        g = normal(3, n, 4, seed=1)
        check_direction(x, g, 0.1, mode)
        phi = svgd.svgd_direction(x, g, 0.1, **MODES[mode])
        expected = g.mean(dim=1, keepdim=True) / (0.1 if MODES[mode].get("repulsion", True) else 1.0)
        torch.testing.assert_close(phi, expected.expand(3, n, 4))

    def test_median_zero_while_some_particles_are_apart(self):
        x = torch.zeros(1, 8, 2, device=DEVICE)
        x[0, 3] = 0.5
        for mode in MODES:
            check_direction(x, normal(1, 8, 2), 1.0, mode)

    @pytest.mark.parametrize("x_dtype", [F32, BF16, F16])
    @pytest.mark.parametrize("g_dtype", [F32, BF16, F16])
    def test_dtypes(self, x_dtype, g_dtype):
        """Half-precision input is read as it is and computed in float32."""
        check_direction(particles_like("spread", 2, 10, 8).to(x_dtype), normal(2, 10, 8, dtype=g_dtype), 0.2, "paper")

    @pytest.mark.parametrize("mode", ["paper", "release"])
    @pytest.mark.parametrize("name", FLOWS)
    def test_the_release(self, name, mode):
        flow = load_flow(name)
        x, g = flow["particles"][:-1].flatten(0, 1), flow["score"].flatten(0, 1)
        truth = flow["phi_bandwidth_grad" if mode == "release" else "phi"].flatten(0, 1)
        temperature = flow.meta["alpha"]
        phi = svgd.svgd_direction(x.float().to(DEVICE), g.float().to(DEVICE), temperature, **MODES[mode]).cpu()
        scale = oracle.svgd_direction(x, g, temperature, **MODES[mode]).scale
        error = ((phi.double() - truth).abs() / scale).max().item()
        assert error <= BOUNDS["release_direction"][F32]

    def test_what_is_not_a_number_stays_in_its_state(self):
        x, g = particles_like("spread", 3, 10, 4), normal(3, 10, 4)
        clean = svgd.svgd_direction(x, g, 1.0, bandwidth_gradient=True)
        x[1, 3, 2] = math.nan
        phi = svgd.svgd_direction(x, g, 1.0, bandwidth_gradient=True)
        assert phi[1].isnan().all()
        assert torch.equal(phi[[0, 2]], clean[[0, 2]])

    def test_score_shared_by_all_particles(self):
        check_direction(particles_like("spread", 2, 6, 3), normal(1, 1, 3).expand(2, 6, 3), 1.0, "paper")


def adam(x, m, v, phi, step, step_size):
    """Adam ascent in float64."""
    m = 0.9 * m.double() + 0.1 * phi
    v = 0.999 * v.double() + 0.001 * phi**2
    update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return (x.double() + step_size * update).clamp(-1, 1), m, v


class TestStep:
    @many
    @given(
        sizes,
        st.sampled_from(list(MODES)),
        st.lists(st.sampled_from(oracle.LAYOUTS), min_size=4, max_size=4),
        st.integers(2, 9),
        seeds,
    )
    def test_adam_in_place_in_any_layout(self, size, mode, layouts, step, seed):
        x, g = particles_like("spread", *size, seed=seed), normal(*size, seed=seed + 1)
        truth = oracle.svgd_direction(x, g, 0.3, **MODES[mode])
        if MODES[mode].get("bandwidth_gradient"):
            assume((truth.gap > SEPARATE).all())
        m, v = normal(*size, seed=seed + 2), normal(*size, seed=seed + 3).square() + 0.1
        tensors, buffers = zip(
            *(oracle.arrange(*pair) for pair in zip((x, g, m, v), layouts, strict=True)), strict=True
        )
        holes = [buffer.isnan() for buffer in buffers]
        svgd.svgd_step_(*tensors, step, 0.1, 0.3, **MODES[mode])

        plain = [x.clone(), m.clone(), v.clone()]
        reference.svgd_step_(plain[0], g, plain[1], plain[2], step, 0.1, 0.3, **MODES[mode])
        expected = adam(x, m, v, truth.phi, step, 0.1)
        # m / sqrt(v) is large where phi is small beside its terms; there the moments' rounding is all that counts.
        scales = (1.0 + 0.1 * truth.scale, truth.scale + 1.0, truth.scale**2 + 1.0)
        names = ("svgd_step", "svgd_moment", "svgd_moment")
        moved = (tensors[0], tensors[2], tensors[3])
        for name, value, true, other, scale in zip(names, moved, expected, plain, scales, strict=True):
            assert_accurate(name, value, true, other, scale)
        assert torch.equal(tensors[1], g)
        for buffer, hole in zip(buffers, holes, strict=True):
            assert torch.equal(buffer.isnan(), hole)

    def test_the_first_step_is_the_sign(self):
        """Moments start at zero: every entry moves by the step size, whatever the direction's magnitude."""
        x, g = particles_like("spread", 4, 10, 8), normal(4, 10, 8, seed=1)
        start = x.clone()
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        svgd.svgd_step_(x, g, m, v, 1, 0.05, 0.1)
        direction = oracle.svgd_direction(start, g, 0.1)
        clear = direction.phi.abs() > 1e-5 * direction.scale
        assert clear.float().mean() > 0.99
        expected = (start.double() + 0.05 * direction.phi.sign()).clamp(-1, 1)
        torch.testing.assert_close(x[clear].double(), expected[clear], rtol=0, atol=BOUNDS["svgd_step"][F32])

    @pytest.mark.parametrize("mode", MODES)
    def test_ascent(self, mode):
        x, g = particles_like("spread", 3, 10, 8), normal(3, 10, 8, seed=1)
        truth = oracle.svgd_direction(x, g, 0.5, **MODES[mode])
        plain = x.clone()
        reference.svgd_step_(plain, g, None, None, 1, 0.1, 0.5, **MODES[mode], optimizer="ascent")
        expected = (x.double() + 0.1 * truth.phi).clamp(-1, 1)
        svgd.svgd_step_(x, g, None, None, 1, 0.1, 0.5, **MODES[mode], optimizer="ascent")
        assert_accurate("svgd_step", x, expected, plain, 1.0 + 0.1 * truth.scale)

    def test_clip(self):
        x, g = particles_like("spread", 2, 10, 8), 100.0 * normal(2, 10, 8, seed=1)
        svgd.svgd_step_(x, g, None, None, 1, 1.0, 0.5, optimizer="ascent", low=-0.25, high=0.5)
        assert x.min() == -0.25
        assert x.max() == 0.5

    def test_clip_does_not_hide_what_is_not_a_number(self):
        x, g = particles_like("spread", 2, 10, 8), normal(2, 10, 8, seed=1)
        g[1, 4, 5] = math.nan
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        svgd.svgd_step_(x, g, m, v, 1, 0.1, 0.5)
        assert x[1, :, 5].isnan().all()
        assert not x[0].isnan().any()

    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_half_precision_particles(self, dtype):
        x, g = particles_like("spread", 2, 10, 8).to(dtype), normal(2, 10, 8, seed=1, dtype=dtype)
        truth = oracle.svgd_direction(x, g, 0.5).phi
        plain = x.float()
        reference.svgd_step_(plain, g.float(), None, None, 1, 0.1, 0.5, optimizer="ascent")
        expected = (x.double() + 0.1 * truth).clamp(-1, 1)
        svgd.svgd_step_(x, g, None, None, 1, 0.1, 0.5, optimizer="ascent")
        assert_accurate("svgd_step", x, expected, plain.to(dtype), 1.0)

    @pytest.mark.parametrize("name", FLOWS)
    def test_the_release_trajectory(self, name):
        """All its flow steps from its own scores, particles and moments carried by the kernel."""
        flow = load_flow(name)
        x = flow["init"].float().to(DEVICE)
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        unclear = torch.zeros_like(x, dtype=torch.bool, device="cpu")
        for step, score in enumerate(flow["score"], start=1):
            direction = flow["phi_bandwidth_grad"][step - 1]
            # Adam's early steps are nearly a sign: where phi is near zero, rounding chooses it.
            unclear |= direction.abs() < 1e-4 * direction.abs().amax(dim=(1, 2), keepdim=True)
            svgd.svgd_step_(
                x, score.float().to(DEVICE), m, v, step, flow.meta["lr"], flow.meta["alpha"], bandwidth_gradient=True
            )
            error = (x.cpu().double() - flow["particles"][step]).abs()
            assert error[~unclear].max() <= BOUNDS["release_particles"][F32]
        assert unclear.float().mean() < 0.02


class TestOps:
    ARGUMENTS = (0.5, True, True)

    @pytest.mark.parametrize("batch", [0, 3])
    def test_registration(self, batch):
        x, g, m, v = (normal(batch, 5, 3, seed=i).abs() for i in range(4))
        torch.library.opcheck(torch.ops.vgf_fast.svgd_direction, (x, g, *self.ARGUMENTS, "rbf"))
        adam_arguments = (x, g, m, v, 1, 0.1, *self.ARGUMENTS, "rbf", "adam", -1.0, 1.0)
        torch.library.opcheck(torch.ops.vgf_fast.svgd_step_, adam_arguments)
        ascent_arguments = (x, g, None, None, 1, 0.1, *self.ARGUMENTS, "imq", "ascent", -1.0, 1.0)
        torch.library.opcheck(torch.ops.vgf_fast.svgd_step_, ascent_arguments)

    def test_compile_without_a_graph_break(self):
        def two_steps(x, g):
            x = x.clone()
            m, v = torch.zeros_like(x), torch.zeros_like(x)
            for step in (1, 2):
                svgd.svgd_step_(x, g, m, v, step, 0.1, 0.5)
            return svgd.svgd_direction(x, g, 0.5), x, m

        x, g = particles_like("spread", 2, 5, 3), normal(2, 5, 3)
        compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager")
        for value, expected in zip(compiled(x, g), two_steps(x, g), strict=True):
            assert torch.equal(value, expected)


def on_device(values):
    """The tensors among the values moved to the device, but for those meant to be elsewhere."""
    return {
        name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for name, value in values.items()
    }


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"particles": torch.zeros(3, 4)}, r"particles has shape \(3, 4\), expected \(B, N, A\)"),
            ({"particles": torch.zeros(1, 129, 2)}, "particles is 129 a state, expected 1 to 128"),
            ({"particles": torch.zeros(1, 0, 2)}, "particles is 0 a state, expected 1 to 128"),
            ({"particles": torch.zeros(1, 5, 129)}, "particles has 129 columns, expected 1 to 128"),
            ({"score": torch.zeros(1, 5, 3)}, r"score has shape \(1, 5, 3\), expected \(2, 5, 3\)"),
            ({"score": torch.zeros(2, 5, 3).double()}, r"score has dtype torch.float64, expected torch.float32 or"),
            ({"temperature": 0.0}, "temperature is 0.0, expected a number > 0"),
            ({"temperature": math.nan}, "temperature is nan"),
            ({"score": torch.zeros(2, 5, 3, device="meta")}, "score is on meta, expected"),
        ],
    )
    def test_direction(self, arguments, message):
        defaults = {"particles": torch.zeros(2, 5, 3), "score": torch.zeros(2, 5, 3), "temperature": 1.0}
        if "particles" in arguments:
            defaults["score"] = arguments["particles"]
        with pytest.raises(ValueError, match=message):
            svgd.svgd_direction(**on_device(defaults | arguments))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"first_moment": None}, "first_moment is None, expected a float32 tensor"),
            ({"second_moment": torch.zeros(2, 5, 4)}, r"second_moment has shape \(2, 5, 4\), expected \(2, 5, 3\)"),
            ({"second_moment": torch.zeros(2, 5, 3).half()}, "second_moment has dtype torch.float16"),
            ({"first_moment": torch.zeros(2, 1, 3).expand(2, 5, 3)}, "first_moment has strides .* clone it"),
            ({"particles": torch.zeros(2, 1, 3).expand(2, 5, 3)}, "particles has strides .* clone it"),
            ({"step": 0}, "step is 0, expected an integer >= 1"),
            ({"optimizer": "sgd"}, "optimizer is 'sgd', expected 'adam' or 'ascent'"),
        ],
    )
    def test_step(self, arguments, message):
        tensors = {name: torch.zeros(2, 5, 3) for name in ("particles", "score", "first_moment", "second_moment")}
        values = tensors | {"step": 1, "step_size": 0.1, "temperature": 1.0} | arguments
        with pytest.raises(ValueError, match=message):
            svgd.svgd_step_(**on_device(values))

    def test_a_state_beyond_32_bit_offsets(self):
        with pytest.raises(ValueError, match="spans 2\\*\\*31 elements or more"):
            launch.check_span("score", torch.empty(2, 3, 1, device="meta").as_strided((2, 3, 1), (1, 2**30, 1)))

    def test_cpu_tensors_need_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="particles is on cpu, expected a GPU: .* TRITON_INTERPRET=1"):
            svgd.svgd_direction(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), 1.0)


def test_every_size_has_a_launch_configuration():
    for amd in (False, True):
        for n in range(1, launch.MAX_PARTICLES + 1):
            config = launch.svgd(n, amd)
            assert n <= config.block_n < max(2 * n, 8)
            assert not config.paired or config.block_c == 2
    for n in range(1, launch.MAX_CANDIDATES + 1):
        config = launch.selection(n)
        assert n <= config.block_n < 2 * n
        assert config.block_b * config.block_n <= max(256, config.block_n)
