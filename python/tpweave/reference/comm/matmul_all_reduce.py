"""A matmul whose partial products are added over the ranks, wide all the way and rounded once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tpweave.reference.comm.all_reduce import all_reduce_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def matmul_all_reduce_reference(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, group: TPGroup
) -> torch.Tensor:
    """sum over ranks of a @ b, plus bias. a: [..., M, K_local]; b: [K_local, N]; bias: [N]; out: [..., M, N]."""
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = all_reduce_reference(a.to(wide) @ b.to(wide), group)
    return (out if bias is None else out + bias.to(wide)).to(a.dtype)
