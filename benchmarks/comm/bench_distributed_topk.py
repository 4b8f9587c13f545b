"""distributed_topk beside torch.topk of the gathered logits, and of each shard, whose candidates gloo exchanges."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, vocabulary, k, dtype):
    return torch.randn(rows, vocabulary // dist.get_world_size()).to(dtype_named(dtype)), k


def gathered(inputs):
    x, k = inputs
    return tpweave.all_gather(x, 1).topk(k)


def of_shards(inputs):
    x, k = inputs
    values, indices = x.topk(k)
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    places = [torch.empty_like(indices) for _ in found]
    dist.all_gather(found, values)
    dist.all_gather(places, indices + dist.get_rank() * x.shape[1])
    values, order = torch.cat(found, 1).topk(k)
    return values, torch.cat(places, 1).gather(1, order)


def check(inputs, result):
    x, k = inputs
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    whole = torch.cat(parts, 1)
    torch.testing.assert_close(result[0], whole.topk(k).values, rtol=0, atol=0)
    torch.testing.assert_close(whole.gather(1, result[1]), result[0], rtol=0, atol=0)


BENCH = Bench(
    stem="distributed_topk",
    cases=tuple(
        Case(f"{dtype} {rows}x{v} k {k}", {"rows": rows, "vocabulary": v, "k": k, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for rows, v, k in ((1, 32000, 50), (1, 128256, 50), (16, 128256, 50), (1, 128256, 1000))
    ),
    make=make,
    ours=lambda inputs: tpweave.distributed_topk(*inputs),
    rivals={"gather, topk": gathered, "topk, gloo": of_shards},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes,
    world_size=2,
)
