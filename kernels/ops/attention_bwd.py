"""Attention, backward: dq, dk, dv, dbias and dsinks from what the forward returned, no score ever stored.

    P = exp(x - lse);  delta = rowsum(dout * out) - dlse;  dx = P * (F (dout v^T) - delta);  dv = (P F)^T dout
    dS = dx * (1 - tanh^2);  dq = scale dS k;  dk = scale dS^T q;  dbias = dx;  dsink = -sum(exp(sink - lse) delta)

F is 0 or 1 / (1 - p) by dropout, x the score of kernels/primitives/scores.py. Shapes as in kernels/ops/attention.py;
reference: tpweave/reference/ops/attention.py. One program sums dk and dv of a tile of keys over all query heads of
their group, another dq of a tile of queries, each in a fixed order: the scores are computed twice, and nothing is added
by atomics, so the gradients have the same bits every time. dbias has a program for each of its tiles, which runs over
what the bias was broadcast along. Source: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import TARGETS, CompileSpec
from tpweave.kernels.ops.attention import (
    COMPILED,
    compile_spec,
    dense_rows,
    has_features,
    row_types,
    rows_of,
    score_arguments,
    score_types,
)
from tpweave.kernels.primitives.attention_tiles import (
    block_dim,
    gpu_name,
    key_gradient_tiles,
    precision,
    query_gradient_tiles,
)
from tpweave.kernels.primitives.scores import (
    LOG2E,
    dot,
    kept,
    key_head,
    load_rows,
    query_head,
    query_rows,
    scores,
    sequence,
    tile_ranges,
    visible,
)
from tpweave.reference.ops.attention import AttentionOptions
from tpweave.reference.ops.attention_varlen import PackedSequences

Tensor = torch.Tensor

# Rows that one program of the delta kernel takes: a row is read once, so only the launch has to be worth it.
DELTA_ROWS = 32


class Counts(NamedTuple):
    """Sizes of dbias: 1 where the bias was broadcast, and how many batch entries and tiles each program runs over."""

    batch: Any
    heads: Any
    queries: Any
    keys: Any
    all_batch: Any


@triton.jit
def _attention_bwd_delta_kernel(
    dout, out_ptr, dlse_ptr, delta_ptr, queries, heads,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others end at 65535.
    num_tiles = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    h = pid // num_tiles % heads
    b = pid // num_tiles // heads
    offs_i = pid % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = offs_i < queries
    wide_i = offs_i.to(tl.int64)
    # [BLOCK_M, BLOCK_DV]
    do = load_rows(query_head(dout, b, h, 0), wide_i * dout.sequence, valid, DV, BLOCK_DV, False)
    rows = out_ptr + (b.to(tl.int64) * queries * heads + h) * DV
    out = load_rows(rows, wide_i * heads * DV, valid, DV, BLOCK_DV, False)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    stat = (b.to(tl.int64) * heads + h) * queries + offs_i
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + stat, mask=valid, other=0.0)
    tl.store(delta_ptr + stat, delta, mask=valid)


@triton.jit
def _row_stats(lse_ptr, delta_ptr, stat, offs_i, valid):
    """lse in units of log2(e), inf for rows that weigh nothing: beyond the end, or without a key; and delta."""
    lse = tl.load(lse_ptr + stat + offs_i, mask=valid, other=float("-inf")) * LOG2E
    delta = tl.load(delta_ptr + stat + offs_i, mask=valid, other=0.0)
    return tl.where(lse == float("-inf"), float("inf"), lse), delta


@triton.jit
def _weights(x, lse, dp, delta, keep, numbers, seed):
    """P F and dx of a tile; lse and delta broadcast along keys."""
    p = tl.exp2(x - lse)
    weights = p
    if seed is not None:
        weights = tl.where(keep, p * numbers.kept_factor, 0.0)
        dp = tl.where(keep, dp * numbers.kept_factor, 0.0)
    return weights, p * (dp - delta)


@triton.jit
def _add_key_gradients(
    dk, dv, kt, vt, q_head, do_head, q, dout, lse_ptr, delta_ptr, stat, b, h, begin_i, offs_j, begin_j, first, end,
    queries, keys, slopes, bias, mask, numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dk and dv with one tile of queries of one head; tiles are transposed, [BLOCK_N, BLOCK_M]."""
    offs_i = begin_i + tl.arange(0, BLOCK_M)
    valid = offs_i < queries
    # [BLOCK_M, BLOCK_D]
    qt = load_rows(q_head, offs_i.to(tl.int64) * q.sequence, valid, D, BLOCK_D, WHOLE)
    zeros = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    products = dot(kt, tl.trans(qt), zeros, PRECISION)
    x, bent = scores(products, b, h, offs_i[None, :], offs_j[:, None], queries, keys, numbers, slopes, bias, mask)
    if not WHOLE:
        position = offs_i[None, :] + (keys - queries)
        x = tl.where((position >= first[:, None]) & (position < end[:, None]), x, float("-inf"))
    lse, delta = _row_stats(lse_ptr, delta_ptr, stat, offs_i, valid)
    # [BLOCK_M, BLOCK_DV]
    do = load_rows(do_head, offs_i.to(tl.int64) * dout.sequence, valid, DV, BLOCK_DV, WHOLE)
    dp = dot(vt, tl.trans(do), zeros, PRECISION)
    keep = None
    if seed is not None:
        keep = tl.trans(kept(seed, numbers, b, h, offs_i, begin_j, BLOCK_N))
    weights, dx = _weights(x, lse[None, :], dp, delta[None, :], keep, numbers, seed)
    dv = dot(weights.to(do.dtype), do, dv, PRECISION)
    if numbers.softcap is not None:
        dx *= 1.0 - bent * bent
    return dot(dx.to(qt.dtype), qt, dk, PRECISION), dv


