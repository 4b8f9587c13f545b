"""Sums and gathers over hosts that hold several ranks each: how the `pg` rows move flat tensors.

    sum_everywhere   reduce-scatter inside each host, exchange of the parts between hosts, all-gather inside
    sum_scattered    reduce-scatter inside, exchange between, hand-over inside where hosts differ in size
    gather           all-gather inside, exchange between, all-gather inside

Inside, data goes through the host's shared memory; between hosts over torch.distributed, where each byte that a host
has to tell another goes there once. Where no two ranks share a host, or the ranks' hosts are not known, the steps
inside fall away. Nothing here checks that the ranks call the same thing: `exchange.agree` comes first.

Order of addition: the ranks of each host in rank order, then the hosts in the order of their first ranks, each sum in
fp32 (fp64 for fp64) and rounded to the tensor's dtype. All ranks hold the same bits, in every run. Where several ranks
share a host, that is not the order 0..R-1 of one flat sum, and bf16 and fp16 are rounded once per level: twice.

Every rank of the group takes part in every exchange, those that carry nothing with empty pieces, so that a rank which
dies is seen by all. What sums send between hosts may be compressed: see `tpweave.comm.compression`.

Dims: R ranks, H hosts. Source: two-level collectives as in Horovod (Sergeev and Del Balso, 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tpweave.comm.call import SUM_CODES
from tpweave.comm.compression import codec_for
from tpweave.distributed.exchange import exchange_all, exchange_pieces, flat_bytes, parts_of
from tpweave.distributed.group import TPGroup
from tpweave.distributed.splits import even_splits
from tpweave.distributed.supervision import inside_host
from tpweave.distributed.topology import Topology
from tpweave.reference.comm.all_reduce import sum_in_rank_order

Tensor = torch.Tensor


def _topology(x: Tensor, group: TPGroup, *, adds: bool) -> Topology:
    """The group's hosts where shared memory is a way for x, else each rank on its own."""
    if x.is_cpu and (x.dtype in SUM_CODES or not adds):
        return group.between_hosts
    return Topology.flat(group.size, group.rank)


def sum_everywhere(x: Tensor, group: TPGroup) -> Tensor:
    """The sum over ranks of x, flat and as long on all ranks, on every rank."""
    topology = _topology(x, group, adds=True)
    shares = topology.shares(x.numel())
    part = _sum_inside(x, shares, group, topology)
    total = _sum_between(part, group, topology, x.nbytes)
    return _gather_inside(flat_bytes(total), [n * x.element_size() for n in shares], group, topology).view(x.dtype)


def sum_scattered(x: Tensor, numels: Sequence[int], group: TPGroup, divide_by: int = 1) -> Tensor:
    """This rank's part of (the sum over ranks of x) / divide_by; x is the parts of ranks 0..R-1, of these lengths."""
    topology = _topology(x, group, adds=True)
    parts = x.split(list(numels))
    rails = range(topology.rails)
    hosts = range(len(topology.hosts))
    if not topology.is_flat:
        # As the rails carry them: first all that rail 0 does, host after host.
        x = torch.cat([parts[rank] for rail in rails for host in hosts for rank in topology.carried(host, rail)])
    # [rail][host]: elements that this rail brings to this host.
    loads = [[sum(numels[rank] for rank in topology.carried(host, rail)) for host in hosts] for rail in rails]
    idle = [0] * (len(topology.mine) - topology.rails)
    part = _sum_inside(x, [sum(load) for load in loads] + idle, group, topology)
    load = loads[topology.local] if topology.rail else []
    out = _sum_of_pieces(
        dict(zip(topology.rail, part.split(load), strict=True)), group, topology, divide_by, x, x.nbytes
    )
    if len(topology.mine) == topology.rails:
        return out
    return _hand_over(out, numels, group, topology)


def gather(x: Tensor, numels: Sequence[int], group: TPGroup) -> list[Tensor]:
    """Every rank's flat x, by rank; rank r's has numels[r] elements of any dtype."""
    topology = _topology(x, group, adds=False)
    if topology.is_flat:
        return exchange_all(x, group, numels)
    sizes = [n * x.element_size() for n in numels]
    here = _gather_inside(flat_bytes(x), [sizes[rank] for rank in topology.mine], group, topology)
    pieces = dict(zip(topology.mine, here.split([sizes[rank] for rank in topology.mine]), strict=True))
    others = [host for host in range(len(topology.hosts)) if host != topology.host]
    sent, awaited = {}, {}
    for host in others if topology.rail else ():
        sent[topology.rail[host]] = torch.cat([pieces[r] for r in topology.carried(topology.host, topology.local)])
        awaited[topology.rail[host]] = sum(sizes[rank] for rank in topology.carried(host, topology.local))
    received = _exchange(sent, awaited, group, here, sum(sizes))
    # What came over the rails, as it lies there: rail after rail, in each host after host.
    order = [[r for host in others for r in topology.carried(host, rail)] for rail in range(topology.rails)]
    widths = [sum(sizes[rank] for rank in ranks) for ranks in order]
    mine = torch.cat(list(received.values())) if received else here.new_empty(0)
    idle = [0] * (len(topology.mine) - topology.rails)
    there = _gather_inside(mine, widths + idle, group, topology)
    far = [rank for ranks in order for rank in ranks]
    pieces.update(zip(far, there.split([sizes[rank] for rank in far]), strict=True))
    return [pieces[rank].view(x.dtype) for rank in range(group.size)]


