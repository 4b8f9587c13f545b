"""Attention in plain torch, computed in fp32 (fp64 for fp64 inputs): the definition, and its gradient from out and lse.

Dims: B batch, Sq queries, Sk keys, Hq query heads, Hkv KV heads (Hq = G * Hkv), D head dim, Dv value head dim.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor

# Elements of one score matrix [B, heads, Sq, Sk] that the backward holds at a time (four of that size are alive).
_CHUNK_ELEMENTS = 1 << 24


def visible_keys(
    queries: int, keys: int, causal: bool, window: tuple[int, int], device: torch.device | None = None
) -> Tensor | None:
    """Which keys each query sees, [Sq, Sk] bool, or None where all do.

    Query i stands at key i + Sk - Sq (aligned bottom-right) and sees `window = (left, right)` keys to either side, -1
    for no limit; `causal` sets right to 0.
    """
    left, right = window[0], 0 if causal else window[1]
    if left < 0 and right < 0:
        return None
    offset = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + keys - queries)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= offset >= -left
    if right >= 0:
        visible &= offset <= right
    return visible


def _scores(q: Tensor, k: Tensor, scale: float, visible: Tensor | None, mask: Tensor | None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    for allowed in (visible, mask):
        if allowed is not None:
            scores = scores.masked_fill(~allowed, float("-inf"))
    return scores


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None, mask: Tensor | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """out = softmax(scale * q k^T) v over the keys that the window and the mask allow; 0 where there are none.

    q: [B, Sq, Hq, D]; k: [B, Sk, Hkv, D]; v: [B, Sk, Hkv, Dv]; mask: bool, broadcastable to [B, Hq, Sq, Sk], True for
    keys seen. Returns out [B, Sq, Hq, Dv] of q's dtype; with return_lse also the log of the softmax's sum [B, Hq, Sq]
    in fp32 (fp64 for fp64), -inf where no key is seen.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[2] // k.shape[2]
    qh = _heads_first(q, wide)
    kh, vh = (_heads_first(x, wide).repeat_interleave(group, 1) for x in (k, v))
    scores = _scores(qh, kh, scale, visible_keys(q.shape[1], k.shape[1], causal, window, q.device), mask)
    if k.shape[1] == 0:
        out, lse = qh.new_zeros(*qh.shape[:3], v.shape[-1]), qh.new_full(qh.shape[:3], float("-inf"))
    else:
        top = scores.detach().amax(-1, keepdim=True)
        top = top.masked_fill(top == float("-inf"), 0.0)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1.0)
        out = weights @ vh / total
        lse = (top + total.log()).masked_fill(empty, float("-inf")).squeeze(-1)
    out = out.transpose(1, 2).to(q.dtype)
    return (out, lse) if return_lse else out


def attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    *, causal: bool, window: tuple[int, int], softmax_scale: float, mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `attention_reference`'s (out, lse) from what the forward returned, a few KV heads at a time.

        P = exp(scale * q k^T - lse);  dv = P^T dout;  dP = dout v^T
        dS = P * (dP - rowsum(dout * out) + dlse);  dq = scale * dS k;  dk = scale * dS^T q

    Shapes as there; `dlse` [B, Hq, Sq] or None. Returns dq, dk, dv of the inputs' shapes and dtypes. Source: Dao et
    al., "FlashAttention", 2022.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, queries, heads, _ = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    group = heads // kv_heads
    visible = visible_keys(queries, keys, causal, window, q.device)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    step = max(1, _CHUNK_ELEMENTS // max(1, batch * group * queries * keys))
    for first in range(0, kv_heads, step):
        kv = slice(first, min(first + step, kv_heads))
        hq = slice(kv.start * group, kv.stop * group)
        # [B, heads, S, D], the KV heads once for each query head
        qh, doh, oh = (_heads_first(x[:, :, hq], wide) for x in (q, dout, out))
        kh, vh = (_heads_first(x[:, :, kv], wide).repeat_interleave(group, 1) for x in (k, v))
        part = mask[:, hq] if mask is not None and mask.shape[1] > 1 else mask
        row_lse = lse[:, hq, :, None].to(wide)
        row_lse = row_lse.masked_fill(row_lse == float("-inf"), 0.0)
        p = torch.exp(_scores(qh, kh, softmax_scale, visible, part) - row_lse)
        row = (doh * oh).sum(-1, keepdim=True)
        if dlse is not None:
            row = row - dlse[:, hq, :, None].to(wide)
        ds = p * (doh @ vh.transpose(-1, -2) - row) * softmax_scale
        dq[:, :, hq] = (ds @ kh).transpose(1, 2).to(q.dtype)
        for grad, whole in ((dk, ds.transpose(-1, -2) @ qh), (dv, p.transpose(-1, -2) @ doh)):
            summed = whole.unflatten(1, (kv.stop - kv.start, group)).sum(2)
            grad[:, :, kv] = summed.transpose(1, 2).to(grad.dtype)
    return dq, dk, dv
