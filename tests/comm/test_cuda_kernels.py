"""The CUDA kernels, run on the host: values, ragged ends, repeated calls, and what the protocol does when ranks fail.

What this cannot show is the GPU's own: its memory model, its speed, and the PTX of csrc/cuda/ptx.
"""

import importlib
import itertools
import random
import threading
import time

import pytest
import torch

pytest.importorskip("pybind11")

from cuda_ranks import Ranks, emulated_library

from tpweave.dispatch import Inputs
from tpweave.distributed import cuda_memory
from tpweave.errors import CollectiveMismatchError, PeerFailureError
from tpweave.native import DTYPE_CODES, data_ptr
from tpweave.reference.comm.all_reduce import sum_in_rank_order
from tpweave.reference.comm.all_reduce_rms_norm import reduced_norm_reference
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
    for rows, hidden, has_residual, weight_dtype in (
        (1, 8, True, None), (3, 4100, True, torch.float32), (70, 33, True, "same"), (5, 256, False, torch.float32),
    ):  # fmt: skip
        for dtype in DTYPES if hidden != 4100 else DTYPES[1:2]:
            xs = [torch.randn(rows, hidden).to(dtype) for _ in range(size)]
            residual = torch.randn(rows, hidden).to(dtype) if has_residual else None
            weight = None
            if weight_dtype is not None:
                weight = torch.randn(hidden).to(dtype if weight_dtype == "same" else weight_dtype)

            def call(rank, channel, xs=xs, residual=residual, weight=weight, rows=rows, hidden=hidden, dtype=dtype):
                memory = [new_output(rows * hidden, dtype) for _ in range(2)]
                memory.append(new_output(rows, torch.float32))
                channel.all_reduce_rms_norm(
                    xs[rank].data_ptr(), data_ptr(residual), data_ptr(weight), *(out.data_ptr() for _, out in memory),
                    rows, hidden, 1e-6, DTYPE_CODES[dtype], DTYPE_CODES[dtype if weight is None else weight.dtype],
                    TIMEOUT, 0,
                )  # fmt: skip
                assert all(whole[-1] == 77 for whole, _ in memory)
                return [out.view(rows, -1) for _, out in memory]

            h = sum_in_rank_order([x.float() for x in xs] + ([] if residual is None else [residual.float()]))
            exact = rms_norm_reference(h.double(), None if weight is None else weight.double())
            plain = rms_norm_reference(h, weight).to(dtype)
            results = ranks.run(call)
            for normed, residual_out, rstd in results:
                assert torch.equal(residual_out, h.to(dtype))
                assert torch.equal(normed, results[0][0])
                assert_accurate(normed, exact, plain)
                torch.testing.assert_close(rstd, torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6))


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
    outs = all_reduce(ranks, xs, two_shot=two_shot, timeout=0.5, only=[0, 2])
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


class Group:
    """What the rows read of a TPGroup."""

    def __init__(self, rank, size):
        self.rank, self.size, self.timeout = rank, size, TIMEOUT