def _sum_inside(x: Tensor, shares: Sequence[int], group: TPGroup, topology: Topology) -> Tensor:
    """This rank's share of the sum over its host's ranks of x; the shares are those of local ranks 0, 1, ..."""
    if topology.shm is None:
        return x
    x = x.contiguous()
    out = x.new_empty(shares[topology.local])
    with inside_host(group) as shm:
        shm.reduce_scatter(x.data_ptr(), out.data_ptr(), 1, list(shares), SUM_CODES[x.dtype], False)
    return out


def _gather_inside(x: Tensor, sizes: Sequence[int], group: TPGroup, topology: Topology) -> Tensor:
    """The bytes of this host's ranks one after the other; local rank l has sizes[l]."""
    if topology.shm is None:
        return x
    out = x.new_empty(sum(sizes))
    with inside_host(group) as shm:
        shm.all_gather(x.data_ptr(), out.data_ptr(), 1, list(sizes))
    return out


def _hand_over(x: Tensor, numels: Sequence[int], group: TPGroup, topology: Topology) -> Tensor:
    """What the rails carried for ranks beside their own, to those ranks; x is what this one carried."""
    rail_of = [local % topology.rails for local in range(len(topology.mine))]
    sizes = [numels[rank] * x.element_size() for rank in topology.mine]
    sends = [size if rail == topology.local else 0 for rail, size in zip(rail_of, sizes, strict=True)]
    receives = [0] * len(sizes)
    receives[rail_of[topology.local]] = sizes[topology.local]
    out = x.new_empty(numels[topology.rank])
    with inside_host(group) as shm:
        shm.all_to_all(x.data_ptr(), out.data_ptr(), 1, sends, receives)
    return out


def _sum_between(part: Tensor, group: TPGroup, topology: Topology, whole: int) -> Tensor:
    """The sum over this rail's ranks of `part`, on each of them."""
    if len(topology.hosts) == 2:
        # As many bytes as in two steps, with half the latency.
        return _sum_of_pieces(dict.fromkeys(topology.rail, part), group, topology, 1, part, whole)
    sizes = even_splits(part.numel(), len(topology.hosts))
    pieces = dict(zip(topology.rail, part.split(sizes), strict=False))
    mine = _sum_of_pieces(pieces, group, topology, 1, part, whole)
    codec = codec_for(part.dtype, group)
    lengths = sizes if codec is None else [codec.nbytes(size) for size in sizes]
    mine = mine if codec is None else codec.pack(mine)
    sums = _exchange(
        dict.fromkeys(topology.rail, mine), dict(zip(topology.rail, lengths, strict=False)), group, mine, whole
    )
    if not topology.rail:
        return part
    if codec is not None:
        unpacked = [codec.sum([sums[peer]], size, part.dtype) for peer, size in zip(topology.rail, sizes, strict=True)]
        return torch.cat(unpacked)
    return torch.cat([sums[peer] for peer in topology.rail])


def _sum_of_pieces(
    pieces: Mapping[int, Tensor], group: TPGroup, topology: Topology, divide_by: int, like: Tensor, whole: int
) -> Tensor:
    """Send pieces[peer] to each rank of the rail; the sum, in host order, of what they sent to this one."""
    codec = codec_for(like.dtype, group)
    count = pieces[group.rank].numel() if pieces else 0
    if codec is None:
        received = _exchange(pieces, dict.fromkeys(topology.rail, count), group, like, whole)
        if not received:
            return like.new_empty(0)
        return sum_in_rank_order([received[peer] for peer in topology.rail], divide_by)
    # The same piece for several peers is packed once.
    packed = {id(piece): codec.pack(piece) for piece in pieces.values()}
    sent = {peer: packed[id(piece)] for peer, piece in pieces.items()}
    lengths = dict.fromkeys(topology.rail, codec.nbytes(count))
    received = _exchange(sent, lengths, group, like.new_empty(0, dtype=torch.uint8), whole)
    if not received:
        return like.new_empty(0)
    everyones = [received[peer] for peer in topology.rail]
    if divide_by == 1:
        return codec.sum(everyones, count, like.dtype)
    return (codec.sum(everyones, count, torch.float32) / divide_by).to(like.dtype)


def _exchange(
    pieces: Mapping[int, Tensor], lengths: Mapping[int, int], group: TPGroup, like: Tensor, whole: int
) -> dict[int, Tensor]:
    """Send pieces[peer] to each peer; what each of them sent, of these lengths, in the order of `lengths`.

    A rank's piece for itself stays where it is. All ranks of the group call this, perhaps with nothing. `whole` are the
    bytes of the group's tensor, equal on all ranks.
    """
    sent = [pieces[peer].reshape(-1) for peer in sorted(pieces) if peer != group.rank]
    in_numels = [pieces[peer].numel() if peer in pieces and peer != group.rank else 0 for peer in range(group.size)]
    out_numels = [lengths.get(peer, 0) if peer != group.rank else 0 for peer in range(group.size)]
    flat = sent[0] if len(sent) == 1 else torch.cat(sent) if sent else like.new_empty(0)
    received = exchange_pieces(flat, group, in_numels, out_numels, parts=parts_of(whole))
    return {peer: pieces[peer] if peer == group.rank else received[peer] for peer in lengths}
