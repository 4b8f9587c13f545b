"""Gather, then multiply: in fp32 (fp64 for fp64), rounded once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tpweave.reference.comm.all_gather import all_gather_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup


def all_gather_matmul_reference(
    a: torch.Tensor, b: Sequence[torch.Tensor], bias: Sequence[torch.Tensor], dim: int, group: TPGroup,
    splits: Sequence[int], return_a: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:  # fmt: skip
    """The ranks' a joined along `dim` (not negative), and its product with every b, plus its bias.

    a: [..., K]; b[i]: [K, N_i]; bias: none, or [N_i] for every b.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    whole = all_gather_reference(a, dim, group, splits)
    ys = [whole.to(wide) @ w.to(wide) for w in b]
    if bias:
        ys = [y + added.to(wide) for y, added in zip(ys, bias, strict=True)]
    return whole if return_a else None, [y.to(a.dtype) for y in ys]
