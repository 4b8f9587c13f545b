"""all_reduce beside gloo and OpenMPI, in place of a tensor that already exists on each rank.

Of gloo's time for small tensors most is the waking of idle cores, which a rank that computes in between would not pay;
OpenMPI, which spins, is the rival to look at there.
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case

SIZES = {"4 KB": 4 << 10, "16 KB": 16 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}


def make(nbytes):
    # Zeros stay zeros however often they are added up; the check uses other numbers.
    return torch.zeros(nbytes // 4)


def gloo(x):
    dist.all_reduce(x)


def openmpi(x):
    from mpi4py import MPI

    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, x.numpy(), op=MPI.SUM)


def check(x, _):
    rank, size = dist.get_rank(), dist.get_world_size()
    ours = tpweave.all_reduce(torch.arange(x.numel(), dtype=torch.float32) % 100 + rank)
    want = (torch.arange(x.numel(), dtype=torch.float32) % 100) * size + size * (size - 1) / 2
    torch.testing.assert_close(ours, want, rtol=0, atol=0)


BENCH = Bench(
    stem="all_reduce",
    cases=tuple(Case(f"fp32 {name}", {"nbytes": nbytes}) for name, nbytes in SIZES.items()),
    make=make,
    ours=lambda x: tpweave.all_reduce_(x),
    rivals={"gloo": gloo, "OpenMPI": openmpi},
    check=check,
    bytes=lambda x: 2 * x.nbytes,
    world_size=2,
    mpi_rivals=("OpenMPI",),
)
