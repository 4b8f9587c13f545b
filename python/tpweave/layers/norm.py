"""Norms over the hidden dimension, through `tpweave.rms_norm` and `tpweave.layer_norm`.

Their weights are whole on every rank. Where x is whole too, so is the gradient. A norm inside a divided region, such
as one over each head's dims, sees only this rank's heads: given the group, it sums its weight's gradient over it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tpweave.comm.regions import copy_to_ranks
from tpweave.ops.layer_norm import layer_norm
from tpweave.ops.rms_norm import rms_norm

Tensor = torch.Tensor


class RMSNorm(nn.Module):
    """RMS norm over the last dimension.

    | tensor | shape    | on each rank |
    |--------|----------|--------------|
    | x, y   | [..., H] | the same, or with `sum_gradients_over` this rank's heads |
    | weight | [H]      | the same     |

        forward   y = x / sqrt(mean(x^2) + eps) * weight
        wgrad     dweight = sum over all other dims (with `sum_gradients_over` also over ranks) of dy * x / rms(x)

    Args:
        hidden_size: H.
        eps: added to the mean of squares.
        sum_gradients_over: the `TPGroup` whose ranks each see a part of x, or None where x is whole.
        device, dtype: of the weight, which starts as ones.

    Example:
        >>> norm = tpweave.layers.RMSNorm(4096, eps=1e-5)
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-6, *, sum_gradients_over: Any = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.eps, self.sum_gradients_over = eps, sum_gradients_over
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    @classmethod
    def from_weight(cls, weight: nn.Parameter, eps: float, *, sum_gradients_over: Any = None) -> RMSNorm:
        """A norm that shares the parameter `weight`."""
        norm = cls(0, eps, sum_gradients_over=sum_gradients_over)
        norm.weight = weight
        return norm

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if self.sum_gradients_over is not None:
            weight = copy_to_ranks(weight, self.sum_gradients_over)
        y: Any = rms_norm(x, weight, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.Module):
    """Layer norm over the last dimension.

    | tensor       | shape    | on each rank |
    |--------------|----------|--------------|
    | x, y         | [..., H] | the same     |
    | weight, bias | [H]      | the same; bias may be absent |

        forward   y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    Args:
        hidden_size: H.
        eps: added to the variance.
        device, dtype: of the parameters, which start as ones and zeros.

    Example:
        >>> norm = tpweave.layers.LayerNorm.from_layer_norm(model.embeddings.LayerNorm)
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None = nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))

    @classmethod
    def from_layer_norm(cls, norm: nn.LayerNorm) -> LayerNorm:
        """A norm that shares the parameters of `norm`.

        Raises:
            ValueError: `norm` is not over the last dimension alone, or has no weight.
        """
        if len(norm.normalized_shape) != 1 or norm.weight is None:
            raise ValueError(f"LayerNorm needs one normalised dimension and a weight, got {norm}")
        layer = cls(0, norm.eps)
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        y: Any = layer_norm(x, self.weight, self.bias, self.eps)
        return y

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
