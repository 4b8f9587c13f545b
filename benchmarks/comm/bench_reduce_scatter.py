"""reduce_scatter along the first and along the last dimension, beside gloo with the copies that it needs.

The sizes are measured along the first dimension, and beside OpenMPI (comm/openmpi.py says in which mode).
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.comm import openmpi
from tpweave.benchmarks.registry import Bench, Case


def make(rows=None, columns=None, dim=0, nbytes=0):
    if rows is None:
        rows, columns = dist.get_world_size(), nbytes // 4 // dist.get_world_size()
    return torch.ones(rows, columns) * (dist.get_rank() + 1), dim


def gloo(inputs):
    x, dim = inputs
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(), dim)]
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts)
    return out


def by_openmpi(inputs):
    x, dim = inputs
    return openmpi.reduce_scatter(x if dim == 0 else torch.cat(x.chunk(dist.get_world_size(), 1)))


def check(inputs, y):
    size = dist.get_world_size()
    torch.testing.assert_close(y, torch.full_like(y, size * (size + 1) / 2), rtol=0, atol=0)


BENCH = Bench(
    stem="reduce_scatter",
    cases=(
        *(
            Case(f"fp32 {rows}x{columns} dim {dim}", {"rows": rows, "columns": columns, "dim": dim})
            for rows, columns in ((64, 64), (512, 2048))
            for dim in (0, 1)
        ),
        *(Case(f"fp32 {name}", {"nbytes": nbytes}) for name, nbytes in openmpi.SIZES.items()),
    ),
    make=make,
    ours=lambda inputs: tpweave.reduce_scatter(*inputs),
    rivals={"gloo": gloo, "OpenMPI": by_openmpi},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (1 + 1 / dist.get_world_size()),
    world_size=2,
    mpi_rivals=("OpenMPI",),
)
