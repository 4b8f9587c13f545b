"""all_reduce_rms_norm with a residual, beside our own all_reduce followed by rms_norm, and gloo followed by torch's."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named

EPS = 1e-6


def make(rows, dtype, in_arena):
    x = torch.randn(rows, 4096).to(dtype_named(dtype))
    shared = torch.Generator().manual_seed(1)
    residual, weight = torch.randn(rows, 4096, generator=shared), torch.randn(4096, generator=shared)
    if in_arena:
        x = tpweave.init().empty(x.shape, x.dtype).copy_(x)
    return x, residual.to(x.dtype), weight.to(x.dtype)


def in_sequence(inputs):
    x, residual, weight = inputs
    return tpweave.rms_norm(tpweave.all_reduce(x), weight, EPS, residual=residual)


def gloo_and_torch(inputs):
    x, residual, weight = inputs
    total = x.clone()
    dist.all_reduce(total)
    h = total.add_(residual)
    return F.rms_norm(h, weight.shape, weight, EPS), h


def check(inputs, results):
    x, residual, weight = inputs
    h = x.double()
    dist.all_reduce(h)
    h += residual
    tolerance = 1e-5 if x.dtype == torch.float32 else 1e-2
    for got, want in zip(results, (F.rms_norm(h, weight.shape, weight.double(), EPS), h), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="all_reduce_rms_norm",
    cases=tuple(
        Case(f"{dtype} {rows}x4096{place}", {"rows": rows, "dtype": dtype, "in_arena": place != ""})
        for dtype in ("fp32", "bf16")
        for place in ("", " in the arena")
        for rows in (1, 4, 16, 64, 512)
    ),
    make=make,
    ours=lambda inputs: tpweave.all_reduce_rms_norm(*inputs, EPS),
    rivals={"all_reduce, rms_norm": in_sequence, "gloo, torch": gloo_and_torch},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (dist.get_world_size() + 3),
    world_size=2,
)
