"""Quantised reduce-scatter by gathering, uncompressed, what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.reference.comm.quantized_all_reduce import rounded, with_feedback
from tpweave.reference.ops.quantize_blocks import BlockFormat, Rounding

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor


def quantized_reduce_scatter_reference(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool, form: BlockFormat, seed: int | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    """This rank's part of the sum (or the mean) over ranks of x along `dim`, added in rank order in fp32.

    Its own numbers are added as they are, those that rank s sends to rank p quantised, flat, with stream s * R + p.
    `residual`, fp32 of x's shape, is added to what is sent and holds what the codes miss of it afterwards.
    """
    if group.size == 1:
        return with_feedback(x, residual)
    facts = dict(dim=dim, splits=list(splits), average=average, **form._asdict(), seed=seed)
    agree(group, x.device, describe("quantized_reduce_scatter", x.dtype, x.shape, **facts))
    parts = x.detach().float().split(list(splits), dim)
    missed = [None] * group.size if residual is None else residual.split(list(splits), dim)
    sent = []
    for peer, (part, before) in enumerate(zip(parts, missed, strict=True)):
        flat = part.reshape(-1)
        if peer != group.rank:
            after = None if before is None else before.reshape(-1)
            flat = rounded(flat, form, Rounding(seed, group.rank * group.size + peer), residual=after)
            if before is not None and after is not None:
                before.copy_(after.view(before.shape))
        sent.append(flat)
    start = sum(part.numel() for part in parts[: group.rank])
    mine = parts[group.rank]
    pieces = [
        piece[start : start + mine.numel()] for piece in exchange_all(torch.cat(sent), group, [x.numel()] * group.size)
    ]
    return sum_in_rank_order(pieces, group.size if average else 1).to(x.dtype).view(mine.shape)
