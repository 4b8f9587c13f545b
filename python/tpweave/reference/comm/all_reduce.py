"""All-reduce by gathering everything and adding in rank order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def sum_in_rank_order(pieces: Iterable[torch.Tensor], divide_by: int = 1) -> torch.Tensor:
    """x_0 + x_1 + ..., in fp32 for bf16 and fp16, rounded once to the pieces' dtype."""
    first, *others = pieces
    wide = torch.float32 if first.dtype in (torch.bfloat16, torch.float16) else first.dtype
    total = first.to(wide, copy=True)
    for other in others:
        total += other.to(wide)
    if divide_by != 1:
        total /= divide_by
    return total.to(first.dtype)


def all_reduce_reference(x: torch.Tensor, group: TPGroup) -> torch.Tensor:
    """sum over ranks of x, of any shape and any numeric dtype; the same bits on all ranks."""
    if group.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    agree(group, x.device, describe("all_reduce", x.dtype, x.shape))
    return sum_in_rank_order(exchange_all(x, group, [x.numel()] * group.size)).view(x.shape)
