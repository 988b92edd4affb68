"""The selection kernels against PyTorch, in float64 and in the kernel's dtype."""

import math

import oracle
import pytest
import torch
from properties import assume, given, settings, st
from tolerances import BF16, BOUNDS, F16, F32, assert_accurate

pytest.importorskip("triton")

from vgf_fast.kernels import launch, selection

from vgf_fast import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

seeds = st.integers(0, 2**16)
layouts = st.sampled_from(oracle.LAYOUTS)
dtypes = st.sampled_from([F32, BF16, F16])
members = st.integers(1, 16)
batches = st.integers(0, 70)
particles = st.one_of(st.integers(1, 20), st.integers(1, 130), st.just(300))
aggregations = st.sampled_from(["mean", "min"])
many = settings(max_examples=30, deadline=None, derandomize=True)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class TestAggregate:
    @many
    @given(members, batches, particles, aggregations, layouts, dtypes, seeds)
    def test_any_size_layout_and_dtype(self, e, b, n, aggregation, layout, dtype, seed):
        q, _ = oracle.arrange(normal(e, b, n, seed=seed, dtype=dtype), layout)
        with oracle.nan_filled_empty():
            out = selection.aggregate(q, aggregation)
        assert out.is_contiguous()
        plain = reference.aggregate(q, aggregation)
        if aggregation == "min":
            assert torch.equal(out, plain)
        scale = q.double().abs().mean(dim=0).clamp(min=1e-2)
        assert_accurate("aggregate", out, reference.aggregate(q.double(), aggregation), plain, scale)

    @pytest.mark.parametrize("aggregation", ["mean", "min"])
    def test_what_is_not_a_number_stays(self, aggregation):
        q = normal(3, 4, 5)
        q[1, 2, 3] = math.nan
        expected = torch.zeros(4, 5, dtype=torch.bool, device=DEVICE)
        expected[2, 3] = True
        assert torch.equal(selection.aggregate(q, aggregation).isnan(), expected)


def check_choice(x, q, mode, temperature, u):
    """Indices within range, their actions to the bit, and nothing written elsewhere."""
    with oracle.nan_filled_empty():
        action, index = selection.select_particle(x, q, mode, temperature, u)
    assert action.dtype == x.dtype
    assert index.dtype == torch.int64
    assert ((index >= 0) & (index < q.shape[1])).all()
    assert torch.equal(action, x[torch.arange(len(x), device=DEVICE), index])
    return index


