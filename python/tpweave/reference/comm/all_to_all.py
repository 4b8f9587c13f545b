"""All-to-all by gathering everything and picking this rank's pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.errors import CollectiveMismatchError

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def agree_on_pieces(
    x: torch.Tensor, dim: int, group: TPGroup, in_splits: Sequence[int], out_splits: Sequence[int]
) -> list[list[int]]:
    """Every rank's `in_splits`, once it is certain that each rank expects what the others send.

    Raises:
        CollectiveMismatchError: on all ranks.
    """
    around = (*x.shape[:dim], -1, *x.shape[dim + 1 :])
    rows = agree(group, x.device, describe("all_to_all", x.dtype, around, dim=dim), [*in_splits, *out_splits])
    sent = [row[: group.size] for row in rows]
    for receiver, row in enumerate(rows):
        for sender, expected in enumerate(row[group.size :]):
            if sent[sender][receiver] != expected:
                raise CollectiveMismatchError(
                    f"all_to_all in group {group.name}: rank {sender} sends {sent[sender][receiver]} along dim {dim} "
                    f"to rank {receiver}, which expects {expected} (in_splits by rank: {sent})"
                )
    return sent


def all_to_all_reference(
    x: torch.Tensor, dim: int, group: TPGroup, in_splits: Sequence[int], out_splits: Sequence[int]
) -> torch.Tensor:
    """Piece r of x along `dim` (not negative) goes to rank r; the pieces received are joined in rank order."""
    if group.size == 1:
        return x.clone(memory_format=torch.contiguous_format)
    sent = agree_on_pieces(x, dim, group, in_splits, out_splits)
    shapes = [torch.Size((*x.shape[:dim], sum(row), *x.shape[dim + 1 :])) for row in sent]
    whole = exchange_all(x, group, [shape.numel() for shape in shapes])
    pieces = [
        tensor.view(shape).narrow(dim, sum(row[: group.rank]), row[group.rank])
        for tensor, shape, row in zip(whole, shapes, sent, strict=True)
    ]
    return torch.cat(pieces, dim)
