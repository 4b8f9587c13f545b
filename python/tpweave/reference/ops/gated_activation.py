"""Gated linear units (Shazeer, "GLU Variants Improve Transformer", 2020) in plain torch, computed in fp32 or fp64."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def gated_activation_reference(gate: torch.Tensor, up: torch.Tensor, kind: str = "silu") -> torch.Tensor:
    """act(gate) * up. gate, up: [..., F]; kind: a key of ACTIVATIONS."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (ACTIVATIONS[kind](gate.to(wide)) * up.to(wide)).to(gate.dtype)
