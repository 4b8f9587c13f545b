"""gated_activation on the halves of a merged projection, beside torch's activation and product."""

import torch
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named

RIVALS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def make(rows, width, kind, dtype):
    return *torch.randn(rows, 2 * width).to(dtype_named(dtype)).chunk(2, -1), kind


def check(inputs, y):
    gate, up, kind = inputs
    want = RIVALS[kind](gate.double()) * up.double()
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2 if gate.dtype != torch.float32 else 1e-5)


BENCH = Bench(
    stem="gated_activation",
    cases=tuple(
        Case(f"{kind} {dtype} {rows}x{width}", {"rows": rows, "width": width, "kind": kind, "dtype": dtype})
        for kind in ("silu", "gelu", "gelu_tanh")
        for dtype in ("fp32", "bf16")
        for rows, width in ((1, 8192), (2048, 2048))
    ),
    gpu_cases=tuple(
        Case(f"{kind} bf16 {rows}x{width}", {"rows": rows, "width": width, "kind": kind, "dtype": "bf16"})
        for kind in ("silu", "gelu", "gelu_tanh")
        for rows, width in ((64, 14336), (4096, 14336))
    ),
    make=make,
    ours=lambda inputs: tpweave.gated_activation(*inputs),
    rivals={"torch": lambda inputs: RIVALS[inputs[2]](inputs[0]) * inputs[1]},
    check=check,
    bytes=lambda inputs: 3 * inputs[0].numel() * inputs[0].element_size(),
)
