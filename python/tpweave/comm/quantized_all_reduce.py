"""Quantised all-reduce: y = Q(sum over ranks of Q(x_r)), where Q sends numbers as int8 or int4 codes in blocks.

The tensor is divided among the ranks in parts of whole blocks. Rank p adds up part p in rank order in fp32, its own
numbers as they are and those of the others from their codes, and sends the sums as codes to all. With 8 bits in blocks
of 128 that is 0.51 of the bytes of bf16 and 0.25 of those of fp32, with 4 bits in blocks of 32 0.28 and 0.14.

Error of an element whose block has the largest magnitudes A_r on rank r, and A in the sum that is quantised:
    |y - sum over ranks of x_r| <= step(A) / 2 + sum over r != p of step(A_r) / 2,   step(A) = 1.008 * A / 127   (/ 7)
plus the rounding of y to its dtype and fp32's in the sum; twice that for stochastic rounding.

Error feedback: a rank adds what it lost in the last call to what it quantises in this one,
    c = x + e;  e = c - Q(c);     in its own part, for the sums t:  c = t + e;  e = c - Q(c)
so that over calls nothing is lost: the sum of all y is the sum of all x, but for the e of the ranks after the last.

Gradient: straight through the rounding, an all-reduce of the ranks' dy (see `all_reduce`), which is not quantised.

Dims: R ranks. Source: the codes of `quantize_blocks`; error feedback as in Seide et al., "1-bit stochastic gradient
descent", 2014; quantised sums as in Wang et al., "ZeRO++", 2023.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import increment_version

from tpweave.comm.all_reduce import ALL_REDUCE, all_reduce
from tpweave.comm.call import direct, local_objection, pg_objection
from tpweave.comm.quantized import NO_GAIN, check_call, check_feedback, pack, packed_bytes, unpack
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe, exchange_all, exchange_pieces
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.library import register_op
from tpweave.native import DTYPE_CODES, new_output
from tpweave.ops.quantize_blocks import dequantize, quantize
from tpweave.reference.comm.quantized_all_reduce import quantized_all_reduce_reference, with_feedback
from tpweave.reference.ops.quantize_blocks import BlockFormat, Rounding

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def quantized_all_reduce_local(
    x: Tensor, group: TPGroup, form: BlockFormat, seed: int | None, residual: Tensor | None
) -> Tensor:
    return with_feedback(x, residual)


def quantized_all_reduce_shm(
    x: Tensor, group: TPGroup, form: BlockFormat, seed: int | None, residual: Tensor | None
) -> Tensor:
    x = x.contiguous()
    out = new_output(x)
    group.shm.quantized_all_reduce(
        x, residual, out, x.numel(), DTYPE_CODES[x.dtype], x.shape, form.bits, form.block, seed
    )  # fmt: skip
    return out


def quantized_all_reduce_pg(
    x: Tensor, group: TPGroup, form: BlockFormat, seed: int | None, residual: Tensor | None
) -> Tensor:
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        agree(group, x.device, describe("quantized_all_reduce", x.dtype, x.shape, **form._asdict(), seed=seed))
    size, rank, flat = group.size, group.rank, x.detach().reshape(-1)
    counts = form.parts(x.numel(), size)
    ends = list(accumulate(counts))
    own, count, start = flat[ends[rank] - counts[rank] : ends[rank]], counts[rank], ends[rank] - counts[rank]
    missed = [None] * size if residual is None else residual.view(-1).split(counts)
    sent = [flat.new_empty(0, dtype=torch.uint8)] * size
    for peer, part in enumerate(flat.split(counts)):
        if peer != rank:
            first = ends[peer] - counts[peer]
            sent[peer] = pack(*quantize(part, form, Rounding(seed, rank), first, missed[peer]))
    in_bytes = [piece.numel() for piece in sent]
    out_bytes = [0 if peer == rank else packed_bytes(count, form) for peer in range(size)]
    pieces = exchange_pieces(torch.cat(sent), group, in_bytes, out_bytes)
    received = [(None, None) if r == rank else unpack(piece, count, form) for r, piece in enumerate(pieces)]
    codes, scales = zip(*received, strict=True)
    sums = dequantize(codes, scales, count, form, torch.float32, own)
    mine = pack(*quantize(sums, form, Rounding(seed, size), start, missed[rank]))
    pieces = exchange_all(mine, group, [packed_bytes(n, form) for n in counts])
    parts = []
    for n, piece in zip(counts, pieces, strict=True):
        part_codes, part_scales = unpack(piece, n, form)
        parts.append(dequantize([part_codes], [part_scales], n, form, x.dtype))
    return torch.cat(parts).view(x.shape)


QUANTIZED_ALL_REDUCE = Op("quantized_all_reduce", [
    Backend("local", quantized_all_reduce_local, Needs(rules=(local_objection,))),
    Backend("shm", quantized_all_reduce_shm, Needs(device="cpu", dtypes=FLOATS, transport="shm"), NO_GAIN),
    Backend("pg", quantized_all_reduce_pg, Needs(rules=(pg_objection,))),
    Backend("reference", quantized_all_reduce_reference, Needs()),
])  # fmt: skip


def _feedback_impl(x, error_feedback, group_name, bits, block, seed, backend):
    group = TPGroup.by_name(group_name)
    row = QUANTIZED_ALL_REDUCE.choose(Inputs([x], group=group), backend)
    if error_feedback is not None:
        increment_version(error_feedback)
    return row.run(x, group, BlockFormat(bits, block), seed, error_feedback)


def _impl(x, group_name, bits, block, seed, backend):
    return _feedback_impl(x, None, group_name, bits, block, seed, backend)


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, ctx.group_name, _, _, _, ctx.backend = inputs


def _backward(ctx, dy):
    dx = all_reduce(dy, TPGroup.by_name(ctx.group_name), backend=ALL_REDUCE.named(ctx.backend))
    return dx, None, None, None, None, None


_quantized_all_reduce_op = register_op(
    "quantized_all_reduce(Tensor x, str group_name, int bits, int block, SymInt? seed, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip
_quantized_all_reduce_feedback_op = register_op(
    "quantized_all_reduce_feedback(Tensor x, Tensor(a!) error_feedback, str group_name, int bits, int block, "
    "SymInt? seed, str? backend) -> Tensor",
    _feedback_impl, _fake,
)  # fmt: skip


def quantized_all_reduce(
    x: Tensor, group: GroupLike = None, *, bits: int = 8, block: int | None = None, seed: int | None = None,
    error_feedback: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Sum of the ranks' tensors, on every rank, which travel as integers of 8 or 4 bits.

    Made for slow links between hosts. Within a host (`shm`) it takes 1.1 to 4 times as long as the plain `all_reduce`
    (2 ranks of Zen 3): there it is of use only where the numbers must be those of a run over several hosts.
    The error's bound is in the module's docstring: with 8 bits about (R + 1) / 254 of a block's largest number.

    Args:
        x: any shape, the same on all ranks; fp32, bf16, fp16 or fp64 (which is quantised as fp32).
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        bits: 8 or 4.
        block: numbers that share a scale, a power of two from 32 to 1024; None is 128 for 8 bits and 32 for 4.
        seed: None rounds to nearest; an int from 0 to 2^63 - 1, the same on all ranks and another one for each call,
            rounds stochastically, so that the mean over seeds is the exact sum.
        error_feedback: fp32, contiguous, of x's shape: what this rank lost in the calls before, zeros at first. It is
            added, and what is lost now overwrites it. For gradients: one buffer for each tensor.
        backend: force one row of the table, e.g. `"reference"`; the same on all ranks.

    Returns:
        a new, contiguous tensor of x's shape and dtype, bit-equal on all ranks and on every row. A block with an
        infinity or a NaN on any rank is NaN. In a group of one rank nothing is quantised.

    Raises:
        ValueError: x, bits, block, seed or error_feedback are not what is said above; a gradient is recorded with
            error_feedback.
        CollectiveMismatchError: the ranks' shapes, dtypes, bits, blocks or seeds differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> with torch.no_grad():
        ...     grad = tpweave.quantized_all_reduce(w.grad, bits=4, error_feedback=lost[w])
    """
    form = check_call("quantized_all_reduce", x, bits, block, seed)
    if error_feedback is not None:
        check_feedback("quantized_all_reduce", x, error_feedback)
    if x.dtype in FLOATS and (found := direct("quantized_all_reduce", x, group, backend)) is not None:
        if error_feedback is not None:
            increment_version(error_feedback)
        return quantized_all_reduce_shm(x, found, form, seed, error_feedback)
    name = resolve_group(group).name
    if error_feedback is not None:
        return _quantized_all_reduce_feedback_op(x, error_feedback, name, bits, form.block, seed, backend)
    return _quantized_all_reduce_op(x, name, bits, form.block, seed, backend)
