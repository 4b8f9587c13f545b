"""Fused attention with grouped KV heads, windows, chunks, softcap, ALiBi, sinks, bias, masks and dropout.

    x = softmax_scale * q k^T, through softcap, ALiBi and bias (`AttentionOptions` has the chain), -inf where hidden
    lse = log(sum(exp(x)) + exp(sink));  P = exp(x - lse);  F = 0 or 1 / (1 - p) by dropout;  out = (P F) v
    dv = (P F)^T dout;  dP = F (dout v^T);  dx = P * (dP - rowsum(dout * out) + dlse);  dbias = dx
    dS = dx * (1 - tanh^2) with a softcap;  dq = scale dS k;  dk = scale dS^T q
    dsink = sum(exp(sink - lse) * (dlse - rowsum(dout * out)))

Dims: B batch, Sq queries, Sk keys, Hq query heads, Hkv KV heads (Hq a multiple), D head dim, Dv value head dim. The
native row holds one KV head's packed keys and values per thread, never a score matrix. Source: Dao et al.,
"FlashAttention", 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import register_op
from tpweave.native import _C
from tpweave.ops.attention_problem import native_backward, native_problem
from tpweave.reference.ops.attention import AttentionOptions, attention_backward_reference, attention_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensor = torch.Tensor

_MAX_HEAD_DIM = 512  # kMaxHeadDim in csrc/cpu/ops/attention.h
_MAX_BACKWARD_HEAD_DIM = 256  # kMaxBackwardHeadDim in csrc/cpu/ops/attention_bwd.h


def attention_fwd_cpu(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    problem = native_problem(q, k, v, options)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    _C.attention_fwd("attention", problem.integers, problem.reals, out.data_ptr(), lse.data_ptr())
    return out, lse


def attention_fwd_triton(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    from tpweave.kernels.ops.attention import attention_fwd

    return attention_fwd(q, k, v, options)


def attention_bwd_triton(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    from tpweave.kernels.ops.attention_bwd import attention_bwd

    return attention_bwd(dout, dlse, q, k, v, out, lse, options)


def attention_fwd_reference(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    out, lse = attention_reference(q, k, v, options)
    return out.contiguous(), lse


def head_dim_fits(inputs: Inputs) -> str | None:
    """A rule: the native kernel takes these head dims."""
    for tensor in inputs.tensors[:3]:
        if tensor.shape[-1] > _MAX_HEAD_DIM:
            return f"takes head dims up to {_MAX_HEAD_DIM}, not {tensor.shape[-1]}"
    return None


def _triton_head_dim_fits(inputs: Inputs) -> str | None:
    for tensor in inputs.tensors:
        if tensor.shape[-1] > 256:
            return f"takes head dims up to 256, not {tensor.shape[-1]}"
    return None


TRITON_NEEDS = Needs(device="cuda", dtypes=FLOATS, module="triton", rules=(_triton_head_dim_fits,))


def backward_head_dim_fits(inputs: Inputs) -> str | None:
    """A rule: the native backward takes these head dims; the tensors are dout, q, k, v."""
    for tensor in inputs.tensors[1:4]:
        if tensor.shape[-1] > _MAX_BACKWARD_HEAD_DIM:
            return f"takes head dims up to {_MAX_BACKWARD_HEAD_DIM}, not {tensor.shape[-1]}"
    return None


ATTENTION = Op("attention", [
    Backend("cpu", attention_fwd_cpu, Needs(device="cpu", dtypes=FLOATS, rules=(head_dim_fits,))),
    Backend("triton", attention_fwd_triton, TRITON_NEEDS),
    Backend("reference", attention_fwd_reference, Needs()),
])  # fmt: skip
# Rows take (dout, dlse, q, k, v, out, lse, AttentionOptions) and return dq, dk, dv, dbias, dsinks. A bias that requires
# no gradient needs none.
ATTENTION_BWD = Op("attention_bwd", [
    Backend("cpu", native_backward, Needs(device="cpu", dtypes=FLOATS, rules=(backward_head_dim_fits,))),
    Backend("triton", attention_bwd_triton, TRITON_NEEDS),
    Backend("reference", attention_backward_reference, Needs()),
])  # fmt: skip


def _options(
    mask: Tensor | None, bias: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    causal: bool, window_left: int, window_right: int, chunk: int, softmax_scale: float, softcap: float,
    dropout_p: float, head_offset: int,
) -> AttentionOptions:  # fmt: skip
    return AttentionOptions(
        softmax_scale, causal, (window_left, window_right), chunk, softcap, alibi_slopes, bias, mask, sinks,
        dropout_p, seed, head_offset,
    )  # fmt: skip


def _impl(q, k, v, mask, bias, alibi_slopes, sinks, seed, *settings_and_backend):
    *settings, backend = settings_and_backend
    options = _options(mask, bias, alibi_slopes, sinks, seed, *settings)
    row = ATTENTION.choose(Inputs((q, k, v), **options._asdict()), backend)
    return row.run(q, k, v, options)


def _fake(q, k, v, *_):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype)


def _setup_context(ctx, inputs, output):
    *tensors, causal, left, right, chunk, scale, softcap, dropout_p, head_offset, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.settings = causal, left, right, chunk, scale, softcap, dropout_p, head_offset
    ctx.backend = backend
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, mask, bias, alibi_slopes, sinks, seed, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 17
    dout = torch.zeros_like(out) if dout is None else dout
    _, _, _, _, need_dbias, _, need_dsinks, *_ = ctx.needs_input_grad
    dq, dk, dv, dbias, dsinks = _attention_bwd_op(
        dout, dlse, q, k, v, out, lse, mask, bias, alibi_slopes, sinks, seed, *ctx.settings, need_dbias, need_dsinks,
        ctx.backend,
    )  # fmt: skip
    none = (None,) * 10
    return dq, dk, dv, None, dbias if need_dbias else None, None, dsinks if need_dsinks else None, *none


def _bwd_impl(dout, dlse, q, k, v, out, lse, mask, bias, alibi_slopes, sinks, seed, *settings_and_needs):
    *settings, need_dbias, need_dsinks, backend = settings_and_needs
    bias = None if bias is None else bias.detach().requires_grad_(need_dbias)
    options = _options(mask, bias, alibi_slopes, sinks, seed, *settings)
    row = ATTENTION_BWD.choose(Inputs((dout, q, k, v), **options._asdict()), ATTENTION_BWD.named(backend))
    dq, dk, dv, dbias, dsinks = row.run(dout, dlse, q, k, v, out, lse, options)
    return (
        dq, dk, dv, dbias if need_dbias and dbias is not None else q.new_empty(0),
        dsinks if need_dsinks and dsinks is not None else q.new_empty(0),
    )  # fmt: skip


def _bwd_fake(dout, dlse, q, k, v, out, lse, mask, bias, alibi_slopes, sinks, seed, *settings_and_needs):
    *_, need_dbias, need_dsinks, _ = settings_and_needs
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for x, needed in ((bias, need_dbias), (sinks, need_dsinks)):
        grads.append(x.new_empty(x.shape) if needed else q.new_empty(0))
    return tuple(grads)


_OPTIONS_SCHEMA = (
    "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, bool causal, int window_left, "
    "int window_right, int chunk, float softmax_scale, float softcap, float dropout_p, int head_offset"
)
_attention_bwd_op = register_op(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS_SCHEMA}, bool need_dbias, bool need_dsinks, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_attention_op = register_op(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS_SCHEMA}, str? backend) -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def check_options(
    op: str, q: Tensor, shape: tuple[int, int, int, int], window: tuple[int, int], chunk: int, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None, bias: Tensor | None, mask: Tensor | None, dropout_p: float,
) -> None:  # fmt: skip
    """Raise ValueError where options do not fit the scores [B, Hq, Sq, Sk] of `shape`."""
    batch, heads = shape[:2]
    if len(window) != 2 or min(window) < -1:
        raise ValueError(f"{op}: window is {window}; it takes (left, right), each >= 0, or -1 for no limit")
    if chunk < 0:
        raise ValueError(f"{op}: chunk is {chunk}; it takes a number of keys, or 0 for no chunks")
    if not 0 <= softcap < float("inf"):
        raise ValueError(f"{op}: softcap is {softcap}; it takes a positive limit, or 0 for none")
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it takes a share between 0 and 1")
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks), ("bias", bias), ("mask", mask)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}")
    if alibi_slopes is not None:
        if alibi_slopes.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: alibi_slopes is {alibi_slopes.dtype}; it needs torch.float32")
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"{op}: alibi_slopes has shape {tuple(alibi_slopes.shape)}; it takes {(heads,)} or {(batch, heads)}"
            )
    if sinks is not None and (sinks.shape != (heads,) or not sinks.is_floating_point()):
        raise ValueError(f"{op}: sinks is {sinks.dtype} {tuple(sinks.shape)}; it takes floating-point {(heads,)}")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"{op}: bias is {bias.dtype}; it needs a floating-point dtype (mask takes booleans)")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{op}: mask is {mask.dtype}; it needs torch.bool")
    for name, x in (("bias", bias), ("mask", mask)):
        if x is None or (name == "mask" and x.shape == (batch, shape[3])):
            continue
        if x.dim() != 4 or any(m not in (1, n) for m, n in zip(x.shape, shape, strict=True)):
            keys = f"[B, Sk] = {(batch, shape[3])}, or " if name == "mask" else ""
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}; it takes {keys}what broadcasts to [B, Hq, Sq, Sk] = {shape}"
            )


def dropout_seed(dropout_p: float, seed: int | Tensor | None) -> Tensor | None:
    """The seed as the op takes it; one drawn from torch's default generator where dropout has none."""
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**62, (1,))
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"attention: seed is {seed.dtype} {tuple(seed.shape)}; it takes an int, or int64 of one")
        return seed.reshape(1)
    return torch.tensor([seed], dtype=torch.int64)


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, *, dims: str, key_dims: str | None = None) -> None:
    """Raise ValueError where q, k and v are not of one dtype and device, or their heads and head dims do not fit."""
    for name, x, wanted in (("q", q, dims), ("k", k, key_dims or dims), ("v", v, key_dims or dims)):
        num_dims = wanted.count(",") + 1
        if x.dim() != num_dims:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it needs {num_dims} dims [{wanted}]")
        if not x.is_floating_point() or x.dtype != q.dtype:
            raise ValueError(f"{op}: {name} is {x.dtype}, q is {q.dtype}; all need one floating-point dtype")
        if x.device != q.device:
            raise ValueError(f"{op}: {name} is on {x.device}, q on {q.device}")
        if x.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}; the head dim must be at least 1")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: q is {tuple(q.shape)}, k is {tuple(k.shape)}; head dim {q.shape[-1]} must match")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{op}: k is {tuple(k.shape)}, v is {tuple(v.shape)}; v must begin {tuple(k.shape[:-1])}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{op}: {q.shape[-2]} query heads on {k.shape[-2]} KV heads; the first must be a multiple")


