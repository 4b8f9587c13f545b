"""Quantised all-gather by gathering, uncompressed, what the codes stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.reference.comm.quantized_all_reduce import rounded
from tpweave.reference.ops.quantize_blocks import BlockFormat, Rounding

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def quantized_all_gather_reference(
    x: torch.Tensor, dim: int, group: TPGroup, splits: Sequence[int], form: BlockFormat, seed: int | None
) -> torch.Tensor:
    """The ranks' tensors along `dim`, each seen flat and quantised with its rank's stream, its own rank's too."""
    if group.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    shapes = [torch.Size((*x.shape[:dim], size, *x.shape[dim + 1 :])) for size in splits]
    full = (*x.shape[:dim], sum(splits), *x.shape[dim + 1 :])
    facts = dict(dim=dim, splits=list(splits), **form._asdict(), seed=seed)
    agree(group, x.device, describe("quantized_all_gather", x.dtype, full, **facts))
    y = rounded(x.detach().reshape(-1).float(), form, Rounding(seed, group.rank)).to(x.dtype)
    pieces = exchange_all(y, group, [shape.numel() for shape in shapes])
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim)
