"""The compiled module `tpweave._C`, loaded once, and the dtype codes it shares with Python."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # loads the OpenMP runtime that _C looks up; must come first

from tpweave import _C

# Whether plain calls may go straight to their kernels (csrc/common/plain_call.h): this torch has DLPack's C interface.
HAS_PLAIN_CALLS: bool = _C.attach_torch(torch)

# csrc/common/dtype.h holds the same codes.
DTYPE_CODES: dict[torch.dtype, int] = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.int8: 6,
    torch.uint8: 7,
    torch.bool: 8,
    torch.int16: 9,
}


# Name of each collective -> the code that the ranks' headers carry.
COLLECTIVE_CODES: dict[str, int] = _C.COLLECTIVE_CODES


def data_ptr(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element as the kernels take it, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


# Below this a tensor has no whole huge page for sure.
_HUGE_BYTES = 4 << 20


def new_output(x: torch.Tensor, shape: Sequence[int] | None = None) -> torch.Tensor:
    """An uninitialised, dense tensor of x's dtype and device, and of x's shape where none is given.

    Large ones on the CPU ask for huge pages: malloc returns tensors of more than 32 MB to the system when they are
    freed, and touching the next one page by page takes longer than a collective (32 MB: 25 against 6 ms, Zen 3).
    """
    out = torch.empty_like(x) if shape is None else x.new_empty(shape)
    if out.nbytes >= _HUGE_BYTES and out.is_cpu:
        _C.prefer_huge_pages(out.data_ptr(), out.nbytes)
    return out


def dense_last_dim(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where neighbours in its last dim are neighbours in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_dense(x: torch.Tensor) -> torch.Tensor:
    """A contiguous, uninitialised tensor like x; half the time of `torch.empty` with a shape."""
    return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)


__all__ = [
    "COLLECTIVE_CODES",
    "DTYPE_CODES",
    "HAS_PLAIN_CALLS",
    "_C",
    "data_ptr",
    "dense_last_dim",
    "empty_dense",
    "new_output",
]
