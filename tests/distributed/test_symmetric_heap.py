"""Tensors that live in the ranks' shared memory, and collectives whose steps Python takes."""

import ctypes
import gc

import pytest
import torch

import tpweave
from tpweave.distributed.stepped_call import SteppedCall
from tpweave.errors import CollectiveMismatchError, GroupPoisonedError, PeerFailureError
from tpweave.native import DTYPE_CODES
from tpweave.testing import run_ranks

FP32 = DTYPE_CODES[torch.float32]


def peer_tensor(group, offset, shape):
    """A copy of what lies at a peer's offset."""
    out = torch.empty(shape)
    ctypes.memmove(out.data_ptr(), group.shm.address_of(offset), out.nbytes)
    return out


def reads_of_peers(rank, world_size):
    group = tpweave.init(timeout=30)
    # Sizes differ by rank: nobody agrees on anything beforehand.
    held = [group.empty((7 + rank,), torch.int64).fill_(rank) for _ in range(rank)]
    for step in range(20):
        mine = group.empty((3, 1000 + 700 * step)).fill_(100 * step + rank)
        with SteppedCall(
            group, "all_gather_matmul", FP32, mine.shape, own=group.shm.offset_of(mine.data_ptr(), mine.nbytes)
        ) as call:
            call.arrive(1)
            offsets = call.await_arrivals()
            for k in range(1, world_size):
                peer = (rank + k) % world_size
                assert (peer_tensor(group, offsets[peer], mine.shape) == 100 * step + peer).all()
            call.publish(1)
            for k in range(1, world_size):
                call.await_step((rank + k) % world_size, 1)
        mine.fill_(-1)
    assert all((tensor == rank).all() for tensor in held)
    with (
        pytest.raises(CollectiveMismatchError, match=r"all_gather_matmul\(.*rank"),
        SteppedCall(group, "all_gather_matmul", FP32, [rank]) as call,
    ):
        call.arrive()
        call.await_arrivals()
    # The thread lets go of the communicator after a failure too.
    with pytest.raises(GroupPoisonedError):
        tpweave.all_reduce(torch.ones(4), group)
    return True


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_read_what_peers_allocated_alone(world_size):
    assert all(run_ranks(world_size, reads_of_peers))


def gives_up(rank, world_size):
    group = tpweave.init(timeout=30)
    if rank == 1:
        with pytest.raises(ZeroDivisionError), SteppedCall(group, "matmul_reduce_scatter", FP32, [4]) as call:
            call.arrive(1)
            call.await_arrivals()
            1 / 0  # noqa: B018
    else:
        with (
            pytest.raises(PeerFailureError, match="gave up") as caught,
            SteppedCall(group, "matmul_reduce_scatter", FP32, [4]) as call,
        ):
            call.arrive(1)
            call.await_arrivals()
            call.await_step(1, 1)
        assert list(caught.value.ranks) == [1]
    group = tpweave.init(timeout=30)
    return tpweave.all_reduce(torch.ones(3), group).tolist()


def test_a_rank_that_raises_between_steps_fails_the_group_and_a_new_one_works():
    assert run_ranks(3, gives_up) == [[3.0] * 3] * 3


def lifetimes(rank, world_size):
    group = tpweave.init(timeout=30)
    assert group.empty((0, 3)).shape == (0, 3)
    assert group.shm.offset_of(torch.empty(4).data_ptr(), 16) == -1
    before = group.empty((1000, 1000))
    where = before.data_ptr()
    view = before[3:]
    del before
    gc.collect()
    # A view keeps the memory.
    other = group.empty((1000, 1000))
    assert other.data_ptr() != where
    del view
    gc.collect()
    assert group.empty((1000, 999)).data_ptr() == where
    after = group.empty((5,)).fill_(7)
    group.destroy()
    assert (after == 7).all()
    with pytest.raises(GroupPoisonedError):
        group.empty((5,))
    return True


def test_memory_lives_as_long_as_its_tensors_and_is_given_out_again():
    assert all(run_ranks(2, lifetimes))
