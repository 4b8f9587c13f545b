"""flash-attn 2.8's functions, on `tpweave.attention`, `attention_varlen` and `attention_decode`.

Shapes and arguments are flash-attn's:

    q, k, v             [B, Sq, Hq, D], [B, Sk, Hkv, D] twice; a KV head serves Hq / Hkv query heads
    kv, qkv             [B, Sk, 2, Hkv, D], [B, S, 3, H, D]
    of varlen ones      T, the tokens of all sequences, in place of [B, S]; cu_seqlens [B + 1] int32 are their offsets
    dropout_p           drawn from torch's default CPU generator
    softmax_scale       1 / sqrt(D) when None
    causal, window_size of query i around i + Sk - Sq (aligned bottom-right); (left, right), -1 for no limit
    softcap             0 for none
    alibi_slopes        fp32 [Hq] or [B, Hq]: slope * |i + Sk - Sq - j| is taken from the score of key j
    deterministic       without effect: every backward is
    return_attn_probs   return (out, softmax_lse, S_dmask) instead of out

    softmax_lse         [B, Hq, Sq], of varlen ones [Hq, T], fp32; -inf for queries that see no key
    S_dmask             with dropout, and for tests only, [B, Hq, Sq, Sk] with both lengths rounded up to a multiple of
                        128: exp(score - maximum), the maximum over the key's block of `_get_block_size_n` keys and all
                        behind it; negative where the weight was dropped, 0 where the key is hidden. Else empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypedDict

import torch

import tpweave
from tpweave.reference.ops.attention import AttentionOptions, attention_scores, dropout_keep
from tpweave.reference.ops.attention_varlen import sequence_options

Tensor = torch.Tensor
Window = Sequence[int] | Tensor
Probs = tuple[Tensor, Tensor, Tensor]

_BLOCK_KEYS = 64


def _get_block_size_n(device: torch.device | str, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys in one block of `S_dmask`."""
    return _BLOCK_KEYS


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return -(-x // m) * m


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a dense last dim."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


class _Settings(TypedDict):
    softmax_scale: float
    causal: bool
    window: tuple[int, int]
    softcap: float
    alibi_slopes: Tensor | None
    dropout_p: float
    seed: Tensor | None


def _settings(
    q: Tensor, dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window, softcap: float,
    alibi_slopes: Tensor | None,
) -> _Settings:  # fmt: skip
    left, right = (max(int(side), -1) for side in window_size)
    return {
        "softmax_scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        # Drawn here, for S_dmask needs it too.
        "seed": torch.randint(2**62, (1,)) if dropout_p > 0 else None,
    }


def _s_dmask(q: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], queries: int, keys: int, settings: _Settings) -> Tensor:
    """`S_dmask` of the queries [S, Hq, D] and keys [S, Hkv, D] of each sequence, at most so many."""
    seed = settings["seed"]
    if seed is None:
        return q.new_empty(0)
    rounded = round_multiple(queries, 128), round_multiple(keys, 128)
    found = q.new_zeros(len(pairs), q.shape[-2], *rounded)
    for b, (q_b, k_b) in enumerate(pairs):
        options = sequence_options(AttentionOptions(**settings), b, len(q_b), len(k_b))
        scores = attention_scores(q_b[None], k_b[None], options)
        shape = (1, q.shape[-2], len(q_b), len(k_b))
        behind = round_multiple(len(k_b), _BLOCK_KEYS) - len(k_b)
        blocks = torch.nn.functional.pad(scores, (0, behind), value=float("-inf")).unflatten(-1, (-1, _BLOCK_KEYS))
        top = blocks.amax(-1).flip(-1).cummax(-1).values.flip(-1)
        weights = torch.exp(blocks - top.masked_fill(top == float("-inf"), 0.0)[..., None]).flatten(-2)[..., : len(k_b)]
        keep = dropout_keep(seed, settings["dropout_p"], shape, q.device, first_batch=b)
        found[b, :, : len(q_b), : len(k_b)] = torch.where(keep, weights, -weights)[0]
    return found


