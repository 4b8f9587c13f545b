"""The CUDA kernels, run on the host: values, ragged ends, repeated calls, and what the protocol does when ranks fail.

What this cannot show is the GPU's own: its memory model, its speed, and the PTX of csrc/cuda/ptx.
"""

import itertools
import random
import time

import pytest
import torch

pytest.importorskip("pybind11")

from cuda_ranks import Ranks, emulated_library

from tpweave.native import DTYPE_CODES
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.reference.ops.rms_norm import rms_norm_reference
from tpweave.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIMEOUT = 60.0


def new_output(numel, dtype, offset=0):
    """Memory for `numel` elements, with a number before and after them that nobody may touch."""
    memory = torch.full((offset + numel + 1,), 77.0, dtype=dtype)
    return memory, memory[offset : offset + numel]


def all_reduce(ranks, xs, *, two_shot, offset=0, timeout=TIMEOUT, only=None):
    """Every rank's output."""

    def call(rank, channel):
        x = xs[rank]
        memory, out = new_output(x.numel(), x.dtype, offset)
        code = DTYPE_CODES[x.dtype]
        channel.all_reduce(x.data_ptr(), out.data_ptr(), x.numel(), code, two_shot, timeout, 0)
        assert (memory[:offset] == 77).all() and memory[-1] == 77
        return out

    return ranks.run(call, only)


@pytest.mark.parametrize("size", [1, 2, 3, 9])
def test_all_reduce_has_the_reference_s_bits(size):
    ranks = Ranks(size)
    # One element, ragged ends, several blocks, fewer vectors than ranks; then memory that is not 16-byte aligned.
    numels = [(1, 0), (7, 0), (4096, 0), (20011, 0), (20, 3), (4099, 1)]
    for numel, offset in numels[:4] if size > 3 else numels:
        for dtype in DTYPES if size <= 3 else DTYPES[:1]:
            for two_shot in (False, True):
                xs = [torch.randn(numel + offset).to(dtype)[offset:] for _ in range(size)]
                xs[0][0] = xs[-1][0] = -0.0
                want = sum_in_rank_order(xs)
                outs = all_reduce(ranks, xs, two_shot=two_shot, offset=offset)
                bits = torch.int32 if dtype == torch.float32 else torch.int16
                for out in outs:
                    # Copied: a view of 16-bit elements need not begin where 32 bits may.
                    assert torch.equal(out.clone().view(bits), want.view(bits)), (numel, dtype, two_shot)
    assert [channel.failure for channel in ranks.channels] == [None] * size


@pytest.mark.parametrize("size", [1, 3])
def test_all_reduce_rms_norm(size):
    ranks = Ranks(size)
    # One row, fewer rows than blocks, ragged rows, more rows than blocks.
    for rows, hidden, has_residual, has_weight in ((1, 8, True, True), (3, 4100, True, True), (70, 33, True, False),
                                                   (5, 256, False, True)):  # fmt: skip
        for dtype in DTYPES if hidden != 4100 else DTYPES[1:2]:
            xs = [torch.randn(rows, hidden).to(dtype) for _ in range(size)]
            residual = torch.randn(rows, hidden).to(dtype) if has_residual else None
            weight = torch.randn(hidden).to(dtype) if has_weight else None

            def call(rank, channel, xs=xs, residual=residual, weight=weight, rows=rows, hidden=hidden, dtype=dtype):
                memory = [new_output(rows * hidden, dtype) for _ in range(2)]
                channel.all_reduce_rms_norm(
                    xs[rank].data_ptr(), 0 if residual is None else residual.data_ptr(),
                    0 if weight is None else weight.data_ptr(), *(out.data_ptr() for _, out in memory), rows, hidden,
                    1e-6, DTYPE_CODES[dtype], TIMEOUT, 0,
                )  # fmt: skip
                assert all(whole[-1] == 77 for whole, _ in memory)
                return [out.view(rows, hidden) for _, out in memory]

            wide = [x.float() for x in xs] + ([] if residual is None else [residual.float()])
            h = sum_in_rank_order(wide).to(dtype)
            exact = rms_norm_reference(h.double(), None if weight is None else weight.double())
            plain = rms_norm_reference(h, weight)
            results = ranks.run(call)
            for normed, residual_out in results:
                assert torch.equal(residual_out, h)
                assert torch.equal(normed, results[0][0])
                assert_accurate(normed, exact, plain)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_gather_by_chunks(size):
    ranks = Ranks(size)
    cases = [
        (1, [100 + rank for rank in range(size)], 3),
        (7, [5 * rank for rank in range(size)], 1),
        (3, [4096] * size, 2),
        (1, [70001] * size, 16),
        (2, [3] * size, 5),
    ]
    for rows, widths, chunks in cases:
        xs = [torch.randint(0, 255, (rows, width), dtype=torch.uint8) for width in widths]

        def call(rank, channel, xs=xs, rows=rows, widths=widths, chunks=chunks):
            memory = torch.full((rows * sum(widths) + 1,), 77, dtype=torch.uint8)
            x = xs[rank]
            channel.all_gather_begin(x.data_ptr(), memory.data_ptr(), rows, widths, chunks, TIMEOUT, 0)
            # A consumer of the chunks, in the order in which they come.
            for step in range(size):
                for chunk in range(chunks):
                    channel.all_gather_await((rank + step) % size, chunk, TIMEOUT, 0)
            channel.all_gather_end(TIMEOUT, 0)
            assert memory[-1] == 77
            return memory[:-1].view(rows, -1)

        for out in ranks.run(call):
            assert torch.equal(out, torch.cat(xs, 1))
    assert [channel.failure for channel in ranks.channels] == [None] * size


