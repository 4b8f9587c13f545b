"""quantized_all_reduce: the same bits on every row and rank, the error's bound, feedback that loses nothing."""

from itertools import accumulate

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
from tpweave.comm.quantized_all_reduce import QUANTIZED_ALL_REDUCE
from tpweave.reference.ops.quantize_blocks import BlockFormat

SHAPES = [(0,), (), (5,), (7, 33), (2, 3, 511), (4, 1025)]
FORMATS = [(8, None), (4, None), (8, 512)]
HALVES = [torch.bfloat16, torch.float16]
DEFAULT_BLOCKS = {8: 128, 4: 32}


def uneven(shape, dtype, rank, step=0):
    """Numbers whose blocks differ by powers of ten."""
    x = numbers(shape, torch.float32, rank, step)
    return (x * 10.0 ** (torch.arange(x.numel()) // 50 % 5 - 2).view(shape)).to(dtype)


def largest_of_block(x, block):
    blocks = torch.nn.functional.pad(x.double().flatten().abs(), (0, -x.numel() % block)).view(-1, block)
    return blocks.amax(1).repeat_interleave(block)[: x.numel()].view(x.shape)


def bound(parts, form, seed):
    """What the docstring promises, in float64: parts are the ranks' x."""
    counts = form.parts(parts[0].numel(), len(parts))
    owner = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts)).view(parts[0].shape)
    step = 1.008 / form.top * (0.5 if seed is None else 1.0)
    lost = sum(step * largest_of_block(part, form.block) * (owner != rank).double() for rank, part in enumerate(parts))
    exact = sum(part.double() for part in parts)
    largest = largest_of_block(exact.abs() + lost, form.block)
    rounding = torch.finfo(parts[0].dtype).eps
    return lost + step * largest + (2**-15 * step + 2**-20 + rounding) * (largest + lost)


def errors_are_within_the_bound(group, backend):
    results = []
    for step, shape in enumerate(SHAPES):
        for bits, block in FORMATS:
            for dtype in (torch.float32, *(HALVES if step > 3 else ())):
                for seed in (None, 12):
                    parts = [uneven(shape, dtype, rank, step) for rank in range(group.size)]
                    x = parts[group.rank].clone()
                    y = tpweave.quantized_all_reduce(x, group, bits=bits, block=block, seed=seed, backend=backend)
                    assert y.dtype == dtype and y.shape == x.shape and torch.equal(x, parts[group.rank])
                    if x.numel() and group.size > 1:
                        form = BlockFormat(bits, block or DEFAULT_BLOCKS[bits])
                        error = (y.double() - sum(part.double() for part in parts)).abs()
                        assert (error <= bound(parts, form, seed)).all(), (shape, bits, block, dtype, seed)
                    results.append(y)
    same_bits_on_all_ranks(group, results)


def rows_agree(group, backend):
    # The longest travels in several chunks: a slot holds some 500,000 codes of all parts together.
    for count, dtype in (
        (40_000, torch.float32), (3001, torch.bfloat16), (3001, torch.float64), (1_100_003, torch.float32),
    ):  # fmt: skip
        if dtype == torch.float64 and backend == "shm":
            continue
        x = uneven((count,), dtype, group.rank)
        for bits, seed in ((8, None), (4, 2**40)) if count < 100_000 else ((8, None),):
            want, got = (
                tpweave.quantized_all_reduce(x, group, bits=bits, seed=seed, backend=row)
                for row in ("reference", backend)
            )
            assert torch.equal(got, want), (count, dtype, bits)


def feedback_rows_agree(group, backend):
    for bits in (8, 4):
        buffers = [torch.zeros(5, 777) for _ in range(2)]
        for step in range(3):
            x = uneven((5, 777), torch.float32, group.rank, step)
            for seed in (None, step):
                want, got = (
                    tpweave.quantized_all_reduce(x, group, bits=bits, seed=seed, error_feedback=buffer, backend=row)
                    for buffer, row in zip(buffers, ("reference", backend), strict=True)
                )
                assert torch.equal(got, want) and torch.equal(*buffers)


