"""attention beside torch's scaled_dot_product_attention, which gets its own layout [B, H, S, D]."""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named


def make(batch, heads, kv_heads, sequence, head_dim, causal, dtype):
    q, k, v = (torch.randn(batch, sequence, h, head_dim).to(dtype_named(dtype)) for h in (heads, kv_heads, kv_heads))
    return (q, k, v), [x.transpose(1, 2).contiguous() for x in (q, k, v)], causal


def sdpa(inputs):
    (q, k, _), transposed, causal = inputs
    grouped = q.shape[2] != k.shape[2]
    return torch.nn.functional.scaled_dot_product_attention(*transposed, is_causal=causal, enable_gqa=grouped)


def check(inputs, out):
    (q, k, v), transposed, causal = inputs
    wide = sdpa(((q, k, v), [x.double() for x in transposed], causal)).transpose(1, 2)
    tolerance = 1e-5 if q.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), wide, rtol=tolerance, atol=tolerance)


def flops(inputs):
    (q, k, _), _, causal = inputs
    return 4 * q.numel() * k.shape[1] / (2 if causal else 1)


SHAPES = (
    # B, Hq, Hkv, S, D, causal
    (1, 8, 8, 2048, 64, True),
    (1, 8, 8, 2048, 64, False),
    (1, 8, 2, 512, 128, True),
    (4, 12, 12, 128, 32, False),
    (1, 16, 16, 256, 80, False),
)

BENCH = Bench(
    stem="attention",
    cases=tuple(
        Case(
            f"{dtype} B{b} H{h}/{hkv} S{s} D{d}{' causal' if causal else ''}",
            {"batch": b, "heads": h, "kv_heads": hkv, "sequence": s, "head_dim": d, "causal": causal, "dtype": dtype},
        )
        for dtype in ("fp32", "bf16", "fp16")
        for b, h, hkv, s, d, causal in SHAPES
    ),
    make=make,
    ours=lambda inputs: tpweave.attention(*inputs[0], causal=inputs[2]),
    rivals={"torch SDPA": sdpa},
    check=check,
    flops=flops,
)
