"""linear_cross_entropy, forward and backward, beside the logits and torch's cross entropy."""

import torch
import torch.nn.functional as F

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(tokens, hidden, vocabulary, dtype):
    x = torch.randn(tokens, hidden).to(dtype_named(dtype)).requires_grad_()
    weight = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype_named(dtype)).requires_grad_()
    return x, weight, torch.randint(vocabulary, (tokens,))


def with_gradients(loss_of, inputs):
    with torch.enable_grad():
        loss = loss_of(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs[:2])


def by_torch(inputs):
    return with_gradients(
        lambda hidden, weight, labels: F.cross_entropy(F.linear(hidden, weight).float(), labels), inputs
    )


def check(inputs, results):
    for got, want in zip(results, by_torch(inputs), strict=True):
        tolerance = 1e-4 if inputs[0].dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


BENCH = Bench(
    stem="linear_cross_entropy",
    cases=tuple(
        Case(f"{dtype} T{t} D{d} V{v}", {"tokens": t, "hidden": d, "vocabulary": v, "dtype": dtype})
        for dtype in ("fp32", "bf16")
        for t, d, v in ((512, 512, 32000), (2048, 512, 128256))
    ),
    make=make,
    ours=lambda inputs: with_gradients(tpweave.linear_cross_entropy, inputs),
    rivals={"linear + cross_entropy": by_torch},
    check=check,
    flops=lambda inputs: 6 * inputs[0].numel() * inputs[1].shape[0],
)
