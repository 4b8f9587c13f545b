"""Attention in plain torch, computed in fp32 (fp64 for fp64 inputs): the definition, and its gradient from out and lse.

Dims: B batch, Sq queries, Sk keys, Hq query heads, Hkv KV heads (Hq = G * Hkv), D head dim, Dv value head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tpweave.reference.philox import philox

Tensor = torch.Tensor

# Elements of one score matrix [B, heads, Sq, Sk] that the backward holds at a time (a few of that size are alive).
_CHUNK_ELEMENTS = 1 << 24


class AttentionOptions(NamedTuple):
    """How scores become weights. Query i stands at p = i + Sk - Sq (aligned bottom-right):

        x = softmax_scale * (q_i . k_j);  x = softcap * tanh(x / softcap);  x -= alibi_slopes[h] * |p - j|;  x += bias

    Attributes:
        softmax_scale: factor of the products.
        causal: sets the window's right to 0.
        window: (left, right) keys seen around p, -1 for no limit.
        chunk: where > 0, only keys with j // chunk == p // chunk are seen.
        softcap: 0 for none.
        alibi_slopes: fp32 [Hq] or [B, Hq].
        bias: floating, 4 dims that broadcast to [B, Hq, Sq, Sk].
        mask: bool, likewise, True for keys seen.
        sinks: [Hq], a logit that joins each row's sum and takes no value.
        dropout_p: share of the weights that are dropped; the others are divided by 1 - dropout_p.
        seed: int64 tensor of one element, the dropout's.
        head_offset: number of the first query head in the dropout's count.
    """

    softmax_scale: float
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    chunk: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    bias: Tensor | None = None
    mask: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    head_offset: int = 0

    def of_heads(self, heads: slice) -> AttentionOptions:
        """The options of some query heads only."""

        def part(x: Tensor | None, dim: int) -> Tensor | None:
            return x if x is None or x.shape[dim] == 1 else x.movedim(dim, 0)[heads].movedim(0, dim)

        return self._replace(
            alibi_slopes=part(self.alibi_slopes, -1), bias=part(self.bias, 1), mask=part(self.mask, 1),
            sinks=part(self.sinks, 0), head_offset=self.head_offset + heads.start,
        )  # fmt: skip


def visible_keys(
    queries: int, keys: int, causal: bool, window: tuple[int, int], device: torch.device | None = None, chunk: int = 0
) -> Tensor | None:
    """Which keys each query sees by its position, [Sq, Sk] bool, or None where all do: see `AttentionOptions`."""
    left, right = window[0], 0 if causal else window[1]
    if left < 0 and right < 0 and chunk == 0:
        return None
    key = torch.arange(keys, device=device)
    position = torch.arange(queries, device=device)[:, None] + keys - queries
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= key >= position - left
    if right >= 0:
        visible &= key <= position + right
    if chunk > 0:
        visible &= key // chunk == position.div(chunk, rounding_mode="floor")
    return visible


def dropout_keep(
    seed: Tensor | int, dropout_p: float, shape: tuple[int, int, int, int], device: torch.device | None = None,
    *, first_batch: int = 0, first_head: int = 0,
) -> Tensor:  # fmt: skip
    """The weights that dropout keeps, [B, Hq, Sq, Sk] bool: the same on every backend.

    Key j of query i, head h, batch entry b is kept when a word of Philox with the key `seed` is at least
    round(dropout_p * 2^32): word (j % 64) // 16 of the counter (j // 64 * 16 + j % 16, i, h, b). Sixteen neighbouring
    counters give 64 neighbouring keys, so that vectors of 4, 8 or 16 lanes draw without shuffles.
    """
    batch, heads, queries, keys = shape
    blocks = -(-keys // 64)
    sizes = (batch, heads, queries, blocks * 16)
    b, h, i, column = (
        torch.arange(first, first + n, device=device).view([-1 if d == dim else 1 for d in range(4)])
        for dim, (first, n) in enumerate(zip((first_batch, first_head, 0, 0), sizes, strict=True))
    )
    words = philox(int(seed), (column.expand(sizes), i.expand(sizes), h.expand(sizes), b.expand(sizes)))
    lanes = torch.stack([word.unflatten(-1, (blocks, 16)) for word in words], -2)
    return lanes.flatten(-3)[..., :keys] >= min(round(dropout_p * 2**32), 2**32 - 1)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype)


def _capped(q: Tensor, k: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    """Scaled products after the softcap, and their tanh where there is one; q and k with heads first."""
    scores = q @ k.transpose(-1, -2) * options.softmax_scale
    if options.softcap == 0:
        return scores, None
    tanh = torch.tanh(scores / options.softcap)
    return options.softcap * tanh, tanh


def _logits(scores: Tensor, options: AttentionOptions) -> Tensor:
    queries, keys = scores.shape[-2:]
    if options.alibi_slopes is not None:
        position = torch.arange(queries, device=scores.device)[:, None] + keys - queries
        distance = (position - torch.arange(keys, device=scores.device)).abs()
        scores = scores - options.alibi_slopes.to(scores.dtype)[..., None, None] * distance
    if options.bias is not None:
        scores = scores + options.bias.to(scores.dtype)
    visible = visible_keys(queries, keys, options.causal, options.window, scores.device, options.chunk)
    for allowed in (visible, options.mask):
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
    return scores


def attention_scores(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """What the softmax is taken of, x [B, Hq, Sq, Sk] in fp32 (fp64 for fp64), -inf where a key is hidden.

    q: [B, Sq, Hq, D]; k: [B, Sk, Hkv, D].
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    kh = _heads_first(k, wide).repeat_interleave(q.shape[2] // k.shape[2], 1)
    return _logits(_capped(_heads_first(q, wide), kh, options)[0], options)


def _kept(weights: Tensor, options: AttentionOptions, first_batch: int) -> Tensor | None:
    """Factors of dropout, 0 or 1 / (1 - p), or None without."""
    if options.dropout_p == 0:
        return None
    if options.seed is None:
        raise ValueError("attention: dropout needs a seed")
    shape = (weights.shape[0], weights.shape[1], weights.shape[2], weights.shape[3])
    keep = dropout_keep(
        options.seed, options.dropout_p, shape, weights.device, first_batch=first_batch, first_head=options.head_offset
    )
    return keep.to(weights.dtype) / (1 - options.dropout_p) if options.dropout_p < 1 else torch.zeros_like(weights)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, *, first_batch: int = 0
) -> tuple[Tensor, Tensor]:
    """out = dropout(softmax(x)) v over the keys that are seen; 0 where there are none.

    q: [B, Sq, Hq, D]; k: [B, Sk, Hkv, D]; v: [B, Sk, Hkv, Dv]; `first_batch`: number of the first batch entry in the
    dropout's count. Returns out [B, Sq, Hq, Dv] of q's dtype and lse [B, Hq, Sq] in fp32 (fp64 for fp64): the log of
    the softmax's sum, the sink in it, -inf where nothing is in it.
    """
    x = attention_scores(q, k, options)
    vh = _heads_first(v, x.dtype).repeat_interleave(q.shape[2] // k.shape[2], 1)
    sinks = None if options.sinks is None else options.sinks.to(x.dtype)[:, None, None].expand(*x.shape[:3], 1)
    # A column for the sink, or one that weighs nothing: rows without keys need no case of their own.
    joined = torch.cat([x, x.new_full((*x.shape[:3], 1), float("-inf")) if sinks is None else sinks], -1)
    top = joined.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(joined - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    weights = weights[..., :-1]
    factors = _kept(weights, options, first_batch)
    out = (weights if factors is None else weights * factors) @ vh / total
    lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    return out.transpose(1, 2).to(q.dtype), lse


def attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: AttentionOptions, *, first_batch: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `attention_reference`'s (out, lse) from what the forward returned, a few KV heads at a time.

        P = exp(x - lse);  F = dropout's factors;  dv = (P F)^T dout;  dP = F (dout v^T)
        dx = P (dP - rowsum(dout out) + dlse);  dbias = dx;  dS = dx (1 - tanh^2)
        dq = scale dS k;  dk = scale dS^T q;  dsink_h = sum exp(sink_h - lse) (dlse - rowsum(dout out))

    Shapes as there; `dlse` [B, Hq, Sq] or None. Returns dq, dk, dv, dbias, dsinks of the inputs' shapes and dtypes, the
    last two None without such an input. Source: Dao et al., "FlashAttention", 2022.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = None if options.bias is None else torch.zeros(options.bias.shape, dtype=wide, device=q.device)
    dsinks = None if options.sinks is None else torch.empty_like(options.sinks)
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * group * queries * keys))
    for first in range(0, kv_heads, step):
        kv = slice(first, min(first + step, kv_heads))
        hq = slice(kv.start * group, kv.stop * group)
        part = options.of_heads(hq)
        # [B, heads, S, D], the KV heads once for each query head
        qh, doh, oh = (_heads_first(x[:, :, hq], wide) for x in (q, dout, out))
        kh, vh = (_heads_first(x[:, :, kv], wide).repeat_interleave(group, 1) for x in (k, v))
        row_lse = lse[:, hq, :, None].to(wide)
        finite_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
        scores, tanh = _capped(qh, kh, part)
        p = torch.exp(_logits(scores, part) - finite_lse)
        row = (doh * oh).sum(-1, keepdim=True)
        if dlse is not None:
            row = row - dlse[:, hq, :, None].to(wide)
        factors = _kept(p, part, first_batch)
        dp = doh @ vh.transpose(-1, -2)
        dx = p * ((dp if factors is None else dp * factors) - row)
        if dbias is not None:
            slot = dbias[:, hq] if dbias.shape[1] > 1 else dbias
            slot += dx.sum_to_size(slot.shape)
        if dsinks is not None and part.sinks is not None:
            sink = part.sinks.to(wide)[:, None, None]
            mass = torch.exp(sink - finite_lse).masked_fill(row_lse == float("-inf"), 0.0)
            dsinks[hq] = -(mass * row).sum((0, 2, 3)).to(dsinks.dtype)
        ds = dx * options.softmax_scale
        if tanh is not None:
            ds = ds * (1 - tanh * tanh)
        dq[:, :, hq] = (ds @ kh).transpose(1, 2).to(q.dtype)
        weights = p if factors is None else p * factors
        for grad, whole in ((dk, ds.transpose(-1, -2) @ qh), (dv, weights.transpose(-1, -2) @ doh)):
            summed = whole.unflatten(1, (kv.stop - kv.start, group)).sum(2)
            grad[:, :, kv] = summed.transpose(1, 2).to(grad.dtype)
    return dq, dk, dv, None if dbias is None or options.bias is None else dbias.to(options.bias.dtype), dsinks
