"""Where tensor-parallel layers enter and leave the part of a model that is divided: four pairs of forward and backward.

A replicated tensor is equal on all ranks, and every rank computes the same loss from it, so its gradient is equal on
all ranks too. That is not what `all_reduce` and `all_gather` differentiate (they add the ranks' losses).

    function             forward                 backward              in         out
    copy_to_ranks        identity                all-reduce            replicated the input of divided work
    reduce_from_ranks    all-reduce              identity              partial    replicated
    gather_from_ranks    all-gather              this rank's part      divided    replicated
    scatter_to_ranks     this rank's part        all-gather            replicated divided

Between divided tensors (sequence parallelism) the plain `all_gather` and `reduce_scatter` have the right gradients.

Source: Shoeybi et al., "Megatron-LM", 2019, where the first two are called f and g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpweave.comm.all_gather import all_gather
from tpweave.comm.all_reduce import all_reduce
from tpweave.distributed.group import GroupLike, TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, splits_or_even

Tensor = torch.Tensor


def _part(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> Tensor:
    return x.narrow(dim, sum(splits[: group.rank]), splits[group.rank]).contiguous()


class CopyToRanks(torch.autograd.Function):
    """dx = sum over ranks of dy."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return all_reduce(dy, ctx.group), None


class ReduceFromRanks(torch.autograd.Function):
    """y = sum over ranks of x; dx = dy."""

    @staticmethod
    def forward(ctx, x, group):
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class GatherFromRanks(torch.autograd.Function):
    """y = the ranks' x joined; dx = this rank's part of dy."""

    @staticmethod
    def forward(ctx, x, dim, group, splits):
        ctx.dim, ctx.group, ctx.splits = dim, group, splits
        return all_gather(x, dim, group, splits=splits)

    @staticmethod
    def backward(ctx, dy):
        return _part(dy, ctx.dim, ctx.group, ctx.splits), None, None, None


class ScatterToRanks(torch.autograd.Function):
    """y = this rank's part of x; dx = the ranks' dy joined."""

    @staticmethod
    def forward(ctx, x, dim, group, splits):
        ctx.dim, ctx.group, ctx.splits = dim, group, splits
        return _part(x, dim, group, splits)

    @staticmethod
    def backward(ctx, dy):
        return all_gather(dy, ctx.dim, ctx.group, splits=ctx.splits), None, None, None


def copy_to_ranks(x: Tensor, group: GroupLike = None) -> Tensor:
    """x itself; backward adds the ranks' gradients. For the input of column-parallel work.

    Example:
        >>> hidden = torch.nn.functional.linear(copy_to_ranks(x, group), weight_shard)
    """
    return CopyToRanks.apply(x, resolve_group(group))


def reduce_from_ranks(x: Tensor, group: GroupLike = None) -> Tensor:
    """The sum over ranks of x; backward passes the (replicated) gradient on. For the output of row-parallel work.

    Example:
        >>> y = reduce_from_ranks(torch.nn.functional.linear(hidden_shard, weight_shard), group)
    """
    return ReduceFromRanks.apply(x, resolve_group(group))


def gather_from_ranks(x: Tensor, dim: int, group: GroupLike = None, *, splits: Sequence[int] | None = None) -> Tensor:
    """The ranks' x joined along `dim`; backward takes this rank's part of the (replicated) gradient.

    Args:
        splits: each rank's length along `dim`; None where all are equal.
    """
    found, dim = resolve_group(group), check_dim("gather_from_ranks", dim, x.dim())
    sizes = [x.shape[dim]] * found.size if splits is None else list(splits)
    return GatherFromRanks.apply(x, dim, found, sizes)


def scatter_to_ranks(x: Tensor, dim: int, group: GroupLike = None, *, splits: Sequence[int] | None = None) -> Tensor:
    """This rank's part along `dim` of a replicated x; backward joins the ranks' gradients.

    Args:
        splits: each rank's length along `dim`; None for nearly equal lengths, the longer ones first.
    """
    found, dim = resolve_group(group), check_dim("scatter_to_ranks", dim, x.dim())
    sizes = splits_or_even("scatter_to_ranks", "splits", splits, found.size, x.shape[dim])
    return ScatterToRanks.apply(x, dim, found, sizes)
