"""matmul_reduce_scatter: sums and means along every dimension, its gradient, several at once, bad and unequal calls."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from comm_support import ALL_WORLDS, FLOATS, assert_check, assert_ranks_disagree, cases, in_two_threads, numbers

import tpweave
from tpweave.comm.matmul_reduce_scatter import MATMUL_REDUCE_SCATTER, PART_ROWS
from tpweave.distributed.splits import even_splits
from tpweave.errors import PeerFailureError
from tpweave.testing import assert_accurate, run_ranks

# (shape of a without K, K of a rank, N, scatter_dim); M smaller than the ranks, empty parts, columns, middle dims.
CASES = [
    ((12,), 24, 8, 0), ((37,), 7, 19, 0), ((3,), 5, 4, 1), ((1,), 3, 6, 0), ((2, 9), 16, 5, 1), ((5, 4), 6, 33, 0),
    ((2, 3, 7), 8, 9, -2), ((2, 6), 4, 70, -1), ((0,), 4, 8, 0), ((6,), 0, 8, 0), ((64,), 130, 41, 0),
]  # fmt: skip


def inputs_of(case, dtype, group, step=0):
    """Every rank's a and b, and the bias, all known to all ranks."""
    leading, depth, columns, _ = case
    a = [numbers((*leading, depth), dtype, rank, step) for rank in range(group.size)]
    b = [numbers((columns, depth), dtype, rank + 50, step).t() for rank in range(group.size)]
    return a, b, numbers((columns,), dtype, 99, step)


def expected(a, b, bias, dim, splits, rank, average, wide):
    dtype = torch.float64 if wide else a[0].dtype
    y = sum(x.to(dtype) @ w.to(dtype) for x, w in zip(a, b, strict=True))
    y = (y / len(a) if average else y) + (0 if bias is None else bias.to(dtype))
    return y.split(splits, dim)[rank]


def sums_are_right(group, backend):
    for dtype in FLOATS:
        for step, case in enumerate(CASES if dtype in FLOATS[:2] else CASES[1:7:2]):
            a, b, bias = inputs_of(case, dtype, group, step)
            dim = case[3]
            length = (*case[0], case[2])[dim]
            for splits, average, added in (
                (None, False, None),
                ([0] * (group.size - 1) + [length], False, bias),
                (None, True, bias),
            ):
                sizes = even_splits(length, group.size) if splits is None else splits
                w = b[group.rank] if step % 2 else b[group.rank].contiguous()
                y = tpweave.matmul_reduce_scatter(
                    a[group.rank], w, "avg" if average else "sum", dim, group, splits=splits, bias=added,
                    backend=backend,
                )  # fmt: skip
                assert y.dtype == dtype and y.is_contiguous()
                exact = expected(a, b, added, dim, sizes, group.rank, average, True)
                same = expected(a, b, added, dim, sizes, group.rank, average, False)
                assert_accurate(y, exact, same, eps=None if dtype in (torch.float32, torch.float64) else 8e-3)


def bf16_is_rounded_once(group, backend):
    """Where the kernel multiplies, products are added in fp32: the reference's bits but for the order within a dot."""
    a, b, _ = inputs_of(((16,), 64, 40, 0), torch.bfloat16, group)
    exact = expected(a, b, None, 0, even_splits(16, group.size), group.rank, False, True)
    y = tpweave.matmul_reduce_scatter(a[group.rank], b[group.rank], group=group, backend=backend)
    if backend != "pg":
        torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)


def strided_and_repeated(group, backend):
    for step in range(24 if backend in (None, "shm", "shm_whole") else 6):
        rows, depth, columns, dim = 1 + 7 * step % 40, 3 + 11 * step % 50, 1 + 5 * step % 60, step % 2
        parts = []
        for rank in range(group.size):
            a = numbers((depth, rows, 2), torch.float32, rank, step).transpose(0, 1)[..., 0]
            parts.append((a, numbers((depth, columns, 3), torch.float32, rank + 50, step)[..., 1]))
        want = torch.tensor_split(sum(a.double() @ b.double() for a, b in parts), group.size, dim)[group.rank]
        y = tpweave.matmul_reduce_scatter(*parts[group.rank], "sum", dim, group, backend=backend)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)


def gradients_match_the_undivided_product(group, backend):
    for case, average in ((((6,), 4, 5, 0), False), (((2, 7), 3, 4, 1), True), (((5,), 3, 7, 1), True)):
        a, b, bias = inputs_of(case, torch.float64, group)
        dim, shape = case[3], (*case[0], case[2])
        splits = even_splits(shape[dim], group.size)
        weight = numbers(shape, torch.float64, 7)
        whole = [[x.clone().requires_grad_() for x in part] for part in (a, b, [bias])]
        y = sum(x @ w for x, w in zip(*whole[:2], strict=True)) / (group.size if average else 1) + whole[2][0]
        rank = group.rank
        want = torch.autograd.grad((y * weight).sum(), (whole[0][rank], whole[1][rank], whole[2][0]))
        leaves = [part.clone().requires_grad_() for part in (a[rank], b[rank], bias)]
        y = tpweave.matmul_reduce_scatter(
            leaves[0], leaves[1], "avg" if average else "sum", dim, group, bias=leaves[2], backend=backend
        )
        got = torch.autograd.grad((y * weight.split(splits, dim)[rank]).sum(), leaves)
        torch.testing.assert_close(got, want)


