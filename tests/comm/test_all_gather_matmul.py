"""all_gather_matmul: several b, every dimension, shards in the arena, its gradient, several at once, bad calls."""

import os
import signal
import sys
import time

import pytest
import torch
import torch.distributed as dist
from comm_support import ALL_WORLDS, FLOATS, assert_check, assert_ranks_disagree, cases, in_two_threads, numbers

import tpweave
from tpweave.comm.all_gather_matmul import ALL_GATHER_MATMUL
from tpweave.errors import PeerFailureError
from tpweave.testing import assert_accurate, run_ranks

# (shape of rank r's a without the gathered dim's length, gather_dim, length of rank r there, N of each b)
CASES = [
    ((None, 24), 0, lambda r: 5, (8,)),
    ((None, 7), 0, lambda r: r, (19, 3)),
    ((2, None, 16), 1, lambda r: 3 + r, (5,)),
    ((None, 3, 6), 0, lambda r: 2, (33, 1, 4)),
    ((2, None, 3, 8), -3, lambda r: 1 + r % 2, (9,)),
    ((6, None), 1, lambda r: 4 + r, (10, 7)),
    ((2, 3, None), -1, lambda r: 5, (11,)),
    ((None, 5), 0, lambda r: 0, (4,)),
    ((None, 130), 0, lambda r: 21, (41,)),
]


def inputs_of(case, dtype, group, step=0):
    """Every rank's shard, this rank's bs and biases, the splits."""
    shape, dim, length, widths = case
    splits = [length(rank) for rank in range(group.size)]
    shards = [numbers(tuple(n if s is None else s for s in shape), dtype, rank, step) for rank, n in enumerate(splits)]
    depth = sum(splits) if shape[-1] is None else shape[-1]
    b = [numbers((n, depth), dtype, 50 + group.rank + i, step).t() for i, n in enumerate(widths)]
    return shards, b, [numbers((n,), dtype, 80 + i, step) for i, n in enumerate(widths)], splits, dim


def products_are_right(group, backend):
    for dtype in FLOATS:
        for step, case in enumerate(CASES if dtype in FLOATS[:2] else CASES[1:6:2]):
            shards, b, bias, splits, dim = inputs_of(case, dtype, group, step)
            whole = torch.cat(shards, dim)
            biases = [None, [None, *bias[1:]] if len(bias) > 1 else bias][step % 2]
            shard = shards[group.rank]
            if step % 2:
                shard = group.empty(shard.shape, dtype).copy_(shard)
                b = [w.contiguous() for w in b]
            for return_a in (True, False):
                a, ys = tpweave.all_gather_matmul(
                    shard, b, dim, group, splits=splits, return_a=return_a, biases=biases, backend=backend
                )
                assert torch.equal(a, whole) if return_a else a is None
                for y, w, added in zip(ys, b, biases or [None] * len(b), strict=True):
                    exact = whole.double() @ w.double() + (0 if added is None else added.double())
                    same = whole @ w + (0 if added is None else added)
                    assert y.dtype == dtype and y.is_contiguous()
                    assert_accurate(y, exact, same, eps=None if dtype in (torch.float32, torch.float64) else 8e-3)


def shard_is_the_callers_again(group, backend):
    """What was read in place may be written over as soon as the call returns."""
    for step in range(20 if backend in (None, "shm", "shm_whole") else 4):
        rows, depth = 1 + 7 * step % 30, 3 + 11 * step % 50
        shards = [numbers((rows, depth), torch.float32, rank, step) for rank in range(group.size)]
        b = numbers((depth, 1 + 5 * step % 60, 3), torch.float32, 50, step)[..., 1]
        shard = group.empty((rows, depth)).copy_(shards[group.rank])
        a, (y,) = tpweave.all_gather_matmul(shard, [b], group=group, return_a=step % 3 == 0, backend=backend)
        shard.fill_(float("nan"))
        torch.testing.assert_close(y.double(), torch.cat(shards).double() @ b.double(), rtol=1e-5, atol=1e-4)
        if a is not None:
            a.fill_(float("nan"))


