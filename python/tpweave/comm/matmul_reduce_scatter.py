"""Matmul and reduce-scatter: y_r = rank r's part along a dimension of (sum over ranks of a_s @ b_s), plus bias.

The output of a row-parallel linear layer under sequence parallelism. Each rank's product lies in memory that its peers
read; a rank adds its part of all of them in rank order in fp32 (fp64 for fp64) and rounds once, with one exception: on
machines with bf16 instructions the products of more than SMALL_ROWS rows of bf16 or fp16 are torch's, already rounded.

    shm          the product in parts, the next rank's first and this rank's own last: peers add while others multiply
    shm_whole    one product: each part costs torch another packing of b
    shm_sequence the product in memory of its own, then `reduce_scatter`: for small tensors, to lend memory costs more

Gradient, with dY the ranks' dy joined (divided by R for a mean), the dual `all_gather_matmul`:
    da_s = dY @ b_s^T,    db_s = a_s^T @ dY,    dbias = sum over the rows of all ranks of dy: equal on all ranks, as
for a parameter that they share.

Dims: M rows (all leading dims of a together), K this rank's depth, N columns, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch

from tpweave.comm.call import direct, local_objection, pg_objection
from tpweave.comm.local_matmul import as_rows, local_matmul, sum_of_matmuls, wide_dtype
from tpweave.comm.reduce_scatter import reduce_scatter_pg, reduce_scatter_shm
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim, splits_or_even
from tpweave.distributed.stepped_call import SteppedCall
from tpweave.library import is_plain_call, register_op
from tpweave.native import _C, DTYPE_CODES, data_ptr
from tpweave.reference.comm.matmul_reduce_scatter import matmul_reduce_scatter_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor
Tensors = Sequence[Tensor]

# From this many rows for each rank, what a product in parts costs is lost in its repeats (fp32, K 2048, N 4096, Zen 3:
# two parts of 128 rows 1.07 of the time in one, of 256 rows 1.05; two ranks with parts of 1024 rows 1.03 to 1.05 of the
# matmul alone, where a whole product of 512 rows takes 0.98 to 1.02).
PART_ROWS = 2048

# Up to this many elements of the tensor that travels, its own memory and the group's slots are quicker than memory that
# is lent (two ranks, fp32, Zen 3: 4,096 elements 0.6 to 0.9 of the time, 131,072 elements 0.90 to 0.97).
SMALL_ELEMENTS = 1 << 19


def _part_of(bias: Tensor | None, dim: int, dims: int, group: TPGroup, splits: Sequence[int]) -> Tensor | None:
    """What this rank adds: its columns' biases where columns are divided."""
    if bias is None or dim != dims - 1:
        return None if bias is None else bias.contiguous()
    return bias.narrow(0, sum(splits[: group.rank]), splits[group.rank]).contiguous()


def _facts(a: Tensor, b: Tensor, dim: int, average: bool) -> tuple[int, int]:
    """What all ranks must agree on beside the splits, in two numbers."""
    return prod(a.shape[:-1]), (b.shape[1] * a.dim() + dim) * 2 + average


