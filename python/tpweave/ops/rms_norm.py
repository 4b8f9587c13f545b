"""RMS norm with an optional fused residual add.

    h = x + residual            (rounded to x's dtype; h = x without a residual)
    y = h * rstd * weight,      rstd = 1 / sqrt(mean(h^2) + eps)
    dh = rstd * (g - xhat * mean(g * xhat)) + dresidual_out,  g = dy * weight, xhat = h * rstd;  dx = dresidual = dh
    dweight = sum over rows of dy * xhat

Dims: H hidden, N all other dims together. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from __future__ import annotations

from typing import overload

import torch
from torch.compiler import is_compiling

from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.library import is_plain_call, register_op
from tpweave.native import _C
from tpweave.ops.norm_common import CPU_NEEDS, TRITON_NEEDS, check_norm, dense, norm_bwd_cpu, norm_fwd_cpu
from tpweave.reference.ops.rms_norm import rms_norm_reference

Tensor = torch.Tensor


def rms_norm_fwd_cpu(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, with_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    return norm_fwd_cpu(_C.rms_norm_fwd, x, weight, None, eps, residual, 1 if with_rstd else 0)


def rms_norm_bwd_cpu(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    dx, dw = norm_bwd_cpu(_C.rms_norm_bwd, dy, dh, h, weight, rstd, weight is not None)
    return dx, None if weight is None or dw is None else dw[0].to(weight.dtype)


def rms_norm_fwd_triton(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, with_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    from tpweave.kernels.ops.rms_norm import rms_norm_fwd

    y, h, rstd = rms_norm_fwd(x.contiguous(), dense(weight), eps, dense(residual))
    return y, h, rstd if with_rstd else None


def rms_norm_bwd_triton(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    from tpweave.kernels.ops.rms_norm import rms_norm_bwd

    dx, dw = rms_norm_bwd(dy.contiguous(), dense(dh), h.contiguous(), dense(weight), rstd)
    return dx, None if weight is None or dw is None else dw.to(weight.dtype)


def rms_norm_fwd_reference(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, with_rstd: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    h = x if residual is None else x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1) + eps).view(1, -1) if with_rstd else None
    return rms_norm_reference(h, weight, eps), h, rstd


def rms_norm_bwd_reference(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, rstd: Tensor
) -> tuple[Tensor, Tensor | None]:
    rstd = rstd.view(*h.shape[:-1], 1)
    xhat = h.to(rstd.dtype) * rstd
    g = dy.to(rstd.dtype)
    gw = g if weight is None else g * weight.to(rstd.dtype)
    dx = (gw - xhat * (gw * xhat).mean(-1, keepdim=True)) * rstd
    if dh is not None:
        dx = dx + dh.to(rstd.dtype)
    dw = None if weight is None else (g * xhat).flatten(0, -2).sum(0).to(weight.dtype)
    return dx.to(h.dtype), dw


RMS_NORM = Op("rms_norm", [
    Backend("cpu", rms_norm_fwd_cpu, CPU_NEEDS),
    Backend("triton", rms_norm_fwd_triton, TRITON_NEEDS),
    Backend("reference", rms_norm_fwd_reference, Needs()),
])  # fmt: skip
RMS_NORM_BWD = Op("rms_norm_bwd", [
    Backend("cpu", rms_norm_bwd_cpu, CPU_NEEDS),
    Backend("triton", rms_norm_bwd_triton, TRITON_NEEDS),
    Backend("reference", rms_norm_bwd_reference, Needs()),
])  # fmt: skip


def _impl(x, weight, eps, residual, backend):
    y, h, rstd = RMS_NORM.choose(Inputs([x, weight, residual]), backend).run(x, weight, eps, residual, True)
    # An op may not return its input: without a residual, h is x and the caller has it.
    return y, h if residual is not None else x.new_empty(0), rstd


def _fake(x, weight, eps, residual, backend):
    h = x.new_empty(0) if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((1, x.shape[:-1].numel()), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, rstd


def _setup_context(ctx, inputs, output):
    x, weight, _, residual, backend = inputs
    _, h, rstd = output
    ctx.save_for_backward(x if residual is None else h, weight, rstd)
    ctx.has_residual, ctx.backend = residual is not None, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, drstd):
    h, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dh, None, None, dh if ctx.has_residual else None, None
    dx, dw = _rms_norm_bwd_op(dy, dh if ctx.has_residual else None, h, weight, rstd, ctx.backend)
    return dx, None if weight is None else dw, None, dx if ctx.has_residual else None, None


def _bwd_impl(dy, dh, h, weight, rstd, backend):
    dx, dw = RMS_NORM_BWD.choose(Inputs([dy, dh, h, weight]), backend).run(dy, dh, h, weight, rstd)
    return dx, dy.new_empty(0) if dw is None else dw


def _bwd_fake(dy, dh, h, weight, rstd, backend):
    dx = torch.empty_like(h, memory_format=torch.contiguous_format)
    return dx, dy.new_empty(0) if weight is None else torch.empty_like(weight)


_rms_norm_bwd_op = register_op(
    "rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd, str? backend) -> (Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_rms_norm_op = register_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, Tensor? residual, str? backend) -> (Tensor, Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = ..., *, residual: None = ..., backend: str | None = ...
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = ..., *, residual: Tensor, backend: str | None = ...
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float = 1e-6, *, residual: Tensor | None = None, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm over the last dimension, differentiable in x, weight and residual.

    Args:
        x: [..., H], fp32, bf16, fp16 (native) or fp64 (reference).
        weight: [H], or None for no scale.
        eps: added to the mean of squares.
        residual: [..., H] of x's dtype, added to x first.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        y of x's shape and dtype; with a residual `(y, x + residual)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.

    Example:
        >>> y, h = tpweave.rms_norm(x, weight, 1e-6, residual=h)
    """
    if backend is None and not is_compiling():
        done = _C.rms_norm_plain(x, weight, None, eps, residual)
        if done is not None:
            return done
    check_norm("rms_norm", x, weight, None, residual)
    if is_plain_call(x, weight, residual):
        row = RMS_NORM.choose(Inputs((x, weight, residual)), backend)
        y, h, _ = row.run(x, weight, eps, residual, False)
    else:
        y, h, _ = _rms_norm_op(x, weight, eps, residual, backend)
    return y if residual is None else (y, h)
