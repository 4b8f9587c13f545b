"""Attention, forward: out = softmax(x) v and lse = log(sum(exp(x))), in one pass over the keys that are seen.

x is the score of kernels/primitives/scores.py. q [B, Sq, Hq, D], k [B, Sk, Hkv, D], v [B, Sk, Hkv, Dv], packed as
[Tq, Hq, D] with cu_seqlens, or k and v in pages [num_pages, page, Hkv, D]. Reference:
tpweave/reference/ops/attention.py. A program holds BLOCK_M queries of one head and runs through tiles of BLOCK_N keys
with a running maximum and sum, so no score leaves the chip; tiles that are hidden are not read, tiles that are seen
whole are not masked. Source: Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import TARGETS, CompileSpec
from tpweave.kernels.primitives.attention_tiles import block_dim, forward_tiles, gpu_name, precision
from tpweave.kernels.primitives.scores import (
    LN2,
    LOG2E,
    UNLIMITED,
    Limits,
    Numbers,
    Plane,
    Ragged,
    Rows,
    Sizes,
    Slopes,
    dot,
    kept,
    key_offsets,
    load_rows,
    query_rows,
    scores,
    sequence,
    tile_ranges,
    visible,
)

Tensor = torch.Tensor


@triton.jit
def _attend(
    q, acc, top, total, k_head, v_head, k, v, b, h, offs_i, first, end, first_key, queries, keys,
    slopes, bias, mask, ragged, sizes, numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the sums, running maxima and totals with it. WHOLE: all its keys are seen, but for `mask`."""
    offs_j = first_key + tl.arange(0, BLOCK_N)
    valid = offs_j < keys
    # [BLOCK_N, BLOCK_D]
    kt = load_rows(k_head, key_offsets(k, b, offs_j, keys, sizes, ragged), valid, D, BLOCK_D, WHOLE)
    products = dot(q, tl.trans(kt), tl.zeros((offs_i.shape[0], BLOCK_N), tl.float32), PRECISION)
    # [BLOCK_M, BLOCK_N]
    x, _ = scores(products, b, h, offs_i[:, None], offs_j[None, :], queries, keys, numbers, slopes, bias, mask)
    if not WHOLE:
        x = tl.where((offs_j[None, :] >= first[:, None]) & (offs_j[None, :] < end[:, None]), x, float("-inf"))
    new_top = tl.maximum(top, tl.max(x, 1))
    # A row that has seen no key yet must not subtract -inf from -inf.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - base)
    p = tl.exp2(x - base[:, None])
    total = total * shrink + tl.sum(p, 1)
    if seed is not None:
        p = tl.where(kept(seed, numbers.drop_below, b, h, offs_i, first_key, BLOCK_N), p, 0.0)
    # [BLOCK_N, BLOCK_DV]
    vt = load_rows(v_head, key_offsets(v, b, offs_j, keys, sizes, ragged), valid, DV, BLOCK_DV, WHOLE)
    acc = dot(p.to(vt.dtype), vt, acc * shrink[:, None], PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=["seed"])