def test_parts_cover_everything_once():
    part_of = emulated_library().part_of
    for count in (0, 1, 7, 64, 1000):
        for parts in (1, 2, 3, 16):
            spans = [part_of(count, parts, index) for index in range(parts)]
            assert spans[0][0] == 0 and spans[-1][1] == count
            assert all(before[1] == after[0] for before, after in itertools.pairwise(spans))
            assert all(end - begin <= -(-count // parts) for begin, end in spans)


def test_ranks_out_of_step_do_not_overwrite_what_is_read():
    """Many calls without a barrier between, of changing shapes, on ranks that are late by turns."""
    size, rounds = 3, 40
    ranks = Ranks(size, data_bytes=64 << 10)
    numels = [random.Random(step).choice([3, 500, 4000]) for step in range(rounds)]
    xs = [[torch.randn(numel, generator=torch.Generator().manual_seed(7 * step + rank)) for rank in range(size)]
          for step, numel in enumerate(numels)]  # fmt: skip
    wants = [sum_in_rank_order(each) for each in xs]

    def call(rank, channel):
        for step, numel in enumerate(numels):
            if step % size == rank:
                time.sleep(0.002)
            out = torch.empty(numel)
            channel.all_reduce(xs[step][rank].data_ptr(), out.data_ptr(), numel, 0, step % 4 == 3, TIMEOUT, 0)
            assert torch.equal(out, wants[step]), step

    ranks.run(call)


@pytest.mark.parametrize("two_shot", [False, True])
def test_a_silent_peer_is_named_and_the_output_is_no_number(two_shot):
    ranks = Ranks(3)
    xs = [torch.ones(5000)] * 3
    all_reduce(ranks, xs, two_shot=two_shot)
    outs = all_reduce(ranks, xs, two_shot=two_shot, timeout=0.05, only=[0, 2])
    for rank in (0, 2):
        assert outs[rank].isnan().all()
        sequence, late, others = ranks.channels[rank].failure
        assert sequence == 2 and 1 in late and rank not in late and others == []
    # What is already on its way behind the failed call ends at once, whatever its timeout.
    begin = time.monotonic()
    (out, _, _) = all_reduce(ranks, xs, two_shot=two_shot, only=[0])
    assert out.isnan().all() and time.monotonic() - begin < TIMEOUT / 4
    assert ranks.channels[0].failure[0] == 2


def test_a_silent_peer_ends_a_gather():
    ranks = Ranks(2)
    x, out = torch.ones(64, dtype=torch.uint8), torch.zeros(128, dtype=torch.uint8)

    def call(rank, channel):
        channel.all_gather_begin(x.data_ptr(), out.data_ptr(), 1, [64, 64], 2, 0.05, 0)
        channel.all_gather_await(1, 1, TIMEOUT, 0)
        channel.all_gather_end(TIMEOUT, 0)

    ranks.run(call, [0])
    assert ranks.channels[0].failure == (1, [1], [])


def test_ranks_that_call_different_things_fail_at_once():
    ranks = Ranks(2)
    begin = time.monotonic()
    outs = all_reduce(ranks, [torch.ones(16), torch.ones(15)], two_shot=False)
    assert time.monotonic() - begin < TIMEOUT / 4
    assert all(out.isnan().all() for out in outs)
    assert [channel.failure for channel in ranks.channels] == [(1, [], [1]), (1, [], [0])]


def test_negative_control():
    """The sums need the peers' memory: with another rank's address in its place they are wrong."""
    ranks = Ranks(2)
    library = emulated_library()
    elsewhere = Ranks(1).memory[0]
    elsewhere[: library.PAD_BYTES] = 0
    addresses = [memory.data_ptr() for memory in ranks.memory]
    ranks.channels[0] = library.Channel(0, [addresses[0], elsewhere.data_ptr()], 1 << 20, 0)
    outs = all_reduce(ranks, [torch.ones(8), torch.ones(8)], two_shot=False, timeout=0.3)
    assert not torch.equal(outs[0], torch.full((8,), 2.0)) or outs[1].isnan().all()


def test_wrong_arguments_are_refused():
    library = emulated_library()
    ranks = Ranks(2, data_bytes=1024)
    address = ranks.memory[0].data_ptr()
    with pytest.raises(ValueError, match="a channel takes 1 to 16 ranks, not 17"):
        library.Channel(0, [address] * 17, 1024, 0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        library.Channel(2, [address] * 2, 1024, 0)
    with pytest.raises(ValueError, match="not 256-byte aligned"):
        library.Channel(0, [address, address + 16], 1024, 0)
    channel = ranks.channels[0]
    with pytest.raises(ValueError, match="129 elements do not fit in a half of 512 bytes"):
        channel.all_reduce(address, address, 129, 0, False, 1.0, 0)
    with pytest.raises(ValueError, match="adds float32, bfloat16 and float16, not int64"):
        channel.all_reduce(address, address, 1, DTYPE_CODES[torch.int64], False, 1.0, 0)
    with pytest.raises(ValueError, match="1 widths for 2 ranks"):
        channel.all_gather_begin(address, address, 1, [1], 1, 1.0, 0)
    with pytest.raises(ValueError, match="takes 1 to 16 chunks, not 17"):
        channel.all_gather_begin(address, address, 1, [1, 1], 17, 1.0, 0)
    with pytest.raises(ValueError, match="do not fit in 1024 bytes"):
        channel.all_gather_begin(address, address, 1, [1025, 1], 1, 1.0, 0)
