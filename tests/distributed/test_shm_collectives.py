"""The native collectives of the shm transport: every dtype and instruction set, odd sizes, uneven and empty splits."""

import pytest
import torch

import tpweave
from tpweave.native import _C, DTYPE_CODES
from tpweave.testing import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.int8]
SLOT = 512 * 1024  # bytes; the sizes below cross it, and the one-shot limit of half of it


def inputs(world_size, numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return [torch.randn(numel, generator=generator).to(dtype) for _ in range(world_size)]
    return [torch.randint(-100, 100, (numel,), generator=generator).to(dtype) for _ in range(world_size)]


def sum_in_rank_order(xs, average=False):
    """The contract: fp32 (fp64, integers: their own width), rank 0 first, one rounding."""
    wide = torch.float32 if xs[0].dtype in (torch.bfloat16, torch.float16) else xs[0].dtype
    total = xs[0].to(wide)
    for x in xs[1:]:
        total = total + x.to(wide)
    return (total / len(xs) if average else total).to(xs[0].dtype)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def all_reduces(rank, world_size, isa):
    _C.set_active_isa(isa)
    group = tpweave.init(timeout=30)
    assert group.transport == "shm", group.transport_reason
    for dtype in DTYPES:
        for numel in (0, 1, 3, 63, 64, 1031, SLOT // 8, SLOT // dtype.itemsize + 5, 3 * SLOT // dtype.itemsize + 777):
            xs = inputs(world_size, numel, dtype, numel)
            want = sum_in_rank_order(xs)
            out = torch.zeros(numel, dtype=dtype)
            group.shm.all_reduce(xs[rank].data_ptr(), out.data_ptr(), numel, DTYPE_CODES[dtype], out.shape)
            assert same_bits(out, want), (dtype, numel)
            mine = xs[rank]
            group.shm.all_reduce(mine.data_ptr(), mine.data_ptr(), numel, DTYPE_CODES[dtype])
            assert same_bits(mine, want), (dtype, numel, "in place")
    return group.workspace_bytes


@pytest.mark.parametrize("world_size", [2, 3])
def test_all_reduce_is_the_rank_ordered_sum_bit_for_bit(world_size, isa):
    results = run_ranks(world_size, all_reduces, isa)
    # Held pages are the system's count for the one arena: whoever asks last sees the most.
    assert 0 < max(results) <= (1 << 20) + 4 * world_size * SLOT


WIDTHS = {2: ([5, 3], [0, 7], [4, 4]), 3: ([1, 0, 6], [2, 2, 2], [0, 0, 3])}


def column_ranges(widths):
    ends = torch.tensor(widths).cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def splits(rank, world_size, isa):
    _C.set_active_isa(isa)
    group = tpweave.init(timeout=30)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        for widths in WIDTHS[world_size]:
            # Rows of a few elements, of one row only, and enough of them for several slots.
            for outer, factor in ((0, 1), (1, 1), (7, 3), (1, 70001), (50021, 1), (3, 40009)):
                inner = [width * factor for width in widths]
                shape = (world_size, outer, sum(inner))
                whole = torch.stack(inputs(world_size, outer * sum(inner), dtype, outer)).view(shape)
                ranges = column_ranges(inner)
                case = (dtype, widths, outer, factor)

                begin, end = ranges[rank]
                part = whole[0, :, begin:end].contiguous()
                out = torch.empty_like(whole[0])
                group.shm.all_gather(part.data_ptr(), out.data_ptr(), outer, [n * dtype.itemsize for n in inner])
                assert same_bits(out, whole[0]), ("all_gather", *case)

                averages = (False, True) if dtype.is_floating_point else (False,)
                for average in averages:
                    out = torch.empty_like(part)
                    group.shm.reduce_scatter(
                        whole[rank].data_ptr(), out.data_ptr(), outer, inner, DTYPE_CODES[dtype], average
                    )
                    want = sum_in_rank_order([x[:, begin:end] for x in whole], average)
                    assert same_bits(out, want), ("reduce_scatter", average, *case)


@pytest.mark.parametrize("world_size", [2, 3])
def test_gather_and_scatter_with_uneven_splits(world_size, isa):
    run_ranks(world_size, splits, isa)


def exchanges(rank, world_size):
    group = tpweave.init(timeout=30)
    for dtype in (torch.float32, torch.uint8):
        for outer, factor in ((0, 1), (1, 1), (5, 3), (1, 60013), (30011, 1)):
            # Rank i sends (3 i + j) % 4 columns to rank j: uneven, some none.
            sends = [[(3 * i + j) % 4 * factor for j in range(world_size)] for i in range(world_size)]
            receives = [[sends[i][j] for i in range(world_size)] for j in range(world_size)]
            xs = [
                torch.arange(outer * sum(sends[i])).add(1000 * i).to(dtype).view(outer, -1) if outer * sum(sends[i])
                else torch.empty(outer, sum(sends[i]), dtype=dtype)
                for i in range(world_size)
            ]  # fmt: skip
            want = torch.cat([xs[i].split(sends[i], 1)[rank] for i in range(world_size)], 1)
            out = torch.empty_like(want)
            group.shm.all_to_all(
                xs[rank].data_ptr(), out.data_ptr(), outer,
                [n * dtype.itemsize for n in sends[rank]], [n * dtype.itemsize for n in receives[rank]],
            )  # fmt: skip
            assert torch.equal(out, want), (dtype, outer, factor)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_to_all_with_uneven_splits(world_size):
    run_ranks(world_size, exchanges)


def large_outputs(rank, world_size):
    """Large enough to be written past the caches, into memory that does not begin with a cache line."""
    group = tpweave.init(timeout=60)
    dtype = torch.float32
    numel = (34 << 20) // (2 * world_size * dtype.itemsize) + 5
    code, size = DTYPE_CODES[dtype], dtype.itemsize
    xs = [torch.arange(numel).remainder_(97 + peer).to(dtype) for peer in range(world_size)]
    out = torch.full((world_size * numel + 4,), -1.0, dtype=dtype)[3:-1]
    group.shm.all_reduce(xs[rank].data_ptr(), out.data_ptr(), numel, code)
    assert same_bits(out[:numel], sum_in_rank_order(xs)) and (out[numel:] == -1).all()
    group.shm.all_gather(xs[rank].data_ptr(), out.data_ptr(), 1, [numel * size] * world_size)
    assert same_bits(out, torch.cat(xs))
    inner = numel // world_size * size
    group.shm.all_to_all(xs[rank].data_ptr(), out.data_ptr(), 1, [inner] * world_size, [inner] * world_size)
    part = slice(inner // size * rank, inner // size * (rank + 1))
    assert same_bits(out[: inner // size * world_size], torch.cat([x[part] for x in xs]))
    # Columns of a few pages, and of a few elements: one is streamed, the other is not.
    for rows in (500, 100_000):
        width = numel // rows
        shards = [x[: rows * width].view(rows, width) for x in xs]
        got = out[: world_size * rows * width].view(rows, world_size * width)
        group.shm.all_gather(shards[rank].data_ptr(), got.data_ptr(), rows, [width * size] * world_size)
        assert same_bits(got, torch.cat(shards, 1))


@pytest.mark.parametrize("world_size", [2, 3])
def test_outputs_larger_than_the_caches(world_size):
    run_ranks(world_size, large_outputs)


def refused(rank, world_size):
    shm = tpweave.init(timeout=30).shm
    for call, words in (
        (lambda: shm.all_reduce(0, 0, -1, 0), "numel is -1"),
        (lambda: shm.all_reduce(0, 0, 1, DTYPE_CODES[torch.bool]), "does not take dtype"),
        (lambda: shm.all_reduce(0, 0, 1, 99), "does not take dtype code 99"),
        (lambda: shm.all_gather(0, 0, 1, [4]), "1 widths for 2 ranks"),
        (lambda: shm.all_gather(0, 0, 1, [4, -4]), "rank 1's width is -4"),
        (lambda: shm.reduce_scatter(0, 0, 1, [4, 4], DTYPE_CODES[torch.int32], True), "floating-point"),
        (lambda: shm.all_to_all(0, 0, -3, [1, 1], [1, 1]), "outer is -3"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    # A refused call was no call: the ranks are still in step.
    shm.barrier()


def test_bad_arguments_are_refused_before_anything_is_sent():
    run_ranks(2, refused)
