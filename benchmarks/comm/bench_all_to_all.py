"""all_to_all along the first and along the last dimension, beside gloo with the copies that it needs.

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
    # Small enough to be exact in fp32.
    numbers = torch.arange(rows * columns) % 4096 + 1000 * dist.get_rank()
    return numbers.float().view(rows, columns), dim


def gloo(inputs):
    x, dim = inputs
    size = dist.get_world_size()
    sent = torch.cat([part.reshape(-1) for part in x.chunk(size, dim)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat([part.view(x.chunk(size, dim)[0].shape) for part in received.chunk(size)], dim)


def by_openmpi(inputs):
    x, dim = inputs
    size = dist.get_world_size()
    out = openmpi.all_to_all(x if dim == 0 else torch.cat(x.chunk(size, 1)))
    return out if dim == 0 else torch.cat(out.chunk(size), 1)


def check(inputs, y):
    x, dim = inputs
    rank, size = dist.get_rank(), dist.get_world_size()
    pieces = [(x + 1000 * (peer - rank)).chunk(size, dim)[rank] for peer in range(size)]
    torch.testing.assert_close(y, torch.cat(pieces, dim), rtol=0, atol=0)


BENCH = Bench(
    stem="all_to_all",
    cases=(
        *(
            Case(f"fp32 {rows}x{columns} dim {dim}", {"rows": rows, "columns": columns, "dim": dim})
            for rows, columns in ((64, 64), (512, 2048))
            for dim in (0, 1)
        ),
        *(Case(f"fp32 {name}", {"nbytes": nbytes}) for name, nbytes in openmpi.SIZES.items()),
    ),
    make=make,
    ours=lambda inputs: tpweave.all_to_all(*inputs),
    rivals={"gloo": gloo, "OpenMPI": by_openmpi},
    check=check,
    bytes=lambda inputs: 2 * inputs[0].nbytes,
    world_size=2,
    mpi_rivals=("OpenMPI",),
)
