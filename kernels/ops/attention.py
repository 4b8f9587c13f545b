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
from tpweave.kernels.primitives.attention_tiles import Tiles, block_dim, forward_tiles, gpu_name, precision
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
    key_head,
    key_offsets,
    load_rows,
    query_head,
    query_rows,
    scores,
    sequence,
    tile_ranges,
    visible,
)
from tpweave.reference.ops.attention import AttentionOptions
from tpweave.reference.ops.attention_varlen import PackedSequences

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
        p = tl.where(kept(seed, numbers, b, h, offs_i, first_key, BLOCK_N), p, 0.0)
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
        q_head = query_head(q, b, h, first_q)
        k_head = key_head(k, b, h // sizes.group, first_k, ragged)
        v_head = key_head(v, b, h // sizes.group, first_k, ragged)
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
        seen = total != 0.0
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


def _plane_of(x: Tensor | None, shape: tuple[int, ...]) -> Plane | None:
    if x is None:
        return None
    if x.dtype == torch.bool:
        x = x.view(torch.uint8)
    return Plane(x, *x.expand(shape).stride())


def dense_rows(x: Tensor) -> Tensor:
    """x, copied where its last dim is not dense."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def score_arguments(
    q: Tensor, k: Tensor, options: AttentionOptions, packed: PackedSequences | None
) -> tuple[int, dict[str, Any]]:
    """The number of sequences, and the arguments that say how they are scored, the same for forward and backward."""
    heads = q.shape[-2]
    ragged, table = Ragged(None, None, None, None), None
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    if packed is not None:
        table = None if packed.block_table is None else packed.block_table.contiguous()
        used = None if packed.seqused_k is None else packed.seqused_k.contiguous()
        ragged = Ragged(packed.cu_seqlens_q.contiguous(), packed.cu_seqlens_k.contiguous(), used, table)
        batch, queries, keys = len(packed.cu_seqlens_q) - 1, packed.max_seqlen_q, packed.max_seqlen_k
    plane = (batch, heads, queries, keys)
    before, after = options.window[0], 0 if options.causal else options.window[1]
    slopes = None
    if options.alibi_slopes is not None:
        slopes = Slopes(options.alibi_slopes.float().contiguous(), heads if options.alibi_slopes.dim() == 2 else 0)
    dropout_p = options.dropout_p
    return batch, {
        "slopes": slopes,
        "bias": _plane_of(options.bias, plane),
        "mask": _plane_of(options.mask, plane),
        "ragged": ragged,
        "sizes": Sizes(
            queries, keys, heads, heads // k.shape[-2], q.shape[0], 0 if table is None else k.shape[1],
            0 if table is None else table.stride(0),
        ),
        "limits": Limits(
            min(before, UNLIMITED) if before >= 0 else UNLIMITED, min(after, UNLIMITED) if after >= 0 else UNLIMITED,
            min(options.chunk, UNLIMITED) if options.chunk > 0 else None,
        ),
        "numbers": Numbers(
            options.softmax_scale, options.softcap if options.softcap > 0 else None,
            min(round(dropout_p * 2**32), 2**32 - 1), 1.0 / (1.0 - dropout_p) if dropout_p < 1 else 0.0,
            options.head_offset,
        ),
        "seed": int(options.seed) if dropout_p > 0 and options.seed is not None else None,
    }  # fmt: skip


def has_features(arguments: dict[str, Any]) -> bool:
    """Whether a tile costs more than its products."""
    extras = (arguments[name] for name in ("slopes", "bias", "mask", "seed"))
    return arguments["numbers"].softcap is not None or any(x is not None for x in extras)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, packed: PackedSequences | None = None
) -> tuple[Tensor, Tensor]:
    """out of q's dtype and lse in fp32.

    q, k, v: [B, S, H, D], or with `packed` [T, H, D], k and v perhaps [num_pages, page, H, D]; last dims up to 256.
    Without `packed` lse is [B, Hq, Sq], with it [Hq, Tq]; rows of no sequence are 0 and -inf.
    """
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    depth, depth_v = q.shape[-1], v.shape[-1]
    batch, arguments = score_arguments(q, k, options, packed)
    heads, queries = q.shape[-2], arguments["sizes"].queries
    # Rows that no sequence has are written by no program.
    out = (torch.empty if packed is None else torch.zeros)((*q.shape[:-1], depth_v), dtype=q.dtype, device=q.device)
    lse_shape = (batch, heads, queries) if packed is None else (heads, q.shape[0])
    lse = torch.full(lse_shape, float("-inf"), dtype=torch.float32, device=q.device)
    gpu = gpu_name(q.device)
    block_d, block_dv = block_dim(depth), block_dim(depth_v)
    tiles = forward_tiles(gpu, q.dtype, block_d, block_dv, features=has_features(arguments))
    programs = triton.cdiv(queries, tiles.block_m) * batch * heads
    if programs > 0:
        with torch.cuda.device_of(q):
            _attention_fwd_kernel[(programs,)](
                rows_of(q), rows_of(k), rows_of(v), out, lse, sinks_ptr=options.sinks, **arguments, D=depth, DV=depth_v,
                BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_D=block_d, BLOCK_DV=block_dv,
                PRECISION=precision(gpu, q.dtype), num_warps=tiles.num_warps, num_stages=tiles.num_stages,
            )  # fmt: skip
    return out, lse


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# What is compiled for every GPU: dtype, head dim, whether with every feature, and the bytes a thread may spill.
COMPILED = (
    (torch.bfloat16, 64, False, 0), (torch.bfloat16, 128, False, 0), (torch.bfloat16, 256, False, 0),
    (torch.float16, 128, True, 0), (torch.float32, 128, False, 128),
)  # fmt: skip


def row_types(dtype: torch.dtype) -> Rows:
    """The types of `rows_of` a tensor, for `COMPILE_SPECS`."""
    return Rows(f"*{DTYPE_NAMES[dtype]}", "i32:16", "i32:16", "i32:16")


def score_types(features: bool) -> dict[str, Any]:
    """The types of `score_arguments`, with every feature or none."""
    return {
        "slopes": Slopes("*fp32", "i32") if features else None,
        "bias": Plane("*bf16", *["i32:16"] * 3, "i32") if features else None,
        "mask": Plane("*u8", *["i32:16"] * 3, "i32") if features else None,
        "ragged": Ragged(*["*i32" if features else None] * 4),
        "sizes": Sizes(*["i32"] * 7),
        "limits": Limits("i32", "i32", "i32" if features else None),
        "numbers": Numbers("fp32", "fp32" if features else None, "i64" if features else "i32", "fp32", "i32"),
        "seed": "i64" if features else None,
    }


def compile_spec(
    kernel: Any, gpu: str, dtype: torch.dtype, depth: int, tiles: Tiles, arguments: dict[str, Any], max_spills: int
) -> CompileSpec:
    """An entry of `COMPILE_SPECS` for a kernel over tiles of scores, with D = DV = `depth`."""
    constants = {
        "D": depth, "DV": depth, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_D": block_dim(depth),
        "BLOCK_DV": block_dim(depth), "PRECISION": precision(gpu, dtype),
    }  # fmt: skip
    return CompileSpec(kernel, arguments, constants, tiles.num_warps, tiles.num_stages, (gpu,), max_spills)


def _forward_spec(gpu: str, dtype: torch.dtype, depth: int, features: bool, max_spills: int) -> CompileSpec:
    rows = row_types(dtype)
    arguments = {
        "q": rows, "k": rows, "v": rows, "out_ptr": rows.ptr, "lse_ptr": "*fp32",
        "sinks_ptr": "*fp32" if features else None, **score_types(features),
    }  # fmt: skip
    tiles = forward_tiles(gpu, dtype, depth, depth, features=features)
    return compile_spec(_attention_fwd_kernel, gpu, dtype, depth, tiles, arguments, max_spills)


COMPILE_SPECS = [_forward_spec(gpu, *case) for gpu in TARGETS for case in COMPILED]
