"""Two hosts for real: two network namespaces joined by a link of 1 Gbit/s, two ranks in each."""

import ctypes
import functools
import json
import os

import pytest
import torch
import torch.distributed as dist
from comm_support import numbers, same_bits_on_all_ranks

import tpweave
from tpweave.benchmarks import two_hosts
from tpweave.errors import CollectiveMismatchError
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.testing import run_ranks


@functools.cache
def objection():
    return two_hosts.objection()


@pytest.fixture
def hosts():
    if objection() is not None:
        pytest.skip(objection())
    with two_hosts.two_hosts() as made:
        yield made


def move_to_host(path):
    """This process's later sockets belong to that namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path) as namespace:
        if libc.setns(namespace.fileno(), 0x40000000) != 0:
            raise OSError(ctypes.get_errno(), f"setns {path}")
    os.environ["GLOO_SOCKET_IFNAME"] = two_hosts.INTERFACE


def sent_bytes():
    with open("/proc/self/net/dev") as lines:
        line = next(line for line in lines if line.strip().startswith(two_hosts.INTERFACE))
    return int(line.split()[9])


def bytes_of(call):
    """What this rank's host puts on the link while all ranks do `call`, beyond what their meeting takes."""

    def between(work):
        dist.barrier()
        before = sent_bytes()
        work()
        dist.barrier()
        return sent_bytes() - before

    return between(call) - between(lambda: None)


def two_by_two(rank, world_size, paths):
    move_to_host(paths[rank // 2])
    group = tpweave.init(dist.new_group(), timeout=30)
    assert group.transport == "hierarchical" and group.topology.hosts == ((0, 1), (2, 3))
    numel = 1 << 19
    xs = [numbers((numel,), torch.float32, peer) for peer in range(world_size)]
    x = xs[rank]
    total = sum_in_rank_order([sum_in_rank_order(xs[:2]), sum_in_rank_order(xs[2:])])
    assert torch.equal(tpweave.all_reduce(x, group), total)

    # Half of what each of the two ranks of a host would send by itself; headers and acknowledgements are the rest.
    assert 1.0 < bytes_of(lambda: tpweave.all_reduce(x, group)) / x.nbytes < 1.1
    assert 0.5 < bytes_of(lambda: tpweave.reduce_scatter(x, 0, group)) / x.nbytes < 0.6
    shard = x[: numel // 4].clone()
    assert 0.5 < bytes_of(lambda: tpweave.all_gather(shard, 0, group)) / x.nbytes < 0.6

    a, b = numbers((512, 96), torch.float32, rank), numbers((96, 2048), torch.float32, rank, 1)
    tpweave.matmul_all_reduce(a, b, group)
    model = group.cost_model
    assert model.crowded == (2 * torch.get_num_threads() >= len(os.sched_getaffinity(0)))
    assert not model.crowded or model.last == 1
    model.crowded = False
    y = tpweave.matmul_all_reduce(a, b, group)
    want = sum(
        numbers((512, 96), torch.float32, peer).double() @ numbers((96, 2048), torch.float32, peer, 1).double()
        for peer in range(world_size)
    )
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-3)
    # The link's rate bounds what was measured; a busy machine may see far less.
    assert 0 < 2 * model.link.bandwidth < 250e6 and model.link.latency > 0

    narrow = x.to(torch.bfloat16)
    plain = bytes_of(lambda: tpweave.all_reduce(narrow, group))
    assert tpweave.init(group, compression={"inter_host": "int8"}) is group
    packed = []
    assert 0.45 < bytes_of(lambda: packed.append(tpweave.all_reduce(narrow, group))) / plain < 0.55
    same_bits_on_all_ranks(group, [y, *packed])

    with pytest.raises(CollectiveMismatchError, match=r"rank 2: all_gather float32 \(40,\)"):
        tpweave.all_gather(torch.ones(10 if rank == 2 else 9), 0, group)
    with pytest.raises(CollectiveMismatchError, match=r"rank 1: matmul_all_reduce float32 \(7, 5\)"):
        tpweave.matmul_all_reduce(torch.ones(7 if rank == 1 else 6, 4), torch.ones(4, 5), group)
    tpweave.init(group, compression={} if rank == 3 else None)
    with pytest.raises(CollectiveMismatchError, match="compression"):
        tpweave.all_reduce(x, group)


def test_bytes_bits_and_mismatches_between_hosts(hosts):
    run_ranks(4, two_by_two, hosts.paths())


def test_torchrun_across_two_hosts(hosts):
    module = ["-m", "tpweave.benchmarks.between_hosts", "--shape", "128", "256", "512"]
    printed = hosts.torchrun(module, ranks_per_host=2).splitlines()
    found = json.loads(next(line for line in printed if line.startswith("{")))
    assert found["ranks"] == 4 and found["transport"] == "hierarchical"
    assert min(hosts.sent_bytes()) > found["bytes"]["fp32"]


def test_nothing_is_left_behind():
    if objection() is not None:
        pytest.skip(objection())
    with pytest.raises(RuntimeError, match="stop"), two_hosts.two_hosts() as made:
        paths = made.paths()
        assert all(os.path.exists(path) for path in paths)
        raise RuntimeError("stop")
    assert not any(os.path.exists(path) for path in paths)
