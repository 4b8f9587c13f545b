"""attention_decode beside torch's scaled_dot_product_attention, once with the query heads of a KV head as its queries
and once with enable_gqa, and beside a bare read of the same cache, which is the limit. Every call takes another cache,
so that none is in L3.
"""

import itertools

import torch

import tpweave
from tpweave.benchmarks.registry import Bench, Case, dtype_named
from tpweave.native import _C

DEPTH = 128
# More than the largest L3 among the machines measured on.
COLD_BYTES = 256 << 20


def make(keys, heads, kv_heads, dtype, page_size=0, cache="same"):
    dtype = dtype_named(dtype)
    q = torch.randn(1, 1, heads, DEPTH).to(dtype)
    k, v = (torch.randn(1, keys, kv_heads, DEPTH) for _ in range(2))
    options, scale = {}, 1.0
    if cache == "int8":
        scale = 0.03
        options = {"k_scale": torch.tensor(scale), "v_scale": torch.tensor(scale)}
        k, v = ((x / scale).round().clamp(-127, 127).to(torch.int8) for x in (k, v))
    else:
        k, v = k.to(dtype), v.to(dtype)
    if page_size:
        pages = -(-keys // page_size)
        options["block_table"] = torch.randperm(pages, dtype=torch.int32)[None]
        options["cache_seqlens"] = keys
        order = options["block_table"][0].long()
        stores = []
        for x in (k, v):
            store = torch.zeros(pages, page_size, *x.shape[2:], dtype=x.dtype)
            store[order] = torch.nn.functional.pad(x[0], (0, 0, 0, 0, 0, -keys % page_size)).unflatten(0, (pages, -1))
            stores.append(store)
    else:
        stores = [k, v]
    copies = 1 + COLD_BYTES // (k.nbytes + v.nbytes)
    caches = [[x.clone() for x in stores] for _ in range(copies)]
    # SDPA gets its own layout, and codes as the numbers they stand for: it has no other way.
    wide = (k, v) if cache == "same" else [(x * scale).to(dtype) for x in (k, v)]
    plain = [[x.transpose(1, 2).contiguous() for x in wide] for _ in range(copies)]
    return {
        "q": q, "options": options, "caches": caches, "plain": plain, "scale": scale, "kv": (k, v),
        "turns": {name: itertools.count() for name in ("ours", "read", "grouped", "gqa")},
    }  # fmt: skip


def turn(inputs, name, of):
    return inputs[of][next(inputs["turns"][name]) % len(inputs[of])]


def ours(inputs):
    return tpweave.attention_decode(inputs["q"], *turn(inputs, "ours", "caches"), **inputs["options"])


def grouped(inputs):
    k, v = turn(inputs, "grouped", "plain")
    return torch.nn.functional.scaled_dot_product_attention(inputs["q"].view(1, k.shape[1], -1, DEPTH), k, v)


def with_gqa(inputs):
    k, v = turn(inputs, "gqa", "plain")
    q = inputs["q"].transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def read(inputs):
    for x in turn(inputs, "read", "caches"):
        _C.read_memory(x.data_ptr(), x.nbytes)


def check(inputs, out):
    k, v = (x.double().transpose(1, 2) * inputs["scale"] for x in inputs["kv"])
    q = inputs["q"].double().view(1, k.shape[1], -1, DEPTH)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v).view(out.shape)
    tolerance = 1e-5 if out.dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)


def cache_bytes(inputs):
    return sum(x.nbytes for x in inputs["kv"])


CASES = (
    *(("bf16", keys, 32, 8, {}) for keys in (512, 2048, 8192, 32768)),
    *(("fp32", keys, 32, 8, {}) for keys in (512, 8192)),
    *(("fp16", keys, 32, 8, {}) for keys in (512, 8192)),
    *(("bf16", 8192, 8 * group, 8, {}) for group in (1, 3, 7, 8)),
    *(("bf16", keys, 32, 8, {"page_size": 16}) for keys in (512, 8192)),
    *(("bf16", keys, 32, 8, {"cache": "int8"}) for keys in (8192, 32768)),
)

BENCH = Bench(
    stem="attention_decode",
    cases=tuple(
        Case(
            f"{dtype} {keys} keys heads {heads}/{kv_heads}" + "".join(f" {k} {v}" for k, v in extra.items()),
            {"dtype": dtype, "keys": keys, "heads": heads, "kv_heads": kv_heads, **extra},
        )
        for dtype, keys, heads, kv_heads, extra in CASES
    ),
    make=make,
    ours=ours,
    rivals={"torch SDPA, grouped heads": grouped, "torch SDPA, enable_gqa": with_gqa, "read": read},
    check=check,
    bytes=cache_bytes,
)
