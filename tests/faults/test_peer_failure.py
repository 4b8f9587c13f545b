"""Ranks that die, stop, leave or are interrupted: the others raise, name them, and can go on without them."""

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist

import tpweave
from tpweave.errors import GroupPoisonedError, PeerFailureError
from tpweave.testing import run_ranks


def reduce(group, numel=1 << 18):
    x = torch.ones(numel)
    group.shm.all_reduce(x.data_ptr(), x.data_ptr(), numel, 0, x.shape)
    return x


def shared_mappings():
    with open("/proc/self/maps") as maps:
        return [line for line in maps if "/dev/shm" in line and "tpweave" in line]


def survive(rank, world_size, victim, signal_number, timeout):
    group = tpweave.init(timeout=timeout)
    pids = group.all_gather_object(os.getpid())
    survivors = [peer for peer in range(world_size) if peer != victim]
    sent = []

    def strike():
        sent.append(time.monotonic())
        os.kill(pids[victim], signal_number)

    timer = threading.Timer(0.2, strike)
    if rank == survivors[0]:
        timer.start()
    with pytest.raises(PeerFailureError) as caught:
        while True:
            reduce(group)
    raised = time.monotonic()
    assert caught.value.ranks == (victim,) and caught.value.op == "all_reduce", str(caught.value)
    assert group.poisoned and not shared_mappings()
    for _ in range(2):
        with pytest.raises(GroupPoisonedError, match=rf"failed earlier, in all_reduce .* rank\(s\) {victim} "):
            group.shm.barrier()
    # The survivors can go on: a new group without the victim.
    fewer = tpweave.init(dist.new_group(survivors, use_local_synchronization=True))
    assert fewer.ranks == tuple(survivors)
    if fewer.size > 1:
        assert torch.equal(reduce(fewer), torch.full((1 << 18,), float(fewer.size)))
        fewer.shm.barrier()
    if rank == survivors[0] and signal_number == signal.SIGSTOP:
        os.kill(pids[victim], signal.SIGKILL)
    return sent, raised, caught.value.waited


@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (2, 0), (3, 0), (4, 2), (8, 5)])
def test_a_killed_rank_is_named_by_all_others(world_size, victim):
    results = run_ranks(world_size, survive, victim, signal.SIGKILL, 60.0, may_die=(victim,))
    (sent,) = next(result[0] for result in results if result is not None and result[0])
    for result in results:
        assert result is None or result[1] - sent < 2.0
    assert not [name for name in os.listdir("/dev/shm") if "tpweave" in name]


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (4, 3), (8, 1)])
def test_a_stopped_rank_is_named_at_the_timeout(world_size, victim):
    results = run_ranks(world_size, survive, victim, signal.SIGSTOP, 1.5, may_die=(victim,))
    waits = [result[2] for result in results if result is not None]
    assert min(waits) >= 1.5


def late(rank, world_size):
    group = tpweave.init(timeout=0.6)
    reduce(group)
    if rank == 1:
        time.sleep(1.5)
        with pytest.raises(GroupPoisonedError, match="which is this rank"):
            reduce(group)
        return
    with pytest.raises(PeerFailureError, match=r"rank\(s\) 1 had not arrived after 0\.[67]") as caught:
        reduce(group)
    assert caught.value.ranks == (1,)


def test_a_late_rank_learns_that_the_others_gave_up():
    run_ranks(3, late)


def leaves(rank, world_size, politely):
    group = tpweave.init(timeout=60)
    reduce(group)
    if rank == 1:
        if politely:
            group.destroy()
            with pytest.raises(GroupPoisonedError, match="was destroyed"):
                group.shm.barrier()
            time.sleep(1.0)
        return
    with pytest.raises(PeerFailureError, match="destroyed the group" if politely else "ended or was killed") as caught:
        reduce(group)
    assert caught.value.ranks == (1,) and caught.value.waited < 2.0


@pytest.mark.parametrize("politely", [True, False])
def test_a_rank_that_leaves_is_named(politely):
    run_ranks(3, leaves, politely)


def finishes_first(rank, world_size):
    group = tpweave.init(timeout=60)
    for _ in range(50):
        reduce(group, 1 << 20)
    group.destroy()


