"""Fused attention with grouped KV heads, causal and sliding windows, and key masks.

    out = softmax(scale * q k^T) v over the keys a query sees;  lse = log(sum(exp(scale * q k^T)))
    P = exp(scale * q k^T - lse);  dv = P^T dout;  dP = dout v^T
    dS = P * (dP - rowsum(dout * out) + dlse);  dq = scale * dS k;  dk = scale * dS^T q

Dims: B batch, Sq queries, Sk keys, Hq query heads, Hkv KV heads (Hq a multiple), D head dim, Dv value head dim. The
native row holds one KV head's packed keys and values per thread, never a score matrix. Source: Dao et al.,
"FlashAttention", 2022.
"""

from __future__ import annotations

from typing import Literal, overload

import torch

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES
from tpweave.reference.ops.attention import attention_backward_reference, attention_reference

Tensor = torch.Tensor

_MAX_HEAD_DIM = 256  # kMaxHeadDim in csrc/cpu/ops/attention.h


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def attention_fwd_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, window: tuple[int, int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = _dense_rows(q), _dense_rows(k), _dense_rows(v)
    batch, queries, heads, depth = q.shape
    keys, kv_heads, depth_v = v.shape[1:]
    out = torch.empty(batch, queries, heads, depth_v, dtype=q.dtype)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    if mask is not None:
        mask = _dense_rows(mask.expand(batch, 1, 1, keys)[:, 0, 0])
    _C.attention_fwd(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr(),
        lse.data_ptr(), q.stride()[:3], k.stride()[:3], v.stride()[:3], 0 if mask is None else mask.stride(0),
        (batch, queries, keys, heads, kv_heads, depth, depth_v), window[0], 0 if causal else window[1], softmax_scale,
        DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return out, lse


def attention_fwd_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, window: tuple[int, int], softmax_scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference(
        q, k, v, causal=causal, window=window, softmax_scale=softmax_scale, mask=mask, return_lse=True
    )
    return out.contiguous(), lse


def attention_bwd_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None,
    causal: bool, window: tuple[int, int], softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return attention_backward_reference(
        dout, dlse, q, k, v, out, lse, causal=causal, window=window, softmax_scale=softmax_scale, mask=mask
    )


def _head_dim_fits(inputs: Inputs) -> str | None:
    for tensor in inputs.tensors[:3]:
        if tensor.shape[-1] > _MAX_HEAD_DIM:
            return f"takes head dims up to {_MAX_HEAD_DIM}, not {tensor.shape[-1]}"
    return None


def _mask_is_key_padding(inputs: Inputs) -> str | None:
    mask = inputs.values.get("mask")
    if mask is None or mask.dim() == 2 or mask.shape[1:3] == (1, 1):
        return None
    return f"takes masks of keys ([B, Sk] or [B, 1, 1, Sk]), not {list(mask.shape)}"


ATTENTION = Op("attention", [
    Backend("cpu", attention_fwd_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(_head_dim_fits, _mask_is_key_padding))),
    Backend("reference", attention_fwd_reference, Needs()),
])  # fmt: skip
ATTENTION_BWD = Op("attention_bwd", [
    Backend("reference", attention_bwd_reference, Needs()),
])  # fmt: skip


def _impl(q, k, v, mask, causal, window_left, window_right, softmax_scale, backend):
    row = ATTENTION.choose(Inputs([q, k, v], mask=mask), backend)
    return row.run(q, k, v, mask, causal, (window_left, window_right), softmax_scale)


def _fake(q, k, v, mask, causal, window_left, window_right, softmax_scale, backend):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)


def _setup_context(ctx, inputs, output):
    q, k, v, mask, *settings, _ = inputs
    ctx.save_for_backward(q, k, v, mask, *output)
    ctx.settings = settings
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, mask, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 9
    dout = torch.zeros_like(out) if dout is None else dout
    return *_attention_bwd_op(dout, dlse, q, k, v, out, lse, mask, *ctx.settings), *(None,) * 6


