"""all_to_all along the first and along the last dimension, beside gloo with the copies that it needs."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case


def make(rows, columns, dim):
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) + 1000 * dist.get_rank(), dim


def gloo(inputs):
    x, dim = inputs
    size = dist.get_world_size()
    sent = torch.cat([part.reshape(-1) for part in x.chunk(size, dim)])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    return torch.cat([part.view(x.chunk(size, dim)[0].shape) for part in received.chunk(size)], dim)


def check(inputs, y):
    x, dim = inputs
    rank, size = dist.get_rank(), dist.get_world_size()
    pieces = [(x + 1000 * (peer - rank)).chunk(size, dim)[rank] for peer in range(size)]
    torch.testing.assert_close(y, torch.cat(pieces, dim), rtol=0, atol=0)


BENCH = Bench(
    stem="all_to_all",
    cases=tuple(
        Case(f"fp32 {rows}x{columns} dim {dim}", {"rows": rows, "columns": columns, "dim": dim})
        for rows, columns in ((64, 64), (512, 2048))
        for dim in (0, 1)
    ),
    make=make,
    ours=lambda inputs: tpweave.all_to_all(*inputs),
    rivals={"gloo": gloo},
    check=check,
    bytes=lambda inputs: 2 * inputs[0].nbytes,
    world_size=2,
)
