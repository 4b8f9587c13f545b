"""Reduce-scatter by gathering everything and adding this rank's part in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.reference.comm.all_reduce import sum_in_rank_order

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def reduce_scatter_reference(
    x: torch.Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> torch.Tensor:
    """This rank's `splits[rank]` of the sum (or the mean) over ranks of x along `dim` (not negative)."""
    if group.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    agree(group, x.device, describe("reduce_scatter", x.dtype, x.shape, dim=dim, splits=list(splits), average=average))
    start = sum(splits[: group.rank])
    pieces = exchange_all(x, group, [x.numel()] * group.size)
    mine = [piece.view(x.shape).narrow(dim, start, splits[group.rank]) for piece in pieces]
    return sum_in_rank_order(mine, group.size if average else 1).contiguous()