class TestSelect:
    @many
    @given(batches, particles, st.integers(1, 40), layouts, layouts, dtypes, dtypes, seeds)
    def test_max(self, b, n, width, x_layout, q_layout, x_dtype, q_dtype, seed):
        x, _ = oracle.arrange(normal(b, n, width, seed=seed, dtype=x_dtype), x_layout)
        # Few different values: the first of the largest must be taken.
        q, _ = oracle.arrange(normal(b, n, seed=seed + 1).mul(2).round().to(q_dtype), q_layout)
        index = check_choice(x, q, "max", 1.0, None)
        assert torch.equal(q[torch.arange(b, device=DEVICE), index], q.amax(dim=1))
        before = torch.arange(n, device=DEVICE) < index.unsqueeze(1)
        assert not (before & (q == q.amax(dim=1, keepdim=True))).any()

    @many
    @given(batches, particles, layouts, st.sampled_from([0.05, 1.0, 20.0]), seeds)
    def test_softmax_inverts_the_cumulative_sum(self, b, n, layout, temperature, seed):
        q, _ = oracle.arrange(normal(b, n, seed=seed), layout)
        u = uniform(2 * b, seed=seed)[::2]
        cumulative = torch.softmax(q.double() / temperature, dim=1).cumsum(dim=1)
        # Rounding may decide for a u that lies on the boundary of two particles.
        nearest = (cumulative - u.double().unsqueeze(1)).abs().amin(dim=1) if b else u.double()
        index = check_choice(normal(b, n, 3, seed=seed), q, "softmax", temperature, u)
        clear = nearest > BOUNDS["cumulative_probability"][F32]
        assume(b == 0 or clear.any())
        expected = (cumulative <= u.double().unsqueeze(1)).sum(dim=1).clamp(max=n - 1)
        assert torch.equal(index[clear], expected[clear])

    @many
    @given(batches, particles, seeds)
    def test_random(self, b, n, seed):
        u = uniform(b, seed=seed)
        index = check_choice(normal(b, n, 2), normal(b, n), "random", 1.0, u)
        assert torch.equal(index, (u * n).long().clamp(max=n - 1))

    def test_softmax_frequencies(self):
        """Evenly spread u give each particle its probability of the draws."""
        q = torch.tensor([[0.0, 1.0, -math.inf, 0.5]], device=DEVICE)
        draws = 4096
        u = (torch.arange(draws, device=DEVICE) + 0.5) / draws
        _, index = selection.select_particle(normal(1, 4, 2).expand(draws, 4, 2), q.expand(draws, 4), "softmax", 0.5, u)
        frequencies = torch.bincount(index, minlength=4) / draws
        torch.testing.assert_close(frequencies, torch.softmax(q[0] / 0.5, dim=0), rtol=0, atol=1.0 / draws)

    def test_the_largest_u(self):
        """Just below 1, where cumulative sums end by rounding, an index of a particle must come out all the same."""
        u = torch.full((64,), 1.0 - 2.0**-24, device=DEVICE)
        for mode in ("softmax", "random"):
            index = check_choice(normal(64, 127, 2), normal(64, 127, seed=1), mode, 1.0, u)
            assert index.min() >= 0

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    def test_extreme_values(self):
        q = torch.tensor(
            [[-math.inf, -math.inf, -math.inf], [1.0, math.inf, math.inf], [1.0, math.nan, 2.0]], device=DEVICE
        )
        index = check_choice(normal(3, 3, 2), q, "max", 1.0, None)
        assert index.tolist() == [0, 1, 1]
        for u in (0.1, 0.9):
            index = check_choice(normal(3, 3, 2), q, "softmax", 1.0, torch.full((3,), u, device=DEVICE))
            assert index.tolist() == [2 * (u > 0.5), 1 + (u > 0.5), 1]


class TestTarget:
    @many
    @given(
        members,
        batches,
        particles,
        aggregations,
        st.sampled_from(["mean", "max"]),
        layouts,
        dtypes,
        st.booleans(),
        seeds,
    )
    def test_any_size_layout_and_dtype(self, e, b, n, aggregation, reduce, layout, dtype, bool_masks, seed):
        q, _ = oracle.arrange(normal(e, b, n, seed=seed, dtype=dtype), layout)
        rewards = normal(2 * b, seed=seed + 1)[::2]
        masks = uniform(b, seed=seed) > 0.3
        given_masks = masks if bool_masks else masks.float()
        with oracle.nan_filled_empty():
            y = selection.td_target(q, rewards, given_masks, 0.99, aggregation, reduce)
        truth = reference.td_target(q.double(), rewards.double(), masks.double(), 0.99, aggregation, reduce)
        plain = reference.td_target(q.float(), rewards, masks.float(), 0.99, aggregation, reduce)
        scale = rewards.double().abs() + q.double().abs().amax(dim=(0, 2)) if b else rewards.double()
        assert_accurate("td_target", y, truth, plain, scale)

    def test_float64_rewards(self):
        q = normal(2, 5, 3)
        rewards, masks = normal(5, seed=1).double(), torch.ones(5, device=DEVICE, dtype=torch.float64)
        y = selection.td_target(q, rewards, masks, 0.9)
        truth = reference.td_target(q.double(), rewards, masks, 0.9, "mean")
        torch.testing.assert_close(y.double(), truth, rtol=0, atol=4 * BOUNDS["td_target"][F32])

    @pytest.mark.parametrize("reduce", ["mean", "max"])
    def test_what_is_not_a_number_shows(self, reduce):
        q = normal(2, 4, 5)
        q[1, 2, 3] = math.nan
        y = selection.td_target(q, normal(4), torch.ones(4, device=DEVICE), 0.99, "min", reduce)
        assert y.isnan().tolist() == [False, False, True, False]


