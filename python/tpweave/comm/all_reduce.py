"""All-reduce: y = sum over ranks of x_r, added in rank order in fp32 (fp64 for fp64) and rounded once.

Every rank gets the same bits, on every transport and in every run.

Gradient: each rank's y is its own variable, so with the loss L = sum over ranks of L_r,
    dx_r = sum over ranks of dy_s
which is an all-reduce again, as in `torch.distributed.nn`. Where every rank computes the same loss from the same y
(tensor-parallel layers), that counts it R times: those use `tpweave.comm.regions.reduce_from_ranks`, whose backward
is the identity.

Dims: R ranks. Source: one-shot and two-shot all-reduce as in vLLM's custom all-reduce and DeepSpeed's shm collectives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.autograd.graph import increment_version

from tpweave.comm.call import (
    SUM_CODES,
    check_tensor,
    direct,
    float_objection,
    local_objection,
    native_sum_objection,
    pg_objection,
)
from tpweave.comm.hierarchical import sum_everywhere
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.cuda_memory import channel, cuda_objection, current_stream, one_shot_objection
from tpweave.distributed.exchange import agree, describe
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.peer_memory import peer_memory, peer_memory_objection
from tpweave.library import register_op
from tpweave.native import new_output
from tpweave.reference.comm.all_reduce import all_reduce_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor


def all_reduce_local(x: Tensor, group: TPGroup) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def all_reduce_shm(x: Tensor, group: TPGroup) -> Tensor:
    x = x.contiguous()
    out = new_output(x)
    group.shm.all_reduce(x.data_ptr(), out.data_ptr(), x.numel(), SUM_CODES[x.dtype], x.shape)
    return out


def all_reduce_pg(x: Tensor, group: TPGroup) -> Tensor:
    """Two-shot: rank r adds the ranks' r-th pieces in rank order, then all gather the sums.

    As many bytes as a ring's, with the same bits as the other rows, where a ring rounds bf16 at each step. Where ranks
    share hosts, these add first (see `tpweave.comm.hierarchical` for bytes and bits).
    """
    # On a GPU the header would cost a synchronisation with the host; NCCL has its own watchdog.
    if x.is_cpu:
        agree(group, x.device, describe("all_reduce", x.dtype, x.shape))
    return sum_everywhere(x.reshape(-1), group).view(x.shape)


def all_reduce_cuda(x: Tensor, group: TPGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        two_shot = one_shot_objection(group, x.nbytes) is not None
        # Two halves, of multiples of 16 bytes.
        made = channel(group, x.device, "all_reduce", 2 * ((x.nbytes + 15) // 16 * 16))
        made.all_reduce(
            x.data_ptr(), out.data_ptr(), x.numel(), SUM_CODES[x.dtype], two_shot, group.timeout,
            current_stream(x.device),
        )  # fmt: skip
    return out


def all_reduce_triton(x: Tensor, group: TPGroup) -> Tensor:
    from tpweave.kernels.comm.all_reduce import all_reduce_fwd

    x = x.contiguous()
    # On a GPU the header would cost a synchronisation with the host.
    if x.is_cpu:
        agree(group, x.device, describe("all_reduce", x.dtype, x.shape))
    return all_reduce_fwd(x, peer_memory(group, x.device, x.nbytes))


ALL_REDUCE = Op("all_reduce", [
    Backend("local", all_reduce_local, Needs(rules=(local_objection,))),
    Backend("shm", all_reduce_shm, Needs(device="cpu", transport="shm", rules=(native_sum_objection,))),
    Backend("cuda", all_reduce_cuda, Needs(device="cuda", dtypes=FLOATS, rules=(float_objection, cuda_objection))),
    Backend("triton", all_reduce_triton, Needs(
        device="cuda", dtypes=FLOATS, module="triton", rules=(float_objection, peer_memory_objection))),
    Backend("pg", all_reduce_pg, Needs(rules=(pg_objection,))),
    Backend("reference", all_reduce_reference, Needs()),
])  # fmt: skip


def _impl(x, group_name, backend):
    group = TPGroup.by_name(group_name)
    return ALL_REDUCE.choose(Inputs([x], group=group), backend).run(x, group)


def _inplace_impl(x, group_name, backend):
    x.copy_(_impl(x, group_name, backend))


def _fake(x, group_name, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    _, ctx.group_name, ctx.backend = inputs


def _backward(ctx, dy):
    return _all_reduce_op(dy, ctx.group_name, ctx.backend), None, None


_all_reduce_op = register_op(
    "all_reduce(Tensor x, str group_name, str? backend) -> Tensor", _impl, _fake, _backward, _setup_context
)
_all_reduce_inplace_op = register_op(
    "all_reduce_(Tensor(a!) x, str group_name, str? backend) -> ()", _inplace_impl, lambda x, group_name, backend: None
)


def _check(op: str, x: Tensor) -> None:
    check_tensor(op, x)
    if x.dtype == torch.bool:
        raise ValueError(f"{op} adds numbers, got torch.bool; convert to torch.uint8 or torch.int32 first")


def all_reduce(x: Tensor, group: GroupLike = None, *, backend: str | None = None) -> Tensor:
    """Sum of the ranks' tensors, on every rank.

    Args:
        x: any shape, the same on all ranks; any numeric dtype.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        backend: force one row of the table, e.g. `"reference"`; the same on all ranks.

    Returns:
        a new, contiguous tensor of x's shape and dtype, bit-equal on all ranks. Its gradient is the all-reduce of
        the ranks' gradients (see the module's docstring for the other convention).

    Raises:
        ValueError: x is bool or not a strided tensor.
        CollectiveMismatchError: the ranks called different operations, dtypes or shapes.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> y = tpweave.all_reduce(partial)
    """
    code = SUM_CODES.get(x.dtype)
    if code is not None and (found := direct("all_reduce", x, group, backend)) is not None:
        out = new_output(x)
        found.shm.all_reduce(x.data_ptr(), out.data_ptr(), x.numel(), code, x.shape)
        return out
    _check("all_reduce", x)
    return _all_reduce_op(x, resolve_group(group).name, backend)


def all_reduce_(x: Tensor, group: GroupLike = None, *, backend: str | None = None) -> Tensor:
    """`all_reduce` in place: overwrites x with the sum and returns it.

    Raises:
        ValueError: as `all_reduce`, and when x takes part in a gradient (use `all_reduce` there).

    Example:
        >>> tpweave.all_reduce_(counts)
    """
    code = SUM_CODES.get(x.dtype)
    if code is not None and (found := direct("all_reduce", x, group, backend)) is not None:
        increment_version(x)
        data = x.data_ptr()
        found.shm.all_reduce(data, data, x.numel(), code, x.shape)
        return x
    _check("all_reduce_", x)
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("all_reduce_ overwrites a tensor that requires grad; use all_reduce, or torch.no_grad()")
    _all_reduce_inplace_op(x, resolve_group(group).name, backend)
    return x