def test_leaving_after_the_last_call_disturbs_nobody():
    run_ranks(4, finishes_first)


def interrupted(rank, world_size):
    group = tpweave.init(timeout=60)
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            reduce(group)
        with pytest.raises(GroupPoisonedError):
            reduce(group)
        return
    time.sleep(0.8)
    with pytest.raises(PeerFailureError, match="interrupted") as caught:
        reduce(group)
    assert caught.value.ranks == (0,)


def test_ctrl_c_ends_a_wait():
    run_ranks(2, interrupted)


def rebuilt(rank, world_size):
    group = tpweave.init(timeout=0.3)
    if rank == 0:
        with pytest.raises(PeerFailureError):
            reduce(group)
    dist.barrier()
    again = tpweave.init(timeout=60)
    assert again is not group and group.destroyed and again.name != group.name
    assert reduce(again).sum().item() == world_size * (1 << 18)


def test_init_replaces_a_failed_group():
    run_ranks(2, rebuilt)


def forked(rank, world_size):
    group = tpweave.init(timeout=60)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            group.shm.barrier()
            os.write(write, b"no error")
        except GroupPoisonedError as error:
            os.write(write, str(error).encode())
        group.destroy()
        os._exit(0)
    assert "was forked from a rank" in os.read(read, 500).decode()
    os.waitpid(child, 0)
    # Neither the child's call nor its destroy() reached the others.
    assert reduce(group).sum().item() == world_size * (1 << 18)
    group.shm.barrier()


def test_a_forked_child_is_no_rank():
    run_ranks(2, forked)


def dies_with_a_child(rank, world_size):
    group = tpweave.init(timeout=30)
    reduce(group)
    if rank == 1:
        # The child keeps copies of every descriptor open; its parent's end must be seen all the same.
        if os.fork() == 0:
            time.sleep(3.0)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailureError) as caught:
        reduce(group)
    assert caught.value.ranks == (1,) and caught.value.waited < 2.0


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="the system has no pidfd")
def test_a_dead_rank_is_seen_though_its_child_lives():
    run_ranks(2, dies_with_a_child, may_die=(1,))


def survive_on_pg(rank, world_size, victim, signal_number, timeout):
    os.environ["TPWEAVE_TRANSPORT"] = "pg"
    group = tpweave.init(timeout=timeout)
    assert group.transport == "pg"
    x = torch.ones(1000)
    assert torch.equal(tpweave.all_reduce(x, group), x * world_size)
    if rank == victim:
        os.kill(os.getpid(), signal_number)
    began = time.monotonic()
    with pytest.raises(PeerFailureError) as caught:
        tpweave.all_reduce(x, group)
    waited = time.monotonic() - began
    assert caught.value.ranks == (victim,) and caught.value.op == "all_reduce", str(caught.value)
    assert group.poisoned
    with pytest.raises(GroupPoisonedError, match=rf"failed earlier, in all_reduce \(sequence 1\): rank\(s\) {victim} "):
        tpweave.all_gather(x, 0, group)
    fewer = tpweave.init(
        dist.new_group([peer for peer in range(world_size) if peer != victim], use_local_synchronization=True)
    )
    assert torch.equal(tpweave.all_reduce(x, fewer), x * (world_size - 1))
    return waited


@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (4, 2), (4, 0)])
def test_a_killed_rank_is_named_over_torch_distributed(world_size, victim):
    results = run_ranks(world_size, survive_on_pg, victim, signal.SIGKILL, 60.0, may_die=(victim,))
    assert max(waited for waited in results if waited is not None) < 5.0


def stopped_on_pg(rank, world_size, victim):
    group_pids = tpweave.init().all_gather_object(os.getpid())
    tpweave.init().destroy()
    try:
        return survive_on_pg(rank, world_size, victim, signal.SIGSTOP, 2.0)
    finally:
        if rank == (victim + 1) % world_size:
            os.kill(group_pids[victim], signal.SIGKILL)


@pytest.mark.parametrize(("world_size", "victim"), [(3, 1)])
def test_a_stopped_rank_is_named_over_torch_distributed(world_size, victim):
    results = run_ranks(world_size, stopped_on_pg, victim, may_die=(victim,))
    assert max(waited for waited in results if waited is not None) < 8.0
