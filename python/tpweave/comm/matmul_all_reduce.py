"""Matmul and all-reduce: y = sum over ranks of a_r @ b_r, plus bias once. The output of a row-parallel linear layer.

On shared memory few rows are one native call: every rank multiplies into memory that its peers read.

Partial products are added in fp32 and rounded once, with one exception: on machines with bf16 instructions
the local product of more than SMALL_ROWS rows of bf16 or fp16 is torch's, which rounds it before the ranks add theirs.

Over torch.distributed, chunks of rows travel while the next ones are multiplied. Their number follows from measured
rates, so that the bits, equal on all ranks, may differ between runs as torch's products of fewer rows do.

Gradient: every rank holds the same y and computes the same loss from it, so dy is the same on all ranks (the convention
of `tpweave.comm.regions.reduce_from_ranks`), and nothing has to travel:
    da_r = dy @ b_r^T,    db_r = a_r^T @ dy,    dbias = sum over rows of dy

Dims: M rows (all leading dims of a together), K this rank's depth, N columns, R ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import SUM_CODES, direct, local_objection, pg_objection
from tpweave.comm.compression import wire_bytes
from tpweave.comm.hierarchical import sum_everywhere
from tpweave.comm.local_matmul import as_rows, is_native, kernel_operands, local_matmul, wide_dtype
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.exchange import agree, describe
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.pipeline import carrier
from tpweave.distributed.splits import even_splits
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, data_ptr
from tpweave.reference.comm.matmul_all_reduce import matmul_all_reduce_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def matmul_all_reduce_shm(a: Tensor, b: Tensor, bias: Tensor | None, group: TPGroup) -> Tensor:
    rows = as_rows(a)
    m, n = rows.shape[0], b.shape[1]
    if is_native(rows) and m * n * 4 <= _C.SHM_SLOT_BYTES:
        out = a.new_empty(*a.shape[:-1], n)
        rows, b, bias = kernel_operands(rows, b, bias)
        group.shm.matmul_all_reduce(
            rows.data_ptr(), rows.stride(0), b.data_ptr(), *b.stride(), data_ptr(bias), out.data_ptr(), m, n,
            b.shape[0], DTYPE_CODES[a.dtype],
        )  # fmt: skip
        return out
    out = group.empty((m, n), wide_dtype(rows))
    # Rank 0's partial product brings the bias, so that it is added once and before the rounding.
    local_matmul(rows, b, bias if group.rank == 0 else None, out=out)
    group.shm.all_reduce(out.data_ptr(), out.data_ptr(), out.numel(), SUM_CODES[out.dtype], out.shape)
    return out.to(a.dtype).view(*a.shape[:-1], n)


def matmul_all_reduce_pg(a: Tensor, b: Tensor, bias: Tensor | None, group: TPGroup) -> Tensor:
    """In chunks of rows: one travels while the next is multiplied."""
    rows = as_rows(a)
    m, n = rows.shape[0], b.shape[1]
    facts = describe("matmul_all_reduce", a.dtype, (*a.shape[:-1], n))
    # Ranks may differ in depth, but not in their number of chunks.
    depth = max(depths[0] for depths in agree(group, a.device, facts, [b.shape[0]]))
    wire = wire_bytes(a.dtype, group)
    chunks = group.cost_model.chunks(group, "sum_everywhere", m, depth, n, m * n, wire, rows, local_matmul)
    sizes = even_splits(m, chunks)
    with carrier(group, a.device) as submit:
        arriving = [submit(sum_everywhere, local_matmul(part, b).view(-1), group) for part in rows.split(sizes)]
        totals = [chunk.result() for chunk in arriving]
    out = totals[0] if chunks == 1 else torch.cat(totals)
    out = out.view(*a.shape[:-1], n)
    return out if bias is None else out.add_(bias)


def matmul_all_reduce_local(a: Tensor, b: Tensor, bias: Tensor | None, group: TPGroup) -> Tensor:
    return a @ b if bias is None else torch.nn.functional.linear(a, b.t(), bias)


MATMUL_ALL_REDUCE = Op("matmul_all_reduce", [
    Backend("local", matmul_all_reduce_local, Needs(rules=(local_objection,))),
    Backend("shm", matmul_all_reduce_shm, Needs(device="cpu", transport="shm", dtypes=FLOATS | {torch.float64})),
    Backend("pg", matmul_all_reduce_pg, Needs(rules=(pg_objection,))),
    Backend("reference", matmul_all_reduce_reference, Needs()),
])  # fmt: skip


def _impl(a, b, bias, group_name, backend):
    group = TPGroup.by_name(group_name)
    return MATMUL_ALL_REDUCE.choose(Inputs([a, b, bias], group=group), backend).run(a, b, bias, group)


def _fake(a, b, bias, group_name, backend):
    return a.new_empty((*a.shape[:-1], b.shape[1]))


def _setup_context(ctx, inputs, output):
    a, b, bias, _, _ = inputs
    ctx.save_for_backward(a, b)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    a, b = ctx.saved_tensors
    rows_dy = as_rows(dy)
    da = dy @ b.t() if ctx.needs_input_grad[0] else None
    db = as_rows(a).t() @ rows_dy if ctx.needs_input_grad[1] else None
    dbias = rows_dy.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
    return da, db, dbias, None, None


_matmul_all_reduce_op = register_op(
    "matmul_all_reduce(Tensor a, Tensor b, Tensor? bias, str group_name, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def _check(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    if a.dim() == 0 or b.dim() != 2 or a.shape[-1] != b.shape[0]:
        raise ValueError(
            f"matmul_all_reduce: a is {tuple(a.shape)}, b is {tuple(b.shape)}; they must be [..., K] and [K, N]"
        )
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"matmul_all_reduce: bias has shape {tuple(bias.shape)}, b's columns need ({b.shape[1]},)")
    for name, other in (("b", b), ("bias", bias)):
        if other is not None and (other.dtype != a.dtype or other.device != a.device):
            raise ValueError(
                f"matmul_all_reduce: {name} is {other.dtype} on {other.device}, a is {a.dtype} on {a.device}; "
                "they must match"
            )
    if not a.is_floating_point():
        raise ValueError(f"matmul_all_reduce needs floating-point tensors, got {a.dtype}")


def matmul_all_reduce(
    a: Tensor, b: Tensor, group: GroupLike = None, *, bias: Tensor | None = None, backend: str | None = None
) -> Tensor:
    """The sum over ranks of a @ b, plus bias, on every rank.

    Args:
        a: [..., K], this rank's part of the activations; fp32, bf16, fp16 or fp64.
        b: [K, N], this rank's part of the weights, of any strides: `weight.t()` of a linear layer costs nothing.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        bias: [N], the same on all ranks; added once.
        backend: force one row of the table; the same on all ranks.

    Returns:
        [..., N] of a's dtype, bit-equal on all ranks. Its gradient takes dy to be the same on all ranks, as it is where
        every rank computes the same loss (see the module's docstring).

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
        CollectiveMismatchError: the ranks' outputs differ in dtype or shape.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> y = tpweave.matmul_all_reduce(hidden_shard, linear.weight.t(), bias=linear.bias)
    """
    _check(a, b, bias)
    found = resolve_group(group)
    grads = torch.is_grad_enabled() and (b.requires_grad or (bias is not None and bias.requires_grad))
    if not grads and a.dtype in SUM_CODES and direct("matmul_all_reduce", a, found, backend) is not None:
        return matmul_all_reduce_shm(a, b, bias, found)
    return _matmul_all_reduce_op(a, b, bias, found.name, backend)
