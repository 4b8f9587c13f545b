"""RMS norm (Zhang and Sennrich, 2019) in plain torch, computed in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

from typing import overload

import torch


@overload
def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = ..., *, residual: None = ...
) -> torch.Tensor: ...
@overload
def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = ..., *, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]: ...
def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, *, residual: torch.Tensor | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y = h * rsqrt(mean(h^2) + eps) * weight with h = x (+ residual, rounded to x's dtype).

    x, residual: [..., H]; weight: [H]. Returns y, or (y, h) where a residual was given.
    """
    h = x if residual is None else x + residual
    wide = h if h.dtype == torch.float64 else h.float()
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    y = y.to(x.dtype)
    return y if residual is None else (y, h)