def matmul_reduce_scatter_shm(
    a: Tensors, b: Tensors, bias: Tensor | None, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> Tensor:
    x, size, rank = a[0], group.size, group.rank
    shape, columns = (*x.shape[:-1], b[0].shape[1]), dim == x.dim() - 1
    wide, code = wide_dtype(as_rows(x)), DTYPE_CODES[x.dtype]
    other = prod(shape) // shape[dim] if shape[dim] else 0
    starts = [sum(splits[:owner]) for owner in range(size)]
    products = group.empty((sum(splits) * other,), wide)

    def multiply(owner: int) -> None:
        start, length = starts[owner], splits[owner]
        if length * other == 0:
            return
        part = products.narrow(0, start * other, length * other)
        if columns:
            sum_of_matmuls([as_rows(t) for t in a], [w.narrow(1, start, length) for w in b], out=part.view(-1, length))
        else:
            rows = [as_rows(t.narrow(dim, start, length)) for t in a]
            sum_of_matmuls(rows, b, out=part.view(-1, shape[-1]))

    out = x.new_empty((*shape[:dim], splits[rank], *shape[dim + 1 :]))
    bias = _part_of(bias, dim, x.dim(), group, splits)
    width = out.shape[-1]
    own = group.shm.offset_of(products.data_ptr(), products.nbytes) if products.numel() else 0
    fact, extra = _facts(x, b[0], dim, average)
    with SteppedCall(group, "matmul_reduce_scatter", code, splits, fact=fact, extra=extra, own=own) as call:
        call.arrive(size - 1)
        for step in range(1, size):
            multiply((rank + step) % size)
            # Partner: the await_step below, of the rank that owns this part.
            call.publish(step)
        multiply(rank)
        offsets = call.await_arrivals()
        for step in range(1, size):
            # Partner: the publish above, of the rank whose step this rank's part is.
            call.await_step((rank - step) % size, step)
        mine = starts[rank] * other * wide.itemsize
        if out.numel():
            _C.sum_product_part(
                [group.shm.address_of(offset) + mine for offset in offsets],
                (0, 0, 1, out.numel() // width, width, width), data_ptr(bias), out.data_ptr(), DTYPE_CODES[wide], code,
                average,
            )  # fmt: skip
        group.lend(group.shm.sequence, products)
    return out


def matmul_reduce_scatter_shm_whole(
    a: Tensors, b: Tensors, bias: Tensor | None, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> Tensor:
    x, rank = a[0], group.rank
    rows = [as_rows(t) for t in a]
    shape, columns = (*x.shape[:-1], b[0].shape[1]), b[0].shape[1]
    product = group.empty((rows[0].shape[0], columns), wide_dtype(rows[0]))
    sum_of_matmuls(rows, b, out=product)
    out = x.new_empty((*shape[:dim], splits[rank], *shape[dim + 1 :]))
    start, length = sum(splits[:rank]), splits[rank]
    # This rank's part: (first element, stride and number of blocks, rows and columns of a block, stride of rows).
    if dim == len(shape) - 1:
        part = (start, 0, 1, rows[0].shape[0], length, columns)
    else:
        inner = prod(shape[dim + 1 :])
        below = prod(shape[dim + 1 : -1])
        part = (start * inner, shape[dim] * inner, prod(shape[:dim]), length * below, columns, columns)
    bias = _part_of(bias, dim, x.dim(), group, splits)
    sequence = group.shm.matmul_reduce_scatter(
        product.data_ptr(), product.nbytes, part, data_ptr(bias), out.data_ptr(), DTYPE_CODES[product.dtype],
        DTYPE_CODES[x.dtype], average, splits, *_facts(x, b[0], dim, average),
    )  # fmt: skip
    group.lend(sequence, product)
    return out


def _product(a: Tensors, b: Tensors, bias: Tensor | None = None) -> Tensor:
    """sum_i a[i] @ b[i] + bias in a's dtype."""
    rows = [as_rows(t) for t in a]
    shape = (*a[0].shape[:-1], b[0].shape[1])
    if len(a) == 1:
        return local_matmul(rows[0], b[0], bias).view(shape)
    out = sum_of_matmuls(rows, b, out=rows[0].new_empty((rows[0].shape[0], shape[-1]), dtype=wide_dtype(rows[0])))
    return (out if bias is None else out + bias).to(a[0].dtype).view(shape)


def matmul_reduce_scatter_shm_sequence(
    a: Tensors, b: Tensors, bias: Tensor | None, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> Tensor:
    rows = [as_rows(t) for t in a]
    product = rows[0].new_empty((rows[0].shape[0], b[0].shape[1]), dtype=wide_dtype(rows[0]))
    sum_of_matmuls(rows, b, out=product)
    out = reduce_scatter_shm(product.view(*a[0].shape[:-1], b[0].shape[1]), dim, group, splits, average)
    bias = _part_of(bias, dim, a[0].dim(), group, splits)
    return (out if bias is None else out + bias).to(a[0].dtype)


def matmul_reduce_scatter_pg(
    a: Tensors, b: Tensors, bias: Tensor | None, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> Tensor:
    out = reduce_scatter_pg(_product(a, b), dim, group, splits, average)
    bias = _part_of(bias, dim, a[0].dim(), group, splits)
    return out if bias is None else out + bias


def matmul_reduce_scatter_local(
    a: Tensors, b: Tensors, bias: Tensor | None, dim: int, group: TPGroup, splits: Sequence[int], average: bool
) -> Tensor:
    return _product(a, b, bias)


def parts_objection(inputs: Inputs) -> str | None:
    """Advice against the product in parts."""
    part_rows = inputs.values.get("part_rows")
    if part_rows is None or part_rows >= PART_ROWS:
        return None
    return f"parts of less than {PART_ROWS} rows of the first dimension cost more than they hide; this has {part_rows}"


def size_objection(inputs: Inputs) -> str | None:
    """Advice against lent memory."""
    elements = inputs.values.get("elements")
    if elements is None or elements > SMALL_ELEMENTS:
        return None
    return f"up to {SMALL_ELEMENTS} elements travel faster in sequence; these are {elements}"


def rows_of_parts(a: Tensor, dim: int, splits: Sequence[int]) -> int:
    """Rows of the smallest part, of those that lie together; 0 where the parts are no runs of rows."""
    if dim == a.dim() - 1 or prod(a.shape[:dim]) != 1:
        return 0
    return min(splits) * prod(a.shape[dim + 1 : -1])


_DTYPES = FLOATS | {torch.float64}

MATMUL_REDUCE_SCATTER = Op("matmul_reduce_scatter", [
    Backend("local", matmul_reduce_scatter_local, Needs(rules=(local_objection,))),
    Backend("shm", matmul_reduce_scatter_shm,
            Needs(device="cpu", transport="shm", dtypes=_DTYPES, advice=(parts_objection, size_objection))),
    Backend("shm_whole", matmul_reduce_scatter_shm_whole,
            Needs(device="cpu", transport="shm", dtypes=_DTYPES, advice=(size_objection,))),
    Backend("shm_sequence", matmul_reduce_scatter_shm_sequence, Needs(device="cpu", transport="shm", dtypes=_DTYPES)),
    Backend("pg", matmul_reduce_scatter_pg, Needs(rules=(pg_objection,))),
    Backend("reference", matmul_reduce_scatter_reference, Needs()),
])  # fmt: skip


def _impl(a, b, bias, dim, group_name, splits, average, backend):
    group = TPGroup.by_name(group_name)
    inputs = Inputs([*a, *b, bias], group=group, part_rows=rows_of_parts(a[0], dim, splits),
                    elements=prod(a[0].shape[:-1]) * b[0].shape[1])  # fmt: skip
    return MATMUL_REDUCE_SCATTER.choose(inputs, backend).run(a, b, bias, dim, group, splits, average)


def _fake(a, b, bias, dim, group_name, splits, average, backend):
    shape = (*a[0].shape[:-1], b[0].shape[1])
    return a[0].new_empty((*shape[:dim], splits[TPGroup.by_name(group_name).rank], *shape[dim + 1 :]))


def _setup_context(ctx, inputs, output):
    a, b, bias, ctx.dim, ctx.group_name, ctx.splits, ctx.average, ctx.backend = inputs
    ctx.save_for_backward(*a, *b)
    ctx.has_bias = bias is not None


def _backward(ctx, dy):
    # Imported here: the backward of all_gather_matmul is matmul_reduce_scatter.
    from tpweave.comm.all_gather_matmul import all_gather_matmul_op

    saved = ctx.saved_tensors
    a, b = saved[: len(saved) // 2], saved[len(saved) // 2 :]
    size = TPGroup.by_name(ctx.group_name).size
    if ctx.average:
        dy = dy / size
    whole, da = all_gather_matmul_op(
        dy.contiguous(), [w.t() for w in b], [], ctx.dim, ctx.group_name, ctx.splits, True, ctx.backend
    )
    rows = as_rows(whole)
    db = [as_rows(x).t() @ rows for x in a]
    dbias = rows.sum(0) * (size if ctx.average else 1) if ctx.has_bias else None
    return list(da), db, dbias, None, None, None, None, None


matmul_reduce_scatter_op = register_op(
    "matmul_reduce_scatter(Tensor[] a, Tensor[] b, Tensor? bias, int dim, str group_name, SymInt[] splits, "
    "bool average, str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def check_matmul(op: str, a: Tensor, depth: int, b: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError where b and bias do not fit an a that has, with the other ranks', `depth` columns."""
    if a.dim() < 2 or b.dim() != 2 or depth != b.shape[0]:
        joined = "" if a.shape[-1:] == (depth,) else f" with {depth} columns on all ranks together"
        raise ValueError(
            f"{op}: a is {tuple(a.shape)}{joined}, b is {tuple(b.shape)}; they must be [..., M, K] and [K, N]"
        )
    if bias is not None and bias.shape != b.shape[1:]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, b's columns need ({b.shape[1]},)")
    for name, other in (("b", b), ("bias", bias)):
        if other is not None and (other.dtype != a.dtype or other.device != a.device):
            raise ValueError(
                f"{op}: {name} is {other.dtype} on {other.device}, a is {a.dtype} on {a.device}; they must match"
            )
    if not a.is_floating_point():
        raise ValueError(f"{op} needs floating-point tensors, got {a.dtype}")


def matmul_reduce_scatter(
    a: Tensor,
    b: Tensor,
    reduce_op: str = "sum",
    scatter_dim: int = 0,
    group: GroupLike = None,
    *,
    splits: Sequence[int] | None = None,
    bias: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """This rank's part, along `scatter_dim`, of the sum over ranks of a @ b, plus bias.

    Args:
        a: [..., M, K], this rank's part of the activations, of at least two dimensions; fp32, bf16, fp16 or fp64.
        b: [K, N], this rank's part of the weights, of any strides: `weight.t()` of a linear layer costs nothing.
        reduce_op: `"sum"`, or `"avg"` for the mean over ranks of the products.
        scatter_dim: the dimension of a @ b that is divided; the last is that of the columns.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's length along `scatter_dim`, the same list on all ranks; None for nearly equal lengths, the
            longer ones first (as `torch.tensor_split`).
        bias: [N], the same on all ranks; added once, after the mean.
        backend: force one row of the table; the same on all ranks.

    Returns:
        a new tensor of a's dtype, `splits[rank]` long along `scatter_dim`. Its gradient is an `all_gather_matmul`
        (see the module's docstring).

    Raises:
        ValueError: shapes, dtypes, devices or splits that do not fit together; no such dimension or reduce_op.
        CollectiveMismatchError: the ranks' shapes, dtypes or splits differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Source: torch's `symm_mem.fused_matmul_reduce_scatter`, of which the first four arguments are.

    Example:
        >>> y_shard_m = tpweave.matmul_reduce_scatter(hidden_shard_k, linear.weight.t())
    """
    check_matmul("matmul_reduce_scatter", a, a.shape[-1] if a.dim() else 0, b, bias)
    dim = check_dim("matmul_reduce_scatter", scatter_dim, a.dim())
    if reduce_op not in ("sum", "avg"):
        raise ValueError(f"matmul_reduce_scatter: reduce_op is {reduce_op!r}; it takes 'sum' or 'avg'")
    found = resolve_group(group)
    length = b.shape[1] if dim == a.dim() - 1 else a.shape[dim]
    splits = splits_or_even("matmul_reduce_scatter", "splits", splits, found.size, length)
    if a.dtype in _DTYPES and direct("matmul_reduce_scatter", a, found, backend) is not None and is_plain_call(b, bias):
        run = matmul_reduce_scatter_shm_whole
        if prod(a.shape[:-1]) * b.shape[1] <= SMALL_ELEMENTS:
            run = matmul_reduce_scatter_shm_sequence
        elif rows_of_parts(a, dim, splits) >= PART_ROWS:
            run = matmul_reduce_scatter_shm
        return run([a], [b], bias, dim, found, splits, reduce_op == "avg")
    call = _impl if is_plain_call(a, b, bias) else matmul_reduce_scatter_op
    return call([a], [b], bias, dim, found.name, splits, reduce_op == "avg", backend)
