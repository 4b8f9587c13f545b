"""vocab_parallel_embedding: every row against F.embedding of the whole table, its gradient and bad inputs."""

import pytest
import torch
import torch.nn.functional as F
from comm_support import assert_check, assert_ranks_disagree, cases, numbers, same_bits_on_all_ranks

import tpweave
from tpweave.comm.vocab_parallel_embedding import VOCAB_PARALLEL_EMBEDDING


def tables(group, splits, hidden, dtype, step=0):
    return [numbers((rows, hidden), dtype, rank, step) for rank, rows in enumerate(splits)]


def asked(shape, rows, step=0, dtype=torch.int64):
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(step)).to(dtype)


def rows_are_right(group, backend):
    results = []
    for step, (shape, hidden) in enumerate((((3, 5), 7), ((), 64), ((0, 2), 3), ((4,), 0), ((700,), 1000))):
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int8):
            # One rank has none.
            splits = [0 if rank == 1 else 5 + 4 * rank for rank in range(group.size)]
            parts = tables(group, splits, hidden, dtype, step)
            ids = asked(shape, sum(splits), step, torch.int32 if step % 2 else torch.int64)
            y = tpweave.vocab_parallel_embedding(ids, parts[group.rank], group, splits=splits, backend=backend)
            assert y.dtype == dtype and torch.equal(y, F.embedding(ids, torch.cat(parts)))
            results.append(y)
    same_bits_on_all_ranks(group, results)


def strided_and_repeated(group, backend):
    for step in range(20 if backend in (None, "shm") else 5):
        hidden = 1 + 37 * step % 90
        parts = tables(group, [6] * group.size, hidden, torch.float32, step)
        ids = asked((5, 1 + step), 6 * group.size, step).t()
        weight = parts[group.rank].t().contiguous().t()
        y = tpweave.vocab_parallel_embedding(ids, weight, group, backend=backend)
        assert torch.equal(y, F.embedding(ids, torch.cat(parts)))


def gradient_is_the_owners(group, backend):
    splits = [4 + rank for rank in range(group.size)]
    parts = tables(group, splits, 6, torch.float32)
    whole, ids = torch.cat(parts).requires_grad_(), asked((3, 9), sum(splits))
    dy = numbers((3, 9, 6), torch.float32, 50)
    start = sum(splits[: group.rank])
    for padding in (None, 1, sum(splits) - 1):
        (want,) = torch.autograd.grad(F.embedding(ids, whole, padding), whole, dy)
        weight = parts[group.rank].clone().requires_grad_()
        y = tpweave.vocab_parallel_embedding(ids, weight, group, splits=splits, padding_idx=padding, backend=backend)
        y.backward(dy)
        torch.testing.assert_close(weight.grad, want[start : start + splits[group.rank]])


def opcheck_and_compile(group, backend):
    weight = numbers((5, 4), torch.float32, group.rank).requires_grad_()
    ids = asked((2, 3), 5 * group.size)
    arguments = (ids, weight, group.name, [5] * group.size, -1, backend)
    torch.library.opcheck(torch.ops.tpweave.vocab_parallel_embedding.default, arguments)

    def step(weight):
        return tpweave.vocab_parallel_embedding(ids, weight * 2, group, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight), step(weight))
    (want,) = torch.autograd.grad(step(weight).square().sum(), weight)
    (got,) = torch.autograd.grad(compiled(weight).square().sum(), weight)
    assert torch.equal(got, want)


def bad_ids_are_no_call(group, backend):
    weight = torch.ones(4, 3)
    for bad in (-1, 4 * group.size):
        with pytest.raises(ValueError, match=rf"{bad}.*\[0, {4 * group.size}\)"):
            tpweave.vocab_parallel_embedding(torch.tensor([2, bad]), weight, group, backend=backend)
    assert (tpweave.vocab_parallel_embedding(torch.tensor([2]), weight, group, backend=backend) == 1).all()


def ranks_disagree(group, backend):
    rank, ids = group.rank, torch.tensor([1, 2])
    calls = [
        lambda group: tpweave.vocab_parallel_embedding(ids, torch.ones(4, 3 + rank), group, backend=backend),
        lambda group: tpweave.vocab_parallel_embedding(ids[: 1 + rank % 2], torch.ones(4, 3), group, backend=backend),
    ]
    if backend in (None, "shm") and group.transport == "shm":
        calls.append(lambda group: tpweave.vocab_parallel_embedding(ids + rank, torch.ones(4, 3), group))
        calls.append(lambda group: tpweave.vocab_parallel_embedding(ids, torch.ones(4 + rank, 3), group))
    assert_ranks_disagree(group, *calls)


CHECKS = {
    rows_are_right: ("1", "2", "3", "1and3of4"),
    strided_and_repeated: ("2",),
    gradient_is_the_owners: ("1", "3"),
    opcheck_and_compile: ("2",),
    bad_ids_are_no_call: ("1", "2"),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(VOCAB_PARALLEL_EMBEDDING, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(VOCAB_PARALLEL_EMBEDDING, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    weight = torch.ones(4, 3)
    with pytest.raises(ValueError, match="float32"):
        tpweave.vocab_parallel_embedding(torch.ones(2), weight)
    with pytest.raises(ValueError, match=r"\(4, 3, 1\)"):
        tpweave.vocab_parallel_embedding(torch.tensor([1]), weight[..., None])
    with pytest.raises(ValueError, match=r"splits \[3\] give rank 0 3 rows, weight has 4"):
        tpweave.vocab_parallel_embedding(torch.tensor([1]), weight, splits=[3])
