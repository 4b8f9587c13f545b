"""Collectives of ranks that share hosts partly: which hosts are found, the bits of the sums, and failures.

The hosts are made up; `test_two_hosts.py` has the real thing, where namespaces may be made.
"""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from comm_support import numbers, same_bits_on_all_ranks
from host_support import pretend_hosts

import tpweave
from tpweave.distributed.splits import even_splits
from tpweave.distributed.topology import Topology, hosts_of
from tpweave.errors import CollectiveMismatchError, GroupPoisonedError, PeerFailureError
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.testing import run_ranks

CASES = [
    (0, torch.float32), (1, torch.bfloat16), (7, torch.float32), (1000, torch.int64),
    (70_001, torch.bfloat16), (70_001, torch.float32),
]  # fmt: skip
# Even; uneven and interleaved; a host of one rank among three of different sizes; three even ones.
HOSTS = [((0, 1), (2, 3)), ((0, 2, 3), (1, 4)), ((0,), (1, 2), (3, 4, 5)), ((0, 3), (1, 4), (2, 5))]


@pytest.mark.parametrize(
    ("reached", "hosts"),
    [
        ([set(), {0}, {0, 1}], ((0, 1, 2),)),
        ([set(), set(), {0}, {1}], ((0, 2), (1, 3))),
        ([set(), set(), set()], ((0,), (1,), (2,))),
        # Rank 2 reaches both of two that do not reach each other; rank 3 reaches only one of its host's.
        ([set(), set(), {0, 1}], None),
        ([set(), {0}, {0, 1}, {0}], None),
    ],
)
def test_hosts_of(reached, hosts):
    assert hosts_of([frozenset(ranks) for ranks in reached]) == hosts


def test_topology_of_hosts_of_different_sizes():
    topology = Topology(((0, 2, 3), (1, 4)), 3)
    assert (topology.host, topology.local, topology.rails, topology.rail) == (0, 2, 2, ())
    assert topology.carried(0, 0) == (0, 3) and topology.carried(0, 1) == (2,) and topology.carried(1, 1) == (4,)
    assert topology.shares(5) == [3, 2, 0]
    assert Topology(((0, 2, 3), (1, 4)), 2).rail == (2, 4)
    assert Topology.flat(3, 1).is_flat and Topology.flat(3, 1).rail == (0, 1, 2)


def by_host(xs, hosts):
    """The sum in the order that tpweave.comm.hierarchical documents."""
    return sum_in_rank_order([sum_in_rank_order([xs[rank] for rank in ranks]) for ranks in hosts])


def sums_and_gathers(rank, world_size, hosts):
    pretend_hosts(hosts)
    group = tpweave.init(timeout=30)
    assert group.topology.hosts == hosts and group.transport == "hierarchical" and group.shm is None
    assert "cannot reach rank" in group.transport_reason
    assert (group.workspace_bytes > 0) == (len(group.topology.mine) > 1)
    results = []
    for step, (length, dtype) in enumerate(CASES):
        xs = [numbers((2, length, 3), dtype, peer, step) for peer in range(world_size)]
        total = by_host(xs, hosts)
        results.append(tpweave.all_reduce(xs[rank], group))
        assert torch.equal(results[-1], total)
        for splits in (None, [0] * (world_size - 1) + [length]):
            part = tpweave.reduce_scatter(xs[rank], 1, group, splits=splits)
            sizes = even_splits(length, world_size) if splits is None else splits
            assert torch.equal(part, total.split(sizes, 1)[rank])
        if dtype.is_floating_point and length:
            mean = tpweave.reduce_scatter(xs[rank], 0, group, splits=[2, *[0] * (world_size - 1)], reduce_op="avg")
            want = torch.stack(xs).double().mean(0)
            if rank == 0:
                torch.testing.assert_close(mean.double(), want, rtol=1e-2, atol=2e-2)
        sizes = [(5 * peer + length) % 7 for peer in range(world_size)]
        shards = [numbers((2, size, 3), dtype, peer, step) for peer, size in enumerate(sizes)]
        assert torch.equal(tpweave.all_gather(shards[rank], 1, group, splits=sizes), torch.cat(shards, 1))
        assert torch.equal(tpweave.all_gather(xs[rank], 0, group), torch.cat(xs))
    # A dtype that the native side does not add takes the flat way.
    halves = [torch.full((5,), peer + 0.5j) for peer in range(world_size)]
    assert torch.equal(tpweave.all_reduce(halves[rank], group), sum(halves))
    flags = tpweave.all_gather(torch.tensor([rank % 2 == 0]), 0, group)
    assert flags.tolist() == [peer % 2 == 0 for peer in range(world_size)]
    same_bits_on_all_ranks(group, results)


@pytest.mark.parametrize("hosts", HOSTS, ids=str)
def test_sums_and_gathers(hosts):
    run_ranks(sum(len(ranks) for ranks in hosts), sums_and_gathers, hosts)


def gradients(rank, world_size, hosts):
    pretend_hosts(hosts)
    group = tpweave.init(timeout=30)
    x = numbers((4, 6), torch.float32, rank).requires_grad_()
    weight = numbers((4 * world_size, 6), torch.float32, 99)
    (tpweave.all_gather(x, 0, group) * weight).sum().backward()
    torch.testing.assert_close(x.grad, world_size * weight[4 * rank : 4 * rank + 4])
    x.grad = None
    (tpweave.reduce_scatter(x, 0, group) * weight[rank]).sum().backward()
    torch.testing.assert_close(x.grad, weight[:world_size].repeat_interleave(4 // world_size, 0))


def test_gradients():
    run_ranks(4, gradients, HOSTS[0])


def disagree(rank, world_size, hosts):
    pretend_hosts(hosts)
    group = tpweave.init(timeout=30)
    # The odd one out sits on one host; the other host's ranks agree among themselves.
    with pytest.raises(CollectiveMismatchError, match=r"rank 3: all_reduce float32 \(9,\)"):
        tpweave.all_reduce(torch.ones(9 if rank == 3 else 8), group)
    assert torch.equal(tpweave.all_reduce(torch.ones(8), group), torch.full((8,), 4.0))


def test_a_mismatch_is_raised_on_every_host():
    run_ranks(4, disagree, HOSTS[0])


def survive(rank, world_size, hosts, victim, stage):
    pretend_hosts(hosts)
    group = tpweave.init(timeout=60)
    x = torch.ones(1 << 20)
    tpweave.all_reduce(x, group)
    if rank == victim:
        from tpweave.comm import hierarchical

        setattr(hierarchical, stage, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(PeerFailureError) as caught:
        # The other host may have all it needs for this call: then it learns of it in the next.
        while True:
            tpweave.all_reduce(x, group)
    waited = time.monotonic() - began
    assert caught.value.ranks == (victim,) and caught.value.op == "all_reduce", str(caught.value)
    assert group.poisoned
    with pytest.raises(GroupPoisonedError, match=rf"rank\(s\) {victim} "):
        tpweave.all_gather(x, 0, group)
    survivors = [peer for peer in range(world_size) if peer != victim]
    fewer = tpweave.init(dist.new_group(survivors, use_local_synchronization=True))
    assert torch.equal(tpweave.all_reduce(x, fewer), x * (world_size - 1))
    return waited


@pytest.mark.parametrize(("victim", "stage"), [(0, "_sum_inside"), (3, "_exchange"), (1, "_gather_inside")])
def test_a_rank_killed_at_any_stage_is_named_on_every_host(victim, stage):
    results = run_ranks(4, survive, HOSTS[0], victim, stage, may_die=(victim,))
    assert max(waited for waited in results if waited is not None) < 5.0
