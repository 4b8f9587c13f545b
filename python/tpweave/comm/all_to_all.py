"""All-to-all: piece r of each rank's tensor goes to rank r, which joins what it got in rank order.

Gradient: the all-to-all back, with `in_splits` and `out_splits` exchanged.

Dims: R ranks. The tensor is seen as [outer, N, inner].
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import check_tensor, direct, local_objection, pg_objection
from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import exchange_pieces
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, check_splits, splits_or_even
from tpweave.library import register_op
from tpweave.native import new_output
from tpweave.reference.comm.all_to_all import agree_on_pieces, all_to_all_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def all_to_all_local(
    x: Tensor, dim: int, group: TPGroup, in_splits: Sequence[int], out_splits: Sequence[int]
) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def all_to_all_shm(x: Tensor, dim: int, group: TPGroup, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
    x = x.contiguous()
    shape = x.shape
    out = new_output(x, (*shape[:dim], sum(out_splits), *shape[dim + 1 :]))
    inner = prod(shape[dim + 1 :]) * x.element_size()
    group.shm.all_to_all(
        x.data_ptr(), out.data_ptr(), prod(shape[:dim]), [n * inner for n in in_splits], [n * inner for n in out_splits]
    )
    return out


def all_to_all_pg(x: Tensor, dim: int, group: TPGroup, in_splits: Sequence[int], out_splits: Sequence[int]) -> Tensor:
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        agree_on_pieces(x, dim, group, in_splits, out_splits)
    parts = x.split(list(in_splits), dim)
    shapes = [(*x.shape[:dim], size, *x.shape[dim + 1 :]) for size in out_splits]
    flat = torch.cat([part.reshape(-1) for part in parts])
    pieces = exchange_pieces(flat, group, [part.numel() for part in parts], [prod(shape) for shape in shapes])
    return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim)


ALL_TO_ALL = Op("all_to_all", [
    Backend("local", all_to_all_local, Needs(rules=(local_objection,))),
    Backend("shm", all_to_all_shm, Needs(device="cpu", transport="shm")),
    Backend("pg", all_to_all_pg, Needs(rules=(pg_objection,))),
    Backend("reference", all_to_all_reference, Needs()),
])  # fmt: skip


def _impl(x, dim, group_name, in_splits, out_splits, backend):
    group = TPGroup.by_name(group_name)
    return ALL_TO_ALL.choose(Inputs([x], group=group), backend).run(x, dim, group, in_splits, out_splits)


def _fake(x, dim, group_name, in_splits, out_splits, backend):
    return x.new_empty((*x.shape[:dim], sum(out_splits), *x.shape[dim + 1 :]))


def _setup_context(ctx, inputs, output):
    _, ctx.dim, ctx.group_name, ctx.in_splits, ctx.out_splits, ctx.backend = inputs


def _backward(ctx, dy):
    dx = _all_to_all_op(dy, ctx.dim, ctx.group_name, ctx.out_splits, ctx.in_splits, ctx.backend)
    return dx, None, None, None, None, None


_all_to_all_op = register_op(
    "all_to_all(Tensor x, int dim, str group_name, SymInt[] in_splits, SymInt[] out_splits, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def all_to_all(
    x: Tensor,
    dim: int = 0,
    group: GroupLike = None,
    *,
    in_splits: Sequence[int] | None = None,
    out_splits: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Divide x among the ranks along `dim`, and join what the ranks sent to this one.

    Args:
        x: any dtype, at least one dimension.
        dim: the dimension that is divided and joined; the others are equal on all ranks.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        in_splits: how much goes to each rank; None for nearly equal lengths, the longer ones first.
        out_splits: how much each rank sends here; None where every rank divides as this one does, so that each
            sends `in_splits[rank]`.
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor, `sum(out_splits)` long along `dim`. Its gradient is the all-to-all back.

    Raises:
        ValueError: no such dim; splits that do not fit the group and x.
        CollectiveMismatchError: a rank expects another length than its peer sends; shapes or dtypes differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> heads_shard = tpweave.all_to_all(sequence_shard, dim=1)
    """
    check_tensor("all_to_all", x)
    dim = check_dim("all_to_all", dim, x.dim())
    found = resolve_group(group)
    in_splits = splits_or_even("all_to_all", "in_splits", in_splits, found.size, x.shape[dim])
    if out_splits is None:
        out_splits = [in_splits[found.rank]] * found.size
    else:
        out_splits = check_splits("all_to_all", "out_splits", out_splits, found.size)
    if direct("all_to_all", x, found, backend) is not None:
        return all_to_all_shm(x, dim, found, in_splits, out_splits)
    return _all_to_all_op(x, dim, found.name, in_splits, out_splits, backend)
