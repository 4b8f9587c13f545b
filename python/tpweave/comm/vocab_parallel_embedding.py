"""Embedding of token ids in a table whose rows are divided over the ranks.

    y[...] = weight_r[id - start_r] of the rank r that holds row id: start_r <= id < start_r + splits[r]

Gradient: every rank holds the same y and computes the same loss from it, so dy is the same on all ranks (the convention
of `matmul_all_reduce`), and nothing has to travel:
    dweight_r[id - start_r] += dy[...] where rank r holds row id, and id is not padding_idx

Dims: V rows of all ranks together, H hidden, R ranks. Source: Shoeybi et al., "Megatron-LM", 2019, where the rows are
added to zeros in an all-reduce; here each is copied once, from the rank that holds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tpweave.comm.all_reduce import all_reduce_pg
from tpweave.comm.call import check_tensor, direct, local_objection, pg_objection
from tpweave.dispatch import Backend, Inputs, Needs, Op
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_splits
from tpweave.library import register_op
from tpweave.native import new_output
from tpweave.reference.comm.vocab_parallel_embedding import own_rows, vocab_parallel_embedding_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor

# A slot of the arena (csrc/symm_mem/arena.h) holds a whole row.
MAX_ROW_BYTES = 512 * 1024


def row_objection(inputs: Inputs) -> str | None:
    """A rule of the shm row."""
    nbytes = inputs.values.get("row_bytes", 0)
    return None if nbytes <= MAX_ROW_BYTES else f"takes rows of up to {MAX_ROW_BYTES} bytes, not {nbytes}"


def vocab_parallel_embedding_local(ids: Tensor, weight: Tensor, group: TPGroup, splits: Sequence[int]) -> Tensor:
    return F.embedding(ids, weight)


def vocab_parallel_embedding_shm(ids: Tensor, weight: Tensor, group: TPGroup, splits: Sequence[int]) -> Tensor:
    ids, weight = ids.to(torch.int64).contiguous(), weight.contiguous()
    hidden = weight.shape[1]
    out = new_output(weight, (*ids.shape, hidden))
    group.shm.vocab_parallel_embedding(weight, ids, out, ids.numel(), hidden * weight.element_size(), splits)
    return out


def vocab_parallel_embedding_pg(ids: Tensor, weight: Tensor, group: TPGroup, splits: Sequence[int]) -> Tensor:
    return all_reduce_pg(own_rows(ids, weight, sum(splits[: group.rank])), group)


VOCAB_PARALLEL_EMBEDDING = Op("vocab_parallel_embedding", [
    Backend("local", vocab_parallel_embedding_local, Needs(rules=(local_objection,))),
    Backend("shm", vocab_parallel_embedding_shm, Needs(device="cpu", transport="shm", rules=(row_objection,))),
    Backend("pg", vocab_parallel_embedding_pg, Needs(rules=(pg_objection,))),
    Backend("reference", vocab_parallel_embedding_reference, Needs()),
])  # fmt: skip


def _impl(ids, weight, group_name, splits, padding_idx, backend):
    # On a GPU this would cost a synchronisation with the host.
    if ids.numel() > 0 and ids.is_cpu:
        low, high = (int(bound) for bound in ids.aminmax())
        if low < 0 or high >= sum(splits):
            raise ValueError(f"token ids go from {low} to {high}; this embedding has [0, {sum(splits)})")
    group = TPGroup.by_name(group_name)
    row_bytes = weight.shape[1] * weight.element_size()
    row = VOCAB_PARALLEL_EMBEDDING.choose(Inputs([ids, weight], group=group, row_bytes=row_bytes), backend)
    return row.run(ids, weight, group, splits)


def _fake(ids, weight, group_name, splits, padding_idx, backend):
    return weight.new_empty((*ids.shape, weight.shape[1]))


def _setup_context(ctx, inputs, output):
    ids, weight, group_name, splits, ctx.padding_idx, _ = inputs
    ctx.start, ctx.rows = sum(splits[: TPGroup.by_name(group_name).rank]), weight.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, dy):
    (ids,) = ctx.saved_tensors
    # Rows of other ranks, and the padding's, meet in one row more, which is cut off.
    own = (ids >= ctx.start) & (ids < ctx.start + ctx.rows) & (ids != ctx.padding_idx)
    places = torch.where(own, ids - ctx.start, ctx.rows)
    dw = torch.ops.aten.embedding_dense_backward(dy, places, ctx.rows + 1, ctx.rows, False)
    return None, dw[: ctx.rows], None, None, None, None


_vocab_parallel_embedding_op = register_op(
    "vocab_parallel_embedding(Tensor ids, Tensor weight, str group_name, int[] splits, int padding_idx, "
    "str? backend) -> Tensor",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    group: GroupLike = None,
    *,
    splits: Sequence[int] | None = None,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Rows of a table that is divided over the ranks, differentiable in the table.

    Args:
        ids: [...], int64 or int32 in [0, V), the same on all ranks.
        weight: [V_r, H], this rank's rows, of any dtype.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        splits: each rank's rows; None where all have as many.
        padding_idx: the id whose row gets no gradient.
        backend: force one row of the table of backends; the same on all ranks.

    Returns:
        [..., H] of the weight's dtype, the same on all ranks. The gradient takes that of the result to be the same on
        all ranks (see the module's docstring).

    Raises:
        ValueError: an id outside [0, V), ids that are no integers, a weight that is not 2-D, splits that do not fit.
        CollectiveMismatchError: the ranks' splits, H or (in shared memory) ids differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> hidden = tpweave.vocab_parallel_embedding(input_ids, embed_shard)
    """
    check_tensor("vocab_parallel_embedding", weight)
    if ids.dtype not in (torch.int64, torch.int32) or weight.dim() != 2:
        raise ValueError(
            f"vocab_parallel_embedding: ids are {ids.dtype}, weight is {tuple(weight.shape)}; "
            "they must be int64 or int32 and [V_r, H]"
        )
    found, rows = resolve_group(group), weight.shape[0]
    if splits is None:
        splits = [rows] * found.size
    splits = check_splits("vocab_parallel_embedding", "splits", splits, found.size)
    if splits[found.rank] != rows:
        raise ValueError(
            f"vocab_parallel_embedding: splits {splits} give rank {found.rank} {splits[found.rank]} rows, "
            f"weight has {rows}"
        )
    fits = weight.shape[1] * weight.element_size() <= MAX_ROW_BYTES
    if fits and ids.is_cpu and direct("vocab_parallel_embedding", weight, found, backend) is not None:
        return vocab_parallel_embedding_shm(ids, weight, found, splits)
    padding = -1 if padding_idx is None else padding_idx
    return _vocab_parallel_embedding_op(ids, weight, found.name, splits, padding, backend)
