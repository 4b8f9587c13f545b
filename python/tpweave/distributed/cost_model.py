"""Into how many chunks a matmul and its collective are cut, from what the group's link and its ranks' cores can do.

With C chunks, of which each is multiplied and then travels while the next is multiplied:

    T(C) = t_mm(C) / C + (C - 1) / C * max(t_mm(C), t_link(C)) + t_link(C) / C
    t_mm(C) = flops / rate + C * weights * t_weight        t_link(C) = bytes / bandwidth + C * steps * latency

`t_weight` is what reading the weights once more costs. A collective that travels first and is multiplied then has the
same time. The link is measured once per group, the matmul once per group and dtype, each when it is first asked for,
by all ranks at the same time; the slowest rank's numbers are everybody's. So asking is a collective, and all ranks get
the same answer.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tpweave.distributed.exchange import exchange_pieces, parts_of

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup
    from tpweave.distributed.topology import Topology

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

MOST_CHUNKS = 16
# A chunk has at least so many rows: with fewer, a matmul is bound by reading the weights.
LEAST_ROWS = 64
# A chunk has at least so many bytes between hosts: each wakes the threads that carry it from the cores' other work.
LEAST_BYTES = 1 << 19
_MOST_PROBE_BYTES = 1 << 24
_PROBE_ROWS, _PROBE_SIZE = (64, 256), 1024


@dataclass(frozen=True)
class Link:
    """What one rank sees of the way to the other hosts while all ranks use it.

    Attributes:
        latency: seconds of an exchange of nothing.
        bandwidth: bytes a second that a rank sends.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class MatmulRate:
    """Seconds of a [M, K] @ [K, N] are M * K * N * seconds_per_product + K * N * seconds_per_weight."""

    seconds_per_product: float
    seconds_per_weight: float


@dataclass(frozen=True)
class Traffic:
    """What a collective on flat tensors of `numel` elements makes a rank send: elements, in so many steps."""

    elements: float
    steps: int


def traffic(op: str, numel: int, topology: Topology) -> Traffic:
    """Of the busiest rank, for "sum_everywhere", "sum_scattered" and "gather" (numel: of the whole) between hosts."""
    hosts, share = len(topology.hosts), numel / topology.rails
    if op == "sum_everywhere":
        return Traffic(share, 1) if hosts == 2 else Traffic(2 * share * (hosts - 1) / hosts, 2)
    return Traffic(share * (hosts - 1) / hosts, 1)


def pipeline_seconds(chunks: int, matmul: float, per_chunk: float, wire: float, latency: float) -> float:
    """T(chunks) of the module's docstring.

    Args:
        matmul, wire: seconds of the whole product, and of the bytes on the link.
        per_chunk, latency: seconds that each chunk adds to either.
    """
    multiplying, travelling = matmul + chunks * per_chunk, wire + chunks * latency
    return (multiplying + travelling + (chunks - 1) * max(multiplying, travelling)) / chunks


def best_chunks(most: int, matmul: float, per_chunk: float, wire: float, latency: float) -> int:
    """The number of chunks, from 1 to `most`, with the least `pipeline_seconds`; the fewest of equals.

    Example:
        >>> best_chunks(16, matmul=0.1, per_chunk=0.001, wire=0.1, latency=0.001)
        7
    """
    return min(range(1, max(1, most) + 1), key=lambda c: pipeline_seconds(c, matmul, per_chunk, wire, latency))


