"""The MLP of a transformer block, plain or gated, divided by intermediate columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tpweave.comm.regions import copy_to_ranks
from tpweave.distributed.group import resolve_group
from tpweave.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpweave.layers.sharding import Shard
from tpweave.ops.gated_activation import gated_activation

Tensor = torch.Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


class ParallelMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))` without a gate.

    | tensor                  | shape    | on each rank |
    |-------------------------|----------|--------------|
    | x, y                    | [..., H] | the same     |
    | gate_proj, up_proj      | [i, H]   | its rows of [I, H]    |
    | hidden_shard_i          | [..., i] | its columns of [..., I] |
    | down_proj               | [H, i]   | its columns of [H, I] |

        forward   y = sum over ranks of (act(x @ gate_i^T) * (x @ up_i^T)) @ down_i^T      (one all-reduce)
        dgrad     dx = sum over ranks of dgate_i @ gate_i + dup_i @ up_i                    (one all-reduce)
        wgrad     local on every rank

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: "silu", "gelu" or "gelu_tanh".
        gated: whether there is a gate.
        bias: whether the projections have one.
        group: see `tpweave.init`.
        splits: intermediate columns per rank (default: even).
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown activation, splits that do not fit.

    Example:
        >>> mlp = tpweave.layers.ParallelMLP(2048, 5632)
        >>> y = mlp(x)
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, activation: str = "silu", gated: bool = True,
        bias: bool = False, group: Any = None, splits: Sequence[int] | Shard | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        make = functools.partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        gate = make(hidden_size, intermediate_size) if gated else None
        up, down = make(hidden_size, intermediate_size), make(intermediate_size, hidden_size)
        self._fill(gate, up, down, activation, resolve_group(group), splits)

    @classmethod
    def from_linears(
        cls, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, *, activation: str, group: Any = None,
        splits: Sequence[int] | Shard | None = None,
    ) -> ParallelMLP:  # fmt: skip
        """This rank's part of an MLP's linear layers, which are left as they are. Arguments as of the class."""
        mlp = cls.__new__(cls)
        nn.Module.__init__(mlp)
        mlp._fill(gate, up, down, activation, resolve_group(group), splits)
        return mlp

    def _fill(
        self, gate: nn.Linear | None, up: nn.Linear, down: nn.Linear, activation: str, group: Any,
        splits: Sequence[int] | Shard | None,
    ) -> None:  # fmt: skip
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is '{activation}'; there are {', '.join(ACTIVATIONS)}")
        self.activation, self.group = activation, group
        self.gate_proj: ColumnParallelLinear | None = None
        if gate is not None:
            self.gate_proj = ColumnParallelLinear.from_linear(gate, group, splits, copy_input=False)
        self.up_proj = ColumnParallelLinear.from_linear(up, group, splits, copy_input=False)
        self.down_proj = RowParallelLinear.from_linear(down, group, splits)

    def forward(self, x: Tensor) -> Tensor:
        x = copy_to_ranks(x, self.group)
        if self.gate_proj is not None:
            return self.down_proj(gated_activation(self.gate_proj(x), self.up_proj(x), self.activation))
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
