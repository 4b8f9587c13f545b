"""An attention call as the native kernels take it: `AttentionProblem` of csrc/cpu/ops/attention.h, flattened."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tpweave.native import _C, DTYPE_CODES, data_ptr
from tpweave.reference.ops.attention import AttentionOptions

Tensor = torch.Tensor


class NativeProblem(NamedTuple):
    """Attributes:
    integers: addresses, strides and sizes in the order of make_attention_problem (csrc/cpu/ops/attention_problem.cpp).
    reals: softmax_scale, softcap, dropout_p.
    tensors: what the addresses point to; must outlive the call.
    """

    integers: tuple[int, ...]
    reals: tuple[float, float, float]
    tensors: tuple[Tensor | None, ...]


def dense_rows(x: Tensor) -> Tensor:
    """The tensor itself where its last dim is dense, else a contiguous copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def _broadcast_strides(x: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a 4-dim tensor that is expanded: 0 where its size is 1."""
    if x is None:
        return 0, 0, 0, 0
    a, b, c, d = (0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return a, b, c, d


def native_problem(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> NativeProblem:  # fmt: skip
    """Flatten a call.

    q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv]; with `cu_seqlens_q` [B + 1] and `cu_seqlens_k` [B + 1]
    q [Tq, Hq, D] and k, v [Tk, Hkv, D], or pages [num_pages, page_size, Hkv, D] with `block_table` [B, max_pages] and
    lengths from `seqused_k` [B] or `cu_seqlens_k`. All of these int32.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    cu_q, cu_k, used, table = _int32(cu_seqlens_q), _int32(cu_seqlens_k), _int32(seqused_k), _int32(block_table)
    slopes = None if options.alibi_slopes is None else dense_rows(options.alibi_slopes.float())
    sinks = None if options.sinks is None else options.sinks.float().contiguous()
    bias, mask, seed = options.bias, options.mask, options.seed
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        bias = bias.float()
    if cu_q is None:
        batch, queries, heads, depth = q.shape
        keys = k.shape[1]
        q_strides, total_queries = q.stride()[:3], 0
    else:
        batch, queries, keys = cu_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
        total_queries, heads, depth = q.shape
        q_strides = (0, *q.stride()[:2])
    no_batch = (0,) * (4 - k.dim())
    integers = (
        DTYPE_CODES[q.dtype], q.data_ptr(), k.data_ptr(), v.data_ptr(), *q_strides,
        *no_batch, *k.stride()[:-1], *no_batch, *v.stride()[:-1],
        batch, queries, keys, heads, k.shape[-2], depth, v.shape[-1], total_queries, k.shape[0],
        data_ptr(cu_q), data_ptr(cu_k), data_ptr(used), data_ptr(table), 0 if table is None else table.stride(0),
        0 if table is None else table.shape[1], 0 if table is None else k.shape[1],
        options.window[0], 0 if options.causal else options.window[1], options.chunk,
        data_ptr(slopes), slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0, data_ptr(sinks),
        data_ptr(mask), *_broadcast_strides(mask),
        data_ptr(bias), 0 if bias is None else DTYPE_CODES[bias.dtype], *_broadcast_strides(bias),
        0 if seed is None else int(seed), options.head_offset,
    )  # fmt: skip
    return NativeProblem(
        integers, (options.softmax_scale, options.softcap, options.dropout_p),
        (q, k, v, cu_q, cu_k, used, table, slopes, sinks, bias, mask),
    )  # fmt: skip


Gradients = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None"]


def native_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: AttentionOptions, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None, max_seqlen_q: int = 0, max_seqlen_k: int = 0,
) -> Gradients:  # fmt: skip
    """dq, dk, dv, dbias and dsinks from what the forward returned; tensors as in `native_problem`, without pages.

    dbias is None unless `options.bias` requires a gradient, dsinks where there are no sinks.
    """
    problem = native_problem(
        q, k, v, options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    dout, out, lse = dense_rows(dout), out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.float().contiguous()
    # What belongs to no sequence is not written, nor what no query meets.
    allocate = torch.zeros if cu_seqlens_q is not None or q.shape[1] == 0 else torch.empty
    dq, dk, dv = (allocate(x.shape, dtype=x.dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    bias, sinks = options.bias, options.sinks
    dbias = None
    if bias is not None and bias.requires_grad:
        # One number for all queries and keys would be added to by tiles in no fixed order.
        queries = max_seqlen_q if cu_seqlens_q is not None else q.shape[1]
        dbias = torch.zeros(*bias.shape[:2], queries if bias.shape[3] == 1 else bias.shape[2], bias.shape[3])
    dsinks = None if sinks is None else torch.empty(sinks.shape)
    _C.attention_bwd(
        problem.integers, problem.reals, dout.data_ptr(), ((0,) * (4 - dout.dim()) + dout.stride())[:3],
        out.data_ptr(), lse.data_ptr(), data_ptr(dlse), delta.data_ptr(),
        (dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), data_ptr(dbias), data_ptr(dsinks)), _broadcast_strides(dbias),
    )  # fmt: skip
    if dbias is not None and bias is not None:
        dbias = dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk, dv, dbias, dsinks if sinks is None or dsinks is None else dsinks.to(sinks.dtype)
