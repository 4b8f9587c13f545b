"""Attention of new queries over a KV cache in plain torch, one sequence after the other: the definition.

Dims: B sequences, Sq queries, Sn new keys, Hq query heads, Hkv KV heads, D head dim, Dv value head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tpweave.reference.ops.attention import AttentionOptions, attention_reference
from tpweave.reference.ops.rope import rope_reference

Tensor = torch.Tensor


class CacheOptions(NamedTuple):
    """Where the keys of each sequence lie in the cache, and what is appended to them.

    Attributes:
        cache_seqlens: int32 [B], keys that are in the cache already.
        k_new, v_new: [B, Sn, Hkv, D or Dv], written behind them.
        rotary_cos, rotary_sin: [positions, D_rot / 2], turn k_new and q.
        rotary_interleaved: pairs are (2i, 2i + 1) instead of (i, i + D_rot / 2).
        cache_batch_idx: int32 [B], each sequence's entry of the cache.
        cache_leftpad: int32 [B], first keys that are hidden: the sequence begins behind them.
        block_table: int32 [B, max_pages]; the cache is pages then.
        k_scale, v_scale: fp32 [B, Hkv] (any strides), value of one code where the cache holds int8 or float8.
        num_splits: pieces that a sequence's keys are worked on in, 0 for as many as suit; the result's last bits.
    """

    cache_seqlens: Tensor
    k_new: Tensor | None = None
    v_new: Tensor | None = None
    rotary_cos: Tensor | None = None
    rotary_sin: Tensor | None = None
    rotary_interleaved: bool = False
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    num_splits: int = 0


def quantized(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale as a cache of `dtype` holds it: rounded to the nearest even code, saturated at its ends."""
    codes = x.to(scale.dtype) / scale
    if dtype == torch.int8:
        return codes.round().clamp(-128, 127).to(torch.int8)
    limit = torch.finfo(dtype).max
    return codes.clamp(-limit, limit).to(dtype)


def attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """Writes k_new and v_new into the cache behind its first `cache_seqlens` keys, then attends to all of them.

    q: [B, Sq, Hq, D]; k_cache, v_cache: [B_cache, S, Hkv, D or Dv], or pages [num_pages, page_size, Hkv, D or Dv] that
    the block table strings together; of q's dtype, int8 or float8_e4m3fn. Query i stands at p = i + Sk - Sq of its
    sequence's Sk keys. Returns out [B, Sq, Hq, Dv] of q's dtype, lse [B, Hq, Sq] in fp32 (fp64 for fp64).
    """
    batch, queries, heads, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty(batch, queries, heads, v_cache.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=wide, device=q.device)
    # Sequences may share keys, so that everything is written before anything is read.
    rows = [_append(b, q[b].to(wide), k_cache, v_cache, cache, options) for b in range(batch)]
    for b, (row_q, places) in enumerate(rows):
        first = 0 if cache.cache_leftpad is None else int(cache.cache_leftpad[b])
        k, v = (x[places][first:].to(wide) for x in (k_cache, v_cache))
        if k_cache.dtype != q.dtype:
            k, v = k * _scale(cache.k_scale, b, k), v * _scale(cache.v_scale, b, v)
        slopes = options.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        row_out, row_lse = attention_reference(row_q[None], k[None], v[None], options._replace(alibi_slopes=slopes))
        out[b], lse[b] = row_out[0].to(q.dtype), row_lse[0]
    return out, lse


def _scale(scale: Tensor | None, b: int, like: Tensor) -> Tensor:
    """[Hkv, 1] (or [1]) in the dtype of `like`."""
    return like.new_ones(1) if scale is None else scale[b, :, None].to(like.dtype)


def _append(
    b: int, q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Appends the new keys of sequence b. Returns its queries, turned, and the indices of all its keys in the cache."""
    length = int(cache.cache_seqlens[b])
    new = 0 if cache.k_new is None else cache.k_new.shape[1]
    position = torch.arange(length + new, device=q.device)
    if cache.block_table is None:
        entry = b if cache.cache_batch_idx is None else int(cache.cache_batch_idx[b])
        places = torch.full_like(position, entry), position
    else:
        page_size = k_cache.shape[1]
        places = cache.block_table[b].long()[position // page_size], position % page_size
    if cache.k_new is None or cache.v_new is None:
        return q, places
    k, v = cache.k_new[b].to(q.dtype), cache.v_new[b].to(q.dtype)
    if cache.rotary_cos is not None and cache.rotary_sin is not None:
        # All queries stand at the first new position unless the mask depends on where they stand.
        local = options.causal or max(options.window) >= 0
        q_at = length + torch.arange(q.shape[0], device=q.device) * local
        k_at = position[length:]
        q, k = (
            rope_reference(
                x[None], x[None], cache.rotary_cos[at], cache.rotary_sin[at], interleaved=cache.rotary_interleaved
            )[0][0]
            for x, at in ((q, q_at), (k, k_at))
        )
    at = places[0][length:], places[1][length:]
    for store, x, scale in ((k_cache, k, cache.k_scale), (v_cache, v, cache.v_scale)):
        in_codes = store.dtype != cache.k_new.dtype
        store[at] = quantized(x, _scale(scale, b, x), store.dtype) if in_codes else x.to(store.dtype)
    return q, places
