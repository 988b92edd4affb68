"""The tokens whose embeddings are nearest to given vectors, over a whole vocabulary, without its rows x V scores.

For queries q_r [R, d] and a table E_v [V, d], the k tokens of the largest score

    l2:      -|q_r - E_v|^2
    cosine:  q_r . E_v / (|q_r| |E_v|), 0 where a norm is 0
    dot:     q_r . E_v

plus, if given, a log-prior [V] or [R, V]; tokens that a mask [V] forbids are left out. Two launches, three where norms
are needed and not given:

1. Programs over blocks of rows and parts of the vocabulary multiply tiles (for l2, q . E - |E|^2 / 2: |q|^2 changes no
   order, and would cost digits), and each row keeps a list of its best, a few more than k.
2. One program a row merges the lists, computes the scores of the best once more in float32, for l2 by differences,
   which keep their digits wherever the query lies, and puts them in order.

Order: the larger score first, among equal scores the lower token. That holds for the scores as computed: products in
tf32 or bfloat16 may leave out a token whose score is within their rounding of the last one on a list. What is not a
number, or -inf, is never chosen: where fewer than k tokens are left, the last places hold token -1 and score -inf.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

METRICS = ("l2", "cosine", "dot")
INT32_MAX = tl.constexpr(0x7FFFFFFF)
INT64_MIN = tl.constexpr(-(2**63))
NORM_MIN = tl.constexpr(1e-18)  # norms below are taken for it


# --- device helpers --------------------------------------------------------------------------------------------------


@triton.jit
def packed_order(score: tl.tensor, token: tl.tensor) -> tl.tensor:
    """int64 keys that are larger for a larger score, and among equal scores for a lower token."""
    # -0.0 is as large as 0.0.
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ INT32_MAX)
    return (ordered.to(tl.int64) << 32) | (token ^ INT32_MAX).to(tl.int64)


@triton.jit
def largest(keys: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """The ``WIDTH`` largest of keys that differ, in falling order, then INT64_MIN: [C] -> [WIDTH]."""
    places = tl.arange(0, WIDTH)
    found = tl.full([WIDTH], INT64_MIN, tl.int64)
    for place in range(WIDTH):
        best = tl.max(keys, axis=0)
        found = tl.where(places == place, best, found)
        keys = tl.where(keys == best, INT64_MIN, keys)
    return found


# --- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def squared_norms_kernel(
    x_ptr: tl.tensor,  # [N, D], any strides
    out_ptr: tl.tensor,  # [N] float32, contiguous, written
    stride_n: tl.tensor,
    stride_d: tl.tensor,
    N: tl.tensor,
    D: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """|x_n|^2 of a block of rows ``program_id(0)``."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = x_ptr + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_n
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        x = tl.load(rows + offs_d[None, :] * stride_d, mask=(offs_d < D)[None, :], other=0.0).to(tl.float32)
        total += x * x
    tl.store(out_ptr + offs_n, tl.sum(total, axis=1), mask=offs_n < N)


class Inputs(NamedTuple):
    """What the lists are made of; ``None`` for what there is not."""

    query: Any  # [R, D], any strides
    table: Any  # [V, D], any strides
    bias: Any  # [V] float32, contiguous, added to the products; -inf where a token is forbidden
    norm: Any  # [V] float32, contiguous, by which sums are divided
    query_norm: Any  # [R] float32, contiguous, by which sums would be divided if it changed their order
    prior: Any  # [R, V], any strides


class Lists(NamedTuple):
    """A row's lists of tokens, one after another."""

    scores: Any  # [R, LISTED] float32, contiguous
    tokens: Any  # [R, LISTED] int32, contiguous


class Strides(NamedTuple):
    """From row to row and from column to column."""

    query: tuple[int, ...]
    table: tuple[int, ...]
    prior: tuple[int, ...]


