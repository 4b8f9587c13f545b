"""Quantised all-reduce by gathering, uncompressed, what the codes stand for: the definition of its numbers."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.reference.ops.quantize_blocks import (
    BlockFormat,
    Rounding,
    dequantize_blocks_reference,
    quantize_blocks_reference,
)

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor


def rounded(x: Tensor, form: BlockFormat, rounding: Rounding, first: int = 0, residual: Tensor | None = None) -> Tensor:
    """What is left of flat x after quantisation, in fp32."""
    codes, scales = quantize_blocks_reference(x, form, rounding, first, residual)
    return dequantize_blocks_reference([codes], [scales], x.numel(), form, torch.float32)


def with_feedback(x: Tensor, residual: Tensor | None) -> Tensor:
    """A copy of x where nothing is lost on the way: plus the residual, if any, which is 0 then."""
    if residual is None:
        return x.clone(memory_format=torch.contiguous_format)
    total = x.float() + residual
    residual.zero_()
    return total.to(x.dtype)


def quantized_all_reduce_reference(
    x: Tensor, group: TPGroup, form: BlockFormat, seed: int | None, residual: Tensor | None
) -> Tensor:
    """The sum over ranks of x, seen flat, in parts of whole units (`BlockFormat.parts`).

    Part p is added up in rank order in fp32: rank p's own numbers as they are, those of the others quantised (with the
    stream of their rank); the sums are quantised with stream R. `residual`, fp32 of x's shape, is added to what a rank
    quantises, sums included, and holds what the codes miss of it afterwards.
    """
    if group.size == 1:
        return with_feedback(x, residual)
    agree(group, x.device, describe("quantized_all_reduce", x.dtype, x.shape, **form._asdict(), seed=seed))
    parts = form.parts(x.numel(), group.size)
    sent = x.detach().reshape(-1).float().clone()
    missed = None if residual is None else residual.view(-1)
    ranges = [slice(end - count, end) for count, end in zip(parts, accumulate(parts), strict=True)]
    for peer, where in enumerate(ranges):
        if peer != group.rank:
            before = None if missed is None else missed[where]
            sent[where] = rounded(sent[where], form, Rounding(seed, group.rank), where.start, before)
    mine = ranges[group.rank]
    sums = sum_in_rank_order(exchange_all(sent, group, [x.numel()] * group.size))[mine]
    before = None if missed is None else missed[mine]
    y = rounded(sums, form, Rounding(seed, group.size), mine.start, before)
    return torch.cat(exchange_all(y, group, parts)).to(x.dtype).view(x.shape)
