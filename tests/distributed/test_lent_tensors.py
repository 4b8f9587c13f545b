"""Collectives of tensors that live in the arena: every mix of ranks that lend theirs, with a staged call's bits."""

import itertools

import pytest
import torch

import tpweave
from tpweave.native import _C, DTYPE_CODES
from tpweave.testing import run_ranks

SLOT = 512 * 1024  # bytes
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
# Bytes below which nothing is lent, one-shot sizes, one chunk, several.
SIZES = [1000, 17 * 1024 + 8, SLOT // 2, SLOT + 5 * 1024 + 8]


def inputs(world_size, numel, dtype):
    generator = torch.Generator().manual_seed(numel)
    if dtype.is_floating_point:
        return [torch.randn(numel, generator=generator).to(dtype) for _ in range(world_size)]
    return [torch.randint(0, 100, (numel,), generator=generator).to(dtype) for _ in range(world_size)]


def placed(group, x, lent):
    """x in the arena, away from a page's beginning, or in ordinary memory."""
    if not lent:
        return x.clone()
    tensor = group.empty((x.numel() + 16,), x.dtype)[16:]
    return tensor.copy_(x)


def bits(x):
    return x.flatten().view(torch.uint8)


def all_reduces(rank, world_size, isa):
    _C.set_active_isa(isa)
    group = tpweave.init(timeout=30)
    # Who lends, and who wants the sum in place.
    mixes = [(set(range(world_size)), set(range(world_size)), DTYPES)]
    for lenders in ({0}, set(range(1, world_size)), set(range(world_size))):
        for inplace in (set(), {world_size - 1}, set(range(world_size))):
            mixes.append((lenders, inplace, (torch.bfloat16,)))
    for lenders, inplace, dtypes in mixes:
        for dtype, nbytes in itertools.product(dtypes, SIZES if len(dtypes) < 3 else (SIZES[1], SIZES[-1])):
            xs = inputs(world_size, nbytes // dtype.itemsize, dtype)
            staged = xs[rank].clone()
            code, numel = DTYPE_CODES[dtype], staged.numel()
            group.shm.all_reduce(staged.data_ptr(), staged.data_ptr(), numel, code)
            x = placed(group, xs[rank], rank in lenders)
            out = x if rank in inplace else torch.empty_like(x)
            group.shm.all_reduce(x.data_ptr(), out.data_ptr(), numel, code)
            case = (lenders, inplace, dtype, nbytes)
            assert torch.equal(bits(out), bits(staged)), case
            assert rank in inplace or torch.equal(bits(x), bits(xs[rank])), case
            # A peer that still read it would now read this.
            x.fill_(7)
    return True


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_has_the_same_bits_wherever_its_tensors_lie(world_size, isa):
    assert all(run_ranks(world_size, all_reduces, isa))


def repeats(rank, world_size):
    """Many calls on the same few tensors, whose contents each rank changes at once after the call."""
    group = tpweave.init(timeout=30)
    x, y = group.empty((9000,)), group.empty((9000,))
    for step in range(100):
        for tensor, kept in ((x, False), (y, True)):
            tensor.fill_(rank + step)
            total = tpweave.all_reduce(tensor, group) if kept else tpweave.all_reduce_(tensor, group)
            assert (total == world_size * step + world_size * (world_size - 1) // 2).all(), (step, kept)
            assert not kept or (tensor == rank + step).all()
    return True


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_lent_tensor_may_be_written_as_soon_as_the_call_returns(world_size):
    assert all(run_ranks(world_size, repeats))


def gathers_and_scatters(rank, world_size):
    group = tpweave.init(timeout=30)
    for lenders in ({0}, set(range(1, world_size)), set(range(world_size))):
        for rows, columns in ((2, 40), (70, 150), (1000, 260)):
            splits = [rows + 3 * peer for peer in range(world_size)]
            shards = [x.view(-1, columns) for x in (inputs(1, split * columns, torch.float32)[0] for split in splits)]
            x = placed(group, shards[rank].flatten(), rank in lenders).view_as(shards[rank])
            got = tpweave.all_gather(x, 0, group, splits=splits)
            x.fill_(7)
            assert torch.equal(got, torch.cat(shards)), (lenders, rows)
            wide = tpweave.all_gather(placed(group, shards[0].flatten(), rank in lenders).view_as(shards[0]), 1, group)
            assert torch.equal(wide, torch.cat([shards[0]] * world_size, 1))

            whole = [x.view(-1, columns) for x in inputs(world_size, sum(splits) * columns, torch.float32)]
            for dim, cut in ((0, splits), (1, [columns - 7 * (world_size - 1)] + [7] * (world_size - 1))):
                want = tpweave.reduce_scatter(whole[rank].clone(), dim, group, splits=cut)
                x = placed(group, whole[rank].flatten(), rank in lenders).view_as(whole[rank])
                got = tpweave.reduce_scatter(x, dim, group, splits=cut)
                x.fill_(7)
                assert torch.equal(bits(got), bits(want)), (lenders, rows, dim)
    return True


@pytest.mark.parametrize("world_size", [2, 3])
def test_gathers_and_scatters_of_lent_tensors(world_size):
    assert all(run_ranks(world_size, gathers_and_scatters))