@triton.jit(do_not_specialize=["R", "V", "TOKENS"])
def nearest_lists_kernel(
    inputs: Inputs,
    scores_ptr: tl.tensor,  # [R, splits, WIDTH] float32, contiguous, written
    tokens_ptr: tl.tensor,  # [R, splits, WIDTH] int32, contiguous, written; no token where >= V
    strides: Strides,
    R: tl.tensor,
    V: tl.tensor,
    D: tl.tensor,
    TOKENS: tl.tensor,  # of a part of the vocabulary
    HALVED: tl.constexpr,  # whether lists are of half the score
    MIXED: tl.constexpr,  # whether queries and table are of different dtypes: both are multiplied as float32
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """The ``WIDTH`` best of part ``program_id(1)`` of the vocabulary, in no order, for rows of block ``program_id(0)``.

    Programs that run side by side are of the same part, so that they find the tiles of the table in the L2 cache.
    """
    query_ptr = inputs.query
    table_ptr = inputs.table
    prior_ptr = inputs.prior
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Padding reads the last row again, and is not stored.
    row = tl.minimum(offs_m, R - 1).to(tl.int64)
    # Offsets within a tile are of 32 bits: wider ones take the registers of the product.
    query_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * strides.query[0]
    row_offs = tl.minimum(tl.arange(0, BLOCK_M), R - 1 - tl.program_id(0) * BLOCK_M)[:, None]
    query_offs = row_offs * strides.query[0]
    part = tl.program_id(1)
    first = part * TOKENS
    end = tl.minimum(first + TOKENS, V)
    table_ptr += first.to(tl.int64) * strides.table[0]
    if prior_ptr is not None:
        prior_ptr += tl.program_id(0).to(tl.int64) * BLOCK_M * strides.prior[0] + first.to(tl.int64) * strides.prior[1]
    columns = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    places = tl.arange(0, WIDTH)
    best = tl.full([BLOCK_M, WIDTH], float("-inf"), tl.float32)
    best_token = tl.zeros([BLOCK_M, WIDTH], tl.int32) + (places ^ INT32_MAX)[None, :]
    worst = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(first, end, BLOCK_N):
        token_offs = tl.minimum(columns, V - 1 - start)[None, :] * strides.table[0]
        query_ptrs = query_ptr
        table_ptrs = table_ptr
        offs_n = start + columns
        in_n = offs_n < end
        # What is added is there before the product: after it there are no registers left for it.
        score = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        score += tl.load(inputs.bias + offs_n, mask=in_n, other=float("-inf"))[None, :]
        if prior_ptr is not None:
            prior_offs = row_offs * strides.prior[0] + tl.minimum(columns, V - 1 - start)[None, :] * strides.prior[1]
            prior = tl.load(prior_ptr + prior_offs).to(tl.float32)
            if HALVED:
                prior *= 0.5
            if inputs.norm is not None:
                prior *= tl.load(inputs.norm + offs_n, mask=in_n, other=1.0)[None, :]
                prior *= tl.load(inputs.query_norm + row)[:, None]
            score += prior
            prior_ptr += BLOCK_N * strides.prior[1]
        for k in range(0, D, BLOCK_K):
            in_k = offs_k < D - k
            query = tl.load(
                query_ptrs + (query_offs + offs_k[None, :] * strides.query[1]), mask=in_k[None, :], other=0.0
            )
            table = tl.load(
                table_ptrs + (token_offs + offs_k[:, None] * strides.table[1]), mask=in_k[:, None], other=0.0
            )
            query_ptrs += BLOCK_K * strides.query[1]
            table_ptrs += BLOCK_K * strides.table[1]
            if MIXED:
                query, table = query.to(tl.float32), table.to(tl.float32)
            score = tl.dot(query, table, score, input_precision=PRECISION)
        if inputs.norm is not None:
            score = tl.fdiv(score, tl.load(inputs.norm + offs_n, mask=in_n, other=1.0)[None, :])
        score = tl.where(score == score, score, float("-inf"))
        top = tl.max(score, axis=1)
        # Late tiles change few rows' lists, mostly by one token.
        while tl.max((top > worst).to(tl.int32), axis=0) > 0:
            place = tl.min(tl.where(score == top[:, None], columns[None, :], BLOCK_N), axis=1)
            # What leaves the list is its last: of the lowest score, and among equals the highest token.
            leaving = tl.max(tl.where(best == worst[:, None], best_token, -1), axis=1)
            enters = (best_token == leaving[:, None]) & (top > worst)[:, None]
            best = tl.where(enters, top[:, None], best)
            best_token = tl.where(enters, (start + place)[:, None], best_token)
            worst = tl.min(best, axis=1)
            score = tl.where(columns[None, :] == place[:, None], float("-inf"), score)
            top = tl.max(score, axis=1)
        table_ptr += BLOCK_N * strides.table[0]
    offs = (offs_m.to(tl.int64) * tl.num_programs(1) + part)[:, None] * WIDTH + places[None, :]
    in_m = (offs_m < R)[:, None]
    tl.store(scores_ptr + offs, best, mask=in_m)
    tl.store(tokens_ptr + offs, best_token, mask=in_m)


@triton.jit(do_not_specialize=["V", "LISTED", "K"])
def nearest_merge_kernel(
    query_ptr: tl.tensor,  # [R, D], any strides
    table_ptr: tl.tensor,  # [V, D], any strides
    prior_ptr: tl.tensor,  # [R, V], any strides, or None
    lists: Lists,
    scores_ptr: tl.tensor,  # [R, K] float32, contiguous, written
    tokens_ptr: tl.tensor,  # [R, K] int64, contiguous, written
    strides: Strides,
    V: tl.tensor,
    D: tl.tensor,
    LISTED: tl.tensor,
    K: tl.tensor,
    METRIC: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merge the lists of row ``program_id(0)``, score the ``WIDTH`` best anew and store the ``K`` best in order."""
    row = tl.program_id(0).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)
    in_l = offs_l < LISTED
    listed = tl.load(lists.scores + row * LISTED + offs_l, mask=in_l, other=float("-inf"))
    token = tl.load(lists.tokens + row * LISTED + offs_l, mask=in_l, other=INT32_MAX)
    is_token = token < V
    keys = tl.where(is_token, packed_order(listed, token), INT64_MIN)
    keys = largest(keys, WIDTH)
    is_token = keys > INT64_MIN
    token = tl.where(is_token, (keys & INT32_MAX).to(tl.int32) ^ INT32_MAX, 0)
    query_row = query_ptr + row * strides.query[0]
    token_rows = table_ptr + token.to(tl.int64)[:, None] * strides.table[0]
    total = tl.zeros([WIDTH, BLOCK_D], tl.float32)
    if METRIC == "cosine":
        table_square = tl.zeros([WIDTH, BLOCK_D], tl.float32)
        query_square = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, D, BLOCK_D):
        offs_d = first + tl.arange(0, BLOCK_D)
        in_d = offs_d < D
        query = tl.load(query_row + offs_d * strides.query[1], mask=in_d, other=0.0).to(tl.float32)
        table = tl.load(token_rows + offs_d[None, :] * strides.table[1], mask=in_d[None, :], other=0.0).to(tl.float32)
        if METRIC == "l2":
            difference = query[None, :] - table
            total -= difference * difference
        else:
            total += query[None, :] * table
        if METRIC == "cosine":
            table_square += table * table
            query_square += query * query
    score = tl.sum(total, axis=1)
    if METRIC == "cosine":
        table_norm = tl.maximum(tl.sqrt_rn(tl.sum(table_square, axis=1)), NORM_MIN)
        query_norm = tl.maximum(tl.sqrt_rn(tl.sum(query_square, axis=0)), NORM_MIN)
        score = tl.div_rn(tl.div_rn(score, table_norm), query_norm)
    if prior_ptr is not None:
        score += tl.load(prior_ptr + row * strides.prior[0] + token.to(tl.int64) * strides.prior[1]).to(tl.float32)
    is_token = is_token & (score > float("-inf"))
    places = tl.arange(0, WIDTH)
    # Places that no token fills come last, each with a key of its own.
    keys = tl.where(is_token, packed_order(score, token), places.to(tl.int64) + INT64_MIN)
    rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
    tl.store(scores_ptr + row * K + rank, tl.where(is_token, score, float("-inf")), mask=rank < K)
    tl.store(tokens_ptr + row * K + rank, tl.where(is_token, token, -1).to(tl.int64), mask=rank < K)


# --- launchers and registered ops ------------------------------------------------------------------------------------


@torch.library.custom_op("vgf_fast::squared_norms", mutates_args=())
def _squared_norms(rows: Tensor) -> Tensor:
    launch.check_device("rows", rows)
    count, width = rows.shape
    out = torch.empty((count,), dtype=torch.float32, device=rows.device)
    if count == 0:
        return out
    config = launch.squared_norms(width)
    with launch.on_device(rows):
        squared_norms_kernel[(triton.cdiv(count, config.block_n),)](
            rows, out, *rows.stride(), N=count, D=width, **launch.arguments(config)
        )
    return out


_squared_norms.register_fake(lambda rows: rows.new_empty(rows.shape[:1], dtype=torch.float32))


@torch.library.custom_op("vgf_fast::nearest_token", mutates_args=())
def _nearest_token(
    queries: Tensor,
    table: Tensor,
    k: int,
    metric: str,
    mask: Tensor | None,
    log_prior: Tensor | None,
    table_squares: Tensor | None,
    precision: str | None,
) -> tuple[Tensor, Tensor]:
    launch.check_device("queries", queries)
    rows, width = queries.shape
    vocabulary = len(table)
    scores = torch.empty((rows, k), dtype=torch.float32, device=queries.device)
    tokens = torch.empty((rows, k), dtype=torch.int64, device=queries.device)
    if rows == 0:
        return scores, tokens
    if metric != "dot" and table_squares is None:
        table_squares = _squared_norms(table)
    norm = query_norm = None
    prior = log_prior if log_prior is not None and (log_prior.ndim == 2 or metric == "cosine") else None
    bias = torch.zeros((vocabulary,), dtype=torch.float32, device=queries.device)
    if log_prior is not None and prior is None:
        bias += log_prior
    if metric == "l2":
        assert table_squares is not None
        bias.sub_(table_squares).mul_(0.5)
    if metric == "cosine":
        assert table_squares is not None
        norm = table_squares.sqrt().clamp_(min=NORM_MIN.value)
        if prior is not None:
            prior = prior.expand(rows, vocabulary)
            query_norm = _squared_norms(queries).sqrt_().clamp_(min=NORM_MIN.value)
    if mask is not None:
        bias.masked_fill_(~mask, float("-inf"))
    prior_stride = (0, 0) if prior is None else prior.stride()
    mixed = queries.dtype != table.dtype
    dtype = torch.float32 if mixed else table.dtype
    processors = launch.processors(queries.device)
    # Whatever is done to the products takes registers.
    widest = (256 if launch.wide_tiles(queries.device) else 128) if norm is None and prior is None else 128
    widest = 64 if norm is not None and prior is not None else widest
    config = launch.nearest_token(rows, vocabulary, k, dtype, processors, widest, torch.version.hip is not None)
    splits = triton.cdiv(vocabulary, config.tokens)
    shape = (rows, splits, config.width)
    lists = Lists(*(torch.empty(shape, dtype=kind, device=queries.device) for kind in (torch.float32, torch.int32)))
    with launch.on_device(queries):
        nearest_lists_kernel[(triton.cdiv(rows, config.block_m), splits)](
            Inputs(queries, table, bias, norm, query_norm, prior),
            *lists,
            Strides(queries.stride(), table.stride(), prior_stride),
            R=rows,
            V=vocabulary,
            D=width,
            HALVED=metric == "l2",
            MIXED=mixed,
            PRECISION=precision or launch.precision(dtype),
            **launch.arguments(config),
        )
        if log_prior is not None:
            prior = log_prior.expand(rows, vocabulary)
            prior_stride = prior.stride()
        merge = launch.nearest_merge(splits, config.width)
        nearest_merge_kernel[(rows,)](
            queries,
            table,
            prior,
            lists,
            scores,
            tokens,
            Strides(queries.stride(), table.stride(), prior_stride),
            V=vocabulary,
            D=width,
            LISTED=splits * config.width,
            K=k,
            METRIC=metric,
            **launch.arguments(merge),
        )
    return scores, tokens


@_nearest_token.register_fake
def _(queries: Tensor, table: Tensor, k: int, *_: object) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


# --- public functions ------------------------------------------------------------------------------------------------


def squared_norms(rows: Tensor) -> Tensor:
    """|x|^2 of every row, float32: [N, d] -> [N]. Float32, bfloat16 or float16 with any strides.

    Raises ``ValueError`` naming what is wrong with ``rows``.
    """
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows has shape {tuple(rows.shape)}, expected (N, d >= 1)")
    launch.check_dtype("rows", rows, launch.PARTICLE_DTYPES)
    return _squared_norms(rows)


def nearest_token(
    queries: Tensor,
    table: Tensor,
    k: int = 1,
    metric: str = "l2",
    mask: Tensor | None = None,
    log_prior: Tensor | None = None,
    table_squares: Tensor | None = None,
    precision: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores [R, k] float32, falling, and tokens [R, k] int64 of the nearest; formulas and order at the top.

    queries [R, d] and table [V, d] are float32, bfloat16 or float16, also each of its own, with any strides; k is 1 to
    32. ``mask`` [V] is bool, True for tokens that may be chosen. ``log_prior`` [V] or [R, V], in any of these dtypes,
    is added to the scores. ``table_squares`` [V] float32 is ``squared_norms(table)``, else computed at every call.
    ``precision`` is that of float32 products: "tf32" (the default on a GPU) or "ieee". No autograd formula.
    Raises ``ValueError`` naming the argument whose shape, dtype, device or value is wrong.
    """
    for name, tensor, shape in (("queries", queries, "(R, d >= 1)"), ("table", table, "(V >= 1, d)")):
        if tensor.ndim != 2 or tensor.shape[1] < 1 or (name == "table" and len(tensor) < 1):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        launch.check_dtype(name, tensor, launch.PARTICLE_DTYPES)
    vocabulary, width = table.shape
    launch.check_shape("queries", queries, (len(queries), width), "as wide as the table")
    launch.check_same_device("table", table, "queries", queries.device)
    launch.check_choice("metric", metric, METRICS)
    if not 1 <= k <= min(launch.MAX_NEAREST, vocabulary):
        raise ValueError(
            f"k is {k!r}, expected 1 to {min(launch.MAX_NEAREST, vocabulary)}: the kernel's limit is "
            f"{launch.MAX_NEAREST}, the table has {vocabulary} rows"
        )
    if precision is not None:
        launch.check_choice("precision", precision, launch.FLOAT32_PRECISIONS)
    for name, optional, dtypes in (
        ("mask", mask, (torch.bool,)),
        ("log_prior", log_prior, launch.PARTICLE_DTYPES),
        ("table_squares", table_squares, (torch.float32,)),
    ):
        if optional is None:
            continue
        if name != "log_prior" or optional.ndim != 2:
            launch.check_shape(name, optional, (vocabulary,), "one value a token")
        else:
            launch.check_shape(name, optional, (len(queries), vocabulary), "one value a query and token")
        launch.check_dtype(name, optional, dtypes)
        launch.check_same_device(name, optional, "queries", queries.device)
    if table_squares is not None:
        table_squares = table_squares.contiguous()
    return _nearest_token(queries, table, int(k), metric, mask, log_prior, table_squares, precision)
