"""All-gather and matmul: a = the ranks' shards joined along a dimension, y_i = a @ b_i + bias_i, for several b at once.

The input of column-parallel linear layers under sequence parallelism.

    shm          this rank's own part is multiplied first, then each peer's, where the peer holds it: nothing is copied
                 but what `return_a` asks for
    shm_whole    the parts are copied once, from where the peers hold them, and multiplied as one: each part costs torch
                 another packing of b
    shm_sequence `all_gather`, then the product: for small tensors, to lend memory costs more

Gradient, the dual `matmul_reduce_scatter`; the shard is kept, not the gathered tensor, which is gathered again:
    da_r = rank r's part of (sum over ranks of sum_i dy_i @ b_i^T, and of da),    db_i = a^T @ dy_i,
    dbias_i = sum over rows of dy_i

Dims: M rows of the gathered tensor, K depth, N_i columns, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.all_gather import all_gather_op, all_gather_pg, all_gather_shm
from tpweave.comm.call import direct, local_objection, pg_objection
from tpweave.comm.local_matmul import as_rows, local_matmul, sum_of_matmuls, wide_dtype
from tpweave.comm.matmul_reduce_scatter import (
    PART_ROWS,
    SMALL_ELEMENTS,
    check_matmul,
    matmul_reduce_scatter_op,
    parts_objection,
    rows_of_parts,
    size_objection,
)
from tpweave.comm.reduce_scatter import reduce_scatter_op
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, check_splits
from tpweave.distributed.stepped_call import SteppedCall
from tpweave.library import is_plain_call, register_op
from tpweave.native import DTYPE_CODES
from tpweave.reference.comm.all_gather_matmul import all_gather_matmul_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor
Tensors = Sequence[Tensor]
Result = tuple["Tensor | None", list[Tensor]]


def _each(bias: Tensors, b: Tensors) -> list[Tensor | None]:
    """A bias, or None, for every b."""
    return [*bias] if bias else [None] * len(b)


def _products(whole: Tensor, b: Tensors, bias: Tensors) -> list[Tensor]:
    rows = as_rows(whole)
    shape = whole.shape[:-1]
    return [local_matmul(rows, w, added).view(*shape, w.shape[1]) for w, added in zip(b, _each(bias, b), strict=True)]


def _facts(a: Tensor, dim: int, return_a: bool) -> tuple[int, int]:
    """What all ranks must agree on beside the splits, in two numbers."""
    other = [*a.shape[:dim], *a.shape[dim + 1 :]]
    return prod(other), (other[-1] * a.dim() + dim) * 2 + return_a


def _elements(a: Tensor, dim: int, splits: Sequence[int]) -> int:
    """Of the gathered tensor; equal on all ranks."""
    return prod(a.shape[:dim]) * sum(splits) * prod(a.shape[dim + 1 :])


def all_gather_matmul_shm(
    a: Tensor, b: Tensors, bias: Tensors, dim: int, group: TPGroup, splits: Sequence[int], return_a: bool
) -> Result:
    size, rank, code = group.size, group.rank, DTYPE_CODES[a.dtype]
    shapes = [(*a.shape[:dim], length, *a.shape[dim + 1 :]) for length in splits]
    starts = [sum(splits[:peer]) for peer in range(size)]
    own = group.shm.offset_of(a.data_ptr(), a.nbytes) if a.is_contiguous() and a.numel() else -1
    if own < 0:
        a = group.empty(shapes[rank], a.dtype).copy_(a)
        own = group.shm.offset_of(a.data_ptr(), a.nbytes) if a.numel() else 0
    total = (*a.shape[:dim], sum(splits), *a.shape[dim + 1 :])
    whole = a.new_empty(total) if return_a else None
    depth_gathered = dim == a.dim() - 1
    ys = [a.new_empty((*total[:-1], w.shape[1])) for w in b]
    shards: list[Tensor] = [a] * size

    def multiply(peer: int) -> None:
        shard, start, length = shards[peer], starts[peer], splits[peer]
        if whole is not None:
            whole.narrow(dim, start, length).copy_(shard)
        if depth_gathered:
            return
        # Blocks of rows that lie together in the shard and in y.
        for i, w in enumerate(b):
            below = prod(total[dim + 1 : -1])
            inside = shard.reshape(prod(total[:dim]), length * below, total[-1])
            blocks = ys[i].view(prod(total[:dim]), total[dim] * below, w.shape[1])
            for block, rows in zip(blocks.narrow(1, start * below, length * below), inside, strict=True):
                local_matmul(rows, w, bias[i] if bias else None, out=block)

    fact, extra = _facts(a, dim, return_a)
    with SteppedCall(group, "all_gather_matmul", code, splits, fact=fact, extra=extra, own=own) as call:
        call.arrive(1)
        multiply(rank)
        offsets = call.await_arrivals()
        for step in range(1, size):
            peer = (rank + step) % size
            nbytes = prod(shapes[peer]) * a.element_size()
            if nbytes:
                view = torch.frombuffer(group.shm.view(offsets[peer], nbytes), dtype=a.dtype)
                shards[peer] = view.view(shapes[peer])
            else:
                shards[peer] = a.new_empty(shapes[peer])
            multiply(peer)
        if depth_gathered:
            for y, w, added in zip(ys, b, _each(bias, b), strict=True):
                rows = [as_rows(shard) for shard in shards]
                wide = torch.empty(y.numel() // max(1, w.shape[1]), w.shape[1], dtype=wide_dtype(rows[0]))
                sum_of_matmuls(rows, w.split(list(splits)), out=wide)
                y.copy_((wide if added is None else wide + added).view(y.shape))
        # This rank has read what the peers hold. Partner: the wait below, of every other rank, whose tensor is its
        # caller's again after that.
        call.publish(1)
        for peer in range(size):
            if peer != rank:
                call.await_step(peer, 1)
    return whole, ys


def all_gather_matmul_shm_whole(
    a: Tensor, b: Tensors, bias: Tensors, dim: int, group: TPGroup, splits: Sequence[int], return_a: bool
) -> Result:
    whole = group.empty((*a.shape[:dim], sum(splits), *a.shape[dim + 1 :]), a.dtype)
    whole.narrow(dim, sum(splits[: group.rank]), splits[group.rank]).copy_(a)
    inner = prod(a.shape[dim + 1 :]) * a.element_size()
    sequence = group.shm.all_gather_matmul_gather(
        whole.data_ptr(), prod(a.shape[:dim]), [length * inner for length in splits], DTYPE_CODES[a.dtype],
        *_facts(a, dim, return_a), return_a,
    )  # fmt: skip
    ys = _products(whole, b, bias)
    if return_a:
        return whole, ys
    group.lend(sequence, whole)
    return None, ys


def all_gather_matmul_shm_sequence(
    a: Tensor, b: Tensors, bias: Tensors, dim: int, group: TPGroup, splits: Sequence[int], return_a: bool
) -> Result:
    whole = all_gather_shm(a, dim, group, splits)
    return whole if return_a else None, _products(whole, b, bias)


def all_gather_matmul_pg(
    a: Tensor, b: Tensors, bias: Tensors, dim: int, group: TPGroup, splits: Sequence[int], return_a: bool
) -> Result:
    whole = all_gather_pg(a, dim, group, splits)
    return whole if return_a else None, _products(whole, b, bias)


def all_gather_matmul_local(
    a: Tensor, b: Tensors, bias: Tensors, dim: int, group: TPGroup, splits: Sequence[int], return_a: bool
) -> Result:
    return a.clone(memory_format=torch.contiguous_format) if return_a else None, _products(a, b, bias)


_DTYPES = FLOATS | {torch.float64}

ALL_GATHER_MATMUL = Op("all_gather_matmul", [
    Backend("local", all_gather_matmul_local, Needs(rules=(local_objection,))),
    Backend("shm", all_gather_matmul_shm,
            Needs(device="cpu", transport="shm", dtypes=_DTYPES, advice=(parts_objection, size_objection))),
    Backend("shm_whole", all_gather_matmul_shm_whole,
            Needs(device="cpu", transport="shm", dtypes=_DTYPES, advice=(size_objection,))),
    Backend("shm_sequence", all_gather_matmul_shm_sequence, Needs(device="cpu", transport="shm", dtypes=_DTYPES)),
    Backend("pg", all_gather_matmul_pg, Needs(rules=(pg_objection,))),
    Backend("reference", all_gather_matmul_reference, Needs()),
])  # fmt: skip


def _impl(a, b, bias, dim, group_name, splits, return_a, backend):
    group = TPGroup.by_name(group_name)
    inputs = Inputs(
        [a, *b, *bias], group=group, part_rows=rows_of_parts(a, dim, splits), elements=_elements(a, dim, splits)
    )
    whole, ys = ALL_GATHER_MATMUL.choose(inputs, backend).run(a, b, bias, dim, group, splits, return_a)
    return a.new_empty(0) if whole is None else whole, ys


def _fake(a, b, bias, dim, group_name, splits, return_a, backend):
    shape = (*a.shape[:dim], sum(splits), *a.shape[dim + 1 :])
    return a.new_empty(shape if return_a else (0,)), [a.new_empty((*shape[:-1], w.shape[1])) for w in b]


def _setup_context(ctx, inputs, output):
    a, b, bias, ctx.dim, ctx.group_name, ctx.splits, ctx.return_a, ctx.backend = inputs
    ctx.save_for_backward(a, *b)
    ctx.biases = len(bias)


def _backward(ctx, da_whole, dys):
    a, *b = ctx.saved_tensors
    dim, name, splits, backend = ctx.dim, ctx.group_name, ctx.splits, ctx.backend
    dys = [dy.contiguous() for dy in dys]
    da = matmul_reduce_scatter_op(dys, [w.t() for w in b], None, dim, name, splits, False, backend)
    if ctx.return_a:
        da = da + reduce_scatter_op(da_whole, dim, name, splits, False, None)
    rows = as_rows(all_gather_op(a, dim, name, splits, None)).t()
    db = [rows @ as_rows(dy) for dy in dys]
    dbias = [as_rows(dy).sum(0) for dy in dys] if ctx.biases else []
    return da, db, dbias, None, None, None, None, None


all_gather_matmul_op = register_op(
    "all_gather_matmul(Tensor a, Tensor[] b, Tensor[] bias, int dim, str group_name, SymInt[] splits, "
    "bool return_a, str? backend) -> (Tensor, Tensor[])",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def all_gather_matmul(
    a_shard: Tensor,
    bs: Sequence[Tensor],
    gather_dim: int = 0,
    group: GroupLike = None,
    *,
    splits: Sequence[int] | None = None,
    return_a: bool = True,
    biases: Sequence[Tensor | None] | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """The ranks' shards joined along `gather_dim`, multiplied with every b: (a, [a @ b for b in bs]).

    Args:
        a_shard: [..., M_r, K], this rank's shard, of at least two dimensions; fp32, bf16, fp16 or fp64. One that lies
            in the group's memory (`TPGroup.empty`) may be read there.
        bs: [K, N_i] each, this rank's weights, of any strides: `weight.t()` of a linear layer costs nothing. The
            ranks' N_i may differ.
        gather_dim: the dimension along which shards are joined. Along the last one b has the joined K rows.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `gather_dim`, the same list on all ranks; None where all have the same length.
        return_a: whether the joined tensor is wanted too; the same on all ranks.
        biases: for every b None or [N_i], added to its product.
        backend: force one row of the table; the same on all ranks.

    Returns:
        (a, ys): the joined tensor, or None, and for every b the product [..., M, N_i] of a_shard's dtype. Its gradient
        is a `matmul_reduce_scatter` (see the module's docstring).

    Raises:
        ValueError: shapes, dtypes, devices or splits that do not fit together; no such dimension; no b.
        CollectiveMismatchError: the ranks' shapes, dtypes, splits or `return_a` differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Source: torch's `symm_mem.fused_all_gather_matmul`, whose arguments the first four are.

    Example:
        >>> _, (q, k, v) = tpweave.all_gather_matmul(x_shard_m, [wq.t(), wk.t(), wv.t()], return_a=False)
    """
    op = "all_gather_matmul"
    if not bs:
        raise ValueError(f"{op}: bs is empty; use all_gather")
    found = resolve_group(group)
    dim = check_dim(op, gather_dim, a_shard.dim())
    if splits is None:
        splits = [a_shard.shape[dim]] * found.size
    else:
        splits = check_splits(op, "splits", splits, found.size)
        if a_shard.shape[dim] != splits[found.rank]:
            raise ValueError(
                f"{op}: a_shard has {a_shard.shape[dim]} along dim {dim}, splits {splits} gives rank {found.rank} "
                f"{splits[found.rank]}"
            )
    if biases is not None and len(biases) != len(bs):
        raise ValueError(f"{op}: {len(biases)} biases for {len(bs)} bs")
    given = [None] * len(bs) if biases is None else list(biases)
    depth = sum(splits) if dim == a_shard.dim() - 1 else a_shard.shape[-1]
    for b, added in zip(bs, given, strict=True):
        check_matmul(op, a_shard, depth, b, added)
    # All or none travel further; one that is missing is zero.
    bias = [b.new_zeros(b.shape[1]) if x is None else x for b, x in zip(bs, given, strict=True)]
    bias = [] if all(x is None for x in given) else bias
    if a_shard.dtype in _DTYPES and direct(op, a_shard, found, backend) is not None and is_plain_call(*bs, *bias):
        run = all_gather_matmul_shm_whole
        if _elements(a_shard, dim, splits) <= SMALL_ELEMENTS:
            run = all_gather_matmul_shm_sequence
        elif rows_of_parts(a_shard, dim, splits) >= PART_ROWS:
            run = all_gather_matmul_shm
        return run(a_shard, bs, bias, dim, found, splits, return_a)
    call = _impl if is_plain_call(a_shard, *bs, *bias) else all_gather_matmul_op
    a, ys = call(a_shard, list(bs), bias, dim, found.name, splits, return_a, backend)
    return a if return_a else None, ys
