"""quantized_all_gather: the same bits on every row and rank, the error's bound, uneven shards, its gradient."""

import pytest
import torch
from comm_support import (
    ALL_WORLDS,
    assert_check,
    assert_ranks_disagree,
    cases,
    numbers,
    same_bits_on_all_ranks,
)

import tpweave
from tpweave.comm.quantized_all_gather import QUANTIZED_ALL_GATHER

CASES = [((4,), 0), ((0, 5), 1), ((7, 33), 0), ((5, 70), -1), ((2, 9, 41), 1)]


def shard_shape(shape, dim, rank, uneven):
    shape = list(shape)
    shape[dim] += 3 * rank if uneven else 0
    return shape


def shards_come_back(group, backend):
    results = []
    for step, (shape, dim) in enumerate(CASES):
        for dtype in (torch.float32, torch.bfloat16):
            for uneven, bits, seed in ((False, 8, None), (True, 8, 5), (True, 4, None)):
                shapes = [shard_shape(shape, dim, rank, uneven) for rank in range(group.size)]
                parts = [numbers(s, dtype, rank, step) for rank, s in enumerate(shapes)]
                splits = [s[dim] for s in shapes] if uneven else None
                y = tpweave.quantized_all_gather(
                    parts[group.rank], dim, group, splits=splits, bits=bits, seed=seed, backend=backend
                )
                if group.size == 1:
                    assert torch.equal(y, parts[0])
                    continue
                # Each shard as the codec gives it back; all of its elements have one stream of random numbers.
                want = []
                for rank, part in enumerate(parts):
                    codes, scales = tpweave.quantize_blocks(part, bits, seed=seed, stream=rank, backend="reference")
                    want.append(tpweave.dequantize_blocks(codes, scales, part.shape, dtype, bits=bits))
                want = torch.cat(want, dim)
                assert y.dtype == dtype and y.is_contiguous() and torch.equal(y, want), (shape, dim, bits)
                largest = max([part.abs().max().item() for part in parts if part.numel()], default=0)
                step_size = 1.008 * largest / (127 if bits == 8 else 7) * (0.5 if seed is None else 1)
                error = (y.double() - torch.cat(parts, dim).double()).abs()
                assert (error <= step_size * (1 + 2**-15) + torch.finfo(dtype).eps * largest).all()
                results.append(y)
    same_bits_on_all_ranks(group, results)


def long_shards_travel_in_pieces(group, backend):
    # A slot holds some 500,000 codes; the shards of the last dimension lie in rows.
    for shape, dim in (((700_001,), 0), ((1100, 513), 1)):
        shapes = [shard_shape(shape, dim, rank, True) for rank in range(group.size)]
        x = numbers(shapes[group.rank], torch.float32, group.rank)
        splits = [s[dim] for s in shapes]
        want, got = (
            tpweave.quantized_all_gather(x, dim, group, splits=splits, backend=row) for row in ("reference", backend)
        )
        assert torch.equal(got, want)


def gradient_is_reduce_scatter(group, backend):
    shape = (3, 5 + group.rank)
    x = numbers(shape, torch.float32, group.rank).requires_grad_()
    splits = [5 + rank for rank in range(group.size)]
    weights = [numbers((3, sum(splits)), torch.float32, rank, step=1) for rank in range(group.size)]
    y = tpweave.quantized_all_gather(x, 1, group, splits=splits, bits=4, backend=backend)
    (y * weights[group.rank]).sum().backward()
    torch.testing.assert_close(x.grad, sum(weights).split(splits, 1)[group.rank])


def opcheck_and_compile(group, backend):
    x = numbers((4, 50), torch.float32, group.rank).requires_grad_()
    splits = [4] * group.size
    arguments = (x, 0, group.name, splits, 8, 128, 3, backend)
    torch.library.opcheck(torch.ops.tpweave.quantized_all_gather.default, arguments)

    def step(x):
        return tpweave.quantized_all_gather(x * 2, 0, group, bits=4, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    x = torch.ones(8, 4)
    first = group.rank == 0

    def call(x=x, **arguments):
        return lambda group: tpweave.quantized_all_gather(x, 0, group, backend=backend, **arguments)

    messages = assert_ranks_disagree(
        group, call(bits=4 if first else 8, block=64), call(block=64 if first else 32), call(seed=group.rank),
        call(torch.ones(8, 4 + group.rank)), call(x.half() if first else x),
    )  # fmt: skip
    assert all("quantized_all_gather" in message for message in messages), messages


CHECKS = {
    shards_come_back: ALL_WORLDS,
    long_shards_travel_in_pieces: ("2",),
    gradient_is_reduce_scatter: ("1", "3"),
    opcheck_and_compile: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(QUANTIZED_ALL_GATHER, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(QUANTIZED_ALL_GATHER, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="bits is 3"):
        tpweave.quantized_all_gather(x, bits=3)
    with pytest.raises(ValueError, match="dim is 2"):
        tpweave.quantized_all_gather(x, 2)
    with pytest.raises(ValueError, match=r"give rank 0 a length of 5.*has 2"):
        tpweave.quantized_all_gather(x, splits=[5])
    with pytest.raises(ValueError, match="int64"):
        tpweave.quantized_all_gather(torch.ones(2, dtype=torch.int64))
