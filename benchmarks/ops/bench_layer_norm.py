"""layer_norm beside torch.nn.functional.layer_norm, without and with the residual add."""

import torch
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(rows, hidden, dtype, residual):
    x, weight, bias, added = (
        torch.randn(s).to(dtype_named(dtype)) for s in ((rows, hidden), hidden, hidden, (rows, hidden))
    )
    return x, weight, bias, added if residual else None


def ours(inputs):
    x, weight, bias, residual = inputs
    return tpweave.layer_norm(x, weight, bias, residual=residual)


def torch_layer_norm(inputs):
    x, weight, bias, residual = inputs
    h = x if residual is None else x + residual
    return F.layer_norm(h, weight.shape, weight, bias)


def check(inputs, result):
    x, weight, bias, residual = inputs
    y = result if residual is None else result[0]
    h = x if residual is None else x + residual
    want = F.layer_norm(h.double(), weight.shape, weight.double(), bias.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=2e-2 if x.dtype != torch.float32 else 1e-5)


BENCH = Bench(
    stem="layer_norm",
    cases=tuple(
        Case(
            f"{dtype} {rows}x{hidden}{' + residual' if residual else ''}",
            {"rows": rows, "hidden": hidden, "dtype": dtype, "residual": residual},
        )
        for dtype in ("fp32", "bf16")
        for rows, hidden in ((1, 4096), (64, 4096), (2048, 2048))
        for residual in (False, True)
    ),
    gpu_cases=tuple(
        Case(
            f"{dtype} {rows}x{hidden}{' + residual' if residual else ''}",
            {"rows": rows, "hidden": hidden, "dtype": dtype, "residual": residual},
        )
        for dtype in ("fp32", "bf16")
        for rows, hidden in ((64, 4096), (8192, 4096))
        for residual in (False, True)
    ),
    make=make,
    ours=ours,
    rivals={"torch": torch_layer_norm},
    check=check,
    bytes=lambda inputs: (4 if inputs[3] is not None else 2) * inputs[0].numel() * inputs[0].element_size(),
)
