"""Every collective of the shm transport, with a rank that is killed at one of its steps, and with steps that come late.

The steps are those that `tpweave trace` records; the communicator kills the process, or sleeps, where one begins.
"""

import os
import time

import pytest
import torch
import torch.distributed as dist

import tpweave
from tpweave.errors import PeerFailureError
from tpweave.testing import run_ranks

ROWS, DEPTH, COLUMNS = 6, 8, 12
LARGE = 400_000  # elements: several chunks of a pipeline


def draw(rank, *shape):
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(rank)).float()


def draws(group, *shape):
    return [draw(rank, *shape) for rank in range(group.size)]


def in_arena(group, x):
    return group.empty(x.shape).copy_(x)


def parts(x, group, dim=0):
    return x.tensor_split(group.size, dim)[group.rank]


def normed(x):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


# Name -> (call, what it must give), both of a group. Whole numbers: every order of summing gives the same.
CALLS = {
    "all_reduce": (
        lambda group: tpweave.all_reduce(draw(group.rank, 999), group),
        lambda group: sum(draws(group, 999)),
    ),
    "all_reduce large": (
        lambda group: tpweave.all_reduce(draw(group.rank, LARGE), group),
        lambda group: sum(draws(group, LARGE)),
    ),
    "all_reduce in the arena": (
        lambda group: tpweave.all_reduce_(in_arena(group, draw(group.rank, LARGE)), group),
        lambda group: sum(draws(group, LARGE)),
    ),
    "all_gather": (
        lambda group: tpweave.all_gather(draw(group.rank, LARGE), 0, group),
        lambda group: torch.cat(draws(group, LARGE)),
    ),
    "reduce_scatter": (
        lambda group: tpweave.reduce_scatter(draw(group.rank, LARGE), 0, group),
        lambda group: parts(sum(draws(group, LARGE)), group),
    ),
    "all_to_all": (
        lambda group: tpweave.all_to_all(draw(group.rank, LARGE), 0, group),
        lambda group: torch.cat([parts(x, group) for x in draws(group, LARGE)]),
    ),
    "matmul_all_reduce": (
        lambda group: tpweave.matmul_all_reduce(draw(group.rank, ROWS, DEPTH), draw(0, DEPTH, COLUMNS), group),
        lambda group: sum(draws(group, ROWS, DEPTH)) @ draw(0, DEPTH, COLUMNS),
    ),
    "all_gather_matmul in parts": (
        lambda group: tpweave.all_gather_matmul(
            draw(group.rank, ROWS, DEPTH), [draw(0, DEPTH, COLUMNS)], 0, group, backend="shm"
        )[1][0],
        lambda group: torch.cat(draws(group, ROWS, DEPTH)) @ draw(0, DEPTH, COLUMNS),
    ),
    "all_gather_matmul": (
        lambda group: tpweave.all_gather_matmul(
            draw(group.rank, ROWS, DEPTH), [draw(0, DEPTH, COLUMNS)], 0, group
        )[1][0],
        lambda group: torch.cat(draws(group, ROWS, DEPTH)) @ draw(0, DEPTH, COLUMNS),
    ),
    "matmul_reduce_scatter in parts": (
        lambda group: tpweave.matmul_reduce_scatter(
            draw(group.rank, ROWS, DEPTH), draw(0, DEPTH, COLUMNS), "sum", 0, group, backend="shm"
        ),
        lambda group: parts(sum(draws(group, ROWS, DEPTH)) @ draw(0, DEPTH, COLUMNS), group),
    ),
    "matmul_reduce_scatter": (
        lambda group: tpweave.matmul_reduce_scatter(
            draw(group.rank, ROWS, DEPTH), draw(0, DEPTH, COLUMNS), "sum", 0, group
        ),
        lambda group: parts(sum(draws(group, ROWS, DEPTH)) @ draw(0, DEPTH, COLUMNS), group),
    ),
    "all_reduce_rms_norm": (
        lambda group: tpweave.all_reduce_rms_norm(draw(group.rank, 300, 512), None, torch.ones(512), 1e-6, group)[0],
        lambda group: normed(sum(draws(group, 300, 512))),
    ),
    "distributed_topk": (
        lambda group: tpweave.distributed_topk(draw(group.rank, ROWS, 20), 3, group)[0],
        lambda group: torch.cat(draws(group, ROWS, 20), 1).topk(3, 1).values,
    ),
}  # fmt: skip


def check(name, group):
    call, want = CALLS[name]
    torch.testing.assert_close(call(group), want(group), rtol=1e-5, atol=1e-5)


def count_steps(rank, world_size, names):
    """How many steps each call has on this rank."""
    group = tpweave.init(timeout=60)
    counts = []
    for name in names:
        check(name, group)
        group.shm.start_trace()
        check(name, group)
        # The call itself is an event that begins with none.
        counts.append(sum(event[0] not in tpweave.native.COLLECTIVE_CODES for event in group.shm.take_trace()))
    return counts


def killed_at(rank, world_size, name, step):
    group = tpweave.init(timeout=60)
    check(name, group)
    if rank == 1:
        group.shm.start_trace(kill_at=step)
        check(name, group)
        os._exit(3)
    survivors = dist.new_group([0, 2], use_local_synchronization=True)
    failed_after = None
    start = time.monotonic()
    # A rank killed in its last steps may have given the others all that they needed.
    for _ in range(3):
        try:
            check(name, group)
        except PeerFailureError as error:
            assert list(error.ranks) == [1], error
            failed_after = time.monotonic() - start
            break
    assert failed_after is not None, "nobody noticed"
    assert group.poisoned
    check(name, tpweave.init(survivors, timeout=60))
    return failed_after


@pytest.fixture(scope="module")
def steps():
    by_rank = run_ranks(3, count_steps, tuple(CALLS))
    return dict(zip(CALLS, by_rank[1], strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_a_rank_killed_at_a_step_is_named_and_the_others_go_on(name, steps):
    count = steps[name]
    assert count >= 2
    for step in sorted({count // 2, count - 1}):
        assert all(run_ranks(3, killed_at, name, step, may_die=(1,))[::2])


def late_steps(rank, world_size, rounds):
    group = tpweave.init(timeout=60)
    names = list(CALLS)
    for i in range(rounds):
        # One rank or another is late, differently in each round.
        if rank == i % world_size:
            group.shm.start_trace(delay=0.002)
        check(names[i % len(names)], group)
        group.shm.take_trace()
    return True


@pytest.mark.parametrize("world_size", [2, 4])
def test_right_whichever_step_comes_late(world_size):
    assert all(run_ranks(world_size, late_steps, 200))
