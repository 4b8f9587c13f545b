"""reduce_scatter: sums and means, near-even and given splits, its gradient, and ranks that disagree."""

import pytest
import torch
from comm_support import ALL_WORLDS, FLOATS, NUMBERS, assert_check, assert_ranks_disagree, cases, numbers

import tpweave
from tpweave.comm.reduce_scatter import REDUCE_SCATTER
from tpweave.testing import assert_accurate

CASES = [((12,), 0), ((7, 3), 0), ((4, 13), 1), ((2, 9, 5), -2), ((0, 5), 1), ((6, 2), 1), ((33, 50, 17), 1)]


def expected(shape, dim, dtype, group, splits, average, step=0):
    """This rank's part in float64 (exact for integers, which wrap), and what adding in the dtype itself gives."""
    parts = [numbers(shape, dtype, rank, step) for rank in range(group.size)]
    parts = [torch.tensor_split(part, group.size, dim) if splits is None else part.split(splits, dim) for part in parts]
    exact = sum(part[group.rank].to(torch.float64 if dtype.is_floating_point else dtype) for part in parts)
    same = sum(part[group.rank] for part in parts)
    return (exact / group.size, same / group.size) if average else (exact, same)


def sums_are_right(group, backend):
    for dtype in NUMBERS:
        for step, (shape, dim) in enumerate(CASES if dtype in FLOATS[:2] else CASES[2:3]):
            x = numbers(shape, dtype, group.rank, step)
            length = shape[dim]
            uneven = [0] * (group.size - 1) + [length]
            for splits, average in ((None, False), (uneven, False), (None, True)):
                if average and not dtype.is_floating_point:
                    continue
                exact, same = expected(shape, dim, dtype, group, splits, average, step)
                reduce_op = "avg" if average else "sum"
                y = tpweave.reduce_scatter(x, dim, group, splits=splits, reduce_op=reduce_op, backend=backend)
                assert y.dtype == dtype and y.is_contiguous()
                if dtype.is_floating_point:
                    assert_accurate(y, exact, same)
                else:
                    assert torch.equal(y, exact)


def rows_agree(group, backend):
    for dtype in FLOATS:
        x = numbers((9, 101), dtype, group.rank)
        for reduce_op in ("sum", "avg"):
            want = tpweave.reduce_scatter(x, 1, group, reduce_op=reduce_op, backend="reference")
            assert torch.equal(tpweave.reduce_scatter(x, 1, group, reduce_op=reduce_op, backend=backend), want)


def strided_and_repeated(group, backend):
    for step in range(40 if backend in (None, "shm") else 8):
        shape = (1 + 5 * step % 7, 3 + 11 * step % 17, 4)
        x = numbers(shape, torch.float32, group.rank, step).transpose(0, 1)
        want = sum(numbers(shape, torch.float32, rank, step).double() for rank in range(group.size)).transpose(0, 1)
        y = tpweave.reduce_scatter(x, 0, group, backend=backend)
        want = torch.tensor_split(want, group.size)[group.rank]
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)


def gradient_is_all_gather(group, backend):
    for reduce_op, divide_by in (("sum", 1), ("avg", group.size)):
        x = numbers((3, 7), torch.float32, group.rank).requires_grad_()
        shapes = [part.shape for part in torch.tensor_split(torch.empty(3, 7), group.size, 1)]
        weights = [numbers(shape, torch.float32, rank, step=1) for rank, shape in enumerate(shapes)]
        y = tpweave.reduce_scatter(x, 1, group, reduce_op=reduce_op, backend=backend)
        (y * weights[group.rank]).sum().backward()
        torch.testing.assert_close(x.grad, torch.cat(weights, 1) / divide_by)


def opcheck_and_compile(group, backend):
    x = numbers((7, 5), torch.float32, group.rank).requires_grad_()
    splits = [7 - 3 * (group.size - 1)] + [3] * (group.size - 1)
    torch.library.opcheck(torch.ops.tpweave.reduce_scatter.default, (x, 0, group.name, splits, True, backend))

    def step(x):
        return tpweave.reduce_scatter(x * 2, 0, group, reduce_op="avg", backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    rank = group.rank
    reduce_op = "sum" if rank == 0 else "avg"
    assert_ranks_disagree(
        group,
        lambda group: tpweave.reduce_scatter(torch.ones(8, 4 + rank), 0, group, backend=backend),
        lambda group: tpweave.reduce_scatter(torch.ones(8, 4), 0, group, reduce_op=reduce_op, backend=backend),
    )


CHECKS = {
    sums_are_right: ALL_WORLDS,
    rows_agree: ("3",),
    strided_and_repeated: ("2", "3"),
    gradient_is_all_gather: ALL_WORLDS,
    opcheck_and_compile: ("1", "2"),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(REDUCE_SCATTER, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(REDUCE_SCATTER, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"'max'.*'sum' or 'avg'"):
        tpweave.reduce_scatter(x, reduce_op="max")
    with pytest.raises(ValueError, match=r"adds up to 5.*has 2"):
        tpweave.reduce_scatter(x, splits=[5])
    with pytest.raises(ValueError, match=r"'avg'.*int64"):
        tpweave.reduce_scatter(torch.ones(2, dtype=torch.int64), reduce_op="avg")
    with pytest.raises(ValueError, match="dim is -3"):
        tpweave.reduce_scatter(x, -3)
