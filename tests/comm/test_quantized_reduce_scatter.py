"""quantized_reduce_scatter: the same bits on every row, the error's bound, uneven parts, feedback, its gradient."""

import pytest
import torch
from comm_support import ALL_WORLDS, assert_check, assert_ranks_disagree, cases, numbers

import tpweave
from tpweave.comm.quantized_reduce_scatter import QUANTIZED_REDUCE_SCATTER

CASES = [((12,), 0), ((0, 5), 1), ((33, 50), 0), ((4, 213), 1), ((2, 9, 45), -2)]


def part_of(x, dim, splits, group):
    """This rank's part of x."""
    return (torch.tensor_split(x, group.size, dim) if splits is None else x.split(splits, dim))[group.rank]


def sums_are_within_the_bound(group, backend):
    for step, (shape, dim) in enumerate(CASES):
        uneven = [0] * (group.size - 1) + [shape[dim]]
        for dtype in (torch.float32, torch.float16):
            for splits, bits, seed, average in ((None, 8, None, False), (uneven, 4, 5, False), (None, 8, 2, True)):
                parts = [numbers(shape, dtype, rank, step) for rank in range(group.size)]
                y = tpweave.quantized_reduce_scatter(
                    parts[group.rank], dim, group, splits=splits, bits=bits, seed=seed,
                    reduce_op="avg" if average else "sum", backend=backend,
                )  # fmt: skip
                mine = [part_of(part, dim, splits, group) for part in parts]
                exact = sum(part.double() for part in mine) / (group.size if average else 1)
                assert y.dtype == dtype and y.shape == exact.shape and y.is_contiguous()
                if exact.numel() == 0:
                    continue
                largest = [part.abs().max().double() for part in mine]
                others = sum(largest) - largest[group.rank]
                step_size = 1.008 / (127 if bits == 8 else 7) * (0.5 if seed is None else 1) * (1 + 2**-15)
                rounding = torch.finfo(dtype).eps * sum(largest)
                assert ((y.double() - exact).abs() <= step_size * others + rounding).all(), (shape, bits, seed)


def rows_agree(group, backend):
    # The longest travel in several pieces: a slot holds some 500,000 codes of all parts together.
    for shape, dim, dtype in (
        ((40, 101), 1, torch.bfloat16), ((40, 101), 0, torch.float64), ((800_001,), 0, torch.float32),
        ((1000, 801), 1, torch.float32),
    ):  # fmt: skip
        if dtype == torch.float64 and backend == "shm":
            continue
        x = numbers(shape, dtype, group.rank)
        for seed, reduce_op in ((None, "sum"), (9, "avg")) if x.numel() < 10_000 else ((None, "avg"),):
            want, got = (
                tpweave.quantized_reduce_scatter(x, dim, group, reduce_op=reduce_op, seed=seed, backend=row)
                for row in ("reference", backend)
            )
            assert torch.equal(got, want), (shape, dim, seed)


def feedback_loses_nothing(group, backend):
    for dim, splits in ((0, None), (1, [40] + [30] * (group.size - 1))):
        shape = (24, 40 + 30 * (group.size - 1))
        lost, other = torch.zeros(shape), torch.zeros(shape)
        exact, got = 0.0, 0.0
        for step in range(50):
            parts = [numbers(shape, torch.float32, rank, step % 2) for rank in range(group.size)]
            arguments = dict(splits=splits, bits=4, seed=step if dim else None)
            y = tpweave.quantized_reduce_scatter(
                parts[group.rank], dim, group, error_feedback=lost, backend=backend, **arguments
            )
            if step < 3:
                want = tpweave.quantized_reduce_scatter(
                    parts[group.rank], dim, group, error_feedback=other, backend="reference", **arguments
                )
                assert torch.equal(y, want) and torch.equal(lost, other)
            got += y.double()
            exact += sum(part.double() for part in parts)
        total = exact - tpweave.all_reduce(lost.double(), group)
        torch.testing.assert_close(got, part_of(total, dim, splits, group), rtol=1e-5, atol=1e-3)
        assert not part_of(lost, dim, splits, group).any()


def gradient_is_all_gather(group, backend):
    for reduce_op, divide_by in (("sum", 1), ("avg", group.size)):
        x = numbers((3, 7), torch.float32, group.rank).requires_grad_()
        shapes = [part.shape for part in torch.tensor_split(torch.empty(3, 7), group.size, 1)]
        weights = [numbers(shape, torch.float32, rank, step=1) for rank, shape in enumerate(shapes)]
        y = tpweave.quantized_reduce_scatter(x, 1, group, reduce_op=reduce_op, backend=backend)
        (y * weights[group.rank]).sum().backward()
        torch.testing.assert_close(x.grad, torch.cat(weights, 1) / divide_by)
    with pytest.raises(ValueError, match="not differentiable"):
        tpweave.quantized_reduce_scatter(x, 1, group, error_feedback=torch.zeros(3, 7), backend=backend)


def opcheck_and_compile(group, backend):
    x = numbers((7, 50), torch.float32, group.rank).requires_grad_()
    splits = [7 - 3 * (group.size - 1)] + [3] * (group.size - 1)
    arguments = (0, group.name, splits, True, 8, 128, 3, backend)
    torch.library.opcheck(torch.ops.tpweave.quantized_reduce_scatter.default, (x, *arguments))
    torch.library.opcheck(
        torch.ops.tpweave.quantized_reduce_scatter_feedback.default, (x.detach(), torch.zeros(7, 50), *arguments)
    )

    def step(x):
        return tpweave.quantized_reduce_scatter(x * 2, 0, group, bits=4, reduce_op="avg", backend=backend) + 1

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
        return lambda group: tpweave.quantized_reduce_scatter(x, 0, group, backend=backend, **arguments)

    messages = assert_ranks_disagree(
        group, call(bits=4 if first else 8, block=64), call(block=64 if first else 32), call(seed=group.rank),
        call(torch.ones(8, 4 + group.rank)), call(reduce_op="sum" if first else "avg"),
    )  # fmt: skip
    assert all("quantized_reduce_scatter" in message for message in messages), messages


CHECKS = {
    sums_are_within_the_bound: ALL_WORLDS,
    rows_agree: ("2", "3"),
    feedback_loses_nothing: ("1", "3"),
    gradient_is_all_gather: ("1", "3"),
    opcheck_and_compile: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(QUANTIZED_REDUCE_SCATTER, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(QUANTIZED_REDUCE_SCATTER, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'max'.*'sum' or 'avg'"):
        tpweave.quantized_reduce_scatter(x, reduce_op="max")
    with pytest.raises(ValueError, match=r"adds up to 5.*has 2"):
        tpweave.quantized_reduce_scatter(x, splits=[5])
    with pytest.raises(ValueError, match="seed is -3"):
        tpweave.quantized_reduce_scatter(x, seed=-3)
    with pytest.raises(ValueError, match=r"error_feedback is torch\.bfloat16"):
        tpweave.quantized_reduce_scatter(x, error_feedback=torch.zeros(2, 3, dtype=torch.bfloat16))
