"""merge_attention beside the same in torch: a softmax over the parts' log-sum-exps and a weighted sum."""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(parts, queries, heads, head_dim, dtype):
    outs = [torch.randn(1, queries, heads, head_dim).to(dtype_named(dtype)) for _ in range(parts)]
    return outs, [torch.randn(1, heads, queries) for _ in range(parts)]


def softmax_over_parts(inputs):
    outs, lses = torch.stack(inputs[0]), torch.stack(inputs[1])
    weights = torch.softmax(lses, 0).transpose(2, 3).unsqueeze(-1)
    return (outs.to(lses.dtype) * weights).sum(0).to(outs.dtype), torch.logsumexp(lses, 0)


def check(inputs, result):
    wide = softmax_over_parts([[x.double() for x in parts] for parts in inputs])
    tolerance = 1e-5 if result[0].dtype == torch.float32 else 1e-2
    for got, want in zip(result, wide, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="merge_attention",
    cases=tuple(
        Case(
            f"{dtype} {parts} parts of {queries} queries",
            {"parts": parts, "queries": queries, "heads": 16, "head_dim": 64, "dtype": dtype},
        )
        for dtype in ("fp32", "bf16")
        for parts, queries in ((2, 1), (2, 1024), (8, 256))
    ),
    make=make,
    ours=lambda inputs: tpweave.merge_attention(*inputs),
    rivals={"torch": softmax_over_parts},
    check=check,
    bytes=lambda inputs: sum(x.nbytes for parts in inputs for x in parts) + inputs[0][0].nbytes,
)
