"""A matmul whose partial products are added over the ranks and divided among them, wide all the way, rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.reference.comm.reduce_scatter import reduce_scatter_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def matmul_reduce_scatter_reference(
    a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], bias: torch.Tensor | None, dim: int, group: TPGroup,
    splits: Sequence[int], average: bool,
) -> torch.Tensor:  # fmt: skip
    """This rank's `splits[rank]` along `dim` of the sum (or mean) over ranks of sum_i a[i] @ b[i], plus bias.

    a[i]: [..., K_i]; b[i]: [K_i, N]; bias: [N]; `dim`, not negative, is one of the product's dimensions.
    """
    wide = torch.float64 if a[0].dtype == torch.float64 else torch.float32
    product = torch.stack([x.to(wide) @ w.to(wide) for x, w in zip(a, b, strict=True)]).sum(0)
    out = reduce_scatter_reference(product, dim, group, splits, average)
    if bias is not None:
        start = sum(splits[: group.rank])
        mine = bias[start : start + splits[group.rank]] if dim == product.dim() - 1 else bias
        out = out + mine.to(wide)
    return out.to(a[0].dtype)
