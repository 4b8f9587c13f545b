"""all_gather: equal and uneven shards along every dim, its gradient, and ranks that do not fit together."""

import pytest
import torch
from comm_support import (
    ALL_WORLDS,
    NUMBERS,
    assert_check,
    assert_ranks_disagree,
    cases,
    numbers,
    same_bits_on_all_ranks,
)

import tpweave
from tpweave.comm.all_gather import ALL_GATHER

DTYPES = [*NUMBERS, torch.bool, torch.complex64]
# Shapes with the gathered dim as -1, that dim, and each rank's length there.
CASES = [
    ((-1,), 0, [3, 3, 3, 3]),
    ((-1, 7), 0, [2, 0, 5, 1]),
    ((4, -1), 1, [1, 9, 3, 2]),
    ((2, -1, 3), -2, [1, 1, 1, 1]),
    ((0, -1), 1, [2, 3, 1, 1]),
    ((5, -1), 1, [0, 0, 0, 0]),
    ((31, -1, 65), 1, [17, 16, 16, 16]),
]


def shards_of(case, dtype, size, step=0):
    shape, dim, lengths = case
    shapes = [tuple(length if n == -1 else n for n in shape) for length in lengths[:size]]
    return [numbers(shape, dtype, rank, step) for rank, shape in enumerate(shapes)], dim, lengths[:size]


def gathers_are_exact(group, backend):
    for dtype in DTYPES:
        results = []
        for step, case in enumerate(CASES if dtype in (torch.float32, torch.bfloat16) else CASES[2:3]):
            shards, dim, lengths = shards_of(case, dtype, group.size, step)
            equal = len(set(lengths)) == 1
            for splits in [lengths, None] if equal else [lengths]:
                y = tpweave.all_gather(shards[group.rank], dim, group, splits=splits, backend=backend)
                assert y.is_contiguous() and torch.equal(y, torch.cat(shards, dim))
                results.append(y)
        same_bits_on_all_ranks(group, results)


def strided_and_repeated(group, backend):
    for step in range(40 if backend in (None, "shm") else 8):
        splits = [(3 * step + 5 * rank) % 11 for rank in range(group.size)]
        shards = [numbers((6, 1 + step % 4, n), torch.float32, r, step).permute(2, 0, 1) for r, n in enumerate(splits)]
        y = tpweave.all_gather(shards[group.rank], 0, group, splits=splits, backend=backend)
        assert torch.equal(y, torch.cat(shards))


def gradient_is_reduce_scatter(group, backend):
    splits = [2 + rank for rank in range(group.size)]
    x = numbers((3, splits[group.rank]), torch.float32, group.rank).requires_grad_()
    weights = [numbers((3, sum(splits)), torch.float32, rank, step=1) for rank in range(group.size)]
    (tpweave.all_gather(x, 1, group, splits=splits, backend=backend) * weights[group.rank]).sum().backward()
    torch.testing.assert_close(x.grad, sum(weights).split(splits, 1)[group.rank])


def opcheck_and_compile(group, backend):
    splits = [4 + rank for rank in range(group.size)]
    x = numbers((splits[group.rank], 5), torch.float32, group.rank).requires_grad_()
    torch.library.opcheck(torch.ops.tpweave.all_gather.default, (x, 0, group.name, splits, backend))

    def step(x):
        return tpweave.all_gather(x * 2, 0, group, splits=splits, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    # Without splits all shards must be equal; with them, all ranks must name the same.
    rank = group.rank
    splits = [4] * group.size if rank == 0 else [4, *[5] * (group.size - 1)]
    assert_ranks_disagree(
        group,
        lambda group: tpweave.all_gather(torch.ones(4 + rank, 2), 0, group, backend=backend),
        lambda group: tpweave.all_gather(torch.ones(splits[rank], 2), 0, group, splits=splits, backend=backend),
    )


CHECKS = {
    gathers_are_exact: ALL_WORLDS,
    strided_and_repeated: ("2", "3"),
    gradient_is_reduce_scatter: ALL_WORLDS,
    opcheck_and_compile: ("1", "2"),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(ALL_GATHER, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(ALL_GATHER, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"dim is 2.*2 dimension"):
        tpweave.all_gather(x, 2)
    with pytest.raises(ValueError, match=r"\[1, 1\].*1 rank"):
        tpweave.all_gather(x, 0, splits=[1, 1])
    with pytest.raises(ValueError, match=r"x has 2 along dim 0.*\[3\]"):
        tpweave.all_gather(x, 0, splits=[3])
    with pytest.raises(ValueError, match=r"0 dimension"):
        tpweave.all_gather(torch.tensor(1.0))
