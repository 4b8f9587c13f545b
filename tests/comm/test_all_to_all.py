"""all_to_all: even and uneven pieces, its gradient, and ranks that expect what nobody sends."""

import pytest
import torch
from comm_support import ALL_WORLDS, NUMBERS, assert_check, assert_ranks_disagree, cases, numbers

import tpweave
from tpweave.comm.all_to_all import ALL_TO_ALL

DTYPES = [*NUMBERS, torch.bool, torch.complex64]
# What surrounds the divided dim (-1), and that dim.
CASES = [((-1,), 0), ((-1, 7), 0), ((4, -1), 1), ((2, -1, 3), -2), ((0, -1), 1), ((31, -1, 65), 1)]


def sent(size, sender, step):
    """How much a rank sends to each of the others."""
    return [(7 * sender + 5 * receiver + 3 * step) % 6 for receiver in range(size)]


def exchange(group, backend, dtype, case, step):
    """One uneven call; returns our result and the right one."""
    shape, dim = case
    splits = [sent(group.size, rank, step) for rank in range(group.size)]
    inputs = [
        numbers(tuple(sum(row) if n == -1 else n for n in shape), dtype, rank, step) for rank, row in enumerate(splits)
    ]
    want = torch.cat([x.split(row, dim)[group.rank] for x, row in zip(inputs, splits, strict=True)], dim)
    out_splits = [row[group.rank] for row in splits]
    x = inputs[group.rank]
    y = tpweave.all_to_all(x, dim, group, in_splits=splits[group.rank], out_splits=out_splits, backend=backend)
    return y, want


def exchanges_are_exact(group, backend):
    for dtype in DTYPES:
        for step, case in enumerate(CASES if dtype in (torch.float32, torch.bfloat16) else CASES[2:3]):
            y, want = exchange(group, backend, dtype, case, step)
            assert y.is_contiguous() and torch.equal(y, want)
    # Without splits: nearly equal pieces.
    inputs = [numbers((3, 7), torch.float32, rank) for rank in range(group.size)]
    want = torch.cat([torch.tensor_split(x, group.size, 1)[group.rank] for x in inputs], 1)
    assert torch.equal(tpweave.all_to_all(inputs[group.rank], 1, group, backend=backend), want)


def strided_and_repeated(group, backend):
    for step in range(40 if backend in (None, "shm") else 8):
        y, want = exchange(group, backend, torch.float32, ((1 + step % 5, -1, 2), 1), step)
        assert torch.equal(y, want)
        x = numbers((8, 4 * group.size), torch.float32, group.rank, step).t()
        back = tpweave.all_to_all(tpweave.all_to_all(x, 0, group, backend=backend), 0, group, backend=backend)
        assert torch.equal(back, x)


def gradient_is_the_way_back(group, backend):
    splits = [sent(group.size, rank, step=1) for rank in range(group.size)]
    row = splits[group.rank]
    column = [other[group.rank] for other in splits]
    x = numbers((3, sum(row)), torch.float32, group.rank).requires_grad_()
    weights = [
        numbers((3, sum(other[rank] for other in splits)), torch.float32, rank, step=2) for rank in range(group.size)
    ]
    y = tpweave.all_to_all(x, 1, group, in_splits=row, out_splits=column, backend=backend)
    (y * weights[group.rank]).sum().backward()
    pieces = [w.split([other[rank] for other in splits], 1)[group.rank] for rank, w in enumerate(weights)]
    torch.testing.assert_close(x.grad, torch.cat(pieces, 1))


def opcheck_and_compile(group, backend):
    x = numbers((3 * group.size, 5), torch.float32, group.rank).requires_grad_()
    splits = [3] * group.size
    torch.library.opcheck(torch.ops.tpweave.all_to_all.default, (x, 0, group.name, splits, splits, backend))

    def step(x):
        return tpweave.all_to_all(x * 2, 0, group, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    # Rank 0 expects one element more from the last rank than that sends.
    size = group.size
    out_splits = [2] * (size - 1) + [3 if group.rank == 0 else 2]
    rank = group.rank
    assert_ranks_disagree(
        group,
        lambda group: tpweave.all_to_all(torch.ones(2 * size), 0, group, out_splits=out_splits, backend=backend),
        lambda group: tpweave.all_to_all(torch.ones(2 * size, 3 + rank), 0, group, backend=backend),
    )


CHECKS = {
    exchanges_are_exact: ALL_WORLDS,
    strided_and_repeated: ("2", "3"),
    gradient_is_the_way_back: ALL_WORLDS,
    opcheck_and_compile: ("1", "2"),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(ALL_TO_ALL, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(ALL_TO_ALL, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"in_splits \[1\] adds up to 1.*has 2"):
        tpweave.all_to_all(x, 0, in_splits=[1])
    with pytest.raises(ValueError, match=r"out_splits is \[-1\]"):
        tpweave.all_to_all(x, 0, out_splits=[-1])
    with pytest.raises(ValueError, match="dim is 5"):
        tpweave.all_to_all(x, 5)
