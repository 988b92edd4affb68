"""The nearest tokens, by the kernel and by blocked PyTorch, against float64 scores of every token."""

import math

import oracle
import pytest
import torch
from properties import given, settings, st
from races import race_detector
from tolerances import BOUNDS, F16, F32

pytest.importorskip("triton")

from vgf_fast.kernels import launch
from vgf_fast.kernels import nearest_token as kernel

from vgf_fast.llm import nearest

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = nearest.METRICS
BACKENDS = ("triton", "torch")

seeds = st.integers(0, 2**16)
layouts = st.sampled_from(oracle.LAYOUTS)
few = settings(max_examples=12, deadline=None, derandomize=True)
many = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture
def parts(monkeypatch):
    """The vocabulary in several parts, as on a device of many processors."""
    monkeypatch.setattr(launch, "processors", lambda device: 3)


def normal(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def every_score(queries, table, metric, mask=None, log_prior=None):
    """Scores [R, V] in float64, and the sum of the absolute terms of each, which rounding is relative to."""
    q, e = queries.double()[:, None], table.double()[None]
    if metric == "l2":
        score = -(q - e).square().sum(2)
        size = -score
    else:
        score, size = (q * e).sum(2), (q * e).abs().sum(2)
        if metric == "cosine":
            norms = (q.norm(dim=2) * e.norm(dim=2)).clamp(min=1e-30)
            score, size = score / norms, torch.ones_like(score)
    if log_prior is not None:
        score, size = score + log_prior.double(), size + log_prior.double().abs()
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    return score, size


def products_error(queries, table, metric):
    """How much the products by which candidates are found may err, generously: [R, 1]."""
    q, e = queries.double(), table.double()
    error = 2.0 * q.norm(dim=1, keepdim=True) * e.norm(dim=1).max() + e.square().sum(1).max()
    return 1e-6 * (torch.ones_like(error) if metric == "cosine" else error)


def check(found, queries, table, k, metric, mask=None, log_prior=None):
    """Scores are right, tokens are theirs, no token is better than the last, and the order is the promised one."""
    scores, tokens = found
    truth, size = every_score(queries, table, metric, mask, log_prior)
    assert scores.shape == tokens.shape == (len(queries), k)
    assert tokens.dtype == torch.int64
    allowed = len(table) if mask is None else int(mask.sum())
    assert (tokens[:, :allowed] >= 0).all()
    assert (tokens[:, allowed:] == -1).all()
    assert (scores[:, allowed:] == -math.inf).all()
    scores, tokens = scores[:, :allowed].double(), tokens[:, :allowed]
    if scores.numel() == 0:
        return
    error = (scores - truth.gather(1, tokens)).abs() / size.gather(1, tokens).clamp(min=1e-30)
    assert error.max() <= BOUNDS["nearest_score"][F32], f"error {error.max():.2e}"
    left = truth.scatter(1, tokens, -math.inf).max(dim=1, keepdim=True).values
    assert (scores[:, -1:] >= left - products_error(queries, table, metric)).all()
    assert all(len(set(row)) == len(row) for row in tokens.tolist())
    falling = scores[:, :-1] > scores[:, 1:]
    assert (falling | ((scores[:, :-1] == scores[:, 1:]) & (tokens[:, :-1] < tokens[:, 1:]))).all()


def find(backend, queries, table, k=1, metric="l2", **options):
    with oracle.nan_filled_empty():
        return nearest.nearest_token(queries, table, k, metric, backend=backend, **options)


def arguments(draw_sizes):
    return st.tuples(draw_sizes, st.sampled_from(METRICS), layouts, layouts, st.integers(0, 2), st.booleans(), seeds)


SMALL = st.tuples(st.integers(0, 5), st.integers(1, 280), st.integers(1, 70), st.integers(1, 32))
LARGE = st.tuples(st.integers(0, 40), st.integers(1, 3000), st.integers(1, 70), st.integers(1, 32))


def check_any(backend, case):
    (rows, vocabulary, width, k), metric, q_layout, e_layout, prior_ndim, is_masked, seed = case
    k = min(k, vocabulary)
    queries, _ = oracle.arrange(normal(rows, width, seed=seed), q_layout)
    table, _ = oracle.arrange(normal(vocabulary, width, seed=seed + 1), e_layout)
    shape = {0: None, 1: (vocabulary,), 2: (rows, vocabulary)}[prior_ndim]
    log_prior = None if shape is None else oracle.arrange(normal(*shape, seed=seed + 2), "misaligned")[0]
    mask = (normal(vocabulary, seed=seed + 3) > 0) if is_masked else None
    found = find(backend, queries, table, k, metric, mask=mask, log_prior=log_prior)
    check(found, queries, table, k, metric, mask, log_prior)


@few
@given(arguments(SMALL))
def test_kernel_any_size_layout_mask_and_prior(case):
    check_any("triton", case)


@many
@given(arguments(LARGE))
def test_torch_any_size_layout_mask_and_prior(case):
    check_any("torch", case)


@pytest.mark.parametrize(("rows", "k"), [(1, 32), (17, 1), (65, 3)])
def test_kernel_with_parts_of_the_vocabulary(parts, rows, k):
    """Blocks of 16, 64 and 128 rows, each with several parts, the last one not whole."""
    queries, table = normal(rows, 19), normal(400, 19, seed=1)
    check(find("triton", queries, table, k), queries, table, k, "l2")


@pytest.mark.parametrize("backend", BACKENDS)
class TestBoth:
    @pytest.mark.parametrize("metric", METRICS)
    def test_ties_go_to_the_lower_token(self, parts, backend, metric):
        """On a coarse grid products are exact and many tokens are equal, over tiles and parts of the vocabulary."""
        generator = torch.Generator().manual_seed(3)
        distinct = torch.randint(-1, 2, (20, 4), generator=generator).float()
        # Powers of two: norms, too, are exact.
        distinct = torch.cat([distinct, distinct.abs().sum(1, keepdim=True)], dim=1) if metric != "cosine" else distinct
        table = distinct[torch.randint(0, 20, (300,), generator=generator)].to(DEVICE)
        queries = table[:5] + 0.0
        truth, _ = every_score(queries, table, metric)
        scores, tokens = find(backend, queries, table, 12, metric)
        # Equal rows have equal scores; which rows are equal is known without rounding.
        expected = truth.mul(2**20).round().sort(dim=1, descending=True, stable=True).indices[:, :12]
        assert torch.equal(tokens, expected)
        assert (scores[:, :-1] >= scores[:, 1:]).all()

    def test_all_tokens_alike(self, parts, backend):
        table = normal(1, 7).expand(350, 7)
        _, tokens = find(backend, normal(3, 7, seed=1), table, 5)
        assert torch.equal(tokens, torch.arange(5, device=DEVICE).expand(3, 5))

    def test_far_from_the_table(self, backend):
        """|q|^2 is a million times the distances' differences; the squares' difference would keep none of them."""
        table = normal(200, 16)
        queries = 3000.0 + normal(3, 16, seed=1)
        check(find(backend, queries, table, 4), queries, table, 4, "l2")

    def test_queries_in_the_table(self, backend):
        table = 5.0 + normal(150, 24)
        scores, tokens = find(backend, table[40:44], table)
        assert torch.equal(tokens[:, 0], torch.arange(40, 44, device=DEVICE))
        assert torch.equal(scores, torch.zeros_like(scores))

    @pytest.mark.parametrize("metric", METRICS)
    def test_zero_vectors(self, backend, metric):
        table = normal(60, 8)
        table[7] = 0.0
        queries = torch.cat([normal(1, 8, seed=1), torch.zeros(1, 8, device=DEVICE)])
        check(find(backend, queries, table, 3, metric), queries, table, 3, metric)
        if metric != "l2":
            assert torch.equal(find(backend, queries, table, 3, metric).tokens[1].cpu(), torch.arange(3))

    @pytest.mark.parametrize("metric", METRICS)
    def test_what_is_not_a_number_is_never_chosen(self, backend, metric):
        queries, table = normal(3, 8), normal(90, 8, seed=1)
        clean = find(backend, queries, table, 90, metric) if backend == "torch" else None
        table[[2, 40, 41]] = math.nan
        queries[1, 3] = math.nan
        scores, tokens = find(backend, queries, table, 32, metric)
        assert (tokens[1] == -1).all()
        assert (scores[1] == -math.inf).all()
        check(
            (scores[[0, 2]], tokens[[0, 2]]), queries[[0, 2]], table.nan_to_num(1e4), 32, metric, ~table.isnan()[:, 0]
        )
        if clean is not None:
            kept = clean.tokens[0][~torch.isin(clean.tokens[0], torch.tensor([2, 40, 41]))]
            assert torch.equal(tokens[0], kept[:32])

    def test_fewer_allowed_than_asked_for(self, backend):
        queries, table = normal(2, 5), normal(40, 5, seed=1)
        mask = torch.zeros(40, dtype=torch.bool, device=DEVICE)
        mask[[3, 17]] = True
        check(find(backend, queries, table, 4, mask=mask), queries, table, 4, "l2", mask)
        prior = torch.full((40,), -math.inf, device=DEVICE).masked_fill(mask, 0.0)
        assert torch.equal(
            find(backend, queries, table, 4, log_prior=prior).tokens[:, 2:].cpu(), -torch.ones(2, 2).long()
        )
        none = find(backend, queries, table, 2, mask=torch.zeros_like(mask))
        assert (none.tokens == -1).all()

    def test_dtypes_of_queries_and_table_differ(self, backend):
        queries, table = normal(3, 20), normal(150, 20, seed=1, dtype=F16)
        check(find(backend, queries, table, 3), queries, table, 3, "l2")
        halves = queries.half()
        check(find(backend, halves, table, 3, "cosine"), halves, table, 3, "cosine")

    def test_given_squares(self, backend):
        queries, table = normal(3, 20), normal(150, 20, seed=1)
        squares = nearest.squared_norms(table)
        torch.testing.assert_close(squares, kernel.squared_norms(table))
        for metric in METRICS:
            given_them = find(backend, queries, table, 3, metric, table_squares=squares)
            assert torch.equal(given_them.tokens, find(backend, queries, table, 3, metric).tokens)

    def test_input_is_not_written(self, backend):
        queries, table, prior = normal(3, 6), normal(50, 6, seed=1), normal(3, 50, seed=2)
        mask = prior[0] > 0
        before = [tensor.clone() for tensor in (queries, table, prior, mask)]
        for metric in METRICS:
            find(backend, queries, table, 3, metric, mask=mask, log_prior=prior)
        for tensor, value in zip((queries, table, prior, mask), before, strict=True):
            assert torch.equal(tensor, value)


def test_torch_in_float64():
    queries, table = normal(9, 30).double(), normal(700, 30, seed=1).double()
    scores, tokens = find("torch", queries, table, 6)
    truth, _ = every_score(queries, table, "l2")
    values, indices = truth.topk(6)
    assert torch.equal(tokens, indices)
    torch.testing.assert_close(scores, values, rtol=1e-13, atol=0.0)


def test_torch_more_than_the_kernel_takes():
    queries, table = normal(4, 30), normal(300, 30, seed=1)
    check(find("auto", queries, table, 90), queries, table, 90, "l2")
    with pytest.raises(ValueError, match="k is 90, expected at most 32: the kernel's limit"):
        find("triton", queries, table, 90)


def test_torch_memory_does_not_grow_with_rows_and_tokens():
    """No tensor that any operator makes comes near R x V entries, or a copy of the table."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            made = [
                r for r in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(r, torch.Tensor)
            ]
            for tensor in made:
                # Views of the table are as large as its storage and new to nobody.
                if all(tensor.untyped_storage().data_ptr() != known for known in inputs):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    queries, table = normal(1200, 16), normal(40_000, 16, seed=1)
    mask = table[:, 0] > 0
    inputs = [tensor.untyped_storage().data_ptr() for tensor in (queries, table, mask)]
    with Watch():
        nearest.nearest_token(queries, table, 4, mask=mask, backend="torch")
    assert largest <= 8 * 2**20 < 1200 * 40_000 * 4 / 20


class TestOp:
    @pytest.mark.parametrize("rows", [0, 3])
    def test_registration(self, rows):
        queries, table = normal(rows, 6), normal(40, 6, seed=1)
        mask, prior = table[:, 0] > 0, normal(rows, 40, seed=2)
        squares = kernel.squared_norms(table)
        torch.library.opcheck(torch.ops.vgf_fast.squared_norms, (table,))
        for metric in METRICS:
            for optional in ((None, None, None), (mask, prior, squares), (mask, prior[:1, :].flatten()[:40], None)):
                if rows == 0 and optional[1] is not None and optional[1].ndim == 1:
                    continue
                arguments = (queries, table, 3, metric, *optional, None)
                torch.library.opcheck(torch.ops.vgf_fast.nearest_token, arguments)

    def test_compile_without_a_graph_break(self):
        def function(queries, table):
            return kernel.nearest_token(queries * 2.0, table, 2, "cosine")

        queries, table = normal(3, 6), normal(40, 6, seed=1)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for value, expected in zip(compiled(queries, table), function(queries, table), strict=True):
            assert torch.equal(value, expected)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
    def test_no_races(self, parts):
        queries, table = normal(20, 35), normal(300, 35, seed=1)
        with race_detector():
            kernel.nearest_token(queries, table, 3, "cosine", table[:, 0] > 0, normal(20, 300, seed=2))


BASE = {"queries": torch.zeros(3, 4), "table": torch.zeros(9, 4)}
BAD = [
    ({"queries": torch.zeros(4)}, r"queries has shape \(4,\), expected \(R, d"),
    ({"queries": torch.zeros(3, 5)}, r"queries has shape \(3, 5\), expected"),
    ({"table": torch.zeros(0, 4)}, r"table has shape \(0, 4\), expected \(V >= 1, d"),
    ({"metric": "l1"}, "metric is 'l1', expected 'l2' or 'cosine' or 'dot'"),
    ({"k": 0}, "k is 0, expected"),
    ({"k": 10}, "k is 10, expected .* 1 to 9|k is 10, expected 1 to 9"),
    ({"mask": torch.zeros(8, dtype=torch.bool)}, r"mask has shape \(8,\), expected \(9,\)"),
    ({"log_prior": torch.zeros(2, 9)}, r"log_prior has shape \(2, 9\), expected .*\(3, 9\)"),
    ({"table_squares": torch.zeros(4)}, r"table_squares has shape \(4,\), expected \(9,\)"),
    ({"table": torch.zeros(9, 4, device="meta")}, "table is on meta"),
]


class TestErrors:
    @pytest.mark.parametrize(("changed", "message"), BAD)
    def test_values(self, changed, message):
        values = {
            name: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
            for name, value in (BASE | changed).items()
        }
        for function in (nearest.nearest_token, kernel.nearest_token):
            with pytest.raises(ValueError, match=message):
                function(**values)

    def test_dtypes(self):
        queries, table = normal(3, 4), normal(9, 4)
        with pytest.raises(TypeError, match="queries has dtype torch.int64, expected a floating dtype"):
            nearest.nearest_token(queries.long(), table)
        with pytest.raises(TypeError, match="table is a list, expected a torch.Tensor of shape"):
            nearest.nearest_token(queries, [1.0])
        with pytest.raises(TypeError, match="mask has dtype torch.float32, expected bool"):
            nearest.nearest_token(queries, table, mask=table[:, 0])
        with pytest.raises(TypeError, match="log_prior has dtype torch.int64, expected a floating dtype"):
            nearest.nearest_token(queries, table, log_prior=table[:, 0].long())
        with pytest.raises(ValueError, match="mask has dtype torch.float32, expected torch.bool"):
            kernel.nearest_token(queries, table, mask=table[:, 0])
        with pytest.raises(ValueError, match="queries has dtype torch.float64, expected torch.float32 or"):
            kernel.nearest_token(queries.double(), table)
        with pytest.raises(ValueError, match="backend='triton' cannot run: the particles are torch.float64"):
            nearest.nearest_token(queries.double(), table, backend="triton")

    def test_cpu_tensors_need_the_interpreter(self, monkeypatch):
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        with pytest.raises(ValueError, match="queries is on cpu, expected a GPU"):
            kernel.nearest_token(torch.zeros(3, 4), torch.zeros(9, 4))


def test_every_k_and_size_has_a_launch_configuration():
    for k in range(1, launch.MAX_NEAREST + 1):
        for rows in (1, 16, 17, 64, 65, 4096):
            for vocabulary in (32, 1000, 260_000):
                for dtype in (F16, F32):
                    for processors in (1, 132):
                        config = launch.nearest_token(rows, vocabulary, k, dtype, processors, 256)
                        parts = -(-vocabulary // config.tokens)
                        assert config.width > k
                        assert config.tokens % config.block_n == 0
                        assert parts * config.width <= launch.nearest_merge(parts, config.width).block_l
                        assert launch.nearest_merge(parts, config.width).block_l <= launch.MAX_LISTED
