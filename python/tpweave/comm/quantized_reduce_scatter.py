"""Quantised reduce-scatter: y_r = rank r's part along a dimension of the sum (or mean) over ranks of Q(x_s).

Rank r adds its own numbers as they are and those of the others from their int8 or int4 codes, in rank order in fp32,
and rounds once; what a rank sends to another is quantised flat, in blocks. Error of an element whose block has the
largest magnitude A_s on rank s:
    |y - sum over ranks of x_s| <= sum over s != r of step(A_s) / 2,   step(A) = 1.008 * A / 127   (/ 7)
plus the rounding of y to its dtype and fp32's in the sum; twice that for stochastic rounding; divided by R for a mean.

Error feedback: c = x + e;  e = c - Q(c), in the parts of others: over calls, what is sent adds up to what was meant.

Gradient: straight through the rounding, an all-gather of the ranks' dy (see `reduce_scatter`), which is not quantised.

Dims: R ranks. The tensor is seen as [outer, N, inner]. Source: as `quantized_all_reduce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import increment_version

from tpweave.comm.all_gather import ALL_GATHER, all_gather_op
from tpweave.comm.call import direct, local_objection, pg_objection
from tpweave.comm.quantized import NO_GAIN, check_call, check_feedback, pack, packed_bytes, unpack
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe, exchange_pieces
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, splits_or_even
from tpweave.library import register_op
from tpweave.native import DTYPE_CODES, new_output
from tpweave.ops.quantize_blocks import dequantize, quantize
from tpweave.reference.comm.quantized_all_reduce import with_feedback
from tpweave.reference.comm.quantized_reduce_scatter import quantized_reduce_scatter_reference
from tpweave.reference.ops.quantize_blocks import BlockFormat, Rounding

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def quantized_reduce_scatter_local(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool, form: BlockFormat, seed: int | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return with_feedback(x, residual)


def quantized_reduce_scatter_shm(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool, form: BlockFormat, seed: int | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    x = x.contiguous()
    shape = x.shape
    out = new_output(x, (*shape[:dim], splits[group.rank], *shape[dim + 1 :]))
    inner = prod(shape[dim + 1 :])
    group.shm.quantized_reduce_scatter(
        x, residual, out, prod(shape[:dim]), [n * inner for n in splits], DTYPE_CODES[x.dtype], average, form.bits,
        form.block, seed,
    )  # fmt: skip
    return out


def quantized_reduce_scatter_pg(
    x: Tensor, dim: int, group: TPGroup, splits: Sequence[int], average: bool, form: BlockFormat, seed: int | None,
    residual: Tensor | None,
) -> Tensor:  # fmt: skip
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        facts = dict(dim=dim, splits=list(splits), average=average, **form._asdict(), seed=seed)
        agree(group, x.device, describe("quantized_reduce_scatter", x.dtype, x.shape, **facts))
    size, rank = group.size, group.rank
    parts = x.detach().split(list(splits), dim)
    missed = [None] * size if residual is None else residual.split(list(splits), dim)
    sent = [x.new_empty(0, dtype=torch.uint8)] * size
    for peer, (part, before) in enumerate(zip(parts, missed, strict=True)):
        if peer != rank:
            after = None if before is None else before.contiguous().view(-1)
            sent[peer] = pack(*quantize(part.reshape(-1), form, Rounding(seed, rank * size + peer), 0, after))
            if before is not None and after is not None:
                before.copy_(after.view(before.shape))
    count = parts[rank].numel()
    out_bytes = [0 if peer == rank else packed_bytes(count, form) for peer in range(size)]
    pieces = exchange_pieces(torch.cat(sent), group, [piece.numel() for piece in sent], out_bytes)
    received = [(None, None) if peer == rank else unpack(piece, count, form) for peer, piece in enumerate(pieces)]
    codes, scales = zip(*received, strict=True)
    own = parts[rank].reshape(-1)
    return dequantize(codes, scales, count, form, x.dtype, own, average).view(parts[rank].shape)


QUANTIZED_REDUCE_SCATTER = Op("quantized_reduce_scatter", [
    Backend("local", quantized_reduce_scatter_local, Needs(rules=(local_objection,))),
    Backend("shm", quantized_reduce_scatter_shm, Needs(device="cpu", dtypes=FLOATS, transport="shm"), NO_GAIN),
    Backend("pg", quantized_reduce_scatter_pg, Needs(rules=(pg_objection,))),
    Backend("reference", quantized_reduce_scatter_reference, Needs()),
])  # fmt: skip


def _feedback_impl(x, error_feedback, dim, group_name, splits, average, bits, block, seed, backend):
    group = TPGroup.by_name(group_name)
    row = QUANTIZED_REDUCE_SCATTER.choose(Inputs([x], group=group), backend)
    if error_feedback is not None:
        increment_version(error_feedback)
    return row.run(x, dim, group, splits, average, BlockFormat(bits, block), seed, error_feedback)


def _impl(x, *arguments):
    return _feedback_impl(x, None, *arguments)


def _fake(x, dim, group_name, splits, average, bits, block, seed, backend):
    return x.new_empty((*x.shape[:dim], splits[TPGroup.by_name(group_name).rank], *x.shape[dim + 1 :]))


def _feedback_fake(x, error_feedback, *arguments):
    return _fake(x, *arguments)


def _setup_context(ctx, inputs, output):
    _, ctx.dim, ctx.group_name, ctx.splits, ctx.average, _, _, _, ctx.backend = inputs


def _backward(ctx, dy):
    dx = all_gather_op(dy, ctx.dim, ctx.group_name, ctx.splits, ALL_GATHER.named(ctx.backend))
    if ctx.average:
        dx = dx / TPGroup.by_name(ctx.group_name).size
    return dx, None, None, None, None, None, None, None, None


_ARGUMENTS = (
    "int dim, str group_name, SymInt[] splits, bool average, int bits, int block, SymInt? seed, str? backend) -> Tensor"
)
_quantized_reduce_scatter_op = register_op(
    f"quantized_reduce_scatter(Tensor x, {_ARGUMENTS}", _impl, _fake, _backward, _setup_context
)
_quantized_reduce_scatter_feedback_op = register_op(
    f"quantized_reduce_scatter_feedback(Tensor x, Tensor(a!) error_feedback, {_ARGUMENTS}",
    _feedback_impl, _feedback_fake,
)  # fmt: skip


def quantized_reduce_scatter(
    x: Tensor, dim: int = 0, group: GroupLike = None, *, splits: Sequence[int] | None = None, reduce_op: str = "sum",
    bits: int = 8, block: int | None = None, seed: int | None = None, error_feedback: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:  # fmt: skip
    """This rank's part, along `dim`, of the sum over ranks of x, which travels as integers of 8 or 4 bits.

    Made for slow links between hosts; within a host (`shm`) it means the same, but the plain
    `reduce_scatter` is quicker. The error's bound is in the module's docstring.

    Args:
        x: the full tensor, of the same shape on all ranks; fp32, bf16, fp16 or fp64 (which is quantised as fp32).
        dim: the dimension that is divided.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `dim`, the same list on all ranks; None for nearly equal lengths, the longer
            ones first (as `torch.tensor_split`).
        reduce_op: `"sum"`, or `"avg"` for the mean over ranks.
        bits: 8 or 4.
        block: numbers that share a scale, a power of two from 32 to 1024; None is 128 for 8 bits and 32 for 4.
        seed: None rounds to nearest; an int from 0 to 2^63 - 1, the same on all ranks and another one for each call,
            rounds stochastically, so that the mean over seeds is exact.
        error_feedback: fp32, contiguous, of x's shape: what this rank lost in the calls before, zeros at first. It is
            added, and what is lost now overwrites it; this rank's own part loses nothing and is left alone.
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor, `splits[rank]` long along `dim`, the same bits on every row. A block with an infinity or a NaN on
        another rank is NaN. In a group of one rank nothing is quantised.

    Raises:
        ValueError: x, bits, block, seed, reduce_op or error_feedback are not what is said above; no such dim; splits
            that do not fit the group and x; a gradient is recorded with error_feedback.
        CollectiveMismatchError: the ranks' shapes, dtypes, splits, bits, blocks or seeds differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> grad_shard = tpweave.quantized_reduce_scatter(grad, reduce_op="avg")
    """
    form = check_call("quantized_reduce_scatter", x, bits, block, seed)
    dim = check_dim("quantized_reduce_scatter", dim, x.dim())
    if reduce_op not in ("sum", "avg"):
        raise ValueError(f"quantized_reduce_scatter: reduce_op is {reduce_op!r}; it takes 'sum' or 'avg'")
    if error_feedback is not None:
        check_feedback("quantized_reduce_scatter", x, error_feedback)
    found = resolve_group(group)
    splits = splits_or_even("quantized_reduce_scatter", "splits", splits, found.size, x.shape[dim])
    average = reduce_op == "avg"
    if x.dtype in FLOATS and direct("quantized_reduce_scatter", x, found, backend) is not None:
        if error_feedback is not None:
            increment_version(error_feedback)
        return quantized_reduce_scatter_shm(x, dim, found, splits, average, form, seed, error_feedback)
    arguments = dim, found.name, splits, average, bits, form.block, seed, backend
    if error_feedback is not None:
        return _quantized_reduce_scatter_feedback_op(x, error_feedback, *arguments)
    return _quantized_reduce_scatter_op(x, *arguments)
