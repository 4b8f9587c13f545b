"""The compiled module `tpweave._C`, loaded once, and the dtype codes it shares with Python."""

from __future__ import annotations

import torch  # loads the OpenMP runtime that _C looks up; must come first

from tpweave import _C

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

__all__ = ["DTYPE_CODES", "_C"]