def feedback_loses_nothing(group, backend):
    """Over 50 steps the sums differ from the true ones by what the buffers hold at the end, and no more."""
    for bits, seeded in ((4, False), (8, True)):
        lost = torch.zeros(1300)
        exact, got, without = (torch.zeros(1300, dtype=torch.float64) for _ in range(3))
        for step in range(50):
            parts = [uneven((1300,), torch.float32, rank, step % 3) for rank in range(group.size)]
            seed = step if seeded else None
            version = lost._version
            y = tpweave.quantized_all_reduce(
                parts[group.rank], group, bits=bits, seed=seed, error_feedback=lost, backend=backend
            )
            assert lost._version > version
            got += y.double()
            if not seeded:
                without += tpweave.quantized_all_reduce(parts[group.rank], group, bits=bits, backend=backend).double()
            exact += sum(part.double() for part in parts)
        missing = tpweave.all_reduce(lost.double(), group)
        scale = largest_of_block(exact, 32)
        assert ((got + missing - exact).abs() <= 1e-5 * scale).all()
        if group.size > 1 and not seeded:
            assert (got - exact).abs().mean() < (without - exact).abs().mean() / 4


def training_with_feedback_converges(group, backend):
    """Gradient descent on a quadratic whose ranks pull apart: int4 stalls, with feedback it arrives."""
    size = 200
    targets = [numbers((size,), torch.float32, rank) * 10 for rank in range(group.size)]
    best = sum(targets) / group.size
    distance = {}
    for with_feedback in (False, True):
        w, lost = torch.zeros(size), torch.zeros(size) if with_feedback else None
        for _ in range(80):
            grad = w - targets[group.rank]
            grad = tpweave.quantized_all_reduce(grad, group, bits=4, error_feedback=lost, backend=backend)
            w -= 0.1 / group.size * grad
        distance[with_feedback] = (w - best).norm().item()
    start = best.norm().item()
    assert distance[True] < 0.02 * start, (distance, start)
    if group.size > 1:
        assert distance[True] < distance[False] / 2, distance


def gradient_is_all_reduce(group, backend):
    x = numbers((4, 9), torch.float32, group.rank).requires_grad_()
    weights = [numbers((4, 9), torch.float32, rank, step=1) for rank in range(group.size)]
    (tpweave.quantized_all_reduce(x, group, bits=4, backend=backend) * weights[group.rank]).sum().backward()
    torch.testing.assert_close(x.grad, sum(weights))
    with pytest.raises(ValueError, match="not differentiable"):
        tpweave.quantized_all_reduce(x, group, error_feedback=torch.zeros(4, 9), backend=backend)


def strided_and_repeated(group, backend):
    for step in range(20 if backend in (None, "shm") else 4):
        shape = (1 + 37 * step % 300, 6)
        x = numbers(shape, torch.float32, group.rank, step).t()
        parts = [numbers(shape, torch.float32, rank, step).t().contiguous() for rank in range(group.size)]
        y = tpweave.quantized_all_reduce(x, group, backend=backend)
        assert y.is_contiguous()
        if group.size > 1:
            error = (y.double() - sum(part.double() for part in parts)).abs()
            assert (error <= bound(parts, BlockFormat(8, 128), None)).all()


def not_finite_is_nan(group, backend):
    x = numbers((1024,), torch.float32, group.rank)
    if group.rank == group.size - 1:
        x[3], x[900] = torch.inf, torch.nan
    lost = torch.zeros(1024)
    y = tpweave.quantized_all_reduce(x, group, error_feedback=lost, backend=backend)
    if group.size > 1:
        bad = torch.zeros(1024, dtype=torch.bool)
        bad[:128], bad[896:] = True, True
        assert y[bad].isnan().all() and y[~bad].isfinite().all() and lost.isfinite().all()


