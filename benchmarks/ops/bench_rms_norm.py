"""rms_norm beside torch.nn.functional.rms_norm."""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, hidden, dtype):
    return torch.randn(rows, hidden).to(dtype_named(dtype)), torch.randn(hidden).to(dtype_named(dtype))


def check(inputs, y):
    x, weight = inputs
    wide = x.double()
    want = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2 if x.dtype != torch.float32 else 1e-5)


BENCH = Bench(
    stem="rms_norm",
    cases=tuple(
        Case(f"{dtype} {rows}x{hidden}", {"rows": rows, "hidden": hidden, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for rows, hidden in ((1, 4096), (64, 4096), (2048, 2048))
    ),
    gpu_cases=tuple(
        Case(f"{dtype} {rows}x{hidden}", {"rows": rows, "hidden": hidden, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for rows, hidden in ((64, 4096), (8192, 4096), (4096, 16384))
    ),
    make=make,
    ours=lambda inputs: tpweave.rms_norm(inputs[0], inputs[1], 1e-6),
    rivals={"torch": lambda inputs: torch.nn.functional.rms_norm(inputs[0], inputs[1].shape, inputs[1], 1e-6)},
    check=check,
    bytes=lambda inputs: 2 * inputs[0].numel() * inputs[0].element_size(),
)
