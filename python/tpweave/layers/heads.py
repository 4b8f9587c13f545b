"""Which attention heads each rank computes, and which KV heads it holds for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpweave.layers.sharding import Shard, split_sizes


@dataclass(frozen=True)
class LocalHeads:
    """One rank's heads.

    Attributes:
        first_q: the first of its query heads, counted over all ranks.
        num_q: query heads, perhaps 0.
        num_kv: KV heads, at least 1.
        kv_index: for each query head the position of its KV head among the local ones, or None where that is
            `i // (num_q // num_kv)`, as attention functions for grouped heads take it.
    """

    first_q: int
    num_q: int
    num_kv: int
    kv_index: tuple[int, ...] | None


@dataclass(frozen=True)
class HeadSplit:
    """How the heads of one attention are divided: any number of heads over any number of ranks.

    Query heads are divided as evenly as they go. A rank holds every KV head that its query heads read, so KV heads at
    the border of two ranks, and all of them when ranks outnumber KV heads, are replicated. A rank without query heads
    still holds one KV head: its cache then counts positions as everybody's does.

    Attributes:
        head_dim: size of a head.
        q: query heads per rank.
        kv: KV heads per rank, possibly overlapping.

    Example:
        >>> HeadSplit.make(num_q=6, num_kv=2, head_dim=64, ranks=4).kv.ranges
        ((0, 1), (0, 2), (1, 2), (1, 2))
    """

    head_dim: int
    q: Shard
    kv: Shard

    @classmethod
    def make(
        cls, num_q: int, num_kv: int, head_dim: int, ranks: int, *, splits: Sequence[int] | None = None,
        shares: Sequence[float] | None = None,
    ) -> HeadSplit:  # fmt: skip
        """Divide `num_q` query heads that read `num_kv` KV heads.

        Args:
            splits: query heads per rank; None divides evenly, or in proportion to `shares`.

        Raises:
            ValueError: the query heads are not a multiple of the KV heads, or the splits do not fit.
        """
        if num_kv < 1 or num_q % num_kv:
            raise ValueError(f"{num_q} query heads are not a multiple of {num_kv} KV heads")
        group = num_q // num_kv
        q = Shard.of(num_q, ranks, split_sizes(num_q, ranks, shares) if splits is None else splits, "query heads")
        kv = []
        for start, stop in q.ranges:
            first = min(start // group, num_kv - 1)
            kv.append((first, max(first + 1, -(-stop // group))))
        return cls(head_dim, q, Shard(tuple(kv)))

    def local(self, rank: int) -> LocalHeads:
        """What `rank` holds."""
        (q_start, q_stop), (kv_start, kv_stop) = self.q.ranges[rank], self.kv.ranges[rank]
        num_q, num_kv = q_stop - q_start, kv_stop - kv_start
        group = self.q.length // self.kv.length
        index = tuple(head // group - kv_start for head in range(q_start, q_stop))
        regular = num_q % num_kv == 0 and index == tuple(i // (num_q // num_kv) for i in range(num_q))
        return LocalHeads(q_start, num_q, num_kv, None if regular else index)
