"""Attention over sequences packed one after the other, without padding; keys packed likewise, or in pages of a cache.

    out[s:e] = attention(q[s:e], k_b, v_b),   s, e = cu_seqlens_q[b : b + 2],   for each sequence b

with k_b = k[cu_seqlens_k[b] : cu_seqlens_k[b + 1]], or as many keys of the pages k[block_table[b]], one after the
other; with `seqused_k` only the first seqused_k[b] of them. Scores, weights and gradients are those of `attention`. The
cost follows the tiles that hold tokens.

Dims: B sequences, Tq and Tk tokens of all of them, Hq query heads, Hkv KV heads (Hq a multiple), D head dim, Dv value
head dim. Source: Dao, "FlashAttention-2", 2023 (packed sequences); Kwon et al., "Efficient Memory Management for Large
Language Model Serving with PagedAttention", 2023 (pages).
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C
from tpweave.ops.attention import (
    _OPTIONS_SCHEMA,
    TRITON_NEEDS,
    AttentionKeywords,
    _options,
    backward_head_dim_fits,
    check_heads,
    check_options,
    dropout_seed,
    head_dim_fits,
)
from tpweave.ops.attention_problem import Gradients, native_backward, native_problem
from tpweave.reference.ops.attention import AttentionOptions
from tpweave.reference.ops.attention_varlen import (
    PackedSequences,
    attention_varlen_backward_reference,
    attention_varlen_reference,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensor = torch.Tensor


def attention_varlen_fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    problem = native_problem(q, k, v, options, **sequences._asdict())
    out = torch.empty(*q.shape[:2], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    offsets = sequences.cu_seqlens_q
    first, last = int(offsets[0]), int(offsets[-1])
    for outside in (slice(0, first), slice(last, q.shape[0])):
        out[outside] = 0
        lse[:, outside] = float("-inf")
    _C.attention_fwd("attention_varlen", problem.integers, problem.reals, out.data_ptr(), lse.data_ptr())
    return out, lse


def attention_varlen_fwd_triton(
    q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    from tpweave.kernels.ops.attention import attention_fwd

    return attention_fwd(q, k, v, options, sequences)


def attention_varlen_bwd_triton(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sequences: PackedSequences, options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    from tpweave.kernels.ops.attention_bwd import attention_bwd

    return attention_bwd(dout, dlse, q, k, v, out, lse, options, sequences)


def attention_varlen_bwd_cpu(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sequences: PackedSequences, options: AttentionOptions,
) -> Gradients:  # fmt: skip
    fields = sequences._asdict()
    if fields.pop("block_table") is None:
        return native_backward(dout, dlse, q, k, v, out, lse, options, **fields)
    # Sequences may share pages: their keys are unpacked, and their gradients added where they came from.
    rows = torch.cat([torch.empty(0, dtype=torch.int64), *sequences.key_rows(k.shape[1])])
    cu_seqlens_k = torch.nn.functional.pad(sequences.key_lengths().cumsum(0), (1, 0))
    packed_k, packed_v = (x.flatten(0, 1)[rows] for x in (k, v))
    fields.update(cu_seqlens_k=cu_seqlens_k, seqused_k=None)
    dq, *dkv, dbias, dsinks = native_backward(
        dout, dlse, q, packed_k, packed_v, out, lse, options, **fields
    )  # fmt: skip
    dk, dv = (
        torch.zeros(x.shape).flatten(0, 1).index_add_(0, rows, grad.float()).view(x.shape).to(x.dtype)
        for x, grad in zip((k, v), dkv, strict=True)
    )
    return dq, dk, dv, dbias, dsinks


# Rows take (q, k, v, PackedSequences, AttentionOptions) and return out [Tq, Hq, Dv] and lse [Hq, Tq]; those of the
# backward take (dout, dlse, q, k, v, out, lse, PackedSequences, AttentionOptions) and return dq, dk, dv, dbias, dsinks.
# Tokens of no sequence have out 0, lse -inf and gradients 0; so have keys that no sequence uses.
ATTENTION_VARLEN = Op("attention_varlen", [
    Backend("cpu", attention_varlen_fwd_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(head_dim_fits,))),
    Backend("triton", attention_varlen_fwd_triton, TRITON_NEEDS),
    Backend("reference", attention_varlen_reference, Needs()),
])  # fmt: skip
ATTENTION_VARLEN_BWD = Op("attention_varlen_bwd", [
    Backend("cpu", attention_varlen_bwd_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(backward_head_dim_fits,))),
    Backend("triton", attention_varlen_bwd_triton, TRITON_NEEDS),
    Backend("reference", attention_varlen_backward_reference, Needs()),
])  # fmt: skip


def _shown(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 12 else f"[{', '.join(map(str, numbers[:10]))}, ... {numbers[-1]}]"


def _check_lengths(q: Tensor, k: Tensor, sequences: PackedSequences) -> None:
    """Raise ValueError where the numbers in `sequences` do not fit the tensors; these must be on the CPU."""
    cu_q, cu_k, max_q, max_k, table, used = sequences
    tokens_k = None if table is not None else k.shape[0]
    for name, cu, tokens in (("cu_seqlens_q", cu_q, q.shape[0]), ("cu_seqlens_k", cu_k, tokens_k)):
        offsets = cu.tolist()
        if offsets[0] < 0 or any(a > b for a, b in itertools.pairwise(offsets)):
            raise ValueError(f"attention_varlen: {name} is {_shown(offsets)}; offsets start at 0 and never fall")
        if tokens is not None and offsets[-1] > tokens:
            x = "q" if name == "cu_seqlens_q" else "k"
            raise ValueError(f"attention_varlen: {name} ends at {offsets[-1]}, {x} has {tokens} tokens")
    if used is not None:
        for b, (number, length) in enumerate(zip(used.tolist(), cu_k.diff().tolist(), strict=True)):
            if not 0 <= number <= length:
                raise ValueError(f"attention_varlen: seqused_k[{b}] is {number}, sequence {b} has {length} keys")
    lengths = sequences.key_lengths()
    for name, limit, lens in (("max_seqlen_q", max_q, cu_q.diff()), ("max_seqlen_k", max_k, lengths)):
        longest = max(lens.tolist(), default=0)
        if limit < longest:
            raise ValueError(f"attention_varlen: {name} is {limit}, the longest sequence has {longest} tokens")
    if table is None:
        return
    num_pages, page_size = k.shape[:2]
    pages = (lengths + page_size - 1) // page_size
    if max(pages.tolist(), default=0) > table.shape[1]:
        raise ValueError(
            f"attention_varlen: block_table has {table.shape[1]} pages of {page_size} keys for each sequence, "
            f"one has {max(lengths.tolist())} keys"
        )
    wrong = (torch.arange(table.shape[1]) < pages[:, None]) & ((table < 0) | (table >= num_pages))
    if wrong.any():
        b, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"attention_varlen: block_table[{b}, {column}] is {int(table[b, column])}, there are {num_pages} pages"
        )


def _impl(q, k, v, cu_q, cu_k, max_q, max_k, block_table, seqused_k, mask, bias, alibi, sinks, seed, *settings):
    *settings, backend = settings
    sequences = PackedSequences(cu_q, cu_k, max_q, max_k, block_table, seqused_k)
    options = _options(mask, bias, alibi, sinks, seed, *settings)
    if q.device.type == "cpu":
        _check_lengths(q, k, sequences)
    row = ATTENTION_VARLEN.choose(Inputs((q, k, v), **sequences._asdict(), **options._asdict()), backend)
    return row.run(q, k, v, sequences, options)


def _fake(q, k, v, *_):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[-1]), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


def _setup_context(ctx, inputs, output):
    q, k, v, cu_q, cu_k, max_q, max_k, *tensors = inputs[:14]
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, *tensors)
    ctx.longest, ctx.settings, ctx.backend = (max_q, max_k), inputs[14:-1], inputs[-1]
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    if dout is None and dlse is None:
        return (None,) * 23
    q, k, v, out, lse, cu_q, cu_k, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    need_dbias, need_dsinks = ctx.needs_input_grad[10], ctx.needs_input_grad[12]
    dq, dk, dv, dbias, dsinks = _attention_varlen_bwd_op(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        lse,
        cu_q,
        cu_k,
        *ctx.longest,
        *tensors,
        *ctx.settings,
        need_dbias,
        need_dsinks,
        ctx.backend,
    )
    dbias, dsinks = dbias if need_dbias else None, dsinks if need_dsinks else None
    return dq, dk, dv, *(None,) * 7, dbias, None, dsinks, *(None,) * 10


def _bwd_impl(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, block_table, seqused_k, *rest):
    mask, bias, alibi, sinks, seed, *settings, need_dbias, need_dsinks, backend = rest
    sequences = PackedSequences(cu_q, cu_k, max_q, max_k, block_table, seqused_k)
    bias = None if bias is None else bias.detach().requires_grad_(need_dbias)
    options = _options(mask, bias, alibi, sinks, seed, *settings)
    inputs = Inputs((dout, q, k, v), **sequences._asdict(), **options._asdict())
    row = ATTENTION_VARLEN_BWD.choose(inputs, ATTENTION_VARLEN_BWD.named(backend))
    dq, dk, dv, dbias, dsinks = row.run(dout, dlse, q, k, v, out, lse, sequences, options)
    dbias = dbias if need_dbias and dbias is not None else q.new_empty(0)
    return dq, dk, dv, dbias, dsinks if need_dsinks and dsinks is not None else q.new_empty(0)


def _bwd_fake(dout, dlse, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, block_table, seqused_k, *rest):
    _, bias, _, sinks, *_, need_dbias, need_dsinks, _ = rest
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for x, needed in ((bias, need_dbias), (sinks, need_dsinks)):
        grads.append(x.new_empty(x.shape) if needed else q.new_empty(0))
    return tuple(grads)


_SEQUENCES_SCHEMA = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? block_table, "
    "Tensor? seqused_k"
)
_attention_varlen_bwd_op = register_op(
    "attention_varlen_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SEQUENCES_SCHEMA}, {_OPTIONS_SCHEMA}, bool need_dbias, bool need_dsinks, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_attention_varlen_op = register_op(
    f"attention_varlen(Tensor q, Tensor k, Tensor v, {_SEQUENCES_SCHEMA}, {_OPTIONS_SCHEMA}, str? backend)"
    " -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def _check_index(name: str, x: Tensor, q: Tensor, shape: tuple[int, ...]) -> None:
    wrong_shape = x.dim() != len(shape) or any(n not in (-1, m) for m, n in zip(x.shape, shape, strict=True))
    if wrong_shape or x.dtype != torch.int32 or x.device != q.device:
        wanted = ", ".join("pages" if n < 0 else str(n) for n in shape)
        raise ValueError(
            f"attention_varlen: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; "
            f"it needs torch.int32 [{wanted}] on {q.device}"
        )


def _check_sequences(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, block_table: Tensor | None,
    seqused_k: Tensor | None,
) -> None:  # fmt: skip
    pages = None if block_table is None else "pages, page size, heads, head dim"
    check_heads("attention_varlen", q, k, v, dims="tokens, heads, head dim", key_dims=pages)
    if block_table is not None and k.shape[1] == 0:
        raise ValueError(f"attention_varlen: k has shape {tuple(k.shape)}; pages need at least 1 key")
    if cu_seqlens_q.dim() != 1 or len(cu_seqlens_q) == 0:
        raise ValueError(f"attention_varlen: cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}; it needs [B + 1]")
    batch = len(cu_seqlens_q) - 1
    _check_index("cu_seqlens_q", cu_seqlens_q, q, (batch + 1,))
    _check_index("cu_seqlens_k", cu_seqlens_k, q, (batch + 1,))
    if block_table is not None:
        _check_index("block_table", block_table, q, (batch, -1))
    if seqused_k is not None:
        _check_index("seqused_k", seqused_k, q, (batch,))


@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, block_table: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: Literal[False] = ...,
    **options: Unpack[AttentionKeywords],
) -> Tensor: ...  # fmt: skip
@overload
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, block_table: Tensor | None = ..., seqused_k: Tensor | None = ..., return_lse: bool,
    **options: Unpack[AttentionKeywords],
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    *, block_table: Tensor | None = None, seqused_k: Tensor | None = None, causal: bool = False,
    window: tuple[int, int] = (-1, -1), chunk: int = 0, softmax_scale: float | None = None, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, bias: Tensor | None = None,
    mask: Tensor | None = None, dropout_p: float = 0.0, seed: int | Tensor | None = None, head_offset: int = 0,
    return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention within each of several packed sequences, differentiable in q, k, v, bias and sinks.

    Args:
        q: [Tq, Hq, D], fp32, bf16, fp16 or fp64: the queries of all sequences. Any strides.
        k: [Tk, Hkv, D] of q's dtype; with `block_table` pages [num_pages, page_size, Hkv, D], pages of any size.
        v: as k, with Dv in place of D.
        cu_seqlens_q: [B + 1] int32, never falling: sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: [B + 1] int32, likewise the keys; with `block_table` only their number is read from it.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's number of queries and keys.
        block_table: [B, pages] int32, the pages that hold each sequence's keys, in order. Entries behind a sequence's
            last key are not read. Sequences may share pages.
        seqused_k: [B] int32: only so many of each sequence's keys are used, as if it had no more.
        alibi_slopes: fp32 [Hq] or [B, Hq].
        bias, mask: 4 dims that broadcast to [B, Hq, max_seqlen_q, max_seqlen_k], of which each sequence uses the top
            left corner; a mask may also be [B, max_seqlen_k].
        causal, window, chunk, softmax_scale, softcap, sinks, dropout_p, seed, head_offset, return_lse, backend: as for
            `tpweave.attention`, positions counted inside the sequence.

    Returns:
        out [Tq, Hq, Dv] of q's dtype; with `return_lse` `(out, lse)`, lse [Hq, Tq] in fp32 (fp64 for fp64). Queries
        that see no key have out 0 and lse -inf (with sinks, the sink), tokens of no sequence 0 and -inf.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together; on CPU tensors also: offsets that fall or
            lie beyond the tokens, a maximum that is too small, a page that does not exist, more keys used than there
            are.

    Example:
        >>> lengths = torch.tensor([0, 5, 12], dtype=torch.int32)  # a sequence of 5 tokens and one of 7
        >>> q, k, v = torch.randn(12, 8, 64), torch.randn(12, 2, 64), torch.randn(12, 2, 64)
        >>> out = tpweave.attention_varlen(q, k, v, lengths, lengths, 7, 7, causal=True)
    """
    if backend is None and not is_compiling():
        done = _C.attention_varlen_plain(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, seqused_k, mask, bias,
            alibi_slopes, sinks, causal, window, chunk, softmax_scale, softcap, dropout_p, return_lse,
        )  # fmt: skip
        if done is not None:
            return done
    _check_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table, seqused_k)
    shape = (len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
    check_options(
        "attention_varlen", q, shape, window, chunk, softcap, alibi_slopes, sinks, bias, mask, dropout_p
    )  # fmt: skip
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    out, lse = _attention_varlen_op(
        q, k, v, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k, block_table,
        None if seqused_k is None else seqused_k.contiguous(), mask, bias, alibi_slopes, sinks,
        dropout_seed(dropout_p, seed), causal, window[0], window[1], chunk, softmax_scale, softcap, dropout_p,
        head_offset, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
