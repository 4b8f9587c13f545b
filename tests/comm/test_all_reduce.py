"""all_reduce: every row on every dtype against float64, its gradient, and what happens when ranks disagree."""

import pytest
import torch
from comm_support import (
    ALL_WORLDS,
    FLOATS,
    NUMBERS,
    assert_check,
    assert_ranks_disagree,
    cases,
    numbers,
    same_bits_on_all_ranks,
)

import tpweave
from tpweave.comm.all_reduce import ALL_REDUCE
from tpweave.testing import assert_accurate

SHAPES = [(5,), (), (0,), (3, 0), (7, 33), (2, 3, 511), (70001,)]


def expected(shape, dtype, group, step=0):
    """The sum in float64 (exact for integers, which wrap), and what adding in the dtype itself gives."""
    parts = [numbers(shape, dtype, rank, step) for rank in range(group.size)]
    wide = torch.float64 if dtype.is_floating_point else dtype
    exact, same = torch.zeros(shape, dtype=wide), torch.zeros(shape, dtype=dtype)
    for part in parts:
        exact, same = exact + part.to(wide), same + part
    return exact, same


def sums_are_right(group, backend):
    for dtype in NUMBERS:
        results = []
        for step, shape in enumerate(SHAPES if dtype in FLOATS[:2] else SHAPES[-2:]):
            x = numbers(shape, dtype, group.rank, step)
            before = x.clone()
            y = tpweave.all_reduce(x, group, backend=backend)
            exact, same = expected(shape, dtype, group, step)
            assert y.dtype == dtype and y.shape == x.shape and (y.data_ptr() != x.data_ptr() or x.numel() == 0)
            assert torch.equal(x, before)
            if dtype.is_floating_point:
                assert_accurate(y, exact, same)
            else:
                assert torch.equal(y, exact)
            results.append(y)
            inplace = x.clone()
            assert tpweave.all_reduce_(inplace, group, backend=backend) is inplace
            assert torch.equal(inplace, y)
        same_bits_on_all_ranks(group, results)


def rows_agree(group, backend):
    for dtype in FLOATS:
        x = numbers((1000, 3), dtype, group.rank)
        want = tpweave.all_reduce(x, group, backend="reference")
        assert torch.equal(tpweave.all_reduce(x, group, backend=backend), want)


def strided_and_repeated(group, backend):
    for step in range(40 if backend in (None, "shm") else 8):
        columns = 1 + 37 * step % 300
        x = numbers((columns, 6, 5), torch.float32, group.rank, step).transpose(0, 1)[::2]
        exact = sum(numbers((columns, 6, 5), torch.float32, rank, step).double() for rank in range(group.size))
        exact = exact.transpose(0, 1)[::2]
        y = tpweave.all_reduce(x, group, backend=backend)
        assert y.is_contiguous()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        base = x.clone(memory_format=torch.preserve_format)
        tpweave.all_reduce_(base.transpose(0, 1), group, backend=backend)
        assert torch.equal(base, y)


def gradient_is_all_reduce(group, backend):
    x = numbers((4, 9), torch.float32, group.rank).requires_grad_()
    weights = [numbers((4, 9), torch.float32, rank, step=1) for rank in range(group.size)]
    (tpweave.all_reduce(x, group, backend=backend) * weights[group.rank]).sum().backward()
    # L = sum over ranks s of <w_s, y_s>, and every y_s holds x_r once.
    torch.testing.assert_close(x.grad, sum(weights))
    with pytest.raises(ValueError, match="requires grad"):
        tpweave.all_reduce_(x, group, backend=backend)
    with torch.no_grad():
        y = x.detach().clone()
        version = y._version
        tpweave.all_reduce_(y, group, backend=backend)
        assert y._version > version


def opcheck_and_compile(group, backend):
    x = numbers((6, 5), torch.float32, group.rank).requires_grad_()
    torch.library.opcheck(torch.ops.tpweave.all_reduce.default, (x, group.name, backend))
    torch.library.opcheck(torch.ops.tpweave.all_reduce_.default, (x.detach().clone(), group.name, backend))

    def step(x):
        return tpweave.all_reduce(x * 2, group, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    x = torch.ones(4 + group.rank)
    (message,) = assert_ranks_disagree(group, lambda group: tpweave.all_reduce(x, group, backend=backend))
    assert all(f"{4 + rank}" in message for rank in range(group.size)), message


def a_wrong_rank_is_noticed(group, backend):
    x = numbers((64,), torch.float32, group.rank)
    if group.rank == 0:
        x[17] += 0.5
    y = tpweave.all_reduce(x, group, backend=backend)
    exact, same = expected((64,), torch.float32, group)
    with pytest.raises(AssertionError):
        assert_accurate(y, exact, same)


CHECKS = {
    sums_are_right: ALL_WORLDS,
    rows_agree: ("3",),
    strided_and_repeated: ("2", "3"),
    gradient_is_all_reduce: ALL_WORLDS,
    ranks_disagree: ("3",),
    opcheck_and_compile: ("1", "2"),
    a_wrong_rank_is_noticed: ("2",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(ALL_REDUCE, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(ALL_REDUCE, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    with pytest.raises(ValueError, match=r"torch\.bool"):
        tpweave.all_reduce(torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="sparse"):
        tpweave.all_reduce(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="needs a group of several ranks"):
        tpweave.all_reduce(torch.ones(3), backend="pg")
