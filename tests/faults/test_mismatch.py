"""Ranks of one group that call different things: all of them raise, and name who called what."""

import pytest
import torch

import tpweave
from tpweave.errors import CollectiveMismatchError, GroupPoisonedError
from tpweave.native import DTYPE_CODES
from tpweave.testing import run_ranks

BYTES = 3 << 20


def reduce(shm, shape, dtype=torch.float32):
    x = torch.ones(shape, dtype=dtype)
    shm.all_reduce(x.data_ptr(), x.data_ptr(), x.numel(), DTYPE_CODES[dtype], x.shape)


def gather(shm, outer, inner):
    x, out = torch.ones(BYTES, dtype=torch.uint8), torch.empty(BYTES, dtype=torch.uint8)
    shm.all_gather(x.data_ptr(), out.data_ptr(), outer, inner)


def scatter(shm, inner, average=False):
    x, out = torch.ones(BYTES), torch.empty(BYTES)
    shm.reduce_scatter(x.data_ptr(), out.data_ptr(), 1, inner, 0, average)


def exchange(shm, sends, receives):
    x, out = torch.ones(BYTES, dtype=torch.uint8), torch.empty(BYTES, dtype=torch.uint8)
    shm.all_to_all(x.data_ptr(), out.data_ptr(), 2, sends, receives)


# What ranks 0 and 2 call, what rank 1 calls, and words of the message for both.
CASES = {
    "op": ((reduce, (8,)), (gather, 1, [4, 4, 4]), "all_reduce(float32 [8])", "all_gather(1 rows of [4, 4, 4] bytes)"),
    "barrier": ((reduce, (8,)), None, "all_reduce(float32 [8])", "barrier()"),
    "dtype": ((reduce, (8,)), (reduce, (8,), torch.bfloat16), "all_reduce(float32 [8])", "all_reduce(bfloat16 [8])"),
    "shape": ((reduce, (2, 4)), (reduce, (4, 2)), "all_reduce(float32 [2, 4])", "all_reduce(float32 [4, 2])"),
    "size": ((reduce, (8,)), (reduce, (BYTES,)), "all_reduce(float32 [8])", f"all_reduce(float32 [{BYTES}])"),
    "splits": ((gather, 2, [4, 5, 6]), (gather, 2, [5, 4, 6]), "2 rows of [4, 5, 6]", "2 rows of [5, 4, 6]"),
    "average": ((scatter, [4, 4, 4]), (scatter, [4, 4, 4], True), "elements, sum)", "elements, avg)"),
    "pairs": (
        (exchange, [4, 4, 4], [4, 4, 4]), (exchange, [4, 4, 4], [4, 4, 8]),
        "sends [4, 4, 4] bytes, receives [4, 4, 4]", "sends [4, 4, 4] bytes, receives [4, 4, 8]",
    ),
}  # fmt: skip


def mismatch(rank, world_size, name):
    majority, minority, majority_text, minority_text = CASES[name]
    group = tpweave.init(timeout=20)
    # Both parities of the sequence, with a call before.
    for lead in range(2):
        for _ in range(lead):
            group.shm.barrier()
        call = minority if rank == 1 else majority
        with pytest.raises(CollectiveMismatchError) as caught:
            group.shm.barrier() if call is None else call[0](group.shm, *call[1:])
        message = str(caught.value)
        # The ranks are numbered as they called: 0 and 2 alike, 1 differently.
        assert "ranks 0, 2 called " in message and "rank 1 called " in message, message
        assert majority_text in message and minority_text in message, message
        with pytest.raises(GroupPoisonedError, match="called different things"):
            group.shm.barrier()
        group = tpweave.init(timeout=20)
    group.shm.barrier()


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_disagree_all_raise_and_name_who_called_what(name):
    run_ranks(3, mismatch, name)


def all_different(rank, world_size):
    group = tpweave.init(timeout=20)
    with pytest.raises(CollectiveMismatchError) as caught:
        reduce(group.shm, (rank + 1,))
    for peer in range(world_size):
        assert f"rank {peer} called all_reduce(float32 [{peer + 1}])" in str(caught.value)


def test_eight_ranks_with_eight_shapes():
    run_ranks(8, all_different)
