"""all_gather along the first and along the last dimension, beside gloo with the copies that it needs."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case


def make(rows, columns, dim):
    return torch.full((rows, columns), float(dist.get_rank())), dim


def gloo(inputs):
    x, dim = inputs
    shards = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, x)
    return torch.cat(shards, dim)


def check(inputs, y):
    x, dim = inputs
    want = torch.cat([torch.full_like(x, float(rank)) for rank in range(dist.get_world_size())], dim)
    torch.testing.assert_close(y, want, rtol=0, atol=0)


BENCH = Bench(
    stem="all_gather",
    cases=tuple(
        Case(f"fp32 {rows}x{columns} dim {dim}", {"rows": rows, "columns": columns, "dim": dim})
        for rows, columns in ((1, 2048), (512, 1024))
        for dim in (0, 1)
    ),
    make=make,
    ours=lambda inputs: tpweave.all_gather(*inputs),
    rivals={"gloo": gloo},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (1 + dist.get_world_size()),
    world_size=2,
)