def gradients_match_the_undivided_product(group, backend):
    for step, case in enumerate(CASES[1:7]):
        shards, b, bias, splits, dim = inputs_of(case, torch.float64, group, step)
        rank = group.rank
        # Every rank's loss takes its own products; da is the sum of what all ranks' losses give.
        others = [inputs_of(case, torch.float64, _Seen(group, peer), step)[1] for peer in range(group.size)]
        whole = torch.cat(shards, dim).requires_grad_()
        leaves = [x.clone().requires_grad_() for x in (shards[rank], *b, *bias)]
        weights = [numbers((*whole.shape[:-1], w.shape[1]), torch.float64, 7 + i, step) for i, w in enumerate(b)]
        weight_a = numbers(whole.shape, torch.float64, 9, step)
        loss = (whole * weight_a).sum() * group.size
        loss = loss + sum(((whole @ w) * v).sum() for bs in others for w, v in zip(bs, weights, strict=True))
        (da,) = torch.autograd.grad(loss, whole)
        a, ys = tpweave.all_gather_matmul(
            leaves[0], leaves[1 : 1 + len(b)], dim, group, splits=splits, biases=leaves[1 + len(b) :], backend=backend
        )
        loss = (a * weight_a).sum() + sum((y * v).sum() for y, v in zip(ys, weights, strict=True))
        got = torch.autograd.grad(loss, leaves)
        torch.testing.assert_close(got[0], da.split(splits, dim)[rank])
        rows = whole.detach().flatten(0, -2)
        for i, v in enumerate(weights):
            torch.testing.assert_close(got[1 + i], rows.t() @ v.flatten(0, -2))
            torch.testing.assert_close(got[1 + len(b) + i], v.flatten(0, -2).sum(0))


class _Seen:
    """A group as another of its ranks sees it, for `inputs_of`."""

    def __init__(self, group, rank):
        self.size, self.rank = group.size, rank


def opcheck_compile_and_checkpoint(group, backend):
    a = numbers((3, 8), torch.float32, group.rank).requires_grad_()
    b = [numbers((8, n), torch.float32, group.rank).requires_grad_() for n in (5, 2)]
    bias = [numbers((n,), torch.float32, group.rank).requires_grad_() for n in (5, 2)]
    splits = [3] * group.size
    for return_a in (True, False):
        torch.library.opcheck(
            torch.ops.tpweave.all_gather_matmul.default, (a, b, bias, 0, group.name, splits, return_a, backend)
        )

    def step(a, b0, b1, bias0):
        whole, (y0, y1) = tpweave.all_gather_matmul(a * 2, [b0, b1], 0, group, biases=[bias0, None], backend=backend)
        return whole.sum() + (y0 + 1).square().sum() + y1.sum()

    inputs = (a, *b, bias[0])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), step(*inputs))
    want = torch.autograd.grad(step(*inputs), inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs), want)
    checkpointed = torch.utils.checkpoint.checkpoint(step, *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(checkpointed, inputs), want)


def gradcheck_in_float64(group, backend):
    """Every rank moves its own inputs; all ranks see the sum of all losses, as the gradients do."""
    a = numbers((2, 3), torch.float64, group.rank).requires_grad_()
    b = numbers((3, 2), torch.float64, 50 + group.rank).requires_grad_()

    def loss(a, b):
        _, (y,) = tpweave.all_gather_matmul(a, [b], 0, group, return_a=False, backend=backend)
        z = tpweave.matmul_reduce_scatter(y.sin(), b.t(), "avg", 0, group, backend=backend)
        return tpweave.all_reduce(z.square().sum().detach(), group), z

    (_, z), step = loss(a, b), 1e-6
    got = torch.autograd.grad(z.square().sum(), (a, b))
    for mover in range(group.size):
        for i in range(2):
            for at in range(6):
                moved = []
                for sign in (1, -1):
                    inputs = [a.detach().clone(), b.detach().clone()]
                    if group.rank == mover:
                        inputs[i].view(-1)[at] += sign * step
                    moved.append(loss(*inputs)[0])
                if group.rank == mover:
                    numeric = (moved[0] - moved[1]) / (2 * step)
                    torch.testing.assert_close(got[i].reshape(-1)[at], numeric, rtol=1e-5, atol=1e-7)


