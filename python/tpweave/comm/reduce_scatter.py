"""Reduce-scatter: y_r = rank r's part along a dimension of the sum (or mean) over ranks of x_s.

Sums are added in rank order in fp32 (fp64 for fp64) and rounded once.

Gradient: dx = the ranks' dy joined along the dimension (divided by R for a mean), an all-gather with the same splits.

Dims: R ranks. The tensor is seen as [outer, N, inner].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.all_gather import all_gather_op
from tpweave.comm.call import SUM_CODES, check_tensor, direct, local_objection, native_sum_objection, pg_objection
from tpweave.comm.hierarchical import sum_scattered
from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, splits_or_even
from tpweave.library import register_op
from tpweave.native import new_output
from tpweave.reference.comm.reduce_scatter import reduce_scatter_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def reduce_scatter_local(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def reduce_scatter_shm(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool) -> Tensor:
    x = x.contiguous()
    shape = x.shape
    out = new_output(x, (*shape[:dim], splits[group.rank], *shape[dim + 1 :]))
    inner = prod(shape[dim + 1 :])
    group.shm.reduce_scatter(
        x.data_ptr(), out.data_ptr(), prod(shape[:dim]), [n * inner for n in splits], SUM_CODES[x.dtype], average
    )
    return out


def reduce_scatter_pg(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool) -> Tensor:
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        facts = describe("reduce_scatter", x.dtype, x.shape, dim=dim, splits=list(splits), average=average)
        agree(group, x.device, facts)
    parts = x.split(list(splits), dim)
    mine = parts[group.rank]
    flat = torch.cat([part.reshape(-1) for part in parts])
    numels = [part.numel() for part in parts]
    return sum_scattered(flat, numels, group, group.size if average else 1).view(mine.shape)


REDUCE_SCATTER = Op("reduce_scatter", [
    Backend("local", reduce_scatter_local, Needs(rules=(local_objection,))),
    Backend("shm", reduce_scatter_shm, Needs(device="cpu", transport="shm", rules=(native_sum_objection,))),
    Backend("pg", reduce_scatter_pg, Needs(rules=(pg_objection,))),
    Backend("reference", reduce_scatter_reference, Needs()),
])  # fmt: skip


def _impl(x, dim, group_name, splits, average, backend):
    group = TPGroup.by_name(group_name)
    return REDUCE_SCATTER.choose(Inputs([x], group=group), backend).run(x, dim, group, splits, average)


def _fake(x, dim, group_name, splits, average, backend):
    return x.new_empty((*x.shape[:dim], splits[TPGroup.by_name(group_name).rank], *x.shape[dim + 1 :]))


def _setup_context(ctx, inputs, output):
    _, ctx.dim, ctx.group_name, ctx.splits, ctx.average, ctx.backend = inputs


def _backward(ctx, dy):
    dx = all_gather_op(dy, ctx.dim, ctx.group_name, ctx.splits, ctx.backend)
    if ctx.average:
        dx = dx / TPGroup.by_name(ctx.group_name).size
    return dx, None, None, None, None, None


reduce_scatter_op = register_op(
    "reduce_scatter(Tensor x, int dim, str group_name, SymInt[] splits, bool average, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def reduce_scatter(
    x: Tensor,
    dim: int = 0,
    group: GroupLike = None,
    *,
    splits: Sequence[int] | None = None,
    reduce_op: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """This rank's part, along `dim`, of the sum over ranks of x.

    Args:
        x: the full tensor, of the same shape on all ranks; any numeric dtype.
        dim: the dimension that is divided.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `dim`, the same list on all ranks; None for nearly equal lengths, the longer
            ones first (as `torch.tensor_split`).
        reduce_op: `"sum"`, or `"avg"` for the mean over ranks (floating-point dtypes).
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor, `splits[rank]` long along `dim`. Its gradient is an all-gather.

    Raises:
        ValueError: no such dim or reduce_op; splits that do not fit the group and x; a dtype that cannot be added.
        CollectiveMismatchError: the ranks' shapes, dtypes or splits differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> y_shard = tpweave.reduce_scatter(partial, dim=1)
    """
    check_tensor("reduce_scatter", x)
    dim = check_dim("reduce_scatter", dim, x.dim())
    if reduce_op not in ("sum", "avg"):
        raise ValueError(f"reduce_scatter: reduce_op is {reduce_op!r}; it takes 'sum' or 'avg'")
    if x.dtype == torch.bool or (reduce_op == "avg" and not x.is_floating_point()):
        raise ValueError(f"reduce_scatter with reduce_op={reduce_op!r} does not take {x.dtype}")
    found = resolve_group(group)
    splits = splits_or_even("reduce_scatter", "splits", splits, found.size, x.shape[dim])
    if x.dtype in SUM_CODES and direct("reduce_scatter", x, found, backend) is not None:
        return reduce_scatter_shm(x, dim, found, splits, reduce_op == "avg")
    return reduce_scatter_op(x, dim, found.name, splits, reduce_op == "avg", backend)