def _attention_fwd_kernel(
    q, k, v, out_ptr, lse_ptr, slopes, sinks_ptr, bias, mask, ragged, sizes, limits, numbers, seed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # One grid axis: the others end at 65535. The last queries see most under a causal mask, so they begin first.
    num_tiles = tl.cdiv(sizes.queries, BLOCK_M)
    pid = tl.program_id(0)
    tile = num_tiles - 1 - pid % num_tiles
    h = pid // num_tiles % sizes.heads
    b = pid // num_tiles // sizes.heads
    first_q, queries, first_k, keys = sequence(b, sizes, ragged)
    begin_i = tile * BLOCK_M
    if begin_i < queries:
        offs_i = begin_i + tl.arange(0, BLOCK_M)
        valid_i = offs_i < queries
        wide_b = b.to(tl.int64)
        q_head = q.ptr + wide_b * q.batch + tl.cast(first_q, tl.int64) * q.sequence + h.to(tl.int64) * q.head
        kv_head = (h // sizes.group).to(tl.int64)
        k_head = k.ptr + kv_head * k.head + tl.cast(first_k, tl.int64) * k.sequence
        v_head = v.ptr + kv_head * v.head + tl.cast(first_k, tl.int64) * v.sequence
        if ragged is None:
            k_head += wide_b * k.batch
            v_head += wide_b * v.batch
        # [BLOCK_M, BLOCK_D]
        qt = load_rows(q_head, offs_i.to(tl.int64) * q.sequence, valid_i, D, BLOCK_D, False)

        shift = keys - queries
        last_i = tl.minimum(begin_i + BLOCK_M, queries) - 1
        first_begin, first_end = visible(begin_i + shift, limits.before, limits.after, limits.chunk)
        last_begin, last_end = visible(last_i + shift, limits.before, limits.after, limits.chunk)
        begin, whole, whole_end, end = tile_ranges(first_begin, first_end, last_begin, last_end, keys, BLOCK_N)
        first_seen, end_seen = visible(offs_i + shift, limits.before, limits.after, limits.chunk)
        end_seen = tl.minimum(end_seen, keys)

        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        if sinks_ptr is not None:
            # A sink is a key without a value, seen before the others.
            sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
            top = tl.zeros((BLOCK_M,), tl.float32) + sink
            total += tl.where(sink == float("-inf"), 0.0, 1.0)
        for t in range(whole, whole_end):
            acc, top, total = _attend(
                qt, acc, top, total, k_head, v_head, k, v, b, h, offs_i, first_seen, end_seen, t * BLOCK_N, queries,
                keys, slopes, bias, mask, ragged, sizes, numbers, seed, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
                True,
            )  # fmt: skip
        # Tiles at the two ends of the interval, in one loop: the code is large.
        for n in range(whole - begin + end - whole_end):
            t = tl.where(n < whole - begin, begin + n, whole_end + n - (whole - begin))
            acc, top, total = _attend(
                qt, acc, top, total, k_head, v_head, k, v, b, h, offs_i, first_seen, end_seen, t * BLOCK_N, queries,
                keys, slopes, bias, mask, ragged, sizes, numbers, seed, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
                False,
            )  # fmt: skip

        row, stat = query_rows(b, h, first_q, sizes, ragged)
        seen = total > 0.0
        lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
        tl.store(lse_ptr + stat + offs_i, lse, mask=valid_i)
        factor = 1.0 / tl.where(seen, total, 1.0)
        if seed is not None:
            factor *= numbers.kept_factor
        offs_d = tl.arange(0, BLOCK_DV)[None, :]
        out_rows = (row + offs_i.to(tl.int64) * sizes.heads) * DV
        tl.store(
            out_ptr + out_rows[:, None] + offs_d, (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
            mask=valid_i[:, None] & (offs_d < DV),
        )  # fmt: skip


def rows_of(x: Tensor) -> Rows:
    """x [B, S, H, D] or packed [T, H, D], with a dense last dim."""
    return Rows(x, 0 if x.dim() == 3 else x.stride(0), x.stride(-3), x.stride(-2))


def dense_rows(x: Tensor) -> Tensor:
    """x, copied where its last dim is not dense."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _plane_of(x: Tensor | None, shape: tuple[int, int, int, int]) -> Plane | None:
    if x is None:
        return None
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return Plane(x, *x.expand(shape).stride())


def score_arguments(
    q: Tensor, k: Tensor, *, causal: bool, window: tuple[int, int], chunk: int, softmax_scale: float, softcap: float,
    alibi_slopes: Tensor | None, bias: Tensor | None, mask: Tensor | None, dropout_p: float, seed: int | None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, max_seqlen_q: int = 0,
    max_seqlen_k: int = 0, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """The number of sequences, and the arguments that say how they are scored, the same for forward and backward."""
    heads = q.shape[-2]
    ragged = None
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if cu_seqlens_q is not None:
        ragged = Ragged(cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
        batch, queries, keys = cu_seqlens_q.shape[0] - 1, max_seqlen_q, max_seqlen_k
    plane = (batch, heads, queries, keys)
    before, after = window[0], 0 if causal else window[1]
    slopes = None
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        slopes = Slopes(alibi_slopes, heads if alibi_slopes.dim() == 2 else 0)
    return batch, {
        "slopes": slopes,
        "bias": _plane_of(bias, plane),
        "mask": _plane_of(mask, plane),
        "ragged": ragged,
        "sizes": Sizes(
            queries, keys, heads, heads // k.shape[-2], q.shape[0], k.shape[1] if block_table is not None else 0,
            0 if block_table is None else block_table.stride(0),
        ),
        "limits": Limits(
            min(before, UNLIMITED) if before >= 0 else UNLIMITED, min(after, UNLIMITED) if after >= 0 else UNLIMITED,
            min(chunk, UNLIMITED) if chunk > 0 else None,
        ),
        "numbers": Numbers(
            softmax_scale, softcap if softcap > 0 else None, min(round(dropout_p * 2**32), 2**32 - 1),
            1.0 / (1.0 - dropout_p),
        ),
        "seed": seed if dropout_p > 0 else None,
    }  # fmt: skip


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, *, sinks: Tensor | None, **settings: Any) -> tuple[Tensor, Tensor]:
    """out of q's dtype and lse in fp32. `settings` are those of `score_arguments`.

    q, k, v: [B, S, H, D] of any strides, or packed with cu_seqlens, or k and v in pages; last dims up to 256. Without
    cu_seqlens lse is [B, Hq, Sq], with it [Hq, Tq]; rows of no sequence are 0 and -inf.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    depth, depth_v = q.shape[-1], v.shape[-1]
    batch, arguments = score_arguments(q, k, **settings)
    packed = arguments["ragged"] is not None
    heads, queries = q.shape[-2], arguments["sizes"].queries
    # Rows that no sequence has are written by no program.
    out = (torch.zeros if packed else torch.empty)((*q.shape[:-1], depth_v), dtype=q.dtype, device=q.device)
    lse_shape = (heads, q.shape[0]) if packed else (batch, heads, queries)
    lse = torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    gpu = gpu_name(q.device)
    block_d, block_dv = block_dim(depth), block_dim(depth_v)
    tiles = forward_tiles(gpu, q.dtype, block_d, block_dv)
    programs = triton.cdiv(queries, tiles.block_m) * batch * heads
    if programs > 0:
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[(programs,)](
                rows_of(q), rows_of(k), rows_of(v), out, lse, sinks_ptr=sinks, **arguments, D=depth, DV=depth_v,
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
                PRECISION=precision(gpu, q.dtype), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return out, lse


def row_types(dtype: str) -> Rows:
    """`Rows` of a pointer type, as `COMPILE_SPECS` states it."""
    return Rows(f"*{dtype}", "i32:16", "i32:16", "i32:16")


def _compile_specs() -> list[CompileSpec]:
    specs = []
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    sizes = Sizes("i32", "i32", "i32", "i32", "i32", "i32", "i32")
    plain = {
        "slopes": None, "sinks_ptr": None, "bias": None, "mask": None, "ragged": None,
        "limits": Limits("i32", "i32", None), "numbers": Numbers("fp32", None, "i32", "fp32"), "seed": None,
    }  # fmt: skip
    full = {
        "slopes": Slopes("*fp32", "i32"), "sinks_ptr": "*fp32", "bias": Plane("*fp16", *["i32:16"] * 4),
        "mask": Plane("*u8", *["i32:16"] * 4), "ragged": Ragged("*i32", "*i32", "*i32", "*i32"),
        "limits": Limits("i32", "i32", "i32"), "numbers": Numbers("fp32", "fp32", "i64", "fp32"), "seed": "i64",
    }  # fmt: skip
    for gpu in TARGETS:
        for dtype, depth, features in (
            (torch.bfloat16, 64, plain), (torch.bfloat16, 128, plain), (torch.bfloat16, 256, plain),
            (torch.float16, 128, full), (torch.float32, 128, plain),
        ):  # fmt: skip
            tiles = forward_tiles(gpu, dtype, depth, depth)
            rows = row_types(names[dtype])
            specs.append(CompileSpec(
                _attention_fwd_kernel,
                {"q": rows, "k": rows, "v": rows, "out_ptr": rows.ptr, "lse_ptr": "*fp32", "sizes": sizes, **features},
                {
                    "D": depth, "DV": depth, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_D": depth,
                    "BLOCK_DV": depth, "PRECISION": precision(gpu, dtype),
                },
                num_warps=tiles.num_warps, num_stages=tiles.num_stages, targets=(gpu,),
            ))  # fmt: skip
    return specs


COMPILE_SPECS = _compile_specs()
