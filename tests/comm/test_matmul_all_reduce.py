"""matmul_all_reduce: the small-matmul kernel alone, then every row on the ranks, its gradient and its bad inputs."""

import pytest
import torch
from comm_support import ALL_WORLDS, FLOATS, assert_check, assert_ranks_disagree, cases, numbers, same_bits_on_all_ranks

import tpweave
from tpweave.comm.local_matmul import SMALL_ROWS, small_matmul
from tpweave.comm.matmul_all_reduce import MATMUL_ALL_REDUCE
from tpweave.distributed.splits import even_splits
from tpweave.testing import assert_accurate

# (leading dims of a, K of all ranks together, N)
CASES = [
    ((1,), 64, 48),
    ((), 37, 9),
    ((2, 3), 130, 71),
    ((SMALL_ROWS,), 257, 33),
    ((SMALL_ROWS + 1,), 96, 40),
    ((0,), 8, 4),
    ((3,), 4, 0),
    ((2,), 1, 5),
]


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("transposed", [True, False], ids=["dense_columns", "dense_rows"])
def test_small_matmul_matches_float64(isa, dtype, transposed):
    """The kernel keeps fp32 sums: even bf16 results differ from float64 only by fp32 rounding."""
    for rows, depth, columns in ((1, 7, 5), (1, 64, 9), (3, 77, 33), (16, 100, 70), (5, 0, 3), (4, 8, 0), (7, 31, 8),
                                 (2, 2048, 1000), (16, 33, 600), (37, 40, 50)):  # fmt: skip
        a = torch.randn(rows, depth + 3).to(dtype)[:, :depth]
        b = torch.randn(columns, depth).to(dtype).t() if transposed else torch.randn(depth, columns).to(dtype)
        bias = torch.randn(columns).to(dtype)
        for added in (None, bias):
            want = a.double() @ b.double() + (0 if added is None else added.double())
            got = small_matmul(a, b, added, torch.empty(rows, columns))
            narrow = small_matmul(a, b, added, torch.empty(rows, columns, dtype=dtype))
            assert torch.equal(narrow, got.to(dtype))
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6 * max(1, depth) ** 0.5 * 8)


def test_small_matmul_has_the_same_bits_with_any_number_of_threads():
    a, b = torch.randn(3, 512), torch.randn(777, 512).t()
    want = small_matmul(a, b, None, torch.empty(3, 777))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(small_matmul(a, b, None, torch.empty(3, 777)), want)


def inputs_of(case, dtype, group, step=0):
    """Every rank's a, every rank's b [K_r, N], the bias, all of them known to all ranks."""
    leading, depth, columns = case
    depths = even_splits(depth, group.size)
    a = [numbers((*leading, k), dtype, rank, step) for rank, k in enumerate(depths)]
    b = [numbers((columns, k), dtype, rank + 50, step).t() for rank, k in enumerate(depths)]
    return a, b, numbers((columns,), dtype, 99, step)


def products_are_right(group, backend):
    for dtype in FLOATS:
        results = []
        for step, case in enumerate(CASES):
            a, b, bias = inputs_of(case, dtype, group, step)
            for added in (None, bias):
                exact = sum(x.double() @ w.double() for x, w in zip(a, b, strict=True))
                same = sum(x @ w for x, w in zip(a, b, strict=True))
                if added is not None:
                    exact, same = exact + bias.double(), same + bias
                w = b[group.rank] if step % 2 else b[group.rank].contiguous()
                y = tpweave.matmul_all_reduce(a[group.rank], w, group, bias=added, backend=backend)
                assert y.dtype == dtype
                # Two roundings of the result are what torch's own bf16 matmul and one more sum cost.
                assert_accurate(y, exact, same, eps=None if dtype != torch.bfloat16 else 8e-3)
                results.append(y)
        same_bits_on_all_ranks(group, results)


def strided_and_repeated(group, backend):
    for step in range(20 if backend in (None, "shm") else 6):
        rows, depth, columns = 1 + 7 * step % 40, 3 + 11 * step % 50, 1 + 5 * step % 60
        parts = []
        for rank in range(group.size):
            a = numbers((depth, rows, 2), torch.float32, rank, step).transpose(0, 1)[..., 0]
            parts.append((a, numbers((depth, columns, 3), torch.float32, rank + 50, step)[..., 1]))
        want = sum(a.double() @ b.double() for a, b in parts)
        y = tpweave.matmul_all_reduce(*parts[group.rank], group, backend=backend)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)


def gradients_match_the_undivided_product(group, backend):
    a, b, bias = inputs_of(((4,), 11, 6), torch.float64, group)
    whole = [torch.cat(a, -1).requires_grad_(), torch.cat(b, 0).requires_grad_(), bias.clone().requires_grad_()]
    weight = numbers((4, 6), torch.float64, 7)
    da, db, dbias = torch.autograd.grad(((whole[0] @ whole[1] + whole[2]) * weight).sum(), whole)
    leaves = [part.clone().requires_grad_() for part in (a[group.rank], b[group.rank], bias)]
    y = tpweave.matmul_all_reduce(leaves[0], leaves[1], group, bias=leaves[2], backend=backend)
    depths = even_splits(11, group.size)
    got = torch.autograd.grad((y * weight).sum(), leaves)
    torch.testing.assert_close(got, (da.split(depths, 1)[group.rank], db.split(depths)[group.rank], dbias))


def opcheck_and_compile(group, backend):
    a, b, bias = (numbers(shape, torch.float32, group.rank).requires_grad_() for shape in ((3, 8), (8, 5), (5,)))
    torch.library.opcheck(torch.ops.tpweave.matmul_all_reduce.default, (a, b, bias, group.name, backend))

    def step(a, b, bias):
        return tpweave.matmul_all_reduce(a * 2, b, group, bias=bias, backend=backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, bias), step(a, b, bias))
    want = torch.autograd.grad(step(a, b, bias).square().sum(), (a, b, bias))
    got = torch.autograd.grad(compiled(a, b, bias).square().sum(), (a, b, bias))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def ranks_disagree(group, backend):
    a, b = torch.ones(2, 4), torch.ones(4, 5 + group.rank)
    assert_ranks_disagree(group, lambda group: tpweave.matmul_all_reduce(a, b, group, backend=backend))


CHECKS = {
    products_are_right: ALL_WORLDS,
    strided_and_repeated: ("2", "3"),
    gradients_match_the_undivided_product: ALL_WORLDS,
    opcheck_and_compile: ("1", "2"),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(MATMUL_ALL_REDUCE, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(MATMUL_ALL_REDUCE, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        tpweave.matmul_all_reduce(a, b.t())
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*\(4,\)"):
        tpweave.matmul_all_reduce(a, b, bias=torch.ones(3))
    with pytest.raises(ValueError, match=r"b is torch\.float16.*float32"):
        tpweave.matmul_all_reduce(a, b.half())
    with pytest.raises(ValueError, match="int64"):
        tpweave.matmul_all_reduce(a.long(), b.long())
