"""All-gather of shards of any lengths, padded on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def all_gather_reference(x: torch.Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> torch.Tensor:
    """The ranks' tensors one after the other along `dim` (not negative); rank r's has `splits[r]` there."""
    if group.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    shapes = [torch.Size((*x.shape[:dim], size, *x.shape[dim + 1 :])) for size in splits]
    full = (*x.shape[:dim], sum(splits), *x.shape[dim + 1 :])
    agree(group, x.device, describe("all_gather", x.dtype, full, dim=dim, splits=list(splits)))
    pieces = exchange_all(x, group, [shape.numel() for shape in shapes])
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim)
