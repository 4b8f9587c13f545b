"""The Triton row of all_reduce in the interpreter: several processes on one arena, both kernels, and a silent peer."""

import os

import pytest
import torch
from comm_support import numbers

import tpweave
from tpweave.errors import PeerFailureError
from tpweave.testing import run_ranks

# One and several blocks of the kernel, ragged ends, fewer elements than ranks.
SHAPES = [(1,), (7, 33), (4096,), (3, 5003), (0,), (64,)]


def same(got, want):
    """Equal bits; in bf16 one unit in the last place, for Triton's interpreter cuts fp32 off where a GPU rounds."""
    if got.dtype == torch.bfloat16:
        return bool(((got.view(torch.int16).int() - want.view(torch.int16).int()).abs() <= 1).all())
    return torch.equal(got, want)


def sums_are_right(rank, world_size):
    os.environ["TRITON_INTERPRET"] = "1"
    group = tpweave.init(timeout=60)
    if group.transport != "shm":
        return group.transport_reason
    from tpweave.distributed.peer_memory import peer_memory
    from tpweave.kernels.comm.all_reduce import all_reduce_fwd

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for step, shape in enumerate(SHAPES):
            x = numbers(shape, dtype, rank, step)
            want = tpweave.all_reduce(x, group, backend="reference")
            assert same(tpweave.all_reduce(x, group, backend="triton"), want), (dtype, shape)
            memory = peer_memory(group, x.device, x.nbytes)
            assert same(all_reduce_fwd(x, memory, two_shot=True), want), (dtype, shape, "two-shot")
    return None


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_have_the_reference_s_bits(world_size):
    reasons = run_ranks(world_size, sums_are_right)
    if reasons[0] is not None:
        pytest.skip(f"triton: needs the shm transport: {reasons[0]}")


def silent_peer(rank, world_size):
    os.environ["TRITON_INTERPRET"] = "1"
    group = tpweave.init(timeout=60)
    if group.transport != "shm":
        return group.transport_reason
    from tpweave.distributed.peer_memory import peer_memory
    from tpweave.kernels.comm.all_reduce import all_reduce_fwd

    memory = peer_memory(group, torch.device("cpu"), 64)
    memory.timeout = 0.01
    if rank == 0:
        with pytest.raises(PeerFailureError, match=r"rank\(s\) 1 did not signal") as caught:
            all_reduce_fwd(torch.ones(16), memory)
        assert caught.value.ranks == (1,)
    group.all_gather_object(None)
    return None


def test_a_silent_peer_is_named():
    reasons = run_ranks(2, silent_peer)
    if reasons[0] is not None:
        pytest.skip(f"triton: needs the shm transport: {reasons[0]}")


def disconnected(rank, world_size):
    os.environ["TRITON_INTERPRET"] = "1"
    group = tpweave.init(timeout=60)
    if group.transport != "shm":
        return group.transport_reason
    from tpweave.distributed.peer_memory import peer_memory
    from tpweave.kernels.comm.all_reduce import all_reduce_fwd

    memory = peer_memory(group, torch.device("cpu"), 64)
    if rank == 1:
        # Writes its input where nobody looks: the sum must come out wrong.
        memory.data_ptrs = memory.data_ptrs.clone()
        memory.data_ptrs[1] += 64
    y = all_reduce_fwd(torch.full((4,), 1.0 + rank), memory)
    if rank == 0:
        assert not torch.equal(y, torch.full((4,), 3.0))
    group.all_gather_object(None)
    return None


def test_negative_control():
    """The sum needs the peer's memory: with a wrong address it is wrong."""
    reasons = run_ranks(2, disconnected)
    if reasons[0] is not None:
        pytest.skip(f"triton: needs the shm transport: {reasons[0]}")