class TestOps:
    @pytest.mark.parametrize("batch", [0, 3])
    def test_registration(self, batch):
        q, x, u = normal(2, batch, 5), normal(batch, 5, 3), uniform(batch)
        torch.library.opcheck(torch.ops.vgf_fast.aggregate, (q, "min"))
        torch.library.opcheck(torch.ops.vgf_fast.select_particle, (x, q[0], "max", 1.0, None))
        torch.library.opcheck(torch.ops.vgf_fast.select_particle, (x, q[0], "softmax", 1.0, u))
        torch.library.opcheck(torch.ops.vgf_fast.td_target, (q, u, u, 0.99, "mean", "max"))

    def test_compile_without_a_graph_break(self):
        def act_and_learn(x, q, u, rewards):
            action, index = selection.select_particle(x, selection.aggregate(q, "min"), "softmax", 0.5, u)
            return action, index, selection.td_target(q, rewards, torch.ones_like(rewards), 0.99)

        arguments = normal(4, 5, 3), normal(2, 4, 5), uniform(4), normal(4)
        compiled = torch.compile(act_and_learn, fullgraph=True, backend="aot_eager")
        for value, expected in zip(compiled(*arguments), act_and_learn(*arguments), strict=True):
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
            ({"particles": torch.zeros(4, 5)}, r"particles has shape \(4, 5\), expected \(B, N >= 1, A\)"),
            ({"q": torch.zeros(4, 6)}, r"q has shape \(4, 6\), expected \(4, 5\): one value a particle"),
            ({"q": torch.zeros(4, 5).double()}, "q has dtype torch.float64, expected torch.float32 or"),
            ({"mode": "best"}, "mode is 'best', expected 'max', 'softmax' or 'random'"),
            ({"mode": "random"}, "uniform is None, expected one float32 number in .0, 1. a state: mode='random'"),
            ({"mode": "softmax", "uniform": torch.zeros(3)}, r"uniform has shape \(3,\), expected \(4,\)"),
            ({"mode": "softmax", "uniform": torch.zeros(4).double()}, "uniform has dtype torch.float64"),
            ({"temperature": -1.0}, "temperature is -1.0, expected a number > 0"),
            (
                {"particles": torch.zeros(1, 5000, 2), "q": torch.zeros(1, 5000)},
                f"q has 5000 particles a state, expected at most {launch.MAX_CANDIDATES}",
            ),
        ],
    )
    def test_select(self, arguments, message):
        values = {"particles": torch.zeros(4, 5, 3), "q": torch.zeros(4, 5)} | arguments
        values = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        with pytest.raises(ValueError, match=message):
            selection.select_particle(**values)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"q": torch.zeros(4, 5)}, r"q has shape \(4, 5\), expected \(E >= 1, B, N >= 1\)"),
            ({"q": torch.zeros(0, 4, 5)}, r"q has shape \(0, 4, 5\)"),
            ({"rewards": torch.zeros(3)}, r"rewards has shape \(3,\), expected \(4,\): one number a state"),
            ({"masks": torch.zeros(4, dtype=torch.int64)}, "masks has dtype torch.int64"),
            ({"masks": torch.zeros(4, device="meta")}, "masks is on meta, expected"),
            ({"aggregation": "max"}, "aggregation is 'max', expected 'mean' or 'min'"),
            ({"reduce": "min"}, "reduce is 'min', expected 'mean' or 'max'"),
        ],
    )
    def test_target(self, arguments, message):
        values = {"q": torch.zeros(2, 4, 5), "rewards": torch.zeros(4), "masks": torch.zeros(4), "discount": 0.99}
        with pytest.raises(ValueError, match=message):
            selection.td_target(**on_device(values | arguments))

    def test_cpu_tensors_need_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="q is on cpu, expected a GPU"):
            selection.aggregate(torch.zeros(2, 3, 4))
