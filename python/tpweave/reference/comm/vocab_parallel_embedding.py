"""Rows of a divided table as Megatron-LM finds them: each rank looks up its own, and the ranks add theirs up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tpweave.reference.comm.all_reduce import all_reduce_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor


def own_rows(ids: Tensor, weight: Tensor, start: int) -> Tensor:
    """[..., H]: the rows [start, start + len(weight)) that are asked for, 0 where another rank's are."""
    if weight.shape[0] == 0:
        return weight.new_zeros((*ids.shape, weight.shape[1]))
    outside = (ids < start) | (ids >= start + weight.shape[0])
    return F.embedding((ids - start).masked_fill(outside, 0), weight).masked_fill(outside.unsqueeze(-1), 0)


def vocab_parallel_embedding_reference(ids: Tensor, weight: Tensor, group: TPGroup, splits: Sequence[int]) -> Tensor:
    """[..., H] from ids [...] and this rank's rows [splits[rank], H]; the same on all ranks."""
    return all_reduce_reference(own_rows(ids, weight, sum(splits[: group.rank])), group)
