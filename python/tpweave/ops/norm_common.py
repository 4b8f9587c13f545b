"""What rms_norm and layer_norm share: their checks, and the way to their native kernels (csrc/cpu/ops/norm.h)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tpweave.dispatch import FLOATS, Needs, last_dim_up_to
from tpweave.native import DTYPE_CODES

Tensor = torch.Tensor

CPU_NEEDS = Needs(device="cpu", dtypes=FLOATS)
# MAX_HIDDEN of kernels/ops/rms_norm.py and layer_norm.py.
TRITON_NEEDS = Needs(device="cuda", dtypes=FLOATS, module="triton", rules=(last_dim_up_to(32768),))


def check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    """Raises ValueError unless the arguments of the norm `op` fit together."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or not dtype.is_floating_point:
        raise ValueError(f"{op} needs a floating-point x of at least 1 dim, got {dtype} of shape {tuple(shape)}")
    if weight is not None:
        _check_parameter(op, "weight", weight, x)
    if bias is not None:
        _check_parameter(op, "bias", bias, x)
    if residual is not None:
        if residual.shape != shape or residual.dtype != dtype:
            raise ValueError(
                f"{op}: residual is {residual.dtype} {tuple(residual.shape)}, "
                f"x is {dtype} {tuple(shape)}; they must match"
            )
        if residual.device != device:
            raise ValueError(f"{op}: residual is on {residual.device}, x on {device}")


def _check_parameter(op: str, name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} has shape {tuple(parameter.shape)}, x's last dim needs ({x.shape[-1]},)")
    if parameter.device != x.device:
        raise ValueError(f"{op}: {name} is on {parameter.device}, x on {x.device}")


def dense(x: Tensor | None) -> Tensor | None:
    """x, contiguous."""
    return None if x is None else x.contiguous()


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Weight and bias as the kernels read them beside x: contiguous, both of x's dtype or both fp32; and its code."""
    dtype = x.dtype
    if (weight is not None and weight.dtype != dtype) or (bias is not None and bias.dtype != dtype):
        dtype = torch.float32
        weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return dense(weight), dense(bias), DTYPE_CODES[dtype]


def norm_fwd_cpu(
    kernel: Callable[..., None], x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    residual: Tensor | None, stats: int,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """y, h (x itself, contiguous, without a residual) and [stats, N] in fp32, or None where `stats` is 0."""
    x, residual = x.contiguous(), dense(residual)
    weight, bias, parameter_code = _parameters(x, weight, bias)
    y = torch.empty_like(x)
    h = x if residual is None else torch.empty_like(x)
    hidden = x.shape[-1]
    rows = x.numel() // hidden if hidden else x.shape[:-1].numel()
    statistics = x.new_empty((stats, rows), dtype=torch.float32) if stats else None
    code = DTYPE_CODES[x.dtype]
    kernel(x, residual, weight, bias, y, h, statistics, rows, hidden, eps, code, parameter_code)
    return y, h, statistics


def norm_bwd_cpu(
    kernel: Callable[..., None], dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor | None, stats: Tensor,
    parameters: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx, and the gradients of weight and (layer norm) bias as [stats, H] in fp32, or None without `parameters`."""
    dy, dh, h = dy.contiguous(), dense(dh), h.contiguous()
    weight, _, parameter_code = _parameters(h, weight, None)
    dx = torch.empty_like(h)
    hidden = h.shape[-1]
    dparameters = h.new_empty((stats.shape[0], hidden), dtype=torch.float32) if parameters else None
    code = DTYPE_CODES[h.dtype]
    kernel(dy, dh, h, weight, stats, dx, dparameters, stats.shape[1], hidden, code, parameter_code)
    return dx, dparameters
