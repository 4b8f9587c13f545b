"""Top-k over a divided dimension by gathering everything and sorting it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor


def topk_in_order(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last dimension, in order, of equal ones the first; NaN is the largest."""
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


def distributed_topk_reference(x: Tensor, k: int, group: TPGroup, splits: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Values and global indices, [rows, k], of x [rows, splits[rank]]; the same on all ranks."""
    if group.size == 1:
        return topk_in_order(x, k)
    rows = x.shape[0]
    agree(group, x.device, describe("distributed_topk", x.dtype, (rows, k), splits=list(splits)))
    shards = exchange_all(x, group, [rows * split for split in splits])
    return topk_in_order(torch.cat([s.view(rows, split) for s, split in zip(shards, splits, strict=True)], 1), k)
