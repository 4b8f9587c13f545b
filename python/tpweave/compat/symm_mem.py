"""CPU kernels, with gradients, for the fused collectives of torch's symmetric memory.

    from tpweave.compat import symm_mem
    symm_mem.register()

Torch gives `torch.ops.symm_mem.fused_all_gather_matmul`, `fused_matmul_reduce_scatter`, their scaled forms and the
low-contention collectives CUDA kernels only. After `register()` CPU tensors take tpweave's, so code written for torch's
(asynchronous tensor parallelism, torchtitan's `AllGatherLinear` and `LinearReduceScatter`) runs and is tested on CPUs.
CUDA tensors go where they went.

Values, shapes and strides of the results are torch's. The unscaled ops are differentiable here; scaled ones gather or
scatter float8 bytes and multiply by `torch._scaled_mm`, whose result has no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tpweave.comm.all_gather import all_gather
from tpweave.comm.all_gather_matmul import all_gather_matmul
from tpweave.comm.matmul_reduce_scatter import matmul_reduce_scatter
from tpweave.comm.reduce_scatter import reduce_scatter
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_dim

Tensor = torch.Tensor

_libraries: list[torch.library.Library] = []


def register() -> None:
    """Give torch's fused collectives their CPU kernels, for the rest of this process. A second call changes nothing.

    Raises:
        RuntimeError: this build of torch has no symmetric memory, or its ops have CPU kernels already.

    Example:
        >>> symm_mem.register()
        >>> a, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(x_shard, [w.t()], 0, process_group.group_name)
    """
    if _libraries:
        return
    try:
        # Defines the ops.
        import torch.distributed._symmetric_memory
    except ImportError as error:
        raise RuntimeError(f"this build of torch ({torch.__version__}) has no symmetric memory: {error}") from error
    library = torch.library.Library("symm_mem", "IMPL")
    for name, kernel, differentiable in _KERNELS:
        library.impl(name, kernel, "CPU")
        # Autograd's key comes first where a gradient is wanted, and its kernel is the same: tpweave's ops record.
        if differentiable:
            library.impl(name, kernel, "AutogradCPU")
    _libraries.append(library)


def _group(name: Any) -> TPGroup:
    return resolve_group(dist.distributed_c10d._resolve_process_group(name))


def _check_matrices(op: str, a: Tensor, bs: Sequence[Tensor]) -> None:
    if a.dim() < 2:
        raise ValueError(f"{op}: A has shape {tuple(a.shape)}; it must have at least 2 dims")
    for b in bs:
        if b.dim() != 2:
            raise ValueError(f"{op}: B has shape {tuple(b.shape)}; it must be a matrix")


def fused_all_gather_matmul(
    A: Tensor, Bs: list[Tensor], gather_dim: int, group_name: Any, *, return_A: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    """As `torch.ops.symm_mem.fused_all_gather_matmul`: (the gathered A or None, A @ B for each B).

    Args:
        A: [..., K], this rank's shard.
        Bs: [K, N] each; [K of all ranks, N] where `gather_dim` is A's last.
        gather_dim: the dim along which the shards are joined.
        group_name: a process group's `group_name`.
        return_A: whether the gathered A is wanted.
    """
    op = "fused_all_gather_matmul"
    _check_matrices(op, A, Bs)
    dim = check_dim(op, gather_dim, A.dim())
    if dim == A.dim() - 1:
        return all_gather_matmul(A, Bs, dim, _group(group_name), return_a=return_A)
    # The gathered dim is the outermost in the memory of torch's results.
    a, outs = all_gather_matmul(A.movedim(dim, 0), Bs, 0, _group(group_name), return_a=return_A)
    return None if a is None else a.movedim(0, dim), [out.movedim(0, dim) for out in outs]


def fused_matmul_reduce_scatter(A: Tensor, B: Tensor, reduce_op: str, scatter_dim: int, group_name: Any) -> Tensor:
    """As `torch.ops.symm_mem.fused_matmul_reduce_scatter`: this rank's part of the ranks' A @ B, added or averaged.

    Args:
        A: [..., K], this rank's part of the activations.
        B: [K, N].
        reduce_op: `"sum"` or `"avg"`.
        scatter_dim: the dim of A @ B that is divided, into equal parts.
        group_name: a process group's `group_name`.
    """
    op = "fused_matmul_reduce_scatter"
    _check_matrices(op, A, [B])
    group = _group(group_name)
    dim = check_dim(op, scatter_dim, A.dim())
    _check_divides(op, (*A.shape[:-1], B.shape[1]), dim, group)
    return matmul_reduce_scatter(A, B, reduce_op, dim, group)


def _check_divides(op: str, shape: Sequence[int], dim: int, group: TPGroup) -> None:
    if shape[dim] % group.size != 0:
        raise ValueError(
            f"{op}: dim {dim} of the product {tuple(shape)} does not divide by the group's {group.size} ranks; "
            "tpweave.matmul_reduce_scatter takes uneven parts"
        )


def fused_all_gather_scaled_matmul(
    A: Tensor,
    Bs: list[Tensor],
    A_scale: Tensor,
    B_scales: list[Tensor],
    gather_dim: int,
    group_name: Any,
    biases: list[Tensor | None],
    result_scales: list[Tensor | None],
    out_dtypes: list[Any],
    use_fast_accum: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """As `torch.ops.symm_mem.fused_all_gather_scaled_matmul`.

    Args:
        A: [..., K] float8, this rank's shard; Bs, [K, N] float8 each.
        A_scale: fp32, of one element, [..., 1] of the shard, or [..., 1] of the gathered A.
        B_scales, biases, result_scales, out_dtypes, use_fast_accum: one for each B, as `torch._scaled_mm` takes them.
        gather_dim: the dim along which the shards are joined; not the last.
        group_name: a process group's `group_name`.
    """
    from torch.distributed._symmetric_memory import _maybe_convert_scalar_types_to_dtypes

    op = "fused_all_gather_scaled_matmul"
    _check_matrices(op, A, Bs)
    lists: dict[str, Sequence[Any]] = {
        "B_scales": B_scales, "biases": biases, "result_scales": result_scales, "out_dtypes": out_dtypes,
        "use_fast_accum": use_fast_accum,
    }  # fmt: skip
    for name, values in lists.items():
        if len(values) != len(Bs):
            raise ValueError(f"{op}: {len(Bs)} Bs, but {len(values)} {name}")
    dim = check_dim(op, gather_dim, A.dim())
    if dim == A.dim() - 1:
        raise ValueError(f"{op} does not gather the last dim ({gather_dim} of {A.dim()}), nor does torch's")
    group = _group(group_name)
    gathered = all_gather(A.movedim(dim, 0), 0, group)
    full_shape = list(A.shape)
    full_shape[dim] *= group.size
    if A_scale.shape[:-1] == A.shape[:-1] and A_scale.shape[-1] == 1:
        scale = all_gather(A_scale.movedim(dim, 0), 0, group).flatten(0, -2)
    elif A_scale.numel() == 1:
        scale = A_scale
    elif list(A_scale.shape[:-1]) == full_shape[:-1]:
        scale = A_scale.movedim(dim, 0).flatten(0, -2)
    else:
        raise ValueError(
            f"{op}: A_scale has shape {tuple(A_scale.shape)}; for a shard of {tuple(A.shape)} it must have one "
            f"element, {(*A.shape[:-1], 1)} or {(*full_shape[:-1], 1)}"
        )
    rows = gathered.flatten(0, -2)
    outs = []
    for i, out_dtype in enumerate(_maybe_convert_scalar_types_to_dtypes(out_dtypes)):
        out = torch._scaled_mm(
            rows, Bs[i], scale.contiguous(), B_scales[i], biases[i], result_scales[i], out_dtype, use_fast_accum[i]
        )
        outs.append(out.unflatten(0, gathered.shape[:-1]).movedim(0, dim))
    return gathered.movedim(0, dim), outs


def fused_scaled_matmul_reduce_scatter(
    A: Tensor,
    B: Tensor,
    A_scale: Tensor,
    B_scale: Tensor,
    reduce_op: str,
    orig_scatter_dim: int,
    scatter_dim_after_maybe_reshape: int,
    group_name: Any,
    output_shape: Sequence[int],
    bias: Tensor | None = None,
    result_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """As `torch.ops.symm_mem.fused_scaled_matmul_reduce_scatter`.

    Args:
        A: [..., K] float8; B, [K, N] float8.
        A_scale: fp32, of one element or [..., 1]; B_scale as `torch._scaled_mm` takes it.
        reduce_op: `"sum"` or `"avg"`.
        orig_scatter_dim: the dim of `output_shape` that is divided, into equal parts.
        scatter_dim_after_maybe_reshape: the same dim of A.
        group_name: a process group's `group_name`.
        output_shape: the product's, [..., N].
        bias, result_scale, out_dtype, use_fast_accum: as `torch._scaled_mm` takes them.
    """
    op = "fused_scaled_matmul_reduce_scatter"
    _check_matrices(op, A, [B])
    check_dim(op, scatter_dim_after_maybe_reshape, A.dim())
    dim = check_dim(op, orig_scatter_dim, len(output_shape))
    if A_scale.numel() > 1:
        if A_scale.shape[:-1] != A.shape[:-1]:
            raise ValueError(
                f"{op}: A_scale has shape {tuple(A_scale.shape)}; for A of {tuple(A.shape)} it must have one element "
                f"or {(*A.shape[:-1], 1)}"
            )
        A_scale = A_scale.flatten(0, -2).contiguous()
    group = _group(group_name)
    shape = (*output_shape[:-1], B.shape[1])
    _check_divides(op, shape, dim, group)
    product = torch._scaled_mm(
        A.flatten(0, -2).contiguous(), B, A_scale, B_scale, bias, result_scale, out_dtype, use_fast_accum
    )
    return reduce_scatter(product.view(shape), dim, group, reduce_op=reduce_op)


def low_contention_all_gather(tensor: Tensor, group_name: Any) -> Tensor:
    """As `torch.ops.symm_mem._low_contention_all_gather`: the ranks' tensors joined along the first dim."""
    return all_gather(tensor, 0, _group(group_name))


def low_contention_reduce_scatter(tensor: Tensor, reduce_op: str, group_name: Any) -> Tensor:
    """As `torch.ops.symm_mem._low_contention_reduce_scatter`: this rank's rows of the sum or mean."""
    group = _group(group_name)
    _check_divides("_low_contention_reduce_scatter", tensor.shape, 0, group)
    return reduce_scatter(tensor, 0, group, reduce_op=reduce_op)


# Name, kernel, whether it records gradients.
_KERNELS = (
    ("fused_all_gather_matmul", fused_all_gather_matmul, True),
    ("fused_matmul_reduce_scatter", fused_matmul_reduce_scatter, True),
    ("fused_all_gather_scaled_matmul", fused_all_gather_scaled_matmul, False),
    ("fused_scaled_matmul_reduce_scatter", fused_scaled_matmul_reduce_scatter, False),
    ("_low_contention_all_gather", low_contention_all_gather, True),
    ("_low_contention_reduce_scatter", low_contention_reduce_scatter, True),
)
