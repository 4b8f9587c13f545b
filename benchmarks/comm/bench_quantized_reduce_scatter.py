"""quantized_reduce_scatter beside the plain reduce_scatter on the same transport, and gloo."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, bits, dtype):
    return torch.randn(rows, 1024).to(dtype_named(dtype)), bits


def gloo(inputs):
    parts = list(inputs[0].chunk(dist.get_world_size()))
    out = torch.empty_like(parts[0])
    dist.reduce_scatter(out, parts)
    return out


def check(inputs, y):
    x, bits = inputs
    exact = tpweave.reduce_scatter(x.double())
    largest = tpweave.all_reduce(x.abs().max().double())
    step = 1.008 * largest / (127 if bits == 8 else 7)
    assert ((y.double() - exact).abs() <= step * 0.51 + torch.finfo(x.dtype).eps * largest).all()


BENCH = Bench(
    stem="quantized_reduce_scatter",
    cases=tuple(
        Case(f"int{bits} {dtype} {rows}x1024", {"rows": rows, "bits": bits, "dtype": dtype})
        for bits in (8, 4)
        for dtype in ("fp32", "bf16")
        for rows in (4, 1024)
    ),
    make=make,
    ours=lambda inputs: tpweave.quantized_reduce_scatter(inputs[0], bits=inputs[1]),
    rivals={"reduce_scatter": lambda inputs: tpweave.reduce_scatter(inputs[0]), "gloo": gloo},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (1 + 1 / dist.get_world_size()),
    world_size=2,
)
