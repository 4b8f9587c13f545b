"""attention beside torch's scaled_dot_product_attention, which gets its own layout [B, H, S, D] and its masks, made
beforehand. It has no softcap and no sinks: there the rival is attention written out in torch.

`flops` counts the scores that are seen, so GFLOP/s compare the cost of what is seen between cases. Cases with "+ bwd"
run forward and backward, counted as 3.5 times the forward; their extra bytes are the backward's.
"""

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named, multiply_add_peak
from tpweave.native import _C
from tpweave.reference.ops.attention import visible_keys

WINDOW = 256


def make(batch, heads, kv_heads, sequence, head_dim, option, dtype, backward=False):
    dtype = dtype_named(dtype)
    q, k, v = (torch.randn(batch, sequence, h, head_dim).to(dtype) for h in (heads, kv_heads, kv_heads))
    causal = option not in ("full", "bias")
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    options = {
        "window": {"window": (WINDOW, 0)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sinks": torch.randn(heads).to(dtype)},
        "bias": {"bias": torch.randn(1, heads, sequence, sequence).to(dtype)},
    }.get(option, {})
    window = options.get("window", (-1, -1))
    visible = visible_keys(sequence, sequence, causal, window)
    mask = options.get("bias")
    if option == "window":
        mask = visible
    elif option == "alibi":
        distance = (torch.arange(sequence)[:, None] - torch.arange(sequence)).abs()
        mask = (-slopes[:, None, None] * distance).masked_fill(~visible, float("-inf"))[None].to(dtype)
    return {
        "tensors": (q, k, v), "transposed": [x.transpose(1, 2).contiguous() for x in (q, k, v)], "mask": mask,
        "causal": causal, "options": options, "visible": visible, "dout": torch.randn_like(q) if backward else None,
    }  # fmt: skip


def with_gradients(function, tensors, dout):
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = function(leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, dout)


def ours(inputs):
    def attention(tensors):
        return tpweave.attention(*tensors, causal=inputs["causal"], **inputs["options"])

    if inputs["dout"] is None:
        return attention(inputs["tensors"])
    return with_gradients(attention, inputs["tensors"], inputs["dout"])


def written_out(q, k, v, visible, softcap=0.0, sinks=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(q.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    return torch.softmax(scores, -1)[..., : k.shape[2]] @ v


def in_torch(inputs, tensors=None):
    tensors = inputs["transposed"] if tensors is None else tensors
    if inputs["dout"] is None:
        return forward_in_torch(inputs, tensors)
    dout = inputs["dout"].transpose(1, 2).to(tensors[0].dtype)
    return with_gradients(lambda leaves: forward_in_torch(inputs, leaves), tensors, dout)


def forward_in_torch(inputs, tensors):
    options, mask = inputs["options"], inputs["mask"]
    if "softcap" in options or "sinks" in options:
        return written_out(*tensors, inputs["visible"], **options)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(tensors[0].dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        *tensors, attn_mask=mask, is_causal=inputs["causal"] and mask is None,
        enable_gqa=tensors[0].shape[1] != tensors[1].shape[1],
    )  # fmt: skip


def check(inputs, out):
    wide = in_torch(inputs, [x.double() for x in inputs["transposed"]])
    if inputs["dout"] is None:
        out, wide = (out,), (wide,)
    for got, want in zip(out, wide, strict=True):
        tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), want.transpose(1, 2), rtol=tolerance, atol=tolerance)


def flops(inputs):
    q, k, _ = inputs["tensors"]
    visible = inputs["visible"]
    forward = 4 * q.numel() * (k.shape[1] if visible is None else visible.sum().item() / q.shape[1])
    return forward if inputs["dout"] is None else 3.5 * forward


def extra_bytes(inputs):
    ours(inputs)
    return _C.attention_workspace_bytes() if inputs["dout"] is None else _C.attention_bwd_workspace_bytes()


SHAPES = (
    # B, Hq, Hkv, S, D, option
    (1, 8, 8, 2048, 64, "causal"),
    (1, 8, 8, 2048, 64, "full"),
    (1, 4, 4, 2048, 128, "causal"),
    (1, 2, 2, 4096, 64, "causal"),
    (1, 8, 2, 512, 128, "causal"),
    (1, 8, 8, 256, 64, "full"),
    (4, 12, 12, 128, 64, "full"),
    (4, 12, 12, 128, 32, "full"),
    (1, 16, 16, 256, 80, "full"),
    (1, 12, 12, 256, 59, "full"),
    (1, 8, 8, 1024, 72, "full"),
    (1, 8, 8, 1024, 64, "causal"),
    (1, 8, 2, 1024, 64, "causal"),
    (1, 8, 8, 1024, 64, "window"),
    (1, 8, 8, 1024, 64, "softcap"),
    (1, 8, 8, 1024, 64, "alibi"),
    (1, 8, 8, 1024, 64, "sinks"),
    (1, 8, 8, 1024, 64, "bias"),
)
# A GPU needs more to be busy.
GPU_SHAPES = (
    (4, 16, 16, 4096, 64, "causal"),
    (4, 16, 16, 4096, 128, "full"),
    (4, 16, 4, 4096, 128, "causal"),
    (8, 16, 16, 512, 128, "causal"),
)
BACKWARD_SHAPES = (
    (1, 8, 8, 2048, 64, "causal"),
    (1, 8, 8, 2048, 64, "full"),
    (1, 1, 1, 2048, 64, "full"),
    (1, 8, 2, 1024, 128, "causal"),
    (1, 8, 8, 1024, 64, "window"),
    (4, 12, 12, 128, 64, "full"),
)


def cases(dtypes, shapes, backward=False):
    return tuple(
        Case(
            f"{dtype} B{b} H{h}/{hkv} S{s} D{d} {option}{' + bwd' if backward else ''}",
            {
                "batch": b,
                "heads": h,
                "kv_heads": hkv,
                "sequence": s,
                "head_dim": d,
                "option": option,
                "dtype": dtype,
                "backward": backward,
            },
        )
        for dtype in dtypes
        for b, h, hkv, s, d, option in shapes
    )


DTYPES = ("fp32", "bf16", "fp16")
BENCH = Bench(
    stem="attention",
    cases=cases(DTYPES, SHAPES) + cases(DTYPES, BACKWARD_SHAPES, backward=True),
    gpu_cases=cases(("bf16", "fp32"), GPU_SHAPES),
    make=make,
    ours=ours,
    rivals={"torch SDPA": in_torch},
    check=check,
    flops=flops,
    extra_bytes=extra_bytes,
    peak=lambda inputs: multiply_add_peak(inputs["tensors"][0].dtype),
)
