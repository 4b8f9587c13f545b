"""attention_varlen beside torch's scaled_dot_product_attention of the same sequences, padded to the longest.

The rival gets its own layout [B, H, S, D], a KV head for each query head and its mask, all made beforehand; what
packing and unpacking cost is not counted.
"""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named

# Sixteen sequences of 16 to 2048 tokens: a few long, many short, as in a batch of documents.
LENGTHS = (2048, 1311, 1024, 768, 513, 400, 317, 256, 200, 150, 128, 97, 64, 40, 23, 16)


def make(heads, kv_heads, head_dim, causal, dtype):
    tokens, longest, batch = sum(LENGTHS), max(LENGTHS), len(LENGTHS)
    offsets = torch.tensor((0, *LENGTHS)).cumsum(0).to(torch.int32)
    packed = [torch.randn(tokens, h, head_dim).to(dtype_named(dtype)) for h in (heads, kv_heads, kv_heads)]
    inside = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    padded = [x.new_zeros(batch, longest, *x.shape[1:]) for x in packed]
    for x, whole in zip(packed, padded, strict=True):
        whole[inside] = x
    # Rows begin with their tokens, so the causal mask alone hides the padding, and SDPA skips what it hides.
    mask = None if causal else inside[:, None, None]
    padded = [x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1).contiguous() for x in padded]
    return {"packed": packed, "offsets": offsets, "padded": padded, "mask": mask, "inside": inside, "causal": causal}


def ours(inputs):
    offsets, longest = inputs["offsets"], max(LENGTHS)
    return tpweave.attention_varlen(*inputs["packed"], offsets, offsets, longest, longest, causal=inputs["causal"])


def sdpa(inputs):
    return torch.nn.functional.scaled_dot_product_attention(
        *inputs["padded"], attn_mask=inputs["mask"], is_causal=inputs["causal"]
    )


def check(inputs, out):
    tolerance = 1e-5 if out.dtype == torch.float32 else 2e-2
    for b, part in enumerate(out.split(LENGTHS)):
        wide = [x[b : b + 1, :, : len(part)].double() for x in inputs["padded"]]
        want = torch.nn.functional.scaled_dot_product_attention(*wide, is_causal=inputs["causal"])
        torch.testing.assert_close(part.double(), want[0].transpose(0, 1), rtol=tolerance, atol=tolerance)


def flops(inputs):
    q = inputs["packed"][0]
    scores = sum(length * length for length in LENGTHS) / (2 if inputs["causal"] else 1)
    return 4 * scores * q.shape[1] * q.shape[2]


SHAPES = (
    # Hq, Hkv, D, causal
    (8, 8, 64, True),
    (12, 12, 64, False),
    (8, 2, 128, True),
)

BENCH = Bench(
    stem="attention_varlen",
    cases=tuple(
        Case(
            f"{dtype} 16 x 16..2048 H{h}/{hkv} D{d}{' causal' if causal else ''}",
            {"heads": h, "kv_heads": hkv, "head_dim": d, "causal": causal, "dtype": dtype},
        )
        for dtype in ("fp32", "bf16", "fp16")
        for h, hkv, d, causal in SHAPES
    ),
    make=make,
    ours=ours,
    rivals={"padded torch SDPA": sdpa},
    check=check,
    flops=flops,
)
