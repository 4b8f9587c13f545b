"""200 calls of every collective with changing sizes, dtypes and splits: signals that are reused, never confused."""

import random

import pytest
import torch
import torch.distributed as dist

import tpweave
from tpweave.distributed.symmetric_memory import symmetric_buffer
from tpweave.native import DTYPE_CODES
from tpweave.testing import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]
LARGEST = 32 << 20


class Mixed:
    """Calls on one group whose results every rank can foretell: small whole numbers, exact in every dtype."""

    def __init__(self, group, seed):
        self.group, self.random = group, random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.pattern = torch.randint(-4, 5, ((LARGEST >> 1) + 64 * group.size,), generator=generator, dtype=torch.int8)

    def input(self, rank, numel, dtype):
        start = 61 * rank
        return self.pattern[start : start + numel].to(dtype)

    def total(self, numel, dtype):
        total = self.pattern[:numel].clone()
        for rank in range(1, self.group.size):
            total += self.input(rank, numel, torch.int8)
        return total.to(dtype)

    def call(self, nbytes):
        size, rank, shm = self.group.size, self.group.rank, self.group.shm
        dtype = self.random.choice(DTYPES)
        kind = self.random.choice(["all_reduce", "in_place", "all_gather", "reduce_scatter", "all_to_all", "barrier"])
        numel = nbytes // dtype.itemsize
        case = f"{kind} {dtype} {nbytes}"
        if kind == "barrier":
            shm.barrier()
            return
        if kind in ("all_reduce", "in_place"):
            x = self.input(rank, numel, dtype)
            out = x if kind == "in_place" else torch.empty_like(x)
            shm.all_reduce(x.data_ptr(), out.data_ptr(), numel, DTYPE_CODES[dtype], x.shape)
            assert torch.equal(out, self.total(numel, dtype)), case
            return
        outer = self.random.choice([1, 1, 2, 37])
        weights = [self.random.choice([0, 1, 1, 2]) for _ in range(size)]
        inner = [numel // outer * weight // max(1, sum(weights)) for weight in weights]
        width = sum(inner)
        begin = sum(inner[:rank])
        own = slice(begin, begin + inner[rank])
        if kind == "all_gather":
            want = self.input(0, outer * width, dtype).view(outer, width)
            part = want[:, own].contiguous()
            out = torch.empty_like(want)
            shm.all_gather(part.data_ptr(), out.data_ptr(), outer, [n * dtype.itemsize for n in inner])
        elif kind == "reduce_scatter":
            x = self.input(rank, outer * width, dtype)
            want = self.total(outer * width, dtype).view(outer, width)[:, own]
            out = torch.empty(want.shape, dtype=dtype)
            shm.reduce_scatter(x.data_ptr(), out.data_ptr(), outer, inner, DTYPE_CODES[dtype], False)
        else:
            # Every rank sends inner[j] columns to rank j.
            xs = [self.input(peer, outer * width, dtype).view(outer, width) for peer in range(size)]
            want = torch.cat([x[:, own] for x in xs], 1)
            out = torch.empty_like(want)
            shm.all_to_all(
                xs[rank].data_ptr(), out.data_ptr(), outer, [n * dtype.itemsize for n in inner],
                [inner[rank] * dtype.itemsize] * size,
            )  # fmt: skip
        assert torch.equal(out, want), f"{case} outer={outer} inner={inner}"

    def size(self, i):
        """Mostly small; one call in 40 large, and both ends of the range."""
        if i == 20:
            return 0
        if i == 40:
            return LARGEST
        largest = 24 if i % 40 == 0 else 20 if i % 5 == 0 else 14
        return int(2 ** self.random.uniform(0, largest))


def mixed_calls(rank, world_size):
    mixed = Mixed(tpweave.init(timeout=60), seed=world_size)
    for i in range(200):
        mixed.call(mixed.size(i))


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_200_mixed_calls(world_size):
    run_ranks(world_size, mixed_calls, timeout=200)


def two_groups(rank, world_size):
    world = Mixed(tpweave.init(timeout=60), seed=1)
    low, high = dist.new_group([0, 1, 2]), dist.new_group([3, 1])
    mine = [group for group, ranks in ((low, (0, 1, 2)), (high, (1, 3))) if rank in ranks]
    groups = [Mixed(tpweave.init(group), seed=2) for group in mine]
    for i in range(60):
        world.call(world.size(i % 40))
        for group in groups:
            group.call(group.size(i % 40))


def test_groups_that_share_ranks_do_not_disturb_each_other():
    run_ranks(4, two_groups)


def buffers(rank, world_size):
    group = tpweave.init(timeout=60)
    before = group.workspace_bytes
    buffer = symmetric_buffer(group, "a", 10_000)
    assert symmetric_buffer(group, "a", 9_000) is buffer and symmetric_buffer(group, "b", 1) is not buffer
    assert len(set(buffer.data_ptrs + buffer.signal_ptrs)) == 2 * world_size
    write_bytes(buffer.data_ptrs[rank], bytes([rank + 1]) * 10_000)
    write_bytes(buffer.signal_ptrs[rank], bytes([rank + 101]))
    group.shm.barrier()
    for peer in range(world_size):
        assert read_bytes(buffer.data_ptrs[peer], 10_000) == bytes([peer + 1]) * 10_000
        assert read_bytes(buffer.signal_ptrs[peer], 2) == bytes([peer + 101, 0])
    larger = symmetric_buffer(group, "a", 11_000)
    assert larger.nbytes == 20_000 and read_bytes(larger.data_ptrs[rank], 20_000) == bytes(20_000)
    assert group.workspace_bytes > before
    Mixed(group, seed=3).call(1 << 20)


def read_bytes(address, count):
    import ctypes

    return ctypes.string_at(address, count)


def write_bytes(address, content):
    import ctypes

    ctypes.memmove(address, content, len(content))


@pytest.mark.parametrize("world_size", [2, 3])
def test_symmetric_buffers_grow_and_are_mapped_by_all(world_size):
    run_ranks(world_size, buffers)
