"""All-gather: y = the ranks' shards joined along a dimension, of equal or uneven lengths.

Gradient: dx_r = rank r's part of (sum over ranks of dy_s), a reduce-scatter with the same splits. Where every rank
computes the same from the same y, that counts it R times: there use `tpweave.comm.regions.gather_from_ranks`.

Dims: R ranks. The tensor is seen as [outer, shard, inner]: a rank's columns of each row lie together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import check_tensor, direct, local_objection, pg_objection
from tpweave.comm.hierarchical import gather
from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.distributed.cuda_memory import channel, cuda_objection, current_stream
from tpweave.distributed.exchange import agree, describe, flat_bytes, gather_into
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, check_splits
from tpweave.library import register_op
from tpweave.native import new_output
from tpweave.reference.comm.all_gather import all_gather_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def all_gather_local(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def all_gather_shm(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> Tensor:
    x = x.contiguous()
    shape = x.shape
    out = new_output(x, (*shape[:dim], sum(splits), *shape[dim + 1 :]))
    inner = prod(shape[dim + 1 :]) * x.element_size()
    group.shm.all_gather(x.data_ptr(), out.data_ptr(), prod(shape[:dim]), [size * inner for size in splits])
    return out


def all_gather_cuda(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> Tensor:
    """By the copy engines: each rank copies the others' shards out of their memory."""
    x = x.contiguous()
    shape = x.shape
    out = x.new_empty((*shape[:dim], sum(splits), *shape[dim + 1 :]))
    if out.numel() > 0:
        rows, inner = prod(shape[:dim]), prod(shape[dim + 1 :]) * x.element_size()
        made = channel(group, x.device, "all_gather", rows * max(splits) * inner)
        stream = current_stream(x.device)
        widths = [size * inner for size in splits]
        made.all_gather_begin(x.data_ptr(), out.data_ptr(), rows, widths, 1, group.timeout, stream)
        made.all_gather_end(group.timeout, stream)
    return out


def all_gather_pg(x: Tensor, dim: int, group: TPGroup, splits: Sequence[int]) -> Tensor:
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in splits]
    full = (*x.shape[:dim], sum(splits), *x.shape[dim + 1 :])
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        agree(group, x.device, describe("all_gather", x.dtype, full, dim=dim, splits=list(splits)))
    if group.transport != "hierarchical" and prod(x.shape[:dim]) == 1 and len(set(splits)) == 1 and x.numel() > 0:
        # Equal shards of the leading dimension arrive in their place.
        out = x.new_empty(full)
        gather_into(list(flat_bytes(out).view(group.size, -1)), flat_bytes(x), group)
        return out
    pieces = gather(x.reshape(-1), [prod(shape) for shape in shapes], group)
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim)


ALL_GATHER = Op("all_gather", [
    Backend("local", all_gather_local, Needs(rules=(local_objection,))),
    Backend("shm", all_gather_shm, Needs(device="cpu", transport="shm")),
    Backend("cuda", all_gather_cuda, Needs(device="cuda", rules=(cuda_objection,))),
    Backend("pg", all_gather_pg, Needs(rules=(pg_objection,))),
    Backend("reference", all_gather_reference, Needs()),
])  # fmt: skip


def _impl(x, dim, group_name, splits, backend):
    group = TPGroup.by_name(group_name)
    return ALL_GATHER.choose(Inputs([x], group=group), backend).run(x, dim, group, splits)


def _fake(x, dim, group_name, splits, backend):
    return x.new_empty((*x.shape[:dim], sum(splits), *x.shape[dim + 1 :]))


def _setup_context(ctx, inputs, output):
    _, ctx.dim, ctx.group_name, ctx.splits, ctx.backend = inputs


def _backward(ctx, dy):
    # Imported here: reduce_scatter's backward is all_gather.
    from tpweave.comm.reduce_scatter import REDUCE_SCATTER, reduce_scatter_op

    backend = REDUCE_SCATTER.named(ctx.backend)
    return reduce_scatter_op(dy, ctx.dim, ctx.group_name, ctx.splits, False, backend), None, None, None, None


all_gather_op = register_op(
    "all_gather(Tensor x, int dim, str group_name, SymInt[] splits, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def all_gather(
    x: Tensor, dim: int = 0, group: GroupLike = None, *, splits: Sequence[int] | None = None, backend: str | None = None
) -> Tensor:
    """The ranks' tensors joined along `dim`, in rank order, on every rank.

    Args:
        x: this rank's shard, of any dtype and at least one dimension.
        dim: the dimension along which shards are joined.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `dim`, the same list on all ranks; None where all have the same length.
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor, `sum(splits)` long along `dim`. Its gradient is a reduce-scatter (see the module's docstring).

    Raises:
        ValueError: no such dim; splits that do not fit the group or this rank's x.
        CollectiveMismatchError: the ranks' shapes, dtypes or splits do not fit together.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> full = tpweave.all_gather(x_shard, dim=1)
    """
    check_tensor("all_gather", x)
    dim = check_dim("all_gather", dim, x.dim())
    found = resolve_group(group)
    if splits is None:
        splits = [x.shape[dim]] * found.size
    else:
        splits = check_splits("all_gather", "splits", splits, found.size)
        if x.shape[dim] != splits[found.rank]:
            raise ValueError(
                f"all_gather: x has {x.shape[dim]} along dim {dim}, splits {splits} gives rank {found.rank} "
                f"{splits[found.rank]}"
            )
    if direct("all_gather", x, found, backend) is not None:
        return all_gather_shm(x, dim, found, splits)
    return all_gather_op(x, dim, found.name, splits, backend)
