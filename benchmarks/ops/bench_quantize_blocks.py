"""quantize_blocks, beside a copy of its input (the memory's rate) and the same in plain torch."""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(count, bits, dtype, seed=None):
    x = torch.randn(count).to(dtype_named(dtype))
    return x, bits, seed, torch.empty_like(x)


def ours(inputs):
    x, bits, seed, _ = inputs
    return tpweave.quantize_blocks(x, bits, seed=seed)


def torch_row(inputs):
    x, bits, seed, _ = inputs
    return tpweave.quantize_blocks(x, bits, seed=seed, backend="reference")


def check(inputs, result):
    x, bits, seed, _ = inputs
    y = tpweave.dequantize_blocks(*result, x.shape, bits=bits, backend="reference")
    step = result[1].float().repeat_interleave({8: 128, 4: 32}[bits])
    assert ((y - x.float()).abs() <= step * ((0.5 if seed is None else 1) + 2**-16)).all()


BENCH = Bench(
    stem="quantize_blocks",
    cases=tuple(
        Case(
            f"int{bits} {dtype} {count >> 10}K{'' if seed is None else ' stochastic'}",
            {"count": count, "bits": bits, "dtype": dtype, "seed": seed},
        )
        for bits in (8, 4)
        for dtype in ("fp32", "bf16")
        for count in (1 << 14, 1 << 22)
        for seed in (None, 1)
    ),
    make=make,
    ours=ours,
    rivals={"copy": lambda inputs: inputs[3].copy_(inputs[0]), "torch": torch_row},
    check=check,
    bytes=lambda inputs: inputs[0].nbytes + inputs[0].numel() * inputs[1] / 8,
)
