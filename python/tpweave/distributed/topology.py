"""Which ranks of a group share a host, and so what has to travel between hosts.

Ranks share a host when they can share memory; `symmetric_memory.join` finds that out by trying. Host h's ranks are
numbered locally 0, 1, ... in the group's order. Local rank l of every host together are rail l. There are as many
rails as the smallest host has ranks; rail l carries, between hosts, what belongs to local ranks l, l + rails, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tpweave.distributed.splits import even_splits

Hosts = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Topology:
    """A group's ranks by host, as one rank sees them.

    Attributes:
        hosts: each host's ranks, in group order; hosts in the order of their first ranks. Equal on all ranks.
        rank: this rank in the group.
        shm: the native communicator among this host's ranks; None where a host has one rank only.
    """

    hosts: Hosts
    rank: int
    shm: Any = None

    @staticmethod
    def flat(size: int, rank: int) -> Topology:
        """Every rank on a host of its own: what is assumed where nothing is known."""
        return Topology(tuple((peer,) for peer in range(size)), rank)

    @cached_property
    def host(self) -> int:
        """Which of `hosts` is this rank's."""
        return next(index for index, ranks in enumerate(self.hosts) if self.rank in ranks)

    @cached_property
    def mine(self) -> tuple[int, ...]:
        """The ranks of this rank's host."""
        return self.hosts[self.host]

    @cached_property
    def local(self) -> int:
        """This rank's number on its host."""
        return self.mine.index(self.rank)

    @cached_property
    def rails(self) -> int:
        """How many ranks of each host carry its bytes to the other hosts."""
        return min(len(ranks) for ranks in self.hosts)

    @cached_property
    def rail(self) -> tuple[int, ...]:
        """The ranks that this rank exchanges with, one of each host and itself; empty where it carries nothing."""
        return tuple(ranks[self.local] for ranks in self.hosts) if self.local < self.rails else ()

    @property
    def is_flat(self) -> bool:
        """Whether no two ranks share a host."""
        return all(len(ranks) == 1 for ranks in self.hosts)

    def carried(self, host: int, rail: int) -> tuple[int, ...]:
        """The ranks of a host whose bytes rail `rail` carries."""
        return self.hosts[host][rail :: self.rails]

    def shares(self, length: int) -> list[int]:
        """`length` divided among this host's ranks: nearly evenly over the rails, nothing for the others."""
        return even_splits(length, self.rails) + [0] * (len(self.mine) - self.rails)


def hosts_of(reached: Sequence[frozenset[int]]) -> Hosts | None:
    """The hosts, when rank r could reach the lower ranks `reached[r]`; None where that is no division into hosts.

    Example:
        >>> hosts_of([frozenset(), frozenset({0}), frozenset(), frozenset({2})])
        ((0, 1), (2, 3))
    """
    hosts: list[list[int]] = []
    for rank, lower in enumerate(reached):
        host = next((ranks for ranks in hosts if lower == frozenset(ranks)), None)
        if host is not None:
            host.append(rank)
        elif not lower:
            hosts.append([rank])
        else:
            return None
    return tuple(tuple(ranks) for ranks in hosts)