def two_groups_from_two_threads(group, backend):
    groups = [group, tpweave.init(dist.new_group(list(group.ranks)))]
    shards = [numbers((6, 16), torch.float32, rank) for rank in range(group.size)]
    b = numbers((16, 12), torch.float32, 50)

    def run(index):
        for step in range(10):
            _, (y,) = tpweave.all_gather_matmul(
                shards[group.rank] * (step + index), [b], group=groups[index], return_a=False, backend=backend
            )
            torch.testing.assert_close(y, torch.cat(shards) @ b * (step + index), rtol=1e-4, atol=1e-3)

    in_two_threads(run)


def ranks_disagree(group, backend):
    rank = group.rank
    assert_ranks_disagree(
        group,
        lambda group: tpweave.all_gather_matmul(
            torch.ones(8, 4 + rank), [torch.ones(4 + rank, 2)], group=group, backend=backend
        ),
        lambda group: tpweave.all_gather_matmul(
            torch.ones(8 + rank, 4), [torch.ones(4, 2)], group=group, backend=backend
        ),
    )


CHECKS = {
    products_are_right: ALL_WORLDS,
    shard_is_the_callers_again: ("2", "3"),
    gradients_match_the_undivided_product: ALL_WORLDS,
    gradcheck_in_float64: ("2",),
    opcheck_compile_and_checkpoint: ("1", "2"),
    two_groups_from_two_threads: ("2",),
    ranks_disagree: ("3",),
}


@pytest.mark.parametrize(("check", "backend", "world"), cases(ALL_GATHER_MATMUL, CHECKS))
def test_on_ranks(check, backend, world):
    assert_check(ALL_GATHER_MATMUL, CHECKS, check, backend, world)


def _one_is_killed(rank, world_size, backend, products):
    """Rank 1 ends in its second call, before the product of that number."""
    group = tpweave.init(timeout=60)
    a, b = torch.ones(8, 4), torch.ones(4, 4)
    tpweave.all_gather_matmul(a, [b], group=group, backend=backend)
    module = sys.modules["tpweave.comm.all_gather_matmul"]
    multiply, left = module.local_matmul, [products]

    def multiply_or_end(*args, **kwargs):
        left[0] -= 1
        if rank == 1 and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return multiply(*args, **kwargs)

    module.local_matmul = multiply_or_end
    begin = time.monotonic()
    with pytest.raises(PeerFailureError) as caught:
        tpweave.all_gather_matmul(a, [b], group=group, backend=backend)
        # A rank that needs nothing more of the lost one completes that call.
        tpweave.all_gather_matmul(a, [b], group=group, backend=backend)
    assert caught.value.ranks == (1,) and caught.value.op == "all_gather_matmul"
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("backend", "products"), [("shm", 1), ("shm", 2), ("shm", 3)])
def test_a_killed_rank_is_named(backend, products):
    run_ranks(3, _one_is_killed, backend, products, may_die=(1,))


def test_bad_input_names_the_values():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(4, 3\)"):
        tpweave.all_gather_matmul(a, [b, b.t()])
    with pytest.raises(ValueError, match="bs is empty"):
        tpweave.all_gather_matmul(a, [])
    with pytest.raises(ValueError, match=r"bias has shape \(3,\).*\(4,\)"):
        tpweave.all_gather_matmul(a, [b], biases=[torch.ones(3)])
    with pytest.raises(ValueError, match="2 biases for 1 bs"):
        tpweave.all_gather_matmul(a, [b], biases=[None, None])
    with pytest.raises(ValueError, match=r"has 2 along dim 0.*gives rank 0 5"):
        tpweave.all_gather_matmul(a, [b], splits=[5])
    with pytest.raises(ValueError, match="dim is 2"):
        tpweave.all_gather_matmul(a, [b], 2)
    with pytest.raises(ValueError, match=r"b is torch\.float16.*float32"):
        tpweave.all_gather_matmul(a, [b.half()])
