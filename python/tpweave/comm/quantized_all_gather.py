"""Quantised all-gather: y = the ranks' shards joined along a dimension, each as its int8 or int4 codes give it back.

A shard is quantised flat, in blocks; its own rank takes it from the codes too, so that all ranks hold the same bits.
Error: |y - x| <= step / 2 (a step, rounded stochastically), step = 1.008 / 127 (/ 7) of the block's largest magnitude,
plus the rounding to the dtype.

Gradient: straight through the rounding, a reduce-scatter of the ranks' dy (see `all_gather`), which is not quantised.

Dims: R ranks. The tensor is seen as [outer, shard, inner]. Source: gathers of quantised weights as in Wang et
al., "ZeRO++", 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import direct, local_objection, pg_objection
from tpweave.comm.quantized import NO_GAIN, check_call, pack, packed_bytes, unpack
from tpweave.comm.reduce_scatter import REDUCE_SCATTER, reduce_scatter_op
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe, exchange_all
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, check_splits
from tpweave.library import register_op
from tpweave.native import DTYPE_CODES, new_output
from tpweave.ops.quantize_blocks import dequantize, quantize
from tpweave.reference.comm.quantized_all_gather import quantized_all_gather_reference
from tpweave.reference.ops.quantize_blocks import BlockFormat, Rounding

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def quantized_all_gather_local(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], form: BlockFormat, seed: int | None
) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def quantized_all_gather_shm(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], form: BlockFormat, seed: int | None
) -> Tensor:
    x = x.contiguous()
    shape = x.shape
    out = new_output(x, (*shape[:dim], sum(splits), *shape[dim + 1 :]))
    inner = prod(shape[dim + 1 :])
    widths = [size * inner for size in splits]
    group.shm.quantized_all_gather(
        x, out, prod(shape[:dim]), widths, DTYPE_CODES[x.dtype], form.bits, form.block, seed
    )  # fmt: skip
    return out


def quantized_all_gather_pg(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], form: BlockFormat, seed: int | None
) -> Tensor:
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        full = (*x.shape[:dim], sum(splits), *x.shape[dim + 1 :])
        facts = dict(dim=dim, splits=list(splits), **form._asdict(), seed=seed)
        agree(group, x.device, describe("quantized_all_gather", x.dtype, full, **facts))
    shapes = [torch.Size((*x.shape[:dim], size, *x.shape[dim + 1 :])) for size in splits]
    mine = pack(*quantize(x.detach().reshape(-1), form, Rounding(seed, group.rank)))
    pieces = exchange_all(mine, group, [packed_bytes(shape.numel(), form) for shape in shapes])
    parts = []
    for shape, piece in zip(shapes, pieces, strict=True):
        codes, scales = unpack(piece, shape.numel(), form)
        parts.append(dequantize([codes], [scales], shape.numel(), form, x.dtype).view(shape))
    return torch.cat(parts, dim)


QUANTIZED_ALL_GATHER = Op("quantized_all_gather", [
    Backend("local", quantized_all_gather_local, Needs(rules=(local_objection,))),
    Backend("shm", quantized_all_gather_shm, Needs(device="cpu", dtypes=FLOATS, transport="shm"), NO_GAIN),
    Backend("pg", quantized_all_gather_pg, Needs(rules=(pg_objection,))),
    Backend("reference", quantized_all_gather_reference, Needs()),
])  # fmt: skip


def _impl(x, dim, group_name, splits, bits, block, seed, backend):
    group = TPGroup.by_name(group_name)
    row = QUANTIZED_ALL_GATHER.choose(Inputs([x], group=group), backend)
    return row.run(x, dim, group, splits, BlockFormat(bits, block), seed)


def _fake(x, dim, group_name, splits, bits, block, seed, backend):
    return x.new_empty((*x.shape[:dim], sum(splits), *x.shape[dim + 1 :]))


def _setup_context(ctx, inputs, output):
    _, ctx.dim, ctx.group_name, ctx.splits, _, _, _, ctx.backend = inputs


def _backward(ctx, dy):
    backend = REDUCE_SCATTER.named(ctx.backend)
    dx = reduce_scatter_op(dy, ctx.dim, ctx.group_name, ctx.splits, False, backend)
    return dx, None, None, None, None, None, None, None


_quantized_all_gather_op = register_op(
    "quantized_all_gather(Tensor x, int dim, str group_name, SymInt[] splits, int bits, int block, SymInt? seed, "
    "str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def quantized_all_gather(
    x: Tensor, dim: int = 0, group: GroupLike = None, *, splits: Sequence[int] | None = None, bits: int = 8,
    block: int | None = None, seed: int | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """The ranks' tensors joined along `dim`, in rank order, on every rank; they travel as integers of 8 or 4 bits.

    Made for slow links between hosts; within a host (`shm`) it means the same, but the plain
    `all_gather` is quicker. The error's bound is in the module's docstring.

    Args:
        x: this rank's shard, of at least one dimension; fp32, bf16, fp16 or fp64 (which is quantised as fp32).
        dim: the dimension along which shards are joined.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `dim`, the same list on all ranks; None where all have the same length.
        bits: 8 or 4.
        block: numbers that share a scale, a power of two from 32 to 1024; None is 128 for 8 bits and 32 for 4.
        seed: None rounds to nearest; an int from 0 to 2^63 - 1, the same on all ranks, rounds stochastically.
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor, `sum(splits)` long along `dim`, bit-equal on all ranks and on every row. A block with an infinity
        or a NaN is NaN. In a group of one rank nothing is quantised.

    Raises:
        ValueError: x, bits, block or seed are not what is said above; no such dim; splits that do not fit the group or
            this rank's x.
        CollectiveMismatchError: the ranks' shapes, dtypes, splits, bits, blocks or seeds differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> w = tpweave.quantized_all_gather(w_shard, dim=1)
    """
    form = check_call("quantized_all_gather", x, bits, block, seed)
    dim = check_dim("quantized_all_gather", dim, x.dim())
    found = resolve_group(group)
    splits = check_splits(
        "quantized_all_gather", "splits", [x.shape[dim]] * found.size if splits is None else splits, found.size
    )
    if splits[found.rank] != x.shape[dim]:
        raise ValueError(
            f"quantized_all_gather: splits {splits} give rank {found.rank} a length of {splits[found.rank]}, "
            f"its tensor has {x.shape[dim]}"
        )
    if x.dtype in FLOATS and direct("quantized_all_gather", x, found, backend) is not None:
        return quantized_all_gather_shm(x, dim, found, splits, form, seed)
    return _quantized_all_gather_op(x, dim, found.name, splits, bits, form.block, seed, backend)
