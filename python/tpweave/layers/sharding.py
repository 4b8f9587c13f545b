"""Which part of a dimension each rank holds, and modules whose parameters are such parts.

Parts may be uneven, empty, and may overlap: rows that several ranks hold are replicas (KV heads when ranks outnumber
them). A replica sees only its own rank's share of the work, so its gradient is a partial sum; `sum_over_replicas`
completes it, and every holder ends with the true gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tpweave.comm.all_gather import all_gather
from tpweave.comm.all_reduce import all_reduce
from tpweave.distributed.splits import even_splits

Tensor = torch.Tensor


def split_sizes(length: int, parts: int, shares: Sequence[float] | None = None) -> list[int]:
    """`length` divided among `parts`: evenly, the longer pieces first, or in proportion to `shares`.

    Args:
        shares: one weight per part, e.g. `[3, 1]`; what rounding leaves over goes to the largest remainders.

    Raises:
        ValueError: another number of shares than parts, a negative one, or all zero.

    Example:
        >>> split_sizes(12, 5), split_sizes(12, 2, shares=[3, 1])
        ([3, 3, 2, 2, 2], [9, 3])
    """
    if shares is None:
        return even_splits(length, parts)
    if len(shares) != parts or min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(f"shares is {list(shares)}; {parts} rank(s) need {parts} weights of at least 0, not all 0")
    exact = [length * share / sum(shares) for share in shares]
    sizes = [int(size) for size in exact]
    by_remainder = sorted(range(parts), key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in by_remainder[: length - sum(sizes)]:
        sizes[rank] += 1
    return sizes


@dataclass(frozen=True)
class Shard:
    """The part [start, stop) of a dimension that each rank holds.

    Parts follow the order of the ranks and cover the dimension from 0 to its end; neighbours may overlap.

    Attributes:
        ranges: (start, stop) per rank.
    """

    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        covered = 0
        for start, stop in self.ranges:
            if not 0 <= start <= covered or stop < start:
                raise ValueError(f"the parts {list(self.ranges)} leave a gap or run backwards at ({start}, {stop})")
            covered = max(covered, stop)

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Shard:
        """Parts of these sizes, one after the other."""
        ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
        return cls(tuple((end - size, end) for end, size in zip(ends, sizes, strict=True)))

    @classmethod
    def of(cls, length: int, parts: int, splits: Shard | Sequence[int] | None, what: str) -> Shard:
        """`splits` made a Shard of `parts` parts over `length`; even parts for None.

        Raises:
            ValueError: the parts are not `parts`, or do not add up to `length`.
        """
        if splits is None:
            splits = split_sizes(length, parts)
        shard = splits if isinstance(splits, Shard) else cls.from_sizes(splits)
        if len(shard.ranges) != parts or shard.length != length:
            raise ValueError(
                f"{what}: splits {shard.sizes} are {len(shard.ranges)} parts that cover {shard.length}; "
                f"{parts} rank(s) need {parts} parts that cover {length}"
            )
        return shard

    @property
    def length(self) -> int:
        """Size of the whole dimension."""
        return max(stop for _, stop in self.ranges)

    @property
    def sizes(self) -> list[int]:
        """Size of each rank's part."""
        return [stop - start for start, stop in self.ranges]

    @property
    def has_replicas(self) -> bool:
        """Whether some position is held by more than one rank."""
        return sum(self.sizes) > self.length

    def scaled(self, unit: int) -> Shard:
        """The same parts where every position is `unit` long: heads to rows."""
        return Shard(tuple((start * unit, stop * unit) for start, stop in self.ranges))

    def take(self, full: Tensor, dim: int, rank: int) -> Tensor:
        """Rank `rank`'s part of `full`, a copy with storage of its own."""
        start, stop = self.ranges[rank]
        return full.detach().narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)

    def gather(self, local: Tensor, dim: int, group: Any) -> Tensor:
        """The whole from every rank's part; of replicas the first holder's counts. A collective."""
        owned, covered = [], 0
        for start, stop in self.ranges:
            owned.append((max(start, covered), max(stop, covered)))
            covered = max(covered, stop)
        start, stop = owned[group.rank]
        mine = local.detach().narrow(dim, start - self.ranges[group.rank][0] if stop > start else 0, stop - start)
        return all_gather(mine.contiguous(), dim, group, splits=[stop - start for start, stop in owned])


class _SumOverReplicas(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, shard: Shard, dim: int, group: Any) -> Tensor:
        ctx.shard, ctx.dim, ctx.group = shard, dim, group
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        start, stop = ctx.shard.ranges[ctx.group.rank]
        shape = list(grad.shape)
        shape[ctx.dim] = ctx.shard.length
        full = grad.new_zeros(shape)
        full.narrow(ctx.dim, start, stop - start).copy_(grad)
        total = all_reduce(full, ctx.group)
        return total.narrow(ctx.dim, start, stop - start).contiguous(), None, None, None


def sum_over_replicas(local: Tensor, shard: Shard, dim: int, group: Any) -> Tensor:
    """`local` unchanged; backward adds up the gradients of positions that several ranks hold (an all-reduce)."""
    return _SumOverReplicas.apply(local, shard, dim, group)


class ShardedModule(nn.Module):
    """A module whose parameters are this rank's parts of full ones, under the full ones' names.

    Attributes:
        group: the `TPGroup` over which they are divided.
        shards: parameter name -> (dim, Shard); parameters not named here are whole on every rank.
    """

    group: Any
    shards: dict[str, tuple[int, Shard]]

    @classmethod
    def _bare(cls, group: Any) -> Any:
        """An instance without parameters yet: `from_*` constructors fill it."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module.group, module.shards = group, {}
        return module

    def _adopt(self, name: str, full: Tensor | None, dim: int = 0, shard: Shard | None = None) -> None:
        """Register this rank's part of `full` along `dim` as parameter `name`; the whole of it without a shard."""
        if full is None:
            self.register_parameter(name, None)
            return
        part = full.detach().clone() if shard is None else shard.take(full, dim, self.group.rank)
        if shard is not None:
            self.shards[name] = (dim, shard)
        self.register_parameter(name, nn.Parameter(part, requires_grad=full.requires_grad))

    def _with_whole_gradient(self, name: str) -> Any:
        """Parameter `name`, such that its gradient is summed over the ranks that hold replicas of its rows."""
        parameter = getattr(self, name)
        if parameter is None or name not in self.shards or not self.shards[name][1].has_replicas:
            return parameter
        dim, shard = self.shards[name]
        return sum_over_replicas(parameter, shard, dim, self.group)

    def full_parameter(self, name: str) -> Tensor:
        """This module's own parameter `name` at its full shape, bit for bit. A collective."""
        parameter = getattr(self, name).detach()
        if name not in self.shards:
            return parameter.clone()
        dim, shard = self.shards[name]
        return shard.gather(parameter, dim, self.group)
