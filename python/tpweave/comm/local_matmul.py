"""This rank's own product in the collectives that are woven into matmuls, into memory that the caller chose.

    wide     the dtype in which ranks add their products, or in which one rank adds several: fp32 (fp64 for fp64), so
             that the result is rounded once. Where torch multiplies bf16 or fp16, its own dtype: torch rounds.
    narrow   the inputs' dtype.

Dims: M rows, K depth, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch

from tpweave.dispatch import FLOATS, HALF
from tpweave.native import _C, DTYPE_CODES, data_ptr

Tensor = torch.Tensor

# Up to this many rows the kernel beats torch (16 rows, K 2048, N 4096, one thread of Zen 3: fp32 4.8 against 6.6 ms).
SMALL_ROWS = 16


def is_native(a: Tensor) -> bool:
    """Whether the kernel multiplies a, [M, K]: on the CPU few rows of any dtype, and all of bf16 and fp16 where torch
    has no instructions for them (bf16, 64 rows as above: 13 against 99 ms)."""
    if a.dtype in HALF and _C.active_isa() != "avx512bf16":
        return a.is_cpu
    return a.dtype in FLOATS and a.shape[0] <= SMALL_ROWS and a.is_cpu


def wide_dtype(a: Tensor) -> torch.dtype:
    """What products of a, [M, K], are held in before they are added."""
    return torch.float32 if is_native(a) else a.dtype


def as_rows(x: Tensor) -> Tensor:
    """[..., N] as [M, N]; N may be 0."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def kernel_operands(a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same with the strides that the kernel takes: dense rows of a, dense rows or columns of b."""
    a = a if a.stride(1) == 1 else a.contiguous()
    b = b if 1 in b.stride() else b.contiguous()
    return a, b, None if bias is None else bias.contiguous()


def small_matmul(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """a @ b + bias into `out`, [M, N], dense, fp32 or of a's dtype, by the kernel; b is read once for 16 rows."""
    a, b, bias = kernel_operands(a, b, bias)
    _C.small_matmul(
        a.data_ptr(), a.stride(0), b.data_ptr(), *b.stride(), data_ptr(bias), out.data_ptr(), a.shape[0],
        b.shape[1], b.shape[0], DTYPE_CODES[a.dtype], out.dtype == torch.float32,
    )  # fmt: skip
    return out


def local_matmul(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """a @ b + bias, without a gradient.

    Args:
        a: [M, K].
        b: [K, N], of any strides: `weight.t()` costs nothing.
        bias: [N].
        out: [M, N], dense, where the product is written: of a's dtype, or of `wide_dtype(a)`.

    Returns:
        out, or a new tensor of a's dtype.
    """
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    if is_native(a):
        return small_matmul(a, b, bias, out)
    if bias is None:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(bias, a, b, out=out)
    return out


def sum_of_matmuls(a: Sequence[Tensor], b: Sequence[Tensor], *, out: Tensor) -> Tensor:
    """a[0] @ b[0] + a[1] @ b[1] + ... into `out`, [M, N], dense and of the wide dtype."""
    local_matmul(a[0], b[0], out=out)
    for x, w in zip(a[1:], b[1:], strict=True):
        if is_native(x):
            out += local_matmul(x, w, out=torch.empty_like(out))
        else:
            out.addmm_(x, w)
    return out
