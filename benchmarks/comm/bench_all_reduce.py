"""all_reduce in place of a tensor that each rank has, beside gloo and OpenMPI (comm/openmpi.py says in which mode).

Of gloo's time for small tensors most is the waking of idle cores, which a rank that computes in between would not pay;
OpenMPI, which spins, is the rival to look at there. "in the arena" is a tensor of `TPGroup.empty`, which the rivals
get too; "from ordinary memory" is ours on one that is not.
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.comm import openmpi
from tpweave.benchmarks.registry import Bench, Case


def make(nbytes, in_arena):
    # Zeros stay zeros however often they are added up; the check uses other numbers.
    x = torch.zeros(nbytes // 4)
    return (tpweave.init().empty(x.shape).zero_() if in_arena else x), x


def gloo(inputs):
    dist.all_reduce(inputs[0])


def check(inputs, _):
    rank, size = dist.get_rank(), dist.get_world_size()
    numbers = torch.arange(inputs[0].numel(), dtype=torch.float32) % 100
    want = numbers * size + size * (size - 1) / 2
    got = tpweave.all_reduce_(inputs[0].copy_(numbers + rank)).clone()
    inputs[0].zero_()
    torch.testing.assert_close(got, want, rtol=0, atol=0)


BENCH = Bench(
    stem="all_reduce",
    cases=tuple(
        Case(f"fp32 {name}{place}", {"nbytes": nbytes, "in_arena": place != ""})
        for place in ("", " in the arena")
        for name, nbytes in openmpi.SIZES.items()
    ),
    make=make,
    ours=lambda inputs: tpweave.all_reduce_(inputs[0]),
    rivals={
        "gloo": gloo,
        "OpenMPI": lambda inputs: openmpi.all_reduce_(inputs[0]),
        "from ordinary memory": lambda inputs: tpweave.all_reduce_(inputs[1]),
    },
    check=check,
    bytes=lambda inputs: 2 * inputs[0].nbytes,
    world_size=2,
    mpi_rivals=("OpenMPI",),
)
