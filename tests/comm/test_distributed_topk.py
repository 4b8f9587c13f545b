"""distributed_topk: the kernel against a stable sort, every row on the ranks, its gradient and bad inputs."""

import pytest
import torch
from comm_support import FLOATS, assert_check, assert_ranks_disagree, cases, numbers, same_bits_on_all_ranks

import tpweave
from tpweave.comm.distributed_topk import DISTRIBUTED_TOPK, local_topk
from tpweave.reference.comm.distributed_topk import topk_in_order


def awkward(rows, columns, dtype, seed=0):
    """Numbers with many ties, among them both zeros, infinities and NaN."""
    x = numbers((rows, columns), torch.float32, 500 + seed).mul(4).round().div(4)
    flat = x.view(-1)
    for place, value in enumerate((float("inf"), -float("inf"), 0.0, -0.0)):
        flat[place::23] = value
    if rows > 2:
        x[1, ::7] = float("nan")
        x[2] = float("nan")
    return x.to(dtype)


def assert_same(got, want):
    """Equal values (-0 and 0 are) and the same indices."""
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=lambda d: str(d)[6:])
def test_kernel_is_a_stable_sort(isa, dtype):
    for rows, columns in ((1, 1), (3, 63), (4, 64), (3, 200), (2, 5003), (0, 9)):
        x = awkward(rows, columns, dtype)
        for k in {0, 1, min(5, columns), columns // 2, columns}:
            assert_same(local_topk(x, k), topk_in_order(x, k))
    # Every element is larger than all before it, and then none is.
    rising = torch.arange(3000, dtype=torch.float32).view(1, -1).to(dtype)
    for x in (rising, rising.flip(1), torch.zeros(1, 3000, dtype=dtype)):
        assert_same(local_topk(x, 7), topk_in_order(x, 7))


def uneven(group, step):
    """Parts of different lengths, one of them empty, one of a single column."""
    return [(1000 // (rank + 1), 0, 1, 7 + 300 * rank)[(rank + step) % 4] for rank in range(group.size)]


def selections_are_right(group, backend):
    for dtype in FLOATS[:3] if backend == "shm" else FLOATS:
        results = []
        for step in range(6):
            splits = uneven(group, step) if sum(uneven(group, step)) else [9] * group.size
            whole = awkward((1, 4, 0)[step % 3], sum(splits), dtype, step)
            x = whole.split(splits, 1)[group.rank]
            # More than some parts have.
            for k in {0, 1, min(50, sum(splits)), sum(splits)}:
                got = tpweave.distributed_topk(x, k, group, splits=splits, backend=backend)
                assert got[0].dtype == dtype and got[1].dtype == torch.int64
                assert_same(got, topk_in_order(whole, k))
                results += (got[0].nan_to_num() + 0.0, got[1])
        same_bits_on_all_ranks(group, results)


def any_dim_and_stride(group, backend):
    for dim in (0, 1, -1):
        whole = numbers((6 * group.size, 5 * group.size, 4 * group.size), torch.float32, 7)
        x = whole.chunk(group.size, dim)[group.rank]
        values, indices = tpweave.distributed_topk(x, 3, group, dim=dim, backend=backend)
        want = whole.topk(3, dim)
        assert torch.equal(values, want.values) and torch.equal(indices, want.indices)
        assert values.is_contiguous() and indices.is_contiguous()
    x = numbers((40, 3), torch.float32, group.rank).t()
    values, _ = tpweave.distributed_topk(x, 40, group, backend=backend)
    whole = torch.cat([numbers((40, 3), torch.float32, rank).t() for rank in range(group.size)], 1)
    assert torch.equal(values, whole.topk(40).values)
    values, indices = tpweave.distributed_topk(x[0], 2, group, backend=backend)
    assert torch.equal(values, whole[0].topk(2).values) and indices.shape == (2,)


def many_candidates(group, backend):
    """More than a slot of the arena holds at a time."""
    whole = numbers((300, 400 * group.size), torch.float32, 3)
    x = whole.chunk(group.size, 1)[group.rank]
    for k in (300, 399):
        assert_same(tpweave.distributed_topk(x, k, group, backend=backend), topk_in_order(whole, k))


def gradient_goes_to_the_owner(group, backend):
    for dim in (0, 1):
        whole = numbers((6 * group.size, 5 * group.size), torch.float32, 7).requires_grad_()
        dvalues = numbers(whole.topk(4, dim).values.shape, torch.float32, 8)
        (want,) = torch.autograd.grad(whole.topk(4, dim).values, whole, dvalues)
        x = whole.detach().chunk(group.size, dim)[group.rank].clone().requires_grad_()
        values, indices = tpweave.distributed_topk(x, 4, group, dim=dim, backend=backend)
        assert not indices.requires_grad
        values.backward(dvalues)
        assert torch.equal(x.grad, want.chunk(group.size, dim)[group.rank])


def opcheck_and_compile(group, backend):
    x = numbers((6, 5), torch.float32, group.rank).requires_grad_()
    torch.library.opcheck(torch.ops.tpweave.distributed_topk.default, (x, 3, 1, group.name, [5] * group.size, backend))

    def step(x):
        values, indices = tpweave.distributed_topk(x * 2, 3, group, backend=backend)
        return values + indices

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(compiled(x).square().sum(), x)
    assert torch.equal(got, want)


def ranks_disagree(group, backend):
    x, rank = torch.ones(4, 8), group.rank
    assert_ranks_disagree(
        group,
        lambda group: tpweave.distributed_topk(x, 3 + rank, group, backend=backend),
        lambda group: tpweave.distributed_topk(torch.ones(4 + rank, 8), 3, group, backend=backend),
        lambda group: tpweave.distributed_topk(torch.ones(4, 8 + rank), 3, group, backend=backend),
        lambda group: tpweave.distributed_topk(x if rank else x.bfloat16(), 3, group, backend=backend),
    )


CHECKS = {
    selections_are_right: ("1", "2", "3", "1and3of4"),
    any_dim_and_stride: ("1", "3"),
    many_candidates: ("2", "3"),
    gradient_goes_to_the_owner: ("1", "3"),
    opcheck_and_compile: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(DISTRIBUTED_TOPK, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(DISTRIBUTED_TOPK, CHECKS, check, backend, world)


def test_bad_input_names_the_values():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"k is 4.*have 3 along dim 1"):
        tpweave.distributed_topk(x, 4)
    with pytest.raises(ValueError, match="k is -1"):
        tpweave.distributed_topk(x, -1)
    with pytest.raises(ValueError, match="dim is 2"):
        tpweave.distributed_topk(x, 1, dim=2)
    with pytest.raises(ValueError, match=r"splits \[2\] give rank 0 2, x has 3"):
        tpweave.distributed_topk(x, 1, splits=[2])
    with pytest.raises(ValueError, match="int64"):
        tpweave.distributed_topk(torch.ones(2, dtype=torch.int64), 1)
