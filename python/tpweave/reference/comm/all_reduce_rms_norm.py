"""All-reduce, residual add and RMS norm in plain torch, with the sum kept in fp32 until the norm is taken."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor

# `quantize` -> the dtype of the codes and the largest of them.
CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def reduced_norm_reference(
    parts: Iterable[Tensor], residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, residual_out, rstd), or (codes, residual_out, scales), from the ranks' [..., H] in rank order.

    rstd, scales: [...] in fp32 (rstd of fp64 in fp64).
    """
    first, *others = parts
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    h = first.to(wide, copy=True)
    for other in others:
        h += other.to(wide)
    if residual is not None:
        h += residual.to(wide)
    rstd = torch.rsqrt(h.square().mean(-1) + eps)
    y = h * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(wide)
    if quantize is None:
        return y.to(first.dtype), h.to(first.dtype), rstd
    dtype, limit = CODES[quantize]
    most = y.abs().amax(-1, keepdim=True) if y.shape[-1] else y.new_zeros((*y.shape[:-1], 1))
    codes = y * torch.where(most > 0, limit / most, 0.0)
    codes = codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype)
    return codes, h.to(first.dtype), (most / limit).squeeze(-1).float()


def all_reduce_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None, group: TPGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of the ranks' sum plus residual; the same on all ranks."""
    parts = [x]
    if group.size > 1:
        with_residual = residual is not None
        facts = describe("all_reduce_rms_norm", x.dtype, x.shape, residual=with_residual, quantize=quantize)
        agree(group, x.device, facts)
        parts = [part.view(x.shape) for part in exchange_all(x, group, [x.numel()] * group.size)]
    return reduced_norm_reference(parts, residual, weight, eps, quantize)
