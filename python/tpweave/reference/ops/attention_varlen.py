"""Attention over packed sequences in plain torch: the reference attention, one sequence after the other.

Dims: B sequences, Tq and Tk tokens of all of them, Hq query heads, Hkv KV heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from tpweave.reference.ops.attention import AttentionOptions, attention_backward_reference, attention_reference

Tensor = torch.Tensor


class PackedSequences(NamedTuple):
    """Where the tokens of each sequence lie.

    Attributes:
        cu_seqlens_q: [B + 1] int32: sequence b has the queries cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_k: [B + 1] int32: likewise the keys; where they lie in pages, only their number is read from it.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's tokens.
        block_table: [B, pages] int32: k and v are pages [num_pages, page_size, Hkv, D], and sequence b's keys are those
            of the pages block_table[b], one after the other.
        seqused_k: [B] int32: only so many of each sequence's keys are used.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    block_table: Tensor | None = None
    seqused_k: Tensor | None = None

    def key_lengths(self) -> Tensor:
        """How many keys each sequence has, [B]."""
        return self.cu_seqlens_k.diff() if self.seqused_k is None else self.seqused_k

    def query_ranges(self) -> list[tuple[int, int]]:
        """First query and the one behind the last, of each sequence."""
        offsets = self.cu_seqlens_q.tolist()
        return list(itertools.pairwise(offsets))

    def key_rows(self, page_size: int) -> list[Tensor]:
        """Where the keys of each sequence lie: rows of k, or of k.flatten(0, 1) where k consists of pages."""
        firsts, lengths = self.cu_seqlens_k.tolist(), self.key_lengths().tolist()
        rows = []
        for b, length in enumerate(lengths):
            key = torch.arange(length, device=self.cu_seqlens_k.device)
            if self.block_table is None:
                rows.append(firsts[b] + key)
            else:
                rows.append(self.block_table[b].long()[key // page_size] * page_size + key % page_size)
        return rows


def _corner(x: Tensor | None, b: int, queries: int, keys: int) -> Tensor | None:
    """Sequence b's part of what broadcasts to [B, Hq, max_seqlen_q, max_seqlen_k]; dims of 1 stay."""
    if x is None:
        return None
    first = b if x.shape[0] > 1 else 0
    return x[first : first + 1, :, : queries if x.shape[2] > 1 else 1, : keys if x.shape[3] > 1 else 1]


def sequence_options(options: AttentionOptions, b: int, queries: int, keys: int) -> AttentionOptions:
    """The options of sequence b alone."""
    slopes = options.alibi_slopes
    return options._replace(
        alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
        bias=_corner(options.bias, b, queries, keys), mask=_corner(options.mask, b, queries, keys),
    )  # fmt: skip


def attention_varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, sequences: PackedSequences, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """`attention_reference` of each sequence.

    q: [Tq, Hq, D]; k: [Tk, Hkv, D], v: [Tk, Hkv, Dv], or pages of them; the options' bias and mask broadcast to
    [B, Hq, max_seqlen_q, max_seqlen_k], of which each sequence uses the top left corner. Returns out [Tq, Hq, Dv] of
    q's dtype and lse [Hq, Tq] in fp32 (fp64 for fp64); 0 and -inf for tokens of no sequence.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    ranges, rows = sequences.query_ranges(), sequences.key_rows(k.shape[1])
    if sequences.block_table is not None:
        k, v = k.flatten(0, 1), v.flatten(0, 1)

    def nothing(tokens: int) -> tuple[Tensor, Tensor]:
        heads = q.shape[1]
        return q.new_zeros(tokens, heads, v.shape[-1]), q.new_full((heads, tokens), float("-inf"), dtype=wide)

    parts = [nothing(int(sequences.cu_seqlens_q[0]))]
    for b, (first, last) in enumerate(ranges):
        part = sequence_options(options, b, last - first, len(rows[b]))
        out, lse = attention_reference(q[None, first:last], k[rows[b]][None], v[rows[b]][None], part, first_batch=b)
        parts.append((out[0], lse[0]))
    parts.append(nothing(q.shape[0] - int(sequences.cu_seqlens_q[-1])))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses, 1)


def attention_varlen_backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sequences: PackedSequences, options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `attention_varlen_reference`'s (out, lse) from what the forward returned: those of each sequence,
    summed in fp32 (fp64 for fp64) where sequences share pages, sinks or a bias.

    Returns dq, dk, dv, dbias, dsinks of the inputs' shapes and dtypes, the last two None without such an input.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = sequences.key_rows(k.shape[1])
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
    dk_rows, dv_rows = dk, dv
    if sequences.block_table is not None:
        k, v, dk_rows, dv_rows = (x.flatten(0, 1) for x in (k, v, dk, dv))
    # In `wide`, so that no sequence's share is rounded before the sum.
    bias, sinks = (None if x is None else x.to(wide) for x in (options.bias, options.sinks))
    dbias, dsinks = (None if x is None else torch.zeros_like(x) for x in (bias, sinks))
    given, options = options, options._replace(bias=bias, sinks=sinks)
    for b, (first, last) in enumerate(sequences.query_ranges()):
        queries, keys = last - first, len(rows[b])
        dq_b, dk_b, dv_b, dbias_b, dsinks_b = attention_backward_reference(
            dout[None, first:last], None if dlse is None else dlse[None, :, first:last], q[None, first:last],
            k[rows[b]][None].to(wide), v[rows[b]][None].to(wide), out[None, first:last], lse[None, :, first:last],
            sequence_options(options, b, queries, keys), first_batch=b,
        )  # fmt: skip
        dq[first:last] = dq_b[0]
        dk_rows.index_add_(0, rows[b], dk_b[0])
        dv_rows.index_add_(0, rows[b], dv_b[0])
        for total, share in ((_corner(dbias, b, queries, keys), dbias_b), (dsinks, dsinks_b)):
            if total is not None and share is not None:
                total += share
    dbias, dsinks = (
        None if total is None or x is None else total.to(x.dtype)
        for total, x in ((dbias, given.bias), (dsinks, given.sinks))
    )
    return dq, dk.to(q.dtype), dv.to(q.dtype), dbias, dsinks
