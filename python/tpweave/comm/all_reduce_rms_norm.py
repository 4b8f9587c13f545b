"""All-reduce, residual add and RMS norm in one: what stands between two row-parallel halves of a transformer layer.

    h = sum over ranks of x_r + residual          (in rank order, in fp32)
    residual_out = h                              (rounded once, to x's dtype)
    normed = h * rstd * weight,                   rstd = 1 / sqrt(mean(h^2) + eps), of h before it is rounded
With quantize, of each row of normed (before it is rounded):
    scale = max|normed| / 127 (int8) or / 448 (fp8, e4m3),    codes = round(normed / scale)

`all_reduce`, an addition and `rms_norm` round h three times on the way; here it is once.

Gradient: every rank holds the same results and computes the same loss from them, so their gradients are the same on all
ranks (the convention of `matmul_all_reduce`), and nothing has to travel:
    dh = rstd * (g - xhat * mean(g * xhat)) + dresidual_out,    g = dnormed * weight, xhat = h * rstd
    dx_r = dresidual = dh,    dweight = sum over rows of dnormed * xhat

Dims: H hidden, N all other dims together, R ranks. Source: flashinfer's and vLLM's fused all-reduce and RMS norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.compiler import is_compiling

from tpweave.comm.call import check_tensor, direct, float_objection, local_objection, pg_objection
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.cuda_memory import channel, cuda_objection, current_stream, one_shot_objection
from tpweave.distributed.exchange import agree, describe, exchange_all, exchange_pieces
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import even_splits
from tpweave.library import register_op
from tpweave.native import _C, DTYPE_CODES, data_ptr, empty_dense, new_output
from tpweave.ops.norm_common import check_norm, dense
from tpweave.ops.rms_norm import RMS_NORM_BWD
from tpweave.reference.comm.all_reduce_rms_norm import (
    CODES,
    all_reduce_rms_norm_reference,
    reduced_norm_reference,
)

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor

# csrc/cpu/comm/all_reduce_rms_norm.h holds the same numbers.
_NORMED_AS = {None: 0, "int8": 1, "fp8": 2}
# Of a slot of the arena (csrc/symm_mem/arena.h), which holds a whole row.
MAX_ROW_BYTES = 512 * 1024
# csrc/cuda/comm/all_reduce_rms_norm.h holds the same number.
MAX_CUDA_COLUMNS = 24 * 1024


def row_objection(inputs: Inputs) -> str | None:
    """A rule of the shm row."""
    x = inputs.tensors[0]
    nbytes = x.shape[-1] * x.element_size() if x.dim() else 0
    return None if nbytes <= MAX_ROW_BYTES else f"takes rows of up to {MAX_ROW_BYTES} bytes, not {nbytes}"


def cuda_norm_objection(inputs: Inputs) -> str | None:
    """A rule of the cuda row, in which every rank sums everything and keeps a row in shared memory."""
    x = inputs.tensors[0]
    if inputs.values.get("quantize") is not None:
        return "gives no codes (quantize)"
    if x.dim() == 0 or x.numel() == 0:
        return "takes at least one element"
    if x.shape[-1] > MAX_CUDA_COLUMNS:
        return f"takes a last dim of up to {MAX_CUDA_COLUMNS}, not {x.shape[-1]}"
    return one_shot_objection(inputs.group, x.nbytes)


def _outputs(
    x: Tensor, quantize: str | None, empty: Callable[[Tensor, torch.Size], Tensor] = new_output
) -> tuple[Tensor, Tensor, Tensor]:
    """y or codes, residual_out, rstd or scales; uninitialised."""
    y = empty(x, x.shape) if quantize is None else x.new_empty(x.shape, dtype=CODES[quantize][0])
    wide = torch.float64 if x.dtype == torch.float64 and quantize is None else torch.float32
    return y, empty(x, x.shape), x.new_empty(x.shape[:-1], dtype=wide)


def _parameter(weight: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, int]:
    """The weight as the kernels read it beside tensors of `dtype`, and its code."""
    if weight is None:
        return None, DTYPE_CODES[dtype]
    weight = weight.contiguous() if weight.dtype in (dtype, torch.float32) else weight.float()
    return weight, DTYPE_CODES[weight.dtype]


def reduced_norm(
    parts: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`reduced_norm_reference` of parts [R, ..., H], by the kernel where it takes them."""
    if not parts.is_cpu or parts.dtype not in FLOATS:
        return reduced_norm_reference(list(parts), residual, weight, eps, quantize)
    parts, residual = parts.contiguous(), dense(residual)
    weight, weight_code = _parameter(weight, parts.dtype)
    y, residual_out, stats = _outputs(parts[0], quantize)
    _C.reduced_norm(
        parts, parts.shape[0], residual, weight, y, residual_out, stats, stats.numel(), parts.shape[-1], eps,
        _NORMED_AS[quantize], DTYPE_CODES[parts.dtype], weight_code,
    )  # fmt: skip
    return y, residual_out, stats


