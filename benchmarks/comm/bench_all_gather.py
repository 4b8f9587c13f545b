"""all_gather along the first and along the last dimension, beside gloo with the copies that it needs.

The sizes are measured along the first dimension, and beside OpenMPI (comm/openmpi.py says in which mode).
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.comm import openmpi
from tpweave.benchmarks.registry import Bench, Case


def make(rows=None, columns=None, dim=0, nbytes=0):
    if rows is None:
        rows, columns = 1, nbytes // 4 // dist.get_world_size()
    return torch.full((rows, columns), float(dist.get_rank())), dim


def gloo(inputs):
    x, dim = inputs
    shards = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, x)
    return torch.cat(shards, dim)


def by_openmpi(inputs):
    x, dim = inputs
    out = openmpi.all_gather(x)
    return out if dim == 0 else torch.cat(out.chunk(dist.get_world_size()), 1)


def check(inputs, y):
    x, dim = inputs
    want = torch.cat([torch.full_like(x, float(rank)) for rank in range(dist.get_world_size())], dim)
    torch.testing.assert_close(y, want, rtol=0, atol=0)


BENCH = Bench(
    stem="all_gather",
    cases=(
        *(
            Case(f"fp32 {rows}x{columns} dim {dim}", {"rows": rows, "columns": columns, "dim": dim})
            for rows, columns in ((1, 2048), (512, 1024))
            for dim in (0, 1)
        ),
        *(Case(f"fp32 {name}", {"nbytes": nbytes}) for name, nbytes in openmpi.SIZES.items()),
    ),
    make=make,
    ours=lambda inputs: tpweave.all_gather(*inputs),
    rivals={"gloo": gloo, "OpenMPI": by_openmpi},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (1 + dist.get_world_size()),
    world_size=2,
    mpi_rivals=("OpenMPI",),
)