def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | Probs:  # fmt: skip
    """Attention, differentiable in q, k and v: out [B, Sq, Hq, D], or (out, softmax_lse, S_dmask).

    Arguments and results are described at the head of this module.
    """
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = tpweave.attention(q, k, v, return_lse=True, **settings)
    if not return_attn_probs:
        return out
    with torch.no_grad():
        return out, lse, _s_dmask(q, list(zip(q, k, strict=True)), q.shape[1], k.shape[1], settings)


def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | Probs:  # fmt: skip
    """`flash_attn_func` with keys and values in one tensor [B, Sk, 2, Hkv, D]."""
    k, v = kv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | Probs:  # fmt: skip
    """`flash_attn_func` with queries, keys and values in one tensor [B, S, 3, H, D]."""
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
        return_attn_probs,
    )  # fmt: skip


def _sequences(x: Tensor, cu_seqlens: Tensor, block_table: Tensor | None = None) -> list[Tensor]:
    """The tokens of each sequence."""
    if block_table is None:
        return [x[begin:end] for begin, end in itertools.pairwise(cu_seqlens.tolist())]
    lengths = cu_seqlens.diff().tolist()
    pages = [
        table[: round_multiple(n, x.shape[1]) // x.shape[1]] for table, n in zip(block_table, lengths, strict=True)
    ]
    return [x[row.long()].flatten(0, 1)[:n] for row, n in zip(pages, lengths, strict=True)]


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor | Probs:  # fmt: skip
    """Attention within packed sequences, differentiable in q, k and v: out [Tq, Hq, D], or (out, softmax_lse, S_dmask).

    With a block_table [B, pages] int32, k and v are pages [num_pages, page_size, Hkv, D] and `cu_seqlens_k` gives the
    number of keys; pages may have any size. The other arguments and results are described at the head of this module.
    """
    settings = _settings(q, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes)
    out, lse = tpweave.attention_varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), block_table=block_table,
        return_lse=True, **settings,
    )  # fmt: skip
    if not return_attn_probs:
        return out
    with torch.no_grad():
        pairs = zip(_sequences(q, cu_seqlens_q), _sequences(k, cu_seqlens_k, block_table), strict=True)
        return out, lse, _s_dmask(q, list(pairs), int(max_seqlen_q), int(max_seqlen_k), settings)


def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | Probs:  # fmt: skip
    """`flash_attn_varlen_func` with keys and values in one tensor [Tk, 2, Hkv, D]."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor | Probs:  # fmt: skip
    """`flash_attn_varlen_func` with queries, keys and values in one tensor [T, 3, H, D]."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale, causal, window_size,
        softcap, alibi_slopes, deterministic, return_attn_probs,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None = None, v: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None, cache_leftpad: Tensor | None = None, block_table: Tensor | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0,
    rotary_interleaved: bool = True, alibi_slopes: Tensor | None = None, num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over a cache, to which new keys and values are appended first, in place. Not differentiable.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [B_cache, S, Hkv, D], or with a block_table pages [num_pages, page_size, Hkv, D] of any size.
        k, v: [B, Sn, Hkv, D], written behind the first cache_seqlens keys.
        rotary_cos, rotary_sin: [positions, D_rot / 2]: k is turned by rows cache_seqlens, cache_seqlens + 1, ...; q too
            if causal or with a window, else by row cache_seqlens.
        cache_seqlens: int or [B] int32, keys in the cache before; all of it when None.
        cache_batch_idx: [B] int32, each sequence's entry of the cache.
        cache_leftpad: [B] int32, each sequence's first key.
        block_table: [B, pages] int32.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as at the head of this module.
        rotary_interleaved: pairs are (2i, 2i + 1), else (i, i + D_rot / 2).
        num_splits: in how many pieces a sequence's keys are worked on; 0 chooses.
        return_softmax_lse: return (out, softmax_lse).

    Returns:
        out [B, Sq, Hq, D]; softmax_lse [B, Hq, Sq] in fp32.
    """
    left, right = (max(int(side), -1) for side in window_size)
    return tpweave.attention_decode(
        q, k_cache, v_cache, k_new=k, v_new=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved, cache_seqlens=cache_seqlens, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table, softmax_scale=softmax_scale, causal=causal,
        window=(left, right), softcap=softcap, alibi_slopes=alibi_slopes, num_splits=num_splits,
        return_lse=return_softmax_lse,
    )  # fmt: skip