def all_reduce_rms_norm_local(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None, group: TPGroup
) -> tuple[Tensor, Tensor, Tensor]:
    return reduced_norm(x.unsqueeze(0), residual, weight, eps, quantize)


def all_reduce_rms_norm_shm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None, group: TPGroup
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), dense(residual)
    weight, weight_code = _parameter(weight, x.dtype)
    y, residual_out, stats = _outputs(x, quantize)
    group.shm.all_reduce_rms_norm(
        x, residual, weight, y, residual_out, stats, stats.numel(), x.shape[-1], eps, _NORMED_AS[quantize],
        DTYPE_CODES[x.dtype], weight_code,
    )  # fmt: skip
    return y, residual_out, stats


def all_reduce_rms_norm_cuda(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None, group: TPGroup
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), dense(residual)
    weight, weight_code = _parameter(weight, x.dtype)
    y, residual_out, rstd = _outputs(x, None)
    # Two halves, in which rows begin at multiples of 16 bytes.
    row_bytes = (x.shape[-1] * x.element_size() + 15) // 16 * 16
    made = channel(group, x.device, "all_reduce_rms_norm", 2 * rstd.numel() * row_bytes)
    made.all_reduce_rms_norm(
        x.data_ptr(), data_ptr(residual), data_ptr(weight), y.data_ptr(), residual_out.data_ptr(), rstd.data_ptr(),
        rstd.numel(), x.shape[-1], eps, DTYPE_CODES[x.dtype], weight_code, group.timeout, current_stream(x.device),
    )  # fmt: skip
    return y, residual_out, rstd


