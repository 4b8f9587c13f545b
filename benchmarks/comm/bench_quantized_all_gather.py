"""quantized_all_gather beside the plain all_gather on the same transport, and gloo."""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, bits, dtype):
    return torch.randn(rows, 1024).to(dtype_named(dtype)), bits


def gloo(inputs):
    x = inputs[0]
    out = x.new_empty(dist.get_world_size() * x.shape[0], x.shape[1])
    dist.all_gather_into_tensor(out, x)
    return out


def check(inputs, y):
    x, bits = inputs
    exact = tpweave.all_gather(x)
    step = 1.008 * exact.abs().max().double() / (127 if bits == 8 else 7)
    assert ((y.double() - exact.double()).abs() <= step * (0.5 + 2**-8)).all()


BENCH = Bench(
    stem="quantized_all_gather",
    cases=tuple(
        Case(f"int{bits} {dtype} {rows}x1024", {"rows": rows, "bits": bits, "dtype": dtype})
        for bits in (8, 4)
        for dtype in ("fp32", "bf16")
        for rows in (4, 1024)
    ),
    make=make,
    ours=lambda inputs: tpweave.quantized_all_gather(inputs[0], bits=inputs[1]),
    rivals={"all_gather": lambda inputs: tpweave.all_gather(inputs[0]), "gloo": gloo},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes * (1 + dist.get_world_size()),
    world_size=2,
)
