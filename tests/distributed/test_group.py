"""Groups: what `init` takes, what it refuses, and that all ranks hold the same facts."""

import subprocess
import sys

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import tpweave
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.testing import run_ranks


def facts(group):
    return group.name, group.rank, group.size, group.ranks, group.transport


def default_group(rank, world_size):
    group = tpweave.init(timeout=7)
    assert resolve_group(None) is group and resolve_group(dist.group.WORLD) is group and resolve_group(group) is group
    assert TPGroup.by_name(group.name) is group and group.timeout == 7
    assert tpweave.init() is group and group.timeout == 7
    assert tpweave.init(timeout=9).timeout == 9
    return facts(group)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_default_group_is_the_world(world_size):
    results = run_ranks(world_size, default_group)
    assert len({result[0] for result in results}) == 1
    for rank, (_, group_rank, size, ranks, transport) in enumerate(results):
        assert (group_rank, size, ranks) == (rank, world_size, tuple(range(world_size)))
        assert transport == results[0][4] and (transport == "none") == (world_size == 1)


def subgroups_and_meshes(rank, world_size):
    low, high = dist.new_group([0, 2]), dist.new_group([1, 3])
    mine = tpweave.init(low if rank % 2 == 0 else high)
    with pytest.raises(ValueError, match=f"rank {rank} of the world. is not in the group"):
        tpweave.init(high if rank % 2 == 0 else low)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with pytest.raises(ValueError, match=r"this one has 2.*mesh\['tp'\]"):
        tpweave.init(mesh)
    row = tpweave.init(mesh["tp"])
    assert resolve_group(mesh["tp"]) is row
    world = tpweave.init()
    assert len({mine.name, row.name, world.name}) == 3
    return facts(mine), facts(row)


def test_subgroups_and_meshes():
    results = run_ranks(4, subgroups_and_meshes)
    for rank, (mine, row) in enumerate(results):
        assert mine[1:4] == (rank // 2, 2, (rank % 2, rank % 2 + 2))
        assert row[1:4] == (rank % 2, 2, (rank // 2 * 2, rank // 2 * 2 + 1))
    assert results[0][0][0] == results[2][0][0] and results[0][1][0] == results[1][1][0]


def destroyed_and_rebuilt(rank, world_size):
    if rank == 0:
        tpweave.init(dist.new_group([0], use_local_synchronization=True))
    first = tpweave.init()
    name = first.name
    first.destroy()
    first.destroy()
    with pytest.raises(ValueError, match="no group named"):
        TPGroup.by_name(name)
    second = tpweave.init()
    assert second is not first and second.name != name
    return second.name


def test_a_destroyed_group_is_rebuilt_under_another_name():
    names = run_ranks(2, destroyed_and_rebuilt)
    assert names[0] == names[1]


def bad_arguments(rank, world_size):
    for timeout in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="must be more than 0"):
            tpweave.init(timeout=timeout)
    with pytest.raises(ValueError, match="not str"):
        tpweave.init("tp")


def test_bad_arguments():
    run_ranks(1, bad_arguments)


def lone(code, **environment):
    clean = {"PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True)


def test_a_lone_process_is_a_group_of_one():
    done = lone("import tpweave; g = tpweave.init(); print(g.rank, g.size, g.ranks, g.transport, g.process_group)")
    assert done.stdout.strip() == "0 1 (0,) none None", done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "not set: MASTER_ADDR, MASTER_PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "srun started 3 processes"),
    ],
)
def test_processes_that_cannot_be_joined(environment, words):
    done = lone("import tpweave; tpweave.init()", **environment)
    assert done.returncode != 0 and "RuntimeError" in done.stderr and words in done.stderr
