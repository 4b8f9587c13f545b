"""Linear layers divided over ranks, by output columns or by input rows.

Dims: M tokens, K in_features, N out_features, R ranks; `n` and `k` are this rank's parts of N and K.
Source: Shoeybi et al., "Megatron-LM", 2019; here with uneven, empty and replicated parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tpweave.comm.matmul_all_reduce import matmul_all_reduce
from tpweave.comm.regions import copy_to_ranks, gather_from_ranks, reduce_from_ranks
from tpweave.distributed.group import resolve_group
from tpweave.layers.sharding import Shard, ShardedModule

Tensor = torch.Tensor


class ColumnParallelLinear(ShardedModule):
    """`nn.Linear` of which each rank computes some output columns.

    | tensor         | shape    | on each rank |
    |----------------|----------|--------------|
    | x              | [..., K] | the same     |
    | weight_shard_n | [n, K]   | its rows     |
    | bias_shard_n   | [n]      | its part     |
    | y_shard_n      | [..., n] | its columns; [..., N] and the same with `gather_output` |

        forward   y_shard_n = x @ weight_shard_n^T + bias_shard_n
        dgrad     dx = sum over ranks of dy_shard_n @ weight_shard_n      (one all-reduce)
        wgrad     dweight_shard_n = dy_shard_n^T @ x,  dbias_shard_n = sum over M of dy_shard_n

    Rows that several ranks hold (overlapping splits) get the sum of their holders' gradients.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        group: see `tpweave.init`.
        splits: output columns per rank (default: even), or a `Shard` with overlaps.
        gather_output: give every rank all N columns.
        copy_input: sum dx over the ranks here. False when the caller already passed x through `copy_to_ranks`, as
            layers do that share one x: then there is one all-reduce for all of them.
        device, dtype: of the parameters. They are initialised as `nn.Linear`'s, whole and then sliced, so equal seeds
            give the unsharded layer's weights and leave all ranks' generators in step.

    Raises:
        ValueError: splits that do not fit, or overlapping ones together with `gather_output`.

    Example:
        >>> up = tpweave.layers.ColumnParallelLinear(384, 1536)
        >>> down = tpweave.layers.RowParallelLinear(1536, 384)
        >>> y = down(F.gelu(up(x)))
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, group: Any = None,
        splits: Sequence[int] | Shard | None = None, gather_output: bool = False, copy_input: bool = True,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group, self.shards = resolve_group(group), {}
        self._fill(nn.Linear(in_features, out_features, bias, device, dtype), splits, gather_output, copy_input)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group: Any = None, splits: Sequence[int] | Shard | None = None, *,
        gather_output: bool = False, copy_input: bool = True,
    ) -> ColumnParallelLinear:  # fmt: skip
        """This rank's part of `linear`, which is left as it is. Arguments as of the class."""
        layer = cls._bare(resolve_group(group))
        layer._fill(linear, splits, gather_output, copy_input)
        return layer

    def _fill(
        self, linear: nn.Linear, splits: Sequence[int] | Shard | None, gather_output: bool, copy_input: bool
    ) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shard = Shard.of(linear.out_features, self.group.size, splits, type(self).__name__)
        if gather_output and self.shard.has_replicas:
            raise ValueError(f"gather_output needs parts that do not overlap, got {list(self.shard.ranges)}")
        self.gather_output, self.copy_input = gather_output, copy_input
        self._adopt("weight", linear.weight, 0, self.shard)
        self._adopt("bias", linear.bias, 0, self.shard)

    def forward(self, x: Tensor) -> Tensor:
        if self.copy_input:
            x = copy_to_ranks(x, self.group)
        y_shard_n = F.linear(x, self._with_whole_gradient("weight"), self._with_whole_gradient("bias"))
        if not self.gather_output:
            return y_shard_n
        return gather_from_ranks(y_shard_n, -1, self.group, splits=self.shard.sizes)

    def extra_repr(self) -> str:
        start, stop = self.shard.ranges[self.group.rank]
        has_bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features} [{start}:{stop}], bias={has_bias}"


class RowParallelLinear(ShardedModule):
    """`nn.Linear` of which each rank holds the columns of the weight that meet its part of the input.

    | tensor         | shape    | on each rank |
    |----------------|----------|--------------|
    | x_shard_k      | [..., k] | its columns  |
    | weight_shard_k | [N, k]   | its columns  |
    | bias           | [N]      | the same     |
    | y              | [..., N] | the same     |

        forward   y = sum over ranks of x_shard_k @ weight_shard_k^T, + bias      (one all-reduce)
        dgrad     dx_shard_k = dy @ weight_shard_k
        wgrad     dweight_shard_k = dy^T @ x_shard_k,  dbias = sum over M of dy

    Without gradients the product and its all-reduce are one operation, `tpweave.matmul_all_reduce`.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one; it is added once, after the sum.
        group: see `tpweave.init`.
        splits: input columns per rank (default: even).
        device, dtype: as for `ColumnParallelLinear`.

    Raises:
        ValueError: splits that do not fit or overlap.

    Example:
        >>> down = tpweave.layers.RowParallelLinear.from_linear(mlp.down_proj, group, splits=up.shard.sizes)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, group: Any = None,
        splits: Sequence[int] | Shard | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group, self.shards = resolve_group(group), {}
        self._fill(nn.Linear(in_features, out_features, bias, device, dtype), splits)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group: Any = None, splits: Sequence[int] | Shard | None = None
    ) -> RowParallelLinear:
        """This rank's part of `linear`, which is left as it is. Arguments as of the class."""
        layer = cls._bare(resolve_group(group))
        layer._fill(linear, splits)
        return layer

    def _fill(self, linear: nn.Linear, splits: Sequence[int] | Shard | None) -> None:
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.shard = Shard.of(linear.in_features, self.group.size, splits, type(self).__name__)
        if self.shard.has_replicas:
            raise ValueError(f"RowParallelLinear needs parts that do not overlap, got {list(self.shard.ranges)}")
        self._adopt("weight", linear.weight, 1, self.shard)
        self._adopt("bias", linear.bias)

    def forward(self, x_shard_k: Tensor) -> Tensor:
        # Whether gradients are wanted is the same on all ranks, so all choose the same collective.
        if not torch.is_grad_enabled():
            return matmul_all_reduce(x_shard_k, self.weight.t(), self.group, bias=self.bias)
        y = reduce_from_ranks(F.linear(x_shard_k, self.weight), self.group)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        start, stop = self.shard.ranges[self.group.rank]
        has_bias = self.bias is not None
        return f"in_features={self.in_features} [{start}:{stop}], out_features={self.out_features}, bias={has_bias}"