def all_reduce_rms_norm_pg(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, quantize: str | None, group: TPGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Two-shot by rows: rank r sums and norms the r-th part of the rows, then all gather what became of them."""
    if x.is_cpu:
        with_residual = residual is not None
        facts = describe("all_reduce_rms_norm", x.dtype, x.shape, residual=with_residual, quantize=quantize)
        agree(group, x.device, facts)
    hidden, num_rows = x.shape[-1], x.shape[:-1].numel()
    splits = even_splits(num_rows, group.size)
    begin, mine = sum(splits[: group.rank]), splits[group.rank]
    numels = [rows * hidden for rows in splits]
    pieces = exchange_pieces(x, group, numels, [mine * hidden] * group.size)
    parts = torch.stack(pieces).view(group.size, mine, hidden)
    rows = None if residual is None else residual.reshape(num_rows, hidden)[begin : begin + mine]
    y, residual_out, stats = reduced_norm(parts, rows, weight, eps, quantize)

    def gathered(part: Tensor, counts: list[int], shape: torch.Size) -> Tensor:
        return torch.cat(exchange_all(part, group, counts)).view(shape)

    return (
        gathered(y, numels, x.shape),
        gathered(residual_out, numels, x.shape),
        gathered(stats, splits, x.shape[:-1]),
    )


ALL_REDUCE_RMS_NORM = Op("all_reduce_rms_norm", [
    Backend("local", all_reduce_rms_norm_local, Needs(rules=(local_objection,))),
    Backend("shm", all_reduce_rms_norm_shm, Needs(
        device="cpu", dtypes=FLOATS, transport="shm", rules=(row_objection,))),
    Backend("cuda", all_reduce_rms_norm_cuda, Needs(
        device="cuda", dtypes=FLOATS, rules=(float_objection, cuda_objection, cuda_norm_objection))),
    Backend("pg", all_reduce_rms_norm_pg, Needs(rules=(pg_objection,))),
    Backend("reference", all_reduce_rms_norm_reference, Needs()),
])  # fmt: skip


def _run(x, residual, weight, eps, quantize, group_name, backend):
    group = TPGroup.by_name(group_name)
    # Weights may differ between ranks in what a collective may not read.
    row = ALL_REDUCE_RMS_NORM.choose(Inputs([x], group=group, quantize=quantize), backend)
    return row.run(x, residual, weight, eps, quantize, group)


def _impl(x, residual, weight, eps, group_name, backend):
    return _run(x, residual, weight, eps, None, group_name, backend)


def _fake(x, residual, weight, eps, group_name, backend):
    return _outputs(x, None, torch.Tensor.new_empty)


def _setup_context(ctx, inputs, output):
    _, residual, weight, _, _, _ = inputs
    _, residual_out, rstd = output
    ctx.save_for_backward(residual_out, weight, rstd)
    ctx.has_residual = residual is not None
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, drstd):
    h, weight, rstd = ctx.saved_tensors
    dw = None
    if dy is None:
        dx = dh
    else:
        dx, dw = _bwd_op(dy, dh, h, weight, rstd)
    return dx, dx if ctx.has_residual else None, None if weight is None else dw, None, None, None


def _bwd_impl(dy, dh, h, weight, rstd):
    # The norm's own backward: nothing travels.
    row = RMS_NORM_BWD.choose(Inputs([dy, dh, h, weight]))
    dx, dw = row.run(dy, dh, h, weight, rstd.view(1, -1))
    return dx, dy.new_empty(0) if dw is None else dw


def _bwd_fake(dy, dh, h, weight, rstd):
    return empty_dense(h), dy.new_empty(0) if weight is None else torch.empty_like(weight)


_bwd_op = register_op(
    "all_reduce_rms_norm_bwd(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
    _bwd_impl, _bwd_fake,
)  # fmt: skip
_op = register_op(
    "all_reduce_rms_norm(Tensor x, Tensor? residual, Tensor? weight, float eps, str group_name, str? backend) "
    "-> (Tensor, Tensor, Tensor)",
    _impl, _fake, _backward, _setup_context,
)  # fmt: skip
_quantized_op = register_op(
    "all_reduce_rms_norm_quantized(Tensor x, Tensor? residual, Tensor? weight, float eps, str quantize, "
    "str group_name, str? backend) -> (Tensor, Tensor, Tensor)",
    _run, lambda x, residual, weight, eps, quantize, group_name, backend: _outputs(x, quantize, torch.Tensor.new_empty),
)  # fmt: skip


def all_reduce_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float = 1e-6,
    group: GroupLike = None,
    *,
    quantize: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """The RMS norm, over the last dimension, of the sum of the ranks' tensors and a residual.

    Args:
        x: [..., H], this rank's part of the sum, of the same shape on all ranks; fp32, bf16, fp16 or fp64. In memory of
            `group.empty` it is read where it lies.
        residual: [..., H] of x's dtype, the same on all ranks; None adds nothing.
        weight: [H], the same on all ranks; None scales by nothing.
        eps: added to the mean of squares.
        group: None (the default group), a `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        quantize: None, "int8" or "fp8" (e4m3): give the normed rows as codes, with a scale for each row.
        backend: force one row of the table; the same on all ranks.

    Returns:
        (normed, residual_out), both [..., H] of x's dtype; with `quantize` (codes [..., H], scales [...] in fp32,
        residual_out), where codes * scales is about normed. residual_out is the sum, rounded once; the norm is taken
        before that. All bit-equal on all ranks. The gradient takes those of the results to be the same on all ranks
        (see the module's docstring); there is none with `quantize`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together; no such `quantize`, or a gradient is asked of it.
        CollectiveMismatchError: the ranks differ in x's shape or dtype, in `quantize`, or in having a residual.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> normed, hidden = tpweave.all_reduce_rms_norm(partial, hidden, norm.weight, 1e-6)
    """
    if quantize is None and backend is None and not is_compiling():
        shm = resolve_group(group).shm
        done = None if shm is None else shm.all_reduce_rms_norm_plain(x, residual, weight, eps)
        if done is not None:
            return done
    check_tensor("all_reduce_rms_norm", x)
    check_norm("all_reduce_rms_norm", x, weight, None, residual)
    if quantize not in _NORMED_AS:
        raise ValueError(f"all_reduce_rms_norm: quantize is {quantize!r}; it takes None, 'int8' or 'fp8'")
    grads = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight))
    if quantize is not None and grads:
        raise ValueError("all_reduce_rms_norm has no gradient with quantize; use torch.no_grad()")
    found = direct("all_reduce_rms_norm", x, group, backend) if not grads and x.dtype in FLOATS else None
    if found is not None and x.shape[-1] * x.element_size() <= MAX_ROW_BYTES:
        y, residual_out, stats = all_reduce_rms_norm_shm(x, residual, weight, eps, quantize, found)
    elif quantize is None:
        y, residual_out, stats = _op(x, residual, weight, eps, resolve_group(group).name, backend)
    else:
        name = resolve_group(group).name
        y, residual_out, stats = _quantized_op(x, residual, weight, eps, quantize, name, backend)
    return (y, residual_out) if quantize is None else (y, stats, residual_out)
