"""quantized_all_reduce beside the plain all_reduce on the same transport, and gloo.

Within a host the bytes saved are cheap: what the codes are for is links between hosts.
"""

import torch
import torch.distributed as dist

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(count, bits, dtype):
    return torch.randn(count).to(dtype_named(dtype)), bits


def gloo(inputs):
    x = inputs[0].clone()
    dist.all_reduce(x)
    return x


def check(inputs, y):
    x, bits = inputs
    exact = tpweave.all_reduce(x.double())
    largest = tpweave.all_reduce(x.abs().max().double())
    step = 1.008 * largest / (127 if bits == 8 else 7)
    assert ((y.double() - exact).abs() <= step + torch.finfo(x.dtype).eps * largest).all()


BENCH = Bench(
    stem="quantized_all_reduce",
    cases=tuple(
        Case(f"int{bits} {dtype} {count >> 10}K", {"count": count, "bits": bits, "dtype": dtype})
        for bits in (8, 4)
        for dtype in ("fp32", "bf16")
        for count in (1 << 12, 1 << 18, 1 << 22)
    ),
    make=make,
    ours=lambda inputs: tpweave.quantized_all_reduce(inputs[0], bits=inputs[1]),
    rivals={"all_reduce": lambda inputs: tpweave.all_reduce(inputs[0]), "gloo": gloo},
    check=check,
    bytes=lambda inputs: 2 * inputs[0].nbytes,
    world_size=2,
)