class CostModel:
    """A group's measurements, each made when it is first asked for.

    Attributes:
        link: None until it is measured.
        matmul: by dtype and device type.
        crowded: whether some host's ranks keep all its cores busy with their matmuls, so that what carries the chunks
            waits for a core; None until it is asked for. Measured on two hosts of two cores with two ranks each, 16
            chunks of 1024 x 1024 x 2048 took 1.09 times as long as one.
        last: the last number of chunks that was chosen.
    """

    def __init__(self) -> None:
        self.link: Link | None = None
        self.last = 1
        self.matmul: dict[tuple[torch.dtype, str], MatmulRate] = {}
        self.crowded: bool | None = None

    def chunks(
        self, group: TPGroup, op: str, rows: int, depth: int, columns: int, numel: int, wire_bytes: float,
        like: torch.Tensor, multiply: Multiply,
    ) -> int:  # fmt: skip
        """Into how many chunks of rows [rows, depth] @ [depth, columns] and its collective are cut.

        All ranks ask with the same numbers.

        Args:
            op: one of `traffic`'s.
            numel: elements of the tensor that travels.
            wire_bytes: bytes between hosts for each of its elements.
            like: a tensor of the dtype and device that are multiplied.
            multiply: does that.

        Returns:
            1 where nothing is gained by more.
        """
        load = traffic(op, numel, group.between_hosts)
        sent = load.elements * wire_bytes
        most = min(MOST_CHUNKS, rows // LEAST_ROWS, int(sent) // LEAST_BYTES)
        self.last = 1
        if most < 2:
            return 1
        if self.crowded is None:
            busy = torch.get_num_threads() * len(group.topology.mine)
            self.crowded = like.is_cpu and _slowest(group, busy / _cores()) >= 1.0
        if self.crowded:
            return 1
        if self.link is None:
            self.link = _measure_link(group, like)
        key = like.dtype, like.device.type
        if key not in self.matmul:
            self.matmul[key] = _measure_matmul(group, like, multiply)
        rate = self.matmul[key]
        weights = depth * columns
        self.last = best_chunks(
            most,
            matmul=rows * weights * rate.seconds_per_product,
            per_chunk=weights * rate.seconds_per_weight,
            wire=sent / self.link.bandwidth,
            latency=load.steps * self.link.latency,
        )
        return self.last


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _slowest(group: TPGroup, seconds: float) -> float:
    return max(group.all_gather_object(seconds))


def _synchronize(like: torch.Tensor) -> None:
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def _measure_link(group: TPGroup, like: torch.Tensor) -> Link:
    """Every rank sends to every rank of its rail at once, as in the collectives: more and more until it takes long."""
    peers = [peer for peer in group.between_hosts.rail if peer != group.rank]
    others = len(group.between_hosts.hosts) - 1

    def seconds(nbytes: int) -> float:
        numels = [nbytes if peer in peers else 0 for peer in range(group.size)]
        data = torch.zeros(sum(numels), dtype=torch.uint8, device=like.device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            exchange_pieces(data, group, numels, numels, parts=parts_of(nbytes))
            _synchronize(like)
            times.append(time.perf_counter() - start)
        # The first fills the buffers of what lies between.
        return _slowest(group, statistics.median(times[1:]))

    latency = seconds(1)
    nbytes = 1 << 16
    taken = seconds(nbytes)
    while taken < max(5e-3, 10 * latency) and nbytes < _MOST_PROBE_BYTES:
        nbytes *= 4
        taken = seconds(nbytes)
    return Link(latency, nbytes * others / max(taken - latency, 1e-9))


def _measure_matmul(group: TPGroup, like: torch.Tensor, multiply: Multiply) -> MatmulRate:
    weights = like.new_zeros(_PROBE_SIZE, _PROBE_SIZE)
    taken = []
    for rows in _PROBE_ROWS:
        a = like.new_zeros(rows, _PROBE_SIZE)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            multiply(a, weights)
            _synchronize(like)
            times.append(time.perf_counter() - start)
        taken.append(_slowest(group, statistics.median(times[1:])))
    few, many = _PROBE_ROWS
    per_row = max((taken[1] - taken[0]) / (many - few), 0.0)
    return MatmulRate(per_row / _PROBE_SIZE**2, max(taken[0] - few * per_row, 0.0) / _PROBE_SIZE**2)