@triton.jit(do_not_specialize=["seed"])
def _attention_bwd_dkdv_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dk_ptr, dv_ptr, slopes, bias, mask, ragged, sizes, limits, numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Under a causal mask the first keys are seen by most queries, and they begin first.
    num_tiles = tl.cdiv(sizes.keys, BLOCK_N)
    kv_heads = sizes.heads // sizes.group
    pid = tl.program_id(0)
    begin_j = pid % num_tiles * BLOCK_N
    kv_head = pid // num_tiles % kv_heads
    b = pid // num_tiles // kv_heads
    first_q, queries, first_k, keys = sequence(b, sizes, ragged)
    if begin_j < keys:
        offs_j = begin_j + tl.arange(0, BLOCK_N)
        valid_j = offs_j < keys
        wide_j = offs_j.to(tl.int64)
        kt = load_rows(key_head(k, b, kv_head, first_k, ragged), wide_j * k.sequence, valid_j, D, BLOCK_D, False)
        vt = load_rows(key_head(v, b, kv_head, first_k, ragged), wide_j * v.sequence, valid_j, DV, BLOCK_DV, False)

        # The queries that see a key, by position; sides swapped.
        shift = keys - queries
        last_j = tl.minimum(begin_j + BLOCK_N, keys) - 1
        first_begin, first_end = visible(begin_j, limits.after, limits.before, limits.chunk)
        last_begin, last_end = visible(last_j, limits.after, limits.before, limits.chunk)
        begin, whole, whole_end, end = tile_ranges(
            first_begin - shift, first_end - shift, last_begin - shift, last_end - shift, queries, BLOCK_M
        )
        first_seen, end_seen = visible(offs_j, limits.after, limits.before, limits.chunk)

        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        for g in range(sizes.group):
            h = kv_head * sizes.group + g
            _, stat = query_rows(b, h, first_q, sizes, ragged)
            q_head = query_head(q, b, h, first_q)
            do_head = query_head(dout, b, h, first_q)
            for t in range(whole, whole_end):
                dk, dv = _add_key_gradients(
                    dk, dv, kt, vt, q_head, do_head, q, dout, lse_ptr, delta_ptr, stat, b, h, t * BLOCK_M, offs_j,
                    begin_j, first_seen, end_seen, queries, keys, slopes, bias, mask, numbers, seed, D, DV, BLOCK_M,
                    BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, True,
                )  # fmt: skip
            for n in range(whole - begin + end - whole_end):
                t = tl.where(n < whole - begin, begin + n, whole_end + n - (whole - begin))
                dk, dv = _add_key_gradients(
                    dk, dv, kt, vt, q_head, do_head, q, dout, lse_ptr, delta_ptr, stat, b, h, t * BLOCK_M, offs_j,
                    begin_j, first_seen, end_seen, queries, keys, slopes, bias, mask, numbers, seed, D, DV, BLOCK_M,
                    BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, False,
                )  # fmt: skip

        # dk and dv are dense, in k's and v's order of dims.
        row = tl.cast(first_k, tl.int64) if ragged.cu_seqlens_q is not None else b.to(tl.int64) * sizes.keys
        rows = (row + wide_j) * kv_heads + kv_head
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        dk = (dk * numbers.scale).to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + rows[:, None] * D + offs_d, dk, mask=valid_j[:, None] & (offs_d < D))
        offs_d = tl.arange(0, BLOCK_DV)[None, :]
        dv = dv.to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + rows[:, None] * DV + offs_d, dv, mask=valid_j[:, None] & (offs_d < DV))


