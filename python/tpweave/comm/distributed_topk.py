"""Top-k over a dimension that is divided over the ranks: the candidates of sampling from vocabulary-parallel logits.

Each rank selects the k largest of its part, the ranks exchange these, and each merges them. Of equal values the one
with the lower index comes first, so the result is the same on all ranks, in every run and for every division.

Gradient: every rank holds the same values and computes the same loss from them, so dvalues is the same on all ranks
(the convention of `matmul_all_reduce`), and each rank takes what belongs to its part:
    dx_r[index - start_r] = dvalues where start_r <= index < start_r + splits[r], else 0

Dims: V the divided dimension's length on all ranks together, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import check_tensor, direct, local_objection, pg_objection
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, check_splits
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES
from tpweave.reference.comm.distributed_topk import distributed_topk_reference, topk_in_order

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor

# A slot of the arena (csrc/symm_mem/arena.h) holds the candidates of a row, 8 bytes each.
MAX_K = 512 * 1024 // 8


def k_objection(inputs: Inputs) -> str | None:
    """A rule of the shm row."""
    k = inputs.values.get("k", 0)
    return None if k <= MAX_K else f"gives up to {MAX_K} of a row, not {k}"


def _outputs(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)


def local_topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk_in_order` of x [rows, columns], by the kernel where it takes x."""
    if not x.is_cpu or x.dtype not in FLOATS:
        return topk_in_order(x, k)
    x = x.contiguous()
    values, indices = _outputs(x, k)
    _C.topk(x, values, indices, x.shape[0], x.shape[1], k, DTYPE_CODES[x.dtype])
    return values, indices


def distributed_topk_local(x: Tensor, k: int, group: TPGroup, splits: Sequence[int]) -> tuple[Tensor, Tensor]:
    return local_topk(x, k)


def distributed_topk_shm(x: Tensor, k: int, group: TPGroup, splits: Sequence[int]) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    values, indices = _outputs(x, k)
    group.shm.distributed_topk(x, values, indices, x.shape[0], splits, k, DTYPE_CODES[x.dtype])
    return values, indices


def distributed_topk_pg(x: Tensor, k: int, group: TPGroup, splits: Sequence[int]) -> tuple[Tensor, Tensor]:
    rows = x.shape[0]
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        agree(group, x.device, describe("distributed_topk", x.dtype, (rows, k), splits=list(splits)))
    counts = [min(k, split) for split in splits]
    values, indices = local_topk(x, counts[group.rank])
    indices = indices + sum(splits[: group.rank])
    numels = [rows * count for count in counts]
    # Candidates in rank order, so that of equal ones the first has the lowest index.
    every_value, every_index = (
        torch.cat([p.view(rows, n) for p, n in zip(exchange_all(part, group, numels), counts, strict=True)], 1)
        for part in (values, indices)
    )
    values, places = topk_in_order(every_value, k)
    return values, every_index.gather(1, places)


DISTRIBUTED_TOPK = Op("distributed_topk", [
    Backend("local", distributed_topk_local, Needs(rules=(local_objection,))),
    Backend("shm", distributed_topk_shm, Needs(device="cpu", dtypes=FLOATS, transport="shm", rules=(k_objection,))),
    Backend("pg", distributed_topk_pg, Needs(rules=(pg_objection,))),
    Backend("reference", distributed_topk_reference, Needs()),
])  # fmt: skip


def _impl(x, k, dim, group_name, splits, backend):
    group = TPGroup.by_name(group_name)
    row = DISTRIBUTED_TOPK.choose(Inputs([x], group=group, k=k), backend)
    if dim == x.dim() - 1:
        values, indices = row.run(x.reshape(x.shape[:-1].numel(), x.shape[-1]), k, group, splits)
        return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
    last = x.movedim(dim, -1)
    found = row.run(last.reshape(last.shape[:-1].numel(), last.shape[-1]), k, group, splits)
    return tuple(part.view(*last.shape[:-1], k).movedim(-1, dim).contiguous() for part in found)


def _fake(x, k, dim, group_name, splits, backend):
    shape = (*x.shape[:dim], k, *x.shape[dim + 1 :])
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx, inputs, output):
    x, _, ctx.dim, group_name, splits, _ = inputs
    rank = TPGroup.by_name(group_name).rank
    ctx.start, ctx.length = sum(splits[:rank]), x.shape[ctx.dim]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dvalues, _):
    (indices,) = ctx.saved_tensors
    own = (indices >= ctx.start) & (indices < ctx.start + ctx.length)
    shape = (*dvalues.shape[: ctx.dim], ctx.length + 1, *dvalues.shape[ctx.dim + 1 :])
    # Those of the other ranks meet in one place more, which is cut off.
    places = torch.where(own, indices - ctx.start, ctx.length)
    dx = dvalues.new_zeros(shape).scatter_add(ctx.dim, places, dvalues)
    return dx.narrow(ctx.dim, 0, ctx.length).contiguous(), None, None, None, None, None


_distributed_topk_op = register_op(
    "distributed_topk(Tensor x, int k, int dim, str group_name, int[] splits, str? backend) -> (Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def distributed_topk(
    x: Tensor,
    k: int,
    group: GroupLike = None,
    *,
    dim: int = -1,
    splits: Sequence[int] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest values, and where they are, along a dimension that is divided over the ranks.

    Args:
        x: this rank's part, e.g. logits of some of the vocabulary, [..., V_r]; floating point, the same shape on all
            ranks but for `dim`.
        k: how many, at most V; more than a rank's part has is well.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        dim: the divided dimension.
        splits: each rank's length along `dim`; None where all are equal.
        backend: force one row of the table; the same on all ranks.

    Returns:
        (values of x's dtype, int64 indices into the whole dimension), k long along `dim`: largest first, of equal
        values the lower index first, NaN as the largest, as -0 counts as 0. The same on all ranks. The gradient of the
        values takes theirs to be the same on all ranks (see the module's docstring).

    Raises:
        ValueError: no such dim; k that is negative or beyond V; splits that do not fit; x is not floating point.
        CollectiveMismatchError: the ranks' rows, k, dtypes or splits differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> values, token_ids = tpweave.distributed_topk(logits_shard, 50)
    """
    check_tensor("distributed_topk", x)
    if not x.is_floating_point():
        raise ValueError(f"distributed_topk needs floating-point values, got {x.dtype}")
    dim = check_dim("distributed_topk", dim, x.dim())
    found = resolve_group(group)
    length = x.shape[dim]
    splits = [length] * found.size if splits is None else check_splits("distributed_topk", "splits", splits, found.size)
    if splits[found.rank] != length:
        raise ValueError(
            f"distributed_topk: splits {splits} give rank {found.rank} {splits[found.rank]}, x has {length}"
        )
    if not 0 <= k <= sum(splits):
        raise ValueError(f"distributed_topk: k is {k}; the ranks have {sum(splits)} along dim {dim}")
    last = dim == x.dim() - 1 and k <= MAX_K and x.dtype in FLOATS
    if last and direct("distributed_topk", x, found, backend) is not None:
        shape = x.shape
        values, indices = distributed_topk_shm(x.view(shape[:-1].numel(), length), k, found, splits)
        return (values, indices) if len(shape) == 2 else (values.view(*shape[:-1], k), indices.view(*shape[:-1], k))
    return _distributed_topk_op(x, k, dim, found.name, splits, backend)