def opcheck_compile_and_checkpoint(group, backend):
    a, b, bias = (numbers(shape, torch.float32, group.rank).requires_grad_() for shape in ((7, 8), (8, 5), (5,)))
    splits = even_splits(7, group.size)
    torch.library.opcheck(
        torch.ops.tpweave.matmul_reduce_scatter.default, ([a], [b], bias, 0, group.name, splits, True, backend)
    )

    def step(a, b, bias):
        return tpweave.matmul_reduce_scatter(a * 2, b, "avg", 0, group, bias=bias, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, bias), step(a, b, bias))
    want = torch.autograd.grad(step(a, b, bias).square().sum(), (a, b, bias))
    got = torch.autograd.grad(compiled(a, b, bias).square().sum(), (a, b, bias))
    torch.testing.assert_close(got, want)
    checkpointed = torch.utils.checkpoint.checkpoint(step, a, b, bias, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed.square().sum(), (a, b, bias)), want)


def two_groups_from_two_threads(group, backend):
    groups = [group, tpweave.init(dist.new_group(list(group.ranks)))]
    a, b, _ = inputs_of(((20,), 16, 12, 0), torch.float32, group)

    def run(index):
        for step in range(10):
            y = tpweave.matmul_reduce_scatter(
                a[group.rank] * (step + index), b[group.rank], group=groups[index], backend=backend
            )
            want = expected(a, b, None, 0, even_splits(20, group.size), group.rank, False, True) * (step + index)
            torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-3)

    in_two_threads(run)


def ranks_disagree(group, backend):
    rank = group.rank
    reduce_op = "sum" if rank == 0 else "avg"
    messages = assert_ranks_disagree(
        group,
        lambda group: tpweave.matmul_reduce_scatter(
            torch.ones(8, 4), torch.ones(4, 4 + rank), group=group, backend=backend
        ),
        lambda group: tpweave.matmul_reduce_scatter(
            torch.ones(8, 4), torch.ones(4, 4), reduce_op, group=group, backend=backend
        ),
    )
    if backend != "reference":
        assert all("reduce_scatter" in message for message in messages)


CHECKS = {
    sums_are_right: ALL_WORLDS,
    bf16_is_rounded_once: ("2",),
    strided_and_repeated: ("2", "3"),
    gradients_match_the_undivided_product: ALL_WORLDS,
    opcheck_compile_and_checkpoint: ("1", "2"),
    two_groups_from_two_threads: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(MATMUL_REDUCE_SCATTER, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(MATMUL_REDUCE_SCATTER, CHECKS, check, backend, world)


def _one_is_killed(rank, world_size, backend, products):
    """Rank 1 ends in its second call, before the product of that number."""
    group = tpweave.init(timeout=60)
    a, b = torch.ones(8, 4), torch.ones(4, 4)
    tpweave.matmul_reduce_scatter(a, b, group=group, backend=backend)
    module = sys.modules["tpweave.comm.matmul_reduce_scatter"]
    multiply, left = module.sum_of_matmuls, [products]

    def multiply_or_end(*args, **kwargs):
        left[0] -= 1
        if rank == 1 and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return multiply(*args, **kwargs)

    module.sum_of_matmuls = multiply_or_end
    begin = time.monotonic()
    with pytest.raises(PeerFailureError) as caught:
        tpweave.matmul_reduce_scatter(a, b, group=group, backend=backend)
        # A rank that needs nothing more of the lost one completes that call.
        tpweave.matmul_reduce_scatter(a, b, group=group, backend=backend)
    assert caught.value.ranks == (1,) and caught.value.op == "matmul_reduce_scatter"
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("backend", "products"), [("shm", 1), ("shm", 2), ("shm", 3), ("shm_whole", 1)])
def test_a_killed_rank_is_named(backend, products):
    run_ranks(3, _one_is_killed, backend, products, may_die=(1,))


def test_parts_are_taken_where_they_pay():
    group = tpweave.init()
    rows = {name: row for row in MATMUL_REDUCE_SCATTER.backends if (name := row.name) in ("shm", "shm_whole")}
    few, many = (
        tpweave.dispatch.Inputs([torch.ones(1)], group=group, part_rows=rows) for rows in (PART_ROWS - 1, PART_ROWS)
    )
    assert str(PART_ROWS) in rows["shm"].needs.only_if_named(few)
    assert rows["shm"].needs.only_if_named(many) is None
    assert rows["shm_whole"].needs.only_if_named(few) is None


def test_bad_input_names_the_values():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        tpweave.matmul_reduce_scatter(a, b.t())
    with pytest.raises(ValueError, match=r"\(3,\).*\[\.\.\., M, K\]"):
        tpweave.matmul_reduce_scatter(a[0], b)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*\(4,\)"):
        tpweave.matmul_reduce_scatter(a, b, bias=torch.ones(3))
    with pytest.raises(ValueError, match=r"'max'.*'sum' or 'avg'"):
        tpweave.matmul_reduce_scatter(a, b, "max")
    with pytest.raises(ValueError, match=r"adds up to 5.*has 2"):
        tpweave.matmul_reduce_scatter(a, b, splits=[5])
    with pytest.raises(ValueError, match="dim is 2"):
        tpweave.matmul_reduce_scatter(a, b, "sum", 2)
    with pytest.raises(ValueError, match=r"b is torch\.float16.*float32"):
        tpweave.matmul_reduce_scatter(a, b.half())
