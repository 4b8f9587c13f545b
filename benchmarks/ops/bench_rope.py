"""rope beside the form in Hugging Face models: x * cos + rotate_half(x) * sin."""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(sequence, dtype):
    angles = torch.outer(torch.arange(sequence), 10000.0 ** (-torch.arange(0, 128, 2) / 128))
    tensors = (torch.randn(1, sequence, 16, 128), torch.randn(1, sequence, 4, 128), angles.cos(), angles.sin())
    return [t.to(dtype_named(dtype)) for t in tensors]


def rotate_half(inputs):
    q, k, cos, sin = inputs
    cos, sin = (torch.cat((t, t), -1).unsqueeze(-2) for t in (cos, sin))
    return tuple(x * cos + torch.cat((-x[..., 64:], x[..., :64]), -1) * sin for x in (q, k))


def check(inputs, result):
    tolerance = 1e-5 if inputs[0].dtype == torch.float32 else 2e-2
    for got, want in zip(result, rotate_half([t.double() for t in inputs]), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


BENCH = Bench(
    stem="rope",
    cases=tuple(
        Case(f"{dtype} {sequence} tokens", {"sequence": sequence, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for sequence in (1, 64, 2048)
    ),
    gpu_cases=tuple(
        Case(f"bf16 {sequence} tokens", {"sequence": sequence, "dtype": "bf16"}) for sequence in (64, 2048, 16384)
    ),
    make=make,
    ours=lambda inputs: tpweave.rope(*inputs),
    rivals={"torch": rotate_half},
    check=check,
    bytes=lambda inputs: 2 * sum(t.numel() * t.element_size() for t in inputs[:2]),
)