def opcheck_and_compile(group, backend):
    x = numbers((6, 50), torch.float32, group.rank).requires_grad_()
    plain = x.detach()
    lost = torch.zeros(6, 50)
    arguments = (group.name, 4, 32, 7, backend)
    torch.library.opcheck(torch.ops.tpweave.quantized_all_reduce.default, (x, *arguments))
    torch.library.opcheck(torch.ops.tpweave.quantized_all_reduce_feedback.default, (plain, lost, *arguments))

    torch._dynamo.reset()

    def step(x, seed=3):
        return tpweave.quantized_all_reduce(x * 2, group, seed=seed, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)

    def with_feedback(x, lost, seed):
        return (
            tpweave.quantized_all_reduce(x * 2, group, bits=4, seed=seed, error_feedback=lost, backend=backend) + lost
        )

    compiled = torch.compile(with_feedback, fullgraph=True, backend="aot_eager")
    other = torch.zeros(6, 50)
    for seed in range(6):
        with torch._dynamo.config.patch(recompile_limit=2):
            assert torch.equal(compiled(plain, lost, seed), with_feedback(plain, other, seed))
        assert torch.equal(lost, other)


def ranks_disagree(group, backend):
    rank = group.rank
    x = torch.ones(400)

    def call(x=x, **arguments):
        return lambda group: tpweave.quantized_all_reduce(x, group, backend=backend, **arguments)

    messages = assert_ranks_disagree(
        group, call(bits=4 if rank == 1 else 8, block=128), call(block=64 * 2 ** (rank == 1)), call(seed=rank),
        call(torch.ones(400 + rank)), call(x if rank else x.bfloat16()),
    )  # fmt: skip
    assert all("quantized_all_reduce" in message for message in messages), messages
    assert "403" not in messages[3] and "402" in messages[3]


CHECKS = {
    errors_are_within_the_bound: ALL_WORLDS,
    rows_agree: ("2", "3"),
    feedback_rows_agree: ("3",),
    feedback_loses_nothing: ("1", "3"),
    training_with_feedback_converges: ("2",),
    strided_and_repeated: ("2",),
    gradient_is_all_reduce: ALL_WORLDS,
    not_finite_is_nan: ("1", "2", "4"),
    opcheck_and_compile: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(QUANTIZED_ALL_REDUCE, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(QUANTIZED_ALL_REDUCE, CHECKS, check, backend, world)


def test_parts_are_nearly_equal_and_whole_units():
    for count, ranks in ((0, 3), (1, 2), (5000, 3), (1024, 8), (129, 2)):
        parts = BlockFormat(8, 128).parts(count, ranks)
        assert sum(parts) == count and len(parts) == ranks
        assert all(end % 128 == 0 or end == count for end in accumulate(parts))
        assert max(parts) - min(parts) < 256


def test_explain_says_what_shm_gains():
    from tpweave.cli.explain import AssumedGroup

    found = tpweave.explain("quantized_all_reduce", torch.ones(1000), group=AssumedGroup(2, "shm", "gloo"))
    assert found.chosen == "shm" and "no gain" in str(found)


def test_bad_input_names_the_values():
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="bits is 16"):
        tpweave.quantized_all_reduce(x, bits=16)
    with pytest.raises(ValueError, match="block is 100"):
        tpweave.quantized_all_reduce(x, block=100)
    with pytest.raises(ValueError, match="int32"):
        tpweave.quantized_all_reduce(torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"error_feedback is torch\.float32 \(4, 3\).*\(3, 4\)"):
        tpweave.quantized_all_reduce(x, error_feedback=torch.zeros(4, 3))
    with pytest.raises(ValueError, match="strides"):
        tpweave.quantized_all_reduce(x, error_feedback=torch.zeros(4, 3).t())
    with pytest.raises(ValueError, match="sparse"):
        tpweave.quantized_all_reduce(torch.eye(3).to_sparse())
