"""Layer norm (Ba, Kiros and Hinton, 2016) in plain torch, computed in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

from typing import overload

import torch


@overload
def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = ..., *, residual: None = ...
) -> torch.Tensor: ...
@overload
def layer_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float = ..., *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float = 1e-5,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = (h - mean(h)) * rsqrt(var(h) + eps) * weight + bias with h = x (+ residual, rounded to x's dtype).

    x, residual: [..., H]; weight, bias: [H]. Returns y, or (y, h) where a residual was given.
    """
    h = x if residual is None else x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)
