"""The regions' gradients: a divided two-layer network gives each rank its part of the undivided one's gradients."""

import pytest
import torch
from comm_support import assert_check, numbers

from tpweave.comm.regions import copy_to_ranks, gather_from_ranks, reduce_from_ranks, scatter_to_ranks
from tpweave.distributed.splits import even_splits

HIDDEN, WIDTH = 6, 10


def undivided():
    torch.manual_seed(1)
    x, up, down, target = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((5, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (5, HIDDEN))
    )
    return [t.requires_grad_() for t in (x, up, down)], target


def divided_network(group, backend):
    (x, up, down), target = undivided()
    loss = ((torch.relu(x @ up.t()) @ down.t() - target) ** 2).sum()
    dx, dup, ddown = torch.autograd.grad(loss, (x, up, down))

    splits = even_splits(WIDTH, group.size)
    up_shard = up.detach().split(splits)[group.rank].clone().requires_grad_()
    down_shard = down.detach().split(splits, 1)[group.rank].clone().requires_grad_()
    hidden = torch.relu(copy_to_ranks(x, group) @ up_shard.t())
    y = reduce_from_ranks(hidden @ down_shard.t(), group)
    grads = torch.autograd.grad(((y - target) ** 2).sum(), (x, up_shard, down_shard))
    torch.testing.assert_close(grads, (dx, dup.split(splits)[group.rank], ddown.split(splits, 1)[group.rank]))

    # The same with the hidden activation joined and divided again between the layers.
    whole = gather_from_ranks(hidden.detach().requires_grad_(), 1, group, splits=splits)
    again = scatter_to_ranks(whole, -1, group)
    assert torch.equal(again, hidden)


def gather_and_scatter(group, backend):
    splits = [1 + 2 * rank for rank in range(group.size)]
    shards = [numbers((3, n), torch.float64, rank) for rank, n in enumerate(splits)]
    weight = numbers((3, sum(splits)), torch.float64, 99)
    x = shards[group.rank].clone().requires_grad_()
    y = gather_from_ranks(x, 1, group, splits=splits)
    assert torch.equal(y, torch.cat(shards, 1))
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight.split(splits, 1)[group.rank])

    full = torch.cat(shards, 1).requires_grad_()
    part = scatter_to_ranks(full, 1, group, splits=splits)
    assert torch.equal(part, shards[group.rank])
    (part * weight.split(splits, 1)[group.rank]).sum().backward()
    assert torch.equal(full.grad, weight)


def compiled(group, backend):
    x = numbers((4, HIDDEN), torch.float32, 0).requires_grad_()

    def step(x):
        return reduce_from_ranks(copy_to_ranks(x, group) * (group.rank + 1), group)

    fast = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), step(x))
    (want,) = torch.autograd.grad(step(x).square().sum(), x)
    (got,) = torch.autograd.grad(fast(x).square().sum(), x)
    assert torch.equal(got, want)


CHECKS = {divided_network: ("1", "2", "3"), gather_and_scatter: ("1", "2", "3"), compiled: ("2",)}


@pytest.mark.parametrize(("check", "world"), [(check, world) for check, worlds in CHECKS.items() for world in worlds])
def test_on_ranks(check, world):
    assert_check(None, CHECKS, check, None, world)
