"""matmul_all_reduce beside torch's linear followed by gloo's all-reduce."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, depth, columns, dtype):
    weight = torch.randn(columns, depth) / depth**0.5
    return torch.randn(rows, depth).to(dtype_named(dtype)), weight.to(dtype_named(dtype))


def linear_and_gloo(inputs):
    y = torch.nn.functional.linear(*inputs)
    dist.all_reduce(y)
    return y


def check(inputs, y):
    x, weight = inputs
    want = x.double() @ weight.double().t()
    dist.all_reduce(want)
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="matmul_all_reduce",
    cases=tuple(
        Case(f"{dtype} M{m} K{k} N{n}", {"rows": m, "depth": k, "columns": n, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for m, k, n in ((1, 2048, 4096), (4, 2048, 4096), (8, 2048, 4096), (16, 2048, 4096), (128, 1024, 1024))
    ),
    make=make,
    ours=lambda inputs: tpweave.matmul_all_reduce(inputs[0], inputs[1].t()),
    rivals={"linear + gloo": linear_and_gloo},
    check=check,
    alone=lambda inputs: torch.nn.functional.linear(*inputs),
    flops=lambda inputs: 2 * inputs[0].numel() * inputs[1].shape[0],
    bytes=lambda inputs: inputs[1].nbytes,
    world_size=2,
)
