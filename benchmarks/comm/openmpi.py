"""OpenMPI's collectives on the memory of torch's tensors: rivals that spin as ours do.

`OMPI_MCA_btl_vader_single_copy_mechanism=none tpweave bench all_gather` measures the mode in which every byte goes
through shared memory; "cma", where the ranks read each other's memory by system calls, is OpenMPI 4's default.
"""

import torch

# Of the whole tensor: what a rank brings to all_reduce, reduce_scatter and all_to_all, and gets from all_gather.
SIZES = {
    "1 KB": 1 << 10, "4 KB": 4 << 10, "16 KB": 16 << 10, "64 KB": 64 << 10, "256 KB": 256 << 10, "1 MB": 1 << 20,
    "4 MB": 4 << 20, "16 MB": 16 << 20, "64 MB": 64 << 20,
}  # fmt: skip


def all_reduce_(x):
    from mpi4py import MPI

    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, x.numpy(), op=MPI.SUM)


def all_gather(x):
    from mpi4py import MPI

    out = torch.empty(MPI.COMM_WORLD.size * x.shape[0], *x.shape[1:])
    MPI.COMM_WORLD.Allgather(x.numpy(), out.numpy())
    return out


def reduce_scatter(x):
    from mpi4py import MPI

    out = torch.empty(x.shape[0] // MPI.COMM_WORLD.size, *x.shape[1:])
    MPI.COMM_WORLD.Reduce_scatter_block(x.numpy(), out.numpy(), op=MPI.SUM)
    return out


def all_to_all(x):
    from mpi4py import MPI

    out = torch.empty_like(x)
    MPI.COMM_WORLD.Alltoall(x.numpy(), out.numpy())
    return out