@triton.jit
def _score_gradient(
    qt, do, lse, delta, k_head, v_head, k, v, b, h, offs_i, first, end, begin_j, queries, keys, slopes, bias, mask,
    numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dx [BLOCK_M, BLOCK_N] of one tile of keys, their rows of k, and the tanh of its softcap."""
    offs_j = begin_j + tl.arange(0, BLOCK_N)
    valid = offs_j < keys
    zeros = tl.zeros((offs_i.shape[0], BLOCK_N), tl.float32)
    # [BLOCK_N, BLOCK_D]
    kt = load_rows(k_head, offs_j.to(tl.int64) * k.sequence, valid, D, BLOCK_D, WHOLE)
    products = dot(qt, tl.trans(kt), zeros, PRECISION)
    x, bent = scores(products, b, h, offs_i[:, None], offs_j[None, :], queries, keys, numbers, slopes, bias, mask)
    if not WHOLE:
        x = tl.where((offs_j[None, :] >= first[:, None]) & (offs_j[None, :] < end[:, None]), x, float("-inf"))
    # [BLOCK_N, BLOCK_DV]
    vt = load_rows(v_head, offs_j.to(tl.int64) * v.sequence, valid, DV, BLOCK_DV, WHOLE)
    dp = dot(do, tl.trans(vt), zeros, PRECISION)
    keep = None
    if seed is not None:
        keep = kept(seed, numbers, b, h, offs_i, begin_j, BLOCK_N)
    _, dx = _weights(x, lse[:, None], dp, delta[:, None], keep, numbers, seed)
    return dx, kt, bent


@triton.jit
def _add_query_gradient(
    dq, qt, do, lse, delta, k_head, v_head, k, v, b, h, offs_i, first, end, begin_j, queries, keys, slopes, bias, mask,
    numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    dx, kt, bent = _score_gradient(
        qt, do, lse, delta, k_head, v_head, k, v, b, h, offs_i, first, end, begin_j, queries, keys, slopes, bias, mask,
        numbers, seed, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, WHOLE,
    )  # fmt: skip
    if numbers.softcap is not None:
        dx *= 1.0 - bent * bent
    return dot(dx.to(kt.dtype), kt, dq, PRECISION)


@triton.jit(do_not_specialize=["seed"])
def _attention_bwd_dq_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dq_ptr, slopes, bias, mask, ragged, sizes, limits, numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # As in the forward, the last queries begin first.
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    pid = tl.program_id(0)
    begin_i = (num_tiles - 1 - pid % num_tiles) * BLOCK_M
    h = pid // num_tiles % sizes.heads
    b = pid // num_tiles // sizes.heads
    first_q, queries, first_k, keys = sequence(b, sizes, ragged)
    if begin_i < queries:
        offs_i = begin_i + tl.arange(0, BLOCK_M)
        valid_i = offs_i < queries
        wide_i = offs_i.to(tl.int64)
        qt = load_rows(query_head(q, b, h, first_q), wide_i * q.sequence, valid_i, D, BLOCK_D, False)
        do = load_rows(query_head(dout, b, h, first_q), wide_i * dout.sequence, valid_i, DV, BLOCK_DV, False)
        row, stat = query_rows(b, h, first_q, sizes, ragged)
        lse, delta = _row_stats(lse_ptr, delta_ptr, stat, offs_i, valid_i)
        k_head = key_head(k, b, h // sizes.group, first_k, ragged)
        v_head = key_head(v, b, h // sizes.group, first_k, ragged)

        shift = keys - queries
        last_i = tl.minimum(begin_i + BLOCK_M, queries) - 1
        first_begin, first_end = visible(begin_i + shift, limits.before, limits.after, limits.chunk)
        last_begin, last_end = visible(last_i + shift, limits.before, limits.after, limits.chunk)
        begin, whole, whole_end, end = tile_ranges(first_begin, first_end, last_begin, last_end, keys, BLOCK_N)
        first_seen, end_seen = visible(offs_i + shift, limits.before, limits.after, limits.chunk)
        end_seen = tl.minimum(end_seen, keys)

        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for t in range(whole, whole_end):
            dq = _add_query_gradient(
                dq, qt, do, lse, delta, k_head, v_head, k, v, b, h, offs_i, first_seen, end_seen, t * BLOCK_N, queries,
                keys, slopes, bias, mask, numbers, seed, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, True,
            )  # fmt: skip
        for n in range(whole - begin + end - whole_end):
            t = tl.where(n < whole - begin, begin + n, whole_end + n - (whole - begin))
            dq = _add_query_gradient(
                dq, qt, do, lse, delta, k_head, v_head, k, v, b, h, offs_i, first_seen, end_seen, t * BLOCK_N, queries,
                keys, slopes, bias, mask, numbers, seed, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION, False,
            )  # fmt: skip
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        rows = (row + wide_i * sizes.heads) * D
        dq = (dq * numbers.scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + rows[:, None] + offs_d, dq, mask=valid_i[:, None] & (offs_d < D))


@triton.jit(do_not_specialize=["seed"])
def _attention_bwd_dbias_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dbias_ptr, slopes, bias, mask, ragged, sizes, limits, numbers, seed, counts,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Tiles of dbias, and for each the tiles of dx that lie over it.
    tiles_i = tl.cdiv(counts.queries, BLOCK_M)
    tiles_j = tl.cdiv(counts.keys, BLOCK_N)
    pid = tl.program_id(0)
    tile_j = pid % tiles_j
    tile_i = pid // tiles_j % tiles_i
    head = pid // tiles_j // tiles_i % counts.heads
    entry = pid // tiles_j // tiles_i // counts.heads
    over_b = counts.all_batch // counts.batch
    over_h = sizes.heads // counts.heads
    over_i = tl.cdiv(sizes.queries, BLOCK_M) // tiles_i
    over_j = tl.cdiv(sizes.keys, BLOCK_N) // tiles_j
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for n in range(over_b * over_h * over_i * over_j):
        begin_j = (tile_j + n % over_j) * BLOCK_N
        begin_i = (tile_i + n // over_j % over_i) * BLOCK_M
        h = head + n // over_j // over_i % over_h
        b = entry + n // over_j // over_i // over_h
        first_q, queries, first_k, keys = sequence(b, sizes, ragged)
        shift = keys - queries
        last_i = tl.minimum(begin_i + BLOCK_M, queries) - 1
        first_begin, _first_end = visible(begin_i + shift, limits.before, limits.after, limits.chunk)
        _last_begin, last_end = visible(last_i + shift, limits.before, limits.after, limits.chunk)
        if (begin_i < queries) & (begin_j < tl.minimum(last_end, keys)) & (begin_j + BLOCK_N > first_begin):
            offs_i = begin_i + tl.arange(0, BLOCK_M)
            valid_i = offs_i < queries
            wide_i = offs_i.to(tl.int64)
            qt = load_rows(query_head(q, b, h, first_q), wide_i * q.sequence, valid_i, D, BLOCK_D, False)
            do = load_rows(query_head(dout, b, h, first_q), wide_i * dout.sequence, valid_i, DV, BLOCK_DV, False)
            _row, stat = query_rows(b, h, first_q, sizes, ragged)
            lse, delta = _row_stats(lse_ptr, delta_ptr, stat, offs_i, valid_i)
            first_seen, end_seen = visible(offs_i + shift, limits.before, limits.after, limits.chunk)
            dx, _kt, _bent = _score_gradient(
                qt, do, lse, delta, key_head(k, b, h // sizes.group, first_k, ragged),
                key_head(v, b, h // sizes.group, first_k, ragged), k, v, b, h, offs_i, first_seen,
                tl.minimum(end_seen, keys), begin_j, queries, keys, slopes, bias, mask, numbers, seed, D, DV, BLOCK_N,
                BLOCK_D, BLOCK_DV, PRECISION, False,
            )  # fmt: skip
            acc += dx
    # [BLOCK_M, BLOCK_N], or all of it in the first row or column
    offs_i = tile_i * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_j = tile_j * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if counts.queries == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.sum(acc, 0)[None, :]
    if counts.keys == 1:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.sum(acc, 1)[:, None]
    plane = (entry.to(tl.int64) * counts.heads + head) * counts.queries
    ptrs = dbias_ptr + (plane + offs_i) * counts.keys + offs_j
    tl.store(ptrs, acc.to(dbias_ptr.dtype.element_ty), mask=(offs_i < counts.queries) & (offs_j < counts.keys))


def attention_bwd(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: AttentionOptions, packed: PackedSequences | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dbias and dsinks, dense, of their inputs' dtypes; the last two None without such an input.

    Shapes as in `attention_fwd`; dout like out, dlse like lse or None. Keys in pages are copied out of them first, and
    the host waits for the lengths.
    """
    if packed is None or packed.block_table is None:
        return _gradients(dout, dlse, q, k, v, out, lse, options, packed)
    rows = packed.key_rows(k.shape[1])
    lengths = torch.tensor([0, *(len(r) for r in rows)], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    apart = packed._replace(cu_seqlens_k=lengths, block_table=None, seqused_k=None)
    together = torch.cat(rows)
    flat_k, flat_v = (x.flatten(0, 1)[together] for x in (k, v))
    # In fp32, for pages that sequences share get the sum of their gradients: sequence by sequence, in that order.
    dq, dk, dv, dbias, dsinks = _gradients(dout, dlse, q, flat_k, flat_v, out, lse, options, apart, torch.float32)
    grads = []
    for pages, grad in ((k, dk), (v, dv)):
        total = torch.zeros((pages.shape[0] * pages.shape[1], *pages.shape[2:]), dtype=grad.dtype, device=q.device)
        for r, part in zip(rows, grad.split([len(r) for r in rows]), strict=True):
            total[r] += part
        grads.append(total.view(pages.shape).to(pages.dtype))
    return dq, grads[0], grads[1], dbias, dsinks


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: AttentionOptions, packed: PackedSequences | None, key_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dbias and dsinks; dk and dv in `key_dtype`, their inputs' when None. Keys are not in pages."""
    dout, q, k, v = dense_rows(dout), dense_rows(q), dense_rows(k), dense_rows(v)
    out, lse = out.contiguous(), lse.contiguous()
    depth, depth_v = q.shape[-1], v.shape[-1]
    batch, arguments = score_arguments(q, k, options, packed)
    sizes = arguments["sizes"]
    heads, queries, keys, kv_heads = q.shape[-2], sizes.queries, sizes.keys, k.shape[-2]
    gpu, device = gpu_name(q.device), q.device
    # Rows of no sequence are written by no program.
    new = torch.empty if packed is None else torch.zeros
    dq = new(q.shape, dtype=q.dtype, device=device)
    dk, dv = (new(x.shape, dtype=key_dtype or x.dtype, device=device) for x in (k, v))
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    block_d, block_dv = block_dim(depth), block_dim(depth_v)
    dims: dict[str, Any] = {
        "D": depth, "DV": depth_v, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "PRECISION": precision(gpu, q.dtype)
    }  # fmt: skip
    features = has_features(arguments)
    by_key = key_gradient_tiles(gpu, q.dtype, block_d, block_dv, features=features)
    by_query = query_gradient_tiles(gpu, q.dtype, block_d, block_dv, features=features)
    # All rows are of one length for delta: packed ones are those of one sequence.
    entries, rows = (batch, queries) if packed is None else (1, q.shape[0])
    with torch.cuda.device_of(q):
        if lse.numel() > 0:
            _attention_bwd_delta_kernel[(triton.cdiv(rows, DELTA_ROWS) * entries * heads,)](
                rows_of(dout), out, dlse, delta, rows, heads, DV=depth_v, BLOCK_M=DELTA_ROWS, BLOCK_DV=block_dv
            )
        inputs = (rows_of(q), rows_of(k), rows_of(v), rows_of(dout), lse, delta)
        if dk.numel() > 0 and keys > 0:
            _attention_bwd_dkdv_kernel[(triton.cdiv(keys, by_key.block_n) * batch * kv_heads,)](
                *inputs, dk, dv, **arguments, **dims, BLOCK_M=by_key.block_m, BLOCK_N=by_key.block_n,
                num_warps=by_key.num_warps, num_stages=by_key.num_stages,
            )  # fmt: skip
        if dq.numel() > 0 and queries > 0:
            _attention_bwd_dq_kernel[(triton.cdiv(queries, by_query.block_m) * batch * heads,)](
                *inputs, dq, **arguments, **dims, BLOCK_M=by_query.block_m, BLOCK_N=by_query.block_n,
                num_warps=by_query.num_warps, num_stages=by_query.num_stages,
            )  # fmt: skip
        dbias = None
        if options.bias is not None:
            dbias = torch.empty(options.bias.shape, dtype=options.bias.dtype, device=device)
            if min(batch, heads, queries, keys) == 0:
                dbias.zero_()
            else:
                counts = Counts(*options.bias.shape, batch)
                tiles = triton.cdiv(counts.queries, by_query.block_m) * triton.cdiv(counts.keys, by_query.block_n)
                _attention_bwd_dbias_kernel[(tiles * counts.batch * counts.heads,)](
                    *inputs, dbias, **arguments, counts=counts, **dims, BLOCK_M=by_query.block_m,
                    BLOCK_N=by_query.block_n, num_warps=by_query.num_warps, num_stages=1,
                )  # fmt: skip
    dsinks = None
    if options.sinks is not None:
        # [.., Hq, rows]: a row without keys holds the sink alone, or nothing where the sink is -inf.
        sink = options.sinks.float()[:, None]
        mass = torch.exp(sink - lse.masked_fill(lse == float("-inf"), float("inf"))) * delta
        dsinks = -mass.movedim(-2, 0).flatten(1).sum(1).to(options.sinks.dtype)
    return dq, dk, dv, dbias, dsinks


def _backward_specs(gpu: str, dtype: torch.dtype, depth: int, features: bool, max_spills: int) -> list[CompileSpec]:
    rows = row_types(dtype)
    inputs = {"q": rows, "k": rows, "v": rows, "dout": rows, "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
    inputs |= score_types(features)
    if features:
        inputs["ragged"] = inputs["ragged"]._replace(block_table=None)
    by_key = key_gradient_tiles(gpu, dtype, depth, depth, features=features)
    by_query = query_gradient_tiles(gpu, dtype, depth, depth, features=features)
    kernels = [
        (_attention_bwd_dkdv_kernel, by_key, {"dk_ptr": rows.ptr, "dv_ptr": rows.ptr}),
        (_attention_bwd_dq_kernel, by_query, {"dq_ptr": rows.ptr}),
    ]
    if features:
        dbias = {"dbias_ptr": "*bf16", "counts": Counts(*["i32"] * 5)}
        kernels.append((_attention_bwd_dbias_kernel, by_query._replace(num_stages=1), dbias))
    return [
        compile_spec(kernel, gpu, dtype, depth, tiles, {**inputs, **outputs}, max_spills)
        for kernel, tiles, outputs in kernels
    ]


COMPILE_SPECS = [
    CompileSpec(
        _attention_bwd_delta_kernel,
        {
            "dout": row_types(torch.bfloat16), "out_ptr": "*bf16", "dlse_ptr": "*fp32", "delta_ptr": "*fp32",
            "queries": "i32", "heads": "i32",
        },
        {"DV": 128, "BLOCK_M": DELTA_ROWS, "BLOCK_DV": 128},
    ),
    *(spec for gpu in TARGETS for case in COMPILED for spec in _backward_specs(gpu, *case)),
]  # fmt: skip
