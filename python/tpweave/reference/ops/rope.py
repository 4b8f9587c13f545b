"""Rotary position embedding (Su et al., "RoFormer", 2021) in plain torch, computed in fp32 (fp64 for fp64 inputs)."""

from __future__ import annotations

import torch


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
    else:
        a, b = turned[..., :half], turned[..., half:]
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned.to(x.dtype), rest), -1)


def rope_reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns each pair (a, b) of the first D_rot elements to (a cos - b sin, b cos + a sin).

    q: [B, S, Hq, D], k: [B, S, Hkv, D]; cos, sin: [S, D_rot / 2] or [B, S, D_rot / 2]. Pairs are (i, i + D_rot / 2), or
    (2i, 2i + 1) where interleaved.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