def _bwd_impl(dout, dlse, q, k, v, out, lse, mask, causal, window_left, window_right, softmax_scale):
    row = ATTENTION_BWD.choose(Inputs([dout, q, k, v], mask=mask))
    return row.run(dout, dlse, q, k, v, out, lse, mask, causal, (window_left, window_right), softmax_scale)


def _bwd_fake(dout, dlse, q, k, v, out, lse, mask, causal, window_left, window_right, softmax_scale):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


_attention_bwd_op = register_op(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, "
    "bool causal, int window_left, int window_right, float softmax_scale) -> (Tensor, Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_attention_op = register_op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, int window_left, int window_right, "
    "float softmax_scale, str? backend) -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def _check(q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], mask: Tensor | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape = tuple(x.shape)
        if x.dim() != 4:
            raise ValueError(f"attention: {name} has shape {shape}, it needs 4 dims [batch, sequence, heads, head dim]")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {x.dtype}, q is {q.dtype}; all need one floating-point dtype")
        if x.device != q.device:
            raise ValueError(f"attention: {name} is on {x.device}, q on {q.device}")
        if shape[-1] == 0:
            raise ValueError(f"attention: {name} has shape {shape}; the head dim must be at least 1")
    batch, queries, heads, depth = q.shape
    keys, kv_heads = k.shape[1:3]
    if k.shape[0] != batch or k.shape[-1] != depth:
        raise ValueError(
            f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}; batch {batch} and head dim {depth} must match"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: k is {tuple(k.shape)}, v is {tuple(v.shape)}; v must begin {tuple(k.shape[:3])}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention: {heads} query heads on {kv_heads} KV heads; the first must be a multiple")
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"attention: window is {window}; it takes (left, right), each >= 0, or -1 for no limit")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.device != q.device:
        raise ValueError(f"attention: mask is {mask.dtype} on {mask.device}; it needs torch.bool on {q.device}")
    full = (batch, heads, queries, keys)
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
    if not fits and mask.shape != (batch, keys):
        raise ValueError(
            f"attention: mask has shape {tuple(mask.shape)}; it takes [B, Sk] = {(batch, keys)}, "
            f"or what broadcasts to [B, Hq, Sq, Sk] = {full}"
        )


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: tuple[int, int] = ...,
    softmax_scale: float | None = ..., mask: Tensor | None = ..., return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., window: tuple[int, int] = ...,
    softmax_scale: float | None = ..., mask: Tensor | None = ..., return_lse: bool,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None, mask: Tensor | None = None, return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention, differentiable in q, k and v. Query head h reads KV head h // (Hq / Hkv).

    Args:
        q: [B, Sq, Hq, D], fp32, bf16, fp16 (native, D and Dv up to 256) or fp64 (reference). Any strides.
        k: [B, Sk, Hkv, D] of q's dtype; Hq must be a multiple of Hkv.
        v: [B, Sk, Hkv, Dv] of q's dtype.
        causal: query i sees keys up to i + Sk - Sq (aligned bottom-right, as flash-attn 2.1 and later).
        window: (left, right) keys seen around i + Sk - Sq, -1 for no limit; `causal` sets right to 0.
        softmax_scale: factor of the scores; 1 / sqrt(D) when None.
        mask: bool, True for keys seen: [B, Sk] (padding), or 4 dims that broadcast to [B, Hq, Sq, Sk].
        return_lse: also return the log of each row's sum of exponentials, differentiable too.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        out [B, Sq, Hq, Dv] of q's dtype; with `return_lse` `(out, lse)`, lse [B, Hq, Sq] in fp32 (fp64 for fp64). A
        query that sees no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> q, k, v = torch.randn(1, 128, 8, 64), torch.randn(1, 128, 2, 64), torch.randn(1, 128, 2, 64)
        >>> out, lse = tpweave.attention(q, k, v, causal=True, return_lse=True)
    """
    _check(q, k, v, window, mask)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    out, lse = _attention_op(q, k, v, mask, causal, window[0], window[1], softmax_scale, backend)
    return (out, lse) if return_lse else out