@pytest.fixture
def groups(monkeypatch):
    """Three ranks whose `cuda` rows take CPU tensors and run on the host."""
    made = [Group(rank, 3) for rank in range(3)]
    channels = {}

    def new_channel(group, device, data_bytes):
        # Every rank enlarges its channels in the same order.
        key = (data_bytes, sum(kept is group for kept, _ in new_channel.calls))
        new_channel.calls.append((group, key))
        with new_channel.lock:
            ranks = channels.setdefault(key, Ranks(3, data_bytes))
        return ranks.channels[group.rank], ranks

    new_channel.calls, new_channel.lock = [], threading.Lock()
    for group in made:
        monkeypatch.setitem(cuda_memory._groups, group, cuda_memory._Channels(None))
    monkeypatch.setattr(cuda_memory, "_new_channel", new_channel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in ("all_reduce", "all_gather", "all_reduce_rms_norm"):
        monkeypatch.setattr(importlib.import_module(f"tpweave.comm.{name}"), "current_stream", lambda device: 0)
    return made


def on_all(groups, call):
    return Ranks(len(groups)).run(lambda rank, _: call(groups[rank]))


def test_rows_of_all_reduce(groups):
    row = importlib.import_module("tpweave.comm.all_reduce").all_reduce_cuda
    # Nothing, transposed, larger than the first channel's halves: its memory is replaced, and one-shot by two-shot.
    for shape in ((0, 4), (33, 65), (1 << 18,)):
        xs = [torch.randn(shape, dtype=torch.float64).to(torch.bfloat16) for _ in groups]
        for y in on_all(groups, lambda group, xs=xs: row(xs[group.rank].transpose(0, -1), group)):
            assert torch.equal(y, sum_in_rank_order([x.transpose(0, -1) for x in xs]))
    replaced = [cuda_memory._groups[group].replaced for group in groups]
    assert [len(kept) for kept in replaced] == [0, 0, 0]
    large = [torch.ones(600_000, dtype=torch.bfloat16) for _ in groups]
    assert all((y == 3).all() for y in on_all(groups, lambda group: row(large[group.rank], group)))
    assert [len(kept) for kept in replaced] == [1, 1, 1]


def test_rows_of_all_gather(groups):
    row = importlib.import_module("tpweave.comm.all_gather").all_gather_cuda
    for dtype in (torch.bfloat16, torch.int64, torch.bool):
        for dim, splits in ((0, [1, 2, 3]), (1, [2, 0, 5]), (2, [4, 4, 4]), (1, [0, 0, 0])):
            shapes = [[3, 2, 5] for _ in groups]
            for shape, length in zip(shapes, splits, strict=True):
                shape[dim] = length
            xs = [torch.randint(0, 2, shape).to(dtype) for shape in shapes]
            args = (dim, splits)
            for y in on_all(groups, lambda group, xs=xs, args=args: row(xs[group.rank], args[0], group, args[1])):
                assert torch.equal(y, torch.cat(xs, dim))


def test_rows_of_all_reduce_rms_norm(groups):
    row = importlib.import_module("tpweave.comm.all_reduce_rms_norm").all_reduce_rms_norm_cuda
    for dtype, weight_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        xs = [torch.randn(2, 3, 100).to(dtype) for _ in groups]
        residual, weight = torch.randn(3, 2, 100).to(dtype).transpose(0, 1), torch.randn(100).to(weight_dtype)
        for with_residual in (residual, None):
            for with_weight in (weight, None):
                args = (with_residual, with_weight, 1e-5, None)
                want = reduced_norm_reference(xs, *args)
                for got in on_all(groups, lambda group, xs=xs, args=args: row(xs[group.rank], *args, group)):
                    assert torch.equal(got[1], want[1])
                    exact = reduced_norm_reference([x.double() for x in xs], *args)
                    assert_accurate(got[0], exact[0], want[0])
                    torch.testing.assert_close(got[2], want[2])


def test_rows_of_all_reduce_rms_norm_say_why_not(groups):
    rule = importlib.import_module("tpweave.comm.all_reduce_rms_norm").cuda_norm_objection
    for shape, values, words in (
        ((4, 8), {"quantize": "int8"}, "gives no codes (quantize)"),
        ((0, 8), {}, "takes at least one element"),
        ((1, 24577), {}, "takes a last dim of up to 24576, not 24577"),
        ((1024, 1024), {}, "takes up to 524288 bytes on 3 ranks, not 4194304"),
        ((4, 8), {}, None),
    ):
        assert rule(Inputs([torch.empty(shape)], group=groups[0], **values)) == words


def test_rows_raise_what_the_gpu_reported(groups):
    row = importlib.import_module("tpweave.comm.all_reduce").all_reduce_cuda
    xs = [torch.ones(8), torch.ones(9), torch.ones(9)]
    on_all(groups, lambda group: row(xs[group.rank], group))
    with pytest.raises(CollectiveMismatchError, match=r"all_reduce \(sequence 1\): rank\(s\) .* called another"):
        row(xs[0], groups[0])


def test_rows_name_a_late_rank(groups):
    row = importlib.import_module("tpweave.comm.all_reduce").all_reduce_cuda
    groups[0].timeout = 0.05
    row(torch.ones(8), groups[0])
    with pytest.raises(PeerFailureError, match=r"all_reduce \(sequence 1\): rank\(s\) .* did not signal") as caught:
        row(torch.ones(8), groups[0])
    # Threads that look later than the one that gave up first do not add whom they miss.
    assert caught.value.ranks and set(caught.value.ranks) <= {1, 2}


def test_first_calls_are_not_captured(groups, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    row = importlib.import_module("tpweave.comm.all_reduce").all_reduce_cuda
    with pytest.raises(RuntimeError, match="all_reduce: its first call of 64 bytes cannot be captured"):
        row(torch.ones(8), groups[0])
