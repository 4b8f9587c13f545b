"""vocab_parallel_embedding beside the masked look-up that an all-reduce adds up, ours and gloo's."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named
from tpweave.reference.comm.vocab_parallel_embedding import own_rows


def make(tokens, hidden, vocabulary, dtype):
    shared = torch.Generator().manual_seed(1)
    weight = torch.randn(vocabulary // dist.get_world_size(), hidden).to(dtype_named(dtype))
    return torch.randint(vocabulary, (tokens,), generator=shared), weight


def masked(inputs):
    ids, weight = inputs
    return own_rows(ids, weight, dist.get_rank() * weight.shape[0])


def with_gloo(inputs):
    y = masked(inputs)
    dist.all_reduce(y)
    return y


def check(inputs, y):
    ids, weight = inputs
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight)
    torch.testing.assert_close(y, F.embedding(ids, torch.cat(parts)), rtol=0, atol=0)


BENCH = Bench(
    stem="vocab_parallel_embedding",
    cases=tuple(
        Case(f"{dtype} T{t} H4096 V8192", {"tokens": t, "hidden": 4096, "vocabulary": 8192, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for t in (1, 16, 512)
    ),
    make=make,
    ours=lambda inputs: tpweave.vocab_parallel_embedding(*inputs),
    rivals={"masked, all_reduce": lambda inputs: tpweave.all_reduce(masked(inputs)), "masked, gloo": with_gloo},
    check=check,
    bytes=lambda inputs: 3 * inputs[0].numel() * inputs[1].shape[1] * inputs[1].element_size(),
    world_size=2,
)