class AttentionKeywords(TypedDict, total=False):
    """The keywords of `attention`, but for `return_lse`."""

    causal: bool
    window: tuple[int, int]
    chunk: int
    softmax_scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    dropout_p: float
    seed: int | Tensor | None
    head_offset: int
    backend: str | None


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[AttentionKeywords]
) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: Unpack[AttentionKeywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: tuple[int, int] = (-1, -1), chunk: int = 0,
    softmax_scale: float | None = None, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None, bias: Tensor | None = None, mask: Tensor | None = None, dropout_p: float = 0.0,
    seed: int | Tensor | None = None, head_offset: int = 0, return_lse: bool = False, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention, differentiable in q, k, v, bias and sinks. Query head h reads KV head h // (Hq / Hkv).

    Args:
        q: [B, Sq, Hq, D], fp32, bf16, fp16 (native, D and Dv up to 512) or fp64 (reference). Any strides.
        k: [B, Sk, Hkv, D] of q's dtype; Hq must be a multiple of Hkv.
        v: [B, Sk, Hkv, Dv] of q's dtype.
        causal: query i sees keys up to p = i + Sk - Sq (aligned bottom-right, as flash-attn 2.1 and later).
        window: (left, right) keys seen around p, -1 for no limit; `causal` sets right to 0.
        chunk: only keys of p's own chunk of so many keys are seen; 0 for no chunks.
        softmax_scale: factor of the scores; 1 / sqrt(D) when None.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        alibi_slopes: fp32 [Hq] or [B, Hq]: slope * |p - j| is taken from the score of key j. No gradient.
        sinks: [Hq] logits that join each row's softmax and take no value.
        bias: floating-point, 4 dims that broadcast to [B, Hq, Sq, Sk], added to the scores; -inf hides.
        mask: bool, True for keys seen: [B, Sk] (padding), or 4 dims that broadcast to [B, Hq, Sq, Sk].
        dropout_p: share of the weights that are dropped; the others are divided by 1 - dropout_p.
        seed: of the dropout: an int or an int64 CPU tensor of one element; None draws one from torch's default
            generator. The same seed drops the same weights on every backend.
        head_offset: number of q's first head in the model's heads, so that ranks that hold parts of them drop what
            one process would.
        return_lse: also return the log of each row's sum of exponentials, the sink's included, differentiable too.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        out [B, Sq, Hq, Dv] of q's dtype; with `return_lse` `(out, lse)`, lse [B, Hq, Sq] in fp32 (fp64 for fp64). A
        query that sees no key has out 0 and lse -inf (with sinks, the sink).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together.

    Example:
        >>> q, k, v = torch.randn(1, 128, 8, 64), torch.randn(1, 128, 2, 64), torch.randn(1, 128, 2, 64)
        >>> out, lse = tpweave.attention(q, k, v, causal=True, return_lse=True)
    """
    if backend is None and not is_compiling():
        done = _C.attention_plain(
            q, k, v, mask, bias, alibi_slopes, sinks, causal, window, chunk, softmax_scale, softcap, dropout_p,
            return_lse,
        )  # fmt: skip
        if done is not None:
            return done
    check_heads("attention", q, k, v, dims="batch, sequence, heads, head dim")
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"attention: q is {tuple(q.shape)}, k is {tuple(k.shape)}; batch {q.shape[0]} must match")
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    check_options(
        "attention", q, shape, window, chunk, softcap, alibi_slopes, sinks, bias, mask, dropout_p
    )  # fmt: skip
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    out, lse = _attention_op(
        q, k, v, mask, bias, alibi_slopes, sinks, dropout_seed(dropout_p, seed), causal, window[0], window[1], chunk,
        softmax_scale, softcap, dropout_p, head_offset, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
