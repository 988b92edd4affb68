"""The tokens whose embeddings are nearest to given vectors, in bounded memory: blocked PyTorch, or the Triton kernel.

A token's score for a query q is -|q - E|^2 ("l2"), the cosine of the angle between q and E ("cosine", 0 where either is
zero) or q . E ("dot"), plus its log-prior if one is given; the largest score is the nearest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vgf_fast.backends.choice import Backend, resolve_backend
from vgf_fast.config import integer

METRICS = ("l2", "cosine", "dot")
MAX_KERNEL_NEAREST = 32
NORM_MIN = 1e-18  # norms below are taken for it
# Entries of the working memory of the torch backend: products of a tile, best products of groups, embeddings compared.
_PRODUCTS, _MAXIMA, _COMPARED = 2**17, 2**19, 2**17
_ROWS = 256
_SPARE = 1  # groups looked into beyond k: rounding may mistake the order of the last ones


class Nearest(NamedTuple):
    """The nearest tokens of every query, the nearest first."""

    scores: Tensor  # [R, k], float32 at least, falling
    tokens: Tensor  # [R, k] int64


def nearest_token(
    queries: Tensor,
    table: Tensor,
    k: int = 1,
    metric: str = "l2",
    *,
    mask: Tensor | None = None,
    log_prior: Tensor | None = None,
    table_squares: Tensor | None = None,
    backend: Backend = "auto",
) -> Nearest:
    """The ``k`` tokens of the largest scores: queries [R, d], table [V, d] -> Nearest of [R, k].

    ``mask`` [V] is bool, True for tokens that may be chosen; ``log_prior`` [V] or [R, V] is added to the scores;
    ``table_squares`` [V] is ``squared_norms(table)``, which is computed at every call if it is not given. Scores are
    computed in float32 at least, those of "l2" from differences, which keep their digits wherever the query lies; the
    candidates for that are found by products. Among equal scores the lower token comes first. What is not a number, or
    -inf, is never chosen: where fewer than ``k`` tokens are left, the last places hold token -1 and score -inf.

    Memory beyond input and output is some MiB on the torch backend, however large R and V are. The Triton kernel takes
    float32, bfloat16 and float16, and k up to 32. Nothing here is differentiable.

    Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong.
    """
    _check(queries, table, k, metric, mask, log_prior, table_squares)
    queries, table = queries.detach(), table.detach()
    dtypes = {queries.dtype, table.dtype} | (set() if log_prior is None else {log_prior.dtype})
    odd = next((dtype for dtype in dtypes if dtype == torch.float64), queries.dtype)
    # The kernel's limit is reached as one of particles would be: "auto" goes on with torch.
    if k > MAX_KERNEL_NEAREST:
        if backend == "triton":
            raise ValueError(f"k is {k}, expected at most {MAX_KERNEL_NEAREST}: the kernel's limit")
        backend = "torch"
    if resolve_backend(backend, queries.device, 1, 1, odd) == "triton":
        from vgf_fast.kernels import nearest_token as kernel

        squares = None if table_squares is None else table_squares.float()
        prior = None if log_prior is None else log_prior.detach()
        return Nearest(*kernel.nearest_token(queries, table, k, metric, mask, prior, squares))
    return _blocked(queries, table, k, metric, mask, log_prior, table_squares)


def squared_norms(table: Tensor) -> Tensor:
    """|E|^2 of every row [V], float32 at least, of a table [V, d], a few rows at a time."""
    dtype = torch.promote_types(table.dtype, torch.float32)
    out = table.new_empty(len(table), dtype=dtype)
    rows = max(_PRODUCTS // max(table.shape[1], 1), 1)
    for start in range(0, len(table), rows):
        out[start : start + rows] = table[start : start + rows].detach().to(dtype).square().sum(dim=1)
    return out


def _check(
    queries: Tensor,
    table: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    log_prior: Tensor | None,
    table_squares: Tensor | None,
) -> None:
    for name, tensor, shape in (("queries", queries, "(R, d)"), ("table", table, "(V >= 1, d >= 1)")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}, expected a torch.Tensor of shape {shape}")
        if tensor.ndim != 2 or (name == "table" and tensor.numel() == 0):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
    rows, (vocabulary, width) = len(queries), table.shape
    if queries.shape[1] != width:
        raise ValueError(f"queries has shape {tuple(queries.shape)}, expected (*, {width}): as wide as the table")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected {' or '.join(map(repr, METRICS))}")
    integer("k", k, 1, vocabulary)  # the rows of the table
    for name, optional in (("mask", mask), ("log_prior", log_prior), ("table_squares", table_squares)):
        if optional is None:
            continue
        if not isinstance(optional, Tensor):
            raise TypeError(f"{name} is a {type(optional).__name__}, expected a torch.Tensor")
        shapes = [(vocabulary,), (rows, vocabulary)] if name == "log_prior" else [(vocabulary,)]
        if tuple(optional.shape) not in shapes:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name} has shape {tuple(optional.shape)}, expected {expected}: one value a token")
        if (optional.dtype == torch.bool) != (name == "mask") or not (name == "mask" or optional.is_floating_point()):
            raise TypeError(
                f"{name} has dtype {optional.dtype}, expected {'bool' if name == 'mask' else 'a floating dtype'}"
            )
    for name, other in (("table", table), ("mask", mask), ("log_prior", log_prior), ("table_squares", table_squares)):
        if other is not None and other.device != queries.device:
            raise ValueError(f"{name} is on {other.device}, but queries is on {queries.device}: move one of them")


@torch.no_grad()
def _blocked(
    queries: Tensor,
    table: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    log_prior: Tensor | None,
    table_squares: Tensor | None,
) -> Nearest:
    """Products find the groups of tokens that hold the best ones; the tokens of these are then scored one by one."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, table.dtype), torch.float32)
    rows, vocabulary = len(queries), len(table)
    squares = table_squares
    if squares is None and metric != "dot":
        squares = squared_norms(table)
    squares = None if squares is None else squares.to(dtype)
    # The k best tokens lie in the k groups whose best tokens are best. More of them are looked into if they are small.
    group = max(4, 16 >> (k.bit_length() - 1))
    groups = -(-vocabulary // group)
    block = min(max(_MAXIMA // groups, 16), _ROWS)
    scores = torch.empty((rows, k), dtype=dtype, device=queries.device)
    tokens = torch.empty((rows, k), dtype=torch.int64, device=queries.device)
    for start in range(0, rows, block):
        part = slice(start, start + block)
        query = queries[part].to(dtype)
        prior = log_prior if log_prior is None or log_prior.ndim == 1 else log_prior[part]
        found = _best_groups(query, table, group, min(k + _SPARE, groups), metric, mask, prior, squares)
        _best_tokens(query, table, found, group, metric, mask, prior, squares, scores[part], tokens[part])
    return Nearest(scores, tokens)


def _best_groups(
    query: Tensor,
    table: Tensor,
    group: int,
    count: int,
    metric: str,
    mask: Tensor | None,
    prior: Tensor | None,
    squares: Tensor | None,
) -> Tensor:
    """Which ``count`` groups of tokens hold the largest products [count, R], up to what the order of tokens ignores."""
    rows, (vocabulary, width) = len(query), table.shape
    factor: Tensor | float = 2.0 if metric == "l2" else 1.0
    if metric == "cosine":
        factor = query.norm(dim=1, keepdim=True).clamp_min_(NORM_MIN).reciprocal_()
    scaled = (query * factor).T
    tile = max(_PRODUCTS // max(rows, width), group) // group * group
    bias = query.new_zeros(vocabulary)
    if prior is not None and prior.ndim == 1:
        bias += prior
    if metric == "l2":
        assert squares is not None
        bias -= squares
    if mask is not None:
        bias.masked_fill_(~mask, -torch.inf)
    products = query.new_empty((min(tile, vocabulary), rows))
    maxima = query.new_empty((-(-vocabulary // group), rows))
    for clean in (False, True):
        for start in range(0, vocabulary, tile):
            part = slice(start, start + tile)
            embeddings = table[part].to(query.dtype)
            product = torch.mm(embeddings, scaled, out=products[: len(embeddings)])
            if metric == "cosine":
                assert squares is not None
                product.div_(squares[part].sqrt().clamp_min_(NORM_MIN).unsqueeze(1))
            if prior is not None and prior.ndim == 2:
                product += prior[:, part].T
            product += bias[part].unsqueeze(1)
            if clean:
                product.masked_fill_(product.isnan(), -torch.inf)
            _group_maxima(product, group, maxima[start // group : -(-(start + len(embeddings)) // group)])
        # Rare enough to begin again: what is not a number would hide the others of its group.
        if not maxima.isnan().any():
            break
    values, found = maxima.topk(count, dim=0)
    # Which of equal ones topk takes is left open.
    tied = (maxima >= values[-1]).sum(dim=0).gt_(count) & (values[-1] > -torch.inf)
    for row in tied.nonzero().flatten().tolist():
        found[:, row] = maxima[:, row].sort(descending=True, stable=True).indices[:count]
    return found


def _group_maxima(product: Tensor, group: int, out: Tensor) -> None:
    """Largest entry of every ``group`` rows: [tile, R] -> [groups, R]; the last group may be of fewer rows."""
    whole = len(product) // group
    torch.amax(product[: whole * group].unflatten(0, (whole, group)), dim=1, out=out[:whole])
    if whole < len(out):
        torch.amax(product[whole * group :], dim=0, out=out[whole])


def _best_tokens(
    query: Tensor,
    table: Tensor,
    found: Tensor,
    group: int,
    metric: str,
    mask: Tensor | None,
    prior: Tensor | None,
    squares: Tensor | None,
    scores: Tensor,
    tokens: Tensor,
) -> None:
    """Score the tokens of the groups found [count, R], and write the best [R, k] of every row in their order."""
    vocabulary, width = table.shape
    k = scores.shape[1]
    # In rising order, so that a stable sort leaves the lower of equal tokens first.
    first = found.sort(dim=0).values.T * group
    candidates = (first.unsqueeze(2) + torch.arange(group, device=table.device)).flatten(1)
    step = max(_COMPARED // (candidates.shape[1] * width), 1)
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        token = candidates[part]
        forbidden = token >= vocabulary
        token = token.clamp(max=vocabulary - 1)
        embedding = table[token.flatten()].view(*token.shape, width).to(query.dtype)
        target = query[part].unsqueeze(1)
        if metric == "l2":
            score = embedding.sub_(target).square_().sum(dim=2).neg_()
        else:
            score = embedding.mul_(target).sum(dim=2)
        if metric == "cosine":
            assert squares is not None
            score /= squares[token].sqrt().clamp_min_(NORM_MIN) * target.norm(dim=2).clamp_min_(NORM_MIN)
        if prior is not None:
            score += prior[token] if prior.ndim == 1 else prior[part].gather(1, token)
        if mask is not None:
            forbidden |= ~mask[token]
        score.masked_fill_(forbidden | score.isnan(), -torch.inf)
        ordered, place = score.sort(dim=1, descending=True, stable=True)
        scores[part] = ordered[:, :k]
        tokens[part] = token.gather(1, place[:, :k]).masked_fill_(ordered[:, :k] == -torch.inf, -1)
