"""Layer norm with an optional fused residual add.

    h = x + residual            (rounded to x's dtype; h = x without a residual)
    y = xhat * weight + bias,   xhat = (h - mean(h)) * rstd,  rstd = 1 / sqrt(var(h) + eps)
    dh = rstd * (g - mean(g) - xhat * mean(g * xhat)) + dresidual_out,  g = dy * weight;  dx = dresidual = dh
    dweight = sum over rows of dy * xhat,  dbias = sum over rows of dy

Dims: H hidden, N all other dims together. Source: Ba, Kiros and Hinton, "Layer Normalization", 2016.
"""

from __future__ import annotations

from typing import overload

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.library import is_plain_call, register_op
from tpweave.native import _C
from tpweave.ops.norm_common import CPU_NEEDS, TRITON_NEEDS, check_norm, dense, norm_bwd_cpu, norm_fwd_cpu
from tpweave.reference.ops.layer_norm import layer_norm_reference

Tensor = torch.Tensor


def layer_norm_fwd_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return norm_fwd_cpu(_C.layer_norm_fwd, x, weight, bias, eps, residual, 2 if with_stats else 0)


def layer_norm_bwd_cpu(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, has_bias: bool, stats: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    parameters = weight is not None or has_bias
    dx, dw_db = norm_bwd_cpu(_C.layer_norm_bwd, dy, dh, h, weight, stats, parameters)
    if dw_db is None:
        return dx, None, None
    return dx, None if weight is None else dw_db[0], dw_db[1] if has_bias else None


def layer_norm_fwd_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from tpweave.kernels.ops.layer_norm import layer_norm_fwd

    y, h, stats = layer_norm_fwd(x.contiguous(), dense(weight), dense(bias), eps, dense(residual))
    return y, h, stats if with_stats else None


def layer_norm_bwd_triton(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, has_bias: bool, stats: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    from tpweave.kernels.ops.layer_norm import layer_norm_bwd

    return layer_norm_bwd(dy.contiguous(), dense(dh), h.contiguous(), dense(weight), has_bias, stats)


def layer_norm_fwd_reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, with_stats: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    h = x if residual is None else x + residual
    y = layer_norm_reference(h, weight, bias, eps)
    if not with_stats:
        return y, h, None
    wide = h if h.dtype == torch.float64 else h.float()
    mean = wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt((wide - mean).pow(2).mean(-1) + eps)
    return y, h, torch.stack((mean.flatten(), rstd.flatten()))


def layer_norm_bwd_reference(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, has_bias: bool, stats: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean, rstd = stats.view(2, *h.shape[:-1], 1)
    xhat = (h.to(rstd.dtype) - mean) * rstd
    dy = dy.to(rstd.dtype)
    g = dy if weight is None else dy * weight.to(rstd.dtype)
    dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
    if dh is not None:
        dx = dx + dh.to(rstd.dtype)
    dw = None if weight is None else (dy * xhat).flatten(0, -2).sum(0)
    return dx.to(h.dtype), dw, dy.flatten(0, -2).sum(0) if has_bias else None


LAYER_NORM = Op("layer_norm", [
    Backend("cpu", layer_norm_fwd_cpu, CPU_NEEDS),
    Backend("triton", layer_norm_fwd_triton, TRITON_NEEDS),
    Backend("reference", layer_norm_fwd_reference, Needs()),
])  # fmt: skip
LAYER_NORM_BWD = Op("layer_norm_bwd", [
    Backend("cpu", layer_norm_bwd_cpu, CPU_NEEDS),
    Backend("triton", layer_norm_bwd_triton, TRITON_NEEDS),
    Backend("reference", layer_norm_bwd_reference, Needs()),
])  # fmt: skip


def _impl(x, weight, bias, eps, residual, backend):
    row = LAYER_NORM.choose(Inputs([x, weight, bias, residual]), backend)
    y, h, stats = row.run(x, weight, bias, eps, residual, True)
    # An op may not return its input: without a residual, h is x and the caller has it.
    return y, h if residual is not None else x.new_empty(0), stats


def _fake(x, weight, bias, eps, residual, backend):
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    stats_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats = x.new_empty((2, x.shape[:-1].numel()), dtype=stats_dtype)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, stats


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, residual, backend = inputs
    _, h, stats = output
    ctx.save_for_backward(x if residual is None else h, weight, bias, stats)
    ctx.has_residual, ctx.backend = residual is not None, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, dstats):
    h, weight, bias, stats = ctx.saved_tensors
    if dy is None:
        return dh, None, None, None, dh if ctx.has_residual else None, None
    dx, dw, db = _layer_norm_bwd_op(dy, dh if ctx.has_residual else None, h, weight, bias, stats, ctx.backend)
    dw, db = None if weight is None else dw, None if bias is None else db
    return dx, dw, db, None, dx if ctx.has_residual else None, None


def _bwd_impl(dy, dh, h, weight, bias, stats, backend):
    row = LAYER_NORM_BWD.choose(Inputs([dy, dh, h, weight, bias]), backend)
    dx, dw, db = row.run(dy, dh, h, weight, bias is not None, stats)
    # Copies: outputs of an op may not share memory.
    dw = dy.new_empty(0) if dw is None else dw.to(weight.dtype, copy=True)
    return dx, dw, dy.new_empty(0) if db is None else db.to(bias.dtype, copy=True)


def _bwd_fake(dy, dh, h, weight, bias, stats, backend):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    dw, db = (dy.new_empty(0) if p is None else torch.empty_like(p) for p in (weight, bias))
    return dx, dw, db


_layer_norm_bwd_op = register_op(
    "layer_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, Tensor stats, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_layer_norm_op = register_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor? residual, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = ...,
    *,
    residual: None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = ...,
    *,
    residual: Tensor,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, differentiable in x, weight, bias and residual.

    Args:
        x: [..., H], fp32, bf16, fp16 (native) or fp64 (reference).
        weight, bias: [H], or None for no scale or no shift.
        eps: added to the variance.
        residual: [..., H] of x's dtype, added to x first.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        y of x's shape and dtype; with a residual `(y, x + residual)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> y, h = tpweave.layer_norm(x, weight, bias, residual=h)
    """
    if backend is None and not is_compiling():
        done = _C.layer_norm_plain(x, weight, bias, eps, residual)
        if done is not None:
            return done
    check_norm("layer_norm", x, weight, bias, residual)
    if is_plain_call(x, weight, bias, residual):
        row = LAYER_NORM.choose(Inputs((x, weight, bias, residual)), backend)
        y, h, _ = row.run(x, weight, bias, eps, residual, False)
    else:
        y, h, _ = _layer_norm_op(x, weight, bias, eps, residual, backend)
    return y if residual is None else (y, h)
