"""Attention of a few new queries over a KV cache: the keys of a sequence in splits, each for all heads of a KV head.

    out_s, lse_s of split s by kernels/ops/attention.py's rule;  lse = log(sum(exp(lse_s)))
    out = sum(exp(lse_s - lse) out_s)

q [B, Sq, Hq, D]; cache [B_cache, S, Hkv, D or Dv] or pages [num_pages, page, Hkv, D or Dv], of q's dtype or in codes of
int8 or float8_e4m3fn. Reference: tpweave/reference/ops/attention_decode.py. A program reads its keys once for all
queries and heads that share them, and there are enough splits for every multiprocessor to read. A sequence is split by
its own length alone. Source: Dao et al., "Flash-Decoding", 2023.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tpweave.kernels.cross_compile import TARGETS, CompileSpec
from tpweave.kernels.ops.attention import dense_rows, row_types, rows_of, score_arguments
from tpweave.kernels.ops.rope import rope
from tpweave.kernels.primitives.attention_tiles import block_dim, decode_tiles, gpu_name, precision
from tpweave.kernels.primitives.scores import (
    LN2,
    LOG2E,
    Limits,
    Numbers,
    Sizes,
    Slopes,
    dot,
    load_rows,
    scores,
    tile_ranges,
    visible,
)
from tpweave.reference.ops.attention import AttentionOptions
from tpweave.reference.ops.attention_decode import CacheOptions, quantized

Tensor = torch.Tensor

# Programs to a multiprocessor that splits are chosen for: one reads while another computes. Not measured.
PROGRAMS_PER_SM = 2
MAX_SPLITS = 64
# Of a head dim that q and k are multiplied over at a time; wider heads (576 in latent attention) take several.
MAX_BLOCK_D = 256


class Cache(NamedTuple):
    """Where keys lie: pointers to lengths, cache entries, left padding and block table (None but for the first), the
    table's row stride, tokens to a page, keys appended, and the number of splits."""

    seqlens: Any
    entries: Any
    leftpad: Any
    table: Any
    table_row: Any
    page: Any
    new: Any
    splits: Any


class Scales(NamedTuple):
    """Of a cache in codes: pointer (None for 1) and strides of batch entry and head."""

    ptr: Any
    batch: Any
    head: Any


@triton.jit
def _cache_offsets(rows, b, position, valid, cache):
    """Offsets of a sequence's positions within one head of the cache."""
    if cache.table is not None:
        table = cache.table + b.to(tl.int64) * cache.table_row
        page = tl.load(table + position // cache.page, mask=valid, other=0).to(tl.int64)
        return page * rows.batch + (position % cache.page).to(tl.int64) * rows.sequence
    else:
        entry = b if cache.entries is None else tl.load(cache.entries + b)
        return entry.to(tl.int64) * rows.batch + position.to(tl.int64) * rows.sequence


@triton.jit
def _load_cached(
    head, offs, valid, dtype: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr, CODES: tl.constexpr
):
    """[len(offs), BLOCK] of the cache in `dtype`; codes as the numbers they are."""
    x = load_rows(head, offs, valid, LENGTH, BLOCK, False)
    if CODES == "float8":
        # e4m3 is fp16's exponent, 8 less, and the first 3 bits of its fraction: right on every GPU, subnormals too.
        bits = x.to(tl.uint16)
        wide = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), wide)
    if CODES == "int8":
        # By way of fp32: the interpreter takes an integer's bits for those of a bf16.
        x = x.to(tl.float32)
    return x.to(dtype)


@triton.jit
def _code_scale(scales, b, h):
    scale = 1.0
    if scales.ptr is not None:
        scale = tl.load(scales.ptr + b * scales.batch + h * scales.head)
    return scale


@triton.jit
def _attention_decode_kernel(
    q, k, v, out_ptr, lse_ptr, slopes, sinks_ptr, cache, k_scales, v_scales, sizes, limits, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    kv_heads = sizes.heads // sizes.group
    num_rows = sizes.queries * sizes.group
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    pid = tl.program_id(0)
    split = pid % cache.splits
    kv_head = pid // cache.splits % kv_heads
    begin_r = pid // cache.splits // kv_heads % row_tiles * BLOCK_M
    b = pid // cache.splits // kv_heads // row_tiles
    wide_b = b.to(tl.int64)
    dtype: tl.constexpr = q.ptr.dtype.element_ty

    # Row r is query r // group of the group's head r % group.
    offs_r = begin_r + tl.arange(0, BLOCK_M)
    valid_r = offs_r < num_rows
    offs_i = offs_r // sizes.group
    h = kv_head * sizes.group + offs_r % sizes.group
    q_rows = offs_i.to(tl.int64) * q.sequence + h.to(tl.int64) * q.head
    q_entry = q.ptr + wide_b * q.batch
    if D <= BLOCK_D:
        # [BLOCK_M, BLOCK_D]
        qt = load_rows(q_entry, q_rows, valid_r, D, BLOCK_D, False)

    first = 0
    if cache.leftpad is not None:
        first = tl.load(cache.leftpad + b)
    keys = tl.load(cache.seqlens + b) + cache.new - first
    shift = keys - sizes.queries
    last_i = (tl.minimum(begin_r + BLOCK_M, num_rows) - 1) // sizes.group
    first_begin, first_end = visible(begin_r // sizes.group + shift, limits.before, limits.after, limits.chunk)
    last_begin, last_end = visible(last_i + shift, limits.before, limits.after, limits.chunk)
    begin, _whole, _whole_end, end = tile_ranges(first_begin, first_end, last_begin, last_end, keys, BLOCK_N)
    tiles = tl.cdiv(end - begin, cache.splits)
    first_seen, end_seen = visible(offs_i + shift, limits.before, limits.after, limits.chunk)
    end_seen = tl.minimum(end_seen, keys)
    k_scale = _code_scale(k_scales, b, kv_head)
    k_head = k.ptr + kv_head.to(tl.int64) * k.head
    v_head = v.ptr + kv_head.to(tl.int64) * v.head

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if sinks_ptr is not None:
        # In the first split only: the others are added to it.
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        top = tl.where(split == 0, sink, top)
        total = tl.where(top == float("-inf"), 0.0, 1.0)
    for t in range(begin + split * tiles, tl.minimum(begin + (split + 1) * tiles, end)):
        offs_j = t * BLOCK_N + tl.arange(0, BLOCK_N)
        valid_j = offs_j < keys
        k_offs = _cache_offsets(k, b, first + offs_j, valid_j, cache)
        products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if D <= BLOCK_D:
            kt = _load_cached(k_head, k_offs, valid_j, dtype, D, BLOCK_D, CODES)
            products = dot(qt, tl.trans(kt), products, PRECISION)
        else:
            for begin_d in tl.static_range(0, D, BLOCK_D):
                part = load_rows(q_entry + begin_d, q_rows, valid_r, D - begin_d, BLOCK_D, False)
                kt = _load_cached(k_head + begin_d, k_offs, valid_j, dtype, D - begin_d, BLOCK_D, CODES)
                products = dot(part, tl.trans(kt), products, PRECISION)
        if CODES != "none":
            products *= k_scale
        # [BLOCK_M, BLOCK_N]
        x, _bent = scores(
            products, b, h[:, None], offs_i[:, None], offs_j[None, :], sizes.queries, keys, numbers, slopes, None, None
        )
        x = tl.where((offs_j[None, :] >= first_seen[:, None]) & (offs_j[None, :] < end_seen[:, None]), x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        p = tl.exp2(x - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        v_offs = _cache_offsets(v, b, first + offs_j, valid_j, cache)
        vt = _load_cached(v_head, v_offs, valid_j, dtype, DV, BLOCK_DV, CODES)
        acc = dot(p.to(dtype), vt, acc * shrink[:, None], PRECISION)
        top = new_top

    seen = total != 0.0
    lse = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))
    factor = 1.0 / tl.where(seen, total, 1.0)
    if CODES != "none":
        factor *= _code_scale(v_scales, b, kv_head)
    # out [splits, B, Sq, Hq, DV] and lse [splits, B, Hq, Sq]
    part = split.to(tl.int64) * (tl.num_programs(0) // (cache.splits * kv_heads * row_tiles)) + b
    stat = (part * sizes.heads + h) * sizes.queries + offs_i
    tl.store(lse_ptr + stat, lse, mask=valid_r)
    out_rows = ((part * sizes.queries + offs_i) * sizes.heads + h) * DV
    offs_d = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(
        out_ptr + out_rows[:, None] + offs_d, (acc * factor[:, None]).to(out_ptr.dtype.element_ty),
        mask=valid_r[:, None] & (offs_d < DV),
    )  # fmt: skip


@triton.jit
def _merge_splits_kernel(
    parts_ptr, part_lse_ptr, out_ptr, lse_ptr, splits, rows, queries, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stat = (row // (queries * heads) * heads + row % heads) * queries + row // heads % queries
    offs_s = tl.arange(0, BLOCK_SPLITS)
    lses = tl.load(part_lse_ptr + offs_s.to(tl.int64) * rows + stat, mask=offs_s < splits, other=float("-inf"))
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2((lses - base) * LOG2E), 0)
    safe = tl.where(total != 0.0, total, 1.0)
    tl.store(lse_ptr + stat, tl.where(total != 0.0, base + tl.log2(safe) * LN2, float("-inf")))
    offs_d = tl.arange(0, BLOCK_DV)
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for s in range(splits):
        weight = tl.exp2((tl.load(part_lse_ptr + s * rows + stat) - base) * LOG2E) / safe
        acc += weight * tl.load(parts_ptr + (s * rows + row) * DV + offs_d, mask=offs_d < DV, other=0.0)
    tl.store(out_ptr + row * DV + offs_d, acc.to(out_ptr.dtype.element_ty), mask=offs_d < DV)


@triton.jit
def _append_kernel(
    k_new, v_new, k, v, cache, batch, kv_heads,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    # One new key and value of one head.
    pid = tl.program_id(0)
    kv_head = (pid % kv_heads).to(tl.int64)
    i = pid // kv_heads % cache.new
    b = pid // kv_heads // cache.new
    position = tl.load(cache.seqlens + b) + i
    place = _cache_offsets(k, b, position, True, cache)
    last = True
    if (cache.table is not None) or (cache.entries is not None):
        # Of sequences that append to the same place the last one wins, whichever program comes first.
        others = tl.arange(0, BLOCK_B)
        later = (others > b) & (others < batch)
        lengths = tl.load(cache.seqlens + others, mask=later, other=0)
        clashes = 0
        for n in range(cache.new):
            if cache.table is not None:
                at = lengths + n
                table = cache.table + others.to(tl.int64) * cache.table_row + at // cache.page
                page = tl.load(table, mask=later, other=0).to(tl.int64)
                theirs = page * k.batch + (at % cache.page).to(tl.int64) * k.sequence
            else:
                entries = tl.load(cache.entries + others, mask=later, other=0)
                theirs = entries.to(tl.int64) * k.batch + (lengths + n).to(tl.int64) * k.sequence
            clashes += tl.sum((later & (theirs == place)).to(tl.int32), 0)
        last = clashes == 0
    offs_d = tl.arange(0, BLOCK_D)
    source = k_new.ptr + b.to(tl.int64) * k_new.batch + i.to(tl.int64) * k_new.sequence + kv_head * k_new.head
    x = tl.load(source + offs_d, mask=offs_d < D)
    tl.store(k.ptr + place + kv_head * k.head + offs_d, x, mask=(offs_d < D) & last)
    offs_d = tl.arange(0, BLOCK_DV)
    source = v_new.ptr + b.to(tl.int64) * v_new.batch + i.to(tl.int64) * v_new.sequence + kv_head * v_new.head
    x = tl.load(source + offs_d, mask=offs_d < DV)
    place = _cache_offsets(v, b, position, True, cache)
    tl.store(v.ptr + place + kv_head * v.head + offs_d, x, mask=(offs_d < DV) & last)


def _turned(x: Tensor, positions: Tensor, cache: CacheOptions) -> Tensor:
    """x [B, S, H, D] in fp32, turned by the tables' rows `positions` [B, S]; x itself without tables."""
    if cache.rotary_cos is None or cache.rotary_sin is None:
        return x
    # Rounded only once, where it is stored or multiplied.
    tables = (table[positions.long()].contiguous() for table in (cache.rotary_cos, cache.rotary_sin))
    return rope(dense_rows(x).float(), *tables, interleaved=cache.rotary_interleaved, inverse=False)


def _append(k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, where: Cache) -> None:
    """Writes k_new, turned, and v_new into the cache."""
    if cache.k_new is None or cache.v_new is None or cache.k_new.numel() == 0:
        return
    batch, new, kv_heads, depth = cache.k_new.shape
    offsets = torch.arange(new, device=k_cache.device, dtype=torch.int32)
    k_new = _turned(cache.k_new, cache.cache_seqlens[:, None] + offsets, cache)
    sources = []
    for x, store, scale in ((k_new, k_cache, cache.k_scale), (cache.v_new, v_cache, cache.v_scale)):
        if store.dtype != cache.v_new.dtype:
            ones = torch.ones(1, device=x.device)
            x = quantized(x, ones if scale is None else scale[:, None, :, None], store.dtype)
        sources.append(rows_of(_plain(x.to(store.dtype).contiguous())))
    with torch.cuda.device_of(k_cache):
        _append_kernel[(batch * new * kv_heads,)](
            *sources, rows_of(_plain(k_cache)), rows_of(_plain(v_cache)), where, batch, kv_heads, D=depth,
            DV=v_cache.shape[-1], BLOCK_D=block_dim(depth), BLOCK_DV=block_dim(v_cache.shape[-1]),
            BLOCK_B=triton.next_power_of_2(batch),
        )  # fmt: skip


def _plain(x: Tensor) -> Tensor:
    """x as what every GPU can load: codes of float8 as bytes."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _num_splits(device: torch.device, programs: int, tiles: int) -> int:
    """Enough for every multiprocessor, and no more than there are tiles."""
    if device.type != "cuda":
        return 1
    wanted = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(triton.cdiv(wanted, programs), tiles, MAX_SPLITS))


def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, Hq, Dv] of q's dtype and lse [B, Hq, Sq] in fp32, after k_new and v_new were written into the cache.

    q: [B, Sq, Hq, D]; caches with dense last dims. Lengths, indices and pages are contiguous and inside the cache.
    """
    batch, queries, heads, depth = q.shape
    capacity, kv_heads, depth_v = k_cache.shape[1], *v_cache.shape[2:]
    new = 0 if cache.k_new is None else cache.k_new.shape[1]
    gpu, dtype = gpu_name(q.device), q.dtype
    out = torch.empty((batch, queries, heads, depth_v), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, queries), dtype=torch.float32, device=q.device)
    tiles = decode_tiles(gpu, dtype, queries * heads // kv_heads, block_dim(depth_v))
    programs = triton.cdiv(queries * heads // kv_heads, tiles.block_m) * kv_heads * batch
    if cache.block_table is not None:
        capacity *= cache.block_table.shape[1]
    splits = cache.num_splits or _num_splits(q.device, max(1, programs), triton.cdiv(capacity, tiles.block_n))
    where = Cache(
        cache.cache_seqlens, cache.cache_batch_idx, cache.cache_leftpad, cache.block_table,
        0 if cache.block_table is None else cache.block_table.stride(0), k_cache.shape[1], new, splits,
    )  # fmt: skip
    _append(k_cache, v_cache, cache, where)
    if out.numel() == 0:
        return out, lse
    if new > 0:
        # All queries stand at the first new position unless the mask depends on where they stand.
        local = options.causal or max(options.window) >= 0
        steps = torch.arange(queries, device=q.device, dtype=torch.int32) * local
        q = _turned(q, cache.cache_seqlens[:, None] + steps, cache).to(dtype)
    _, arguments = score_arguments(q, k_cache, options, None)
    parts, part_lse = out, lse
    if splits > 1:
        parts = torch.empty((splits, *out.shape), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((splits, *lse.shape), dtype=torch.float32, device=q.device)
    codes = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}.get(k_cache.dtype, "none")
    scales = [Scales(None, 0, 0) if s is None else Scales(s, *s.stride()) for s in (cache.k_scale, cache.v_scale)]
    with torch.cuda.device_of(q):
        _attention_decode_kernel[(programs * splits,)](
            rows_of(dense_rows(q)), rows_of(_plain(k_cache)), rows_of(_plain(v_cache)), parts, part_lse,
            arguments["slopes"], options.sinks, where, *scales, arguments["sizes"], arguments["limits"],
            arguments["numbers"], D=depth, DV=depth_v, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            BLOCK_D=min(block_dim(depth), MAX_BLOCK_D), BLOCK_DV=block_dim(depth_v), PRECISION=precision(gpu, dtype),
            CODES=codes, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
        if splits > 1:
            _merge_splits_kernel[(lse.numel(),)](
                parts, part_lse, out, lse, splits, lse.numel(), queries, heads, DV=depth_v,
                BLOCK_DV=block_dim(depth_v), BLOCK_SPLITS=triton.next_power_of_2(splits),
            )  # fmt: skip
    return out, lse


# dtype, D, Dv, heads to a KV head, codes of the cache: grouped heads, latent attention, caches in codes, fp32.
_COMPILED = (
    (torch.bfloat16, 128, 128, 4, "none"), (torch.bfloat16, 576, 512, 128, "none"),
    (torch.float16, 128, 128, 8, "float8"), (torch.bfloat16, 64, 64, 1, "int8"), (torch.float32, 128, 128, 4, "none"),
)  # fmt: skip


def _decode_spec(gpu: str, dtype: torch.dtype, depth: int, depth_v: int, group: int, codes: str) -> CompileSpec:
    tiles = decode_tiles(gpu, dtype, group, block_dim(depth_v))
    rows = row_types(dtype)
    stored = rows._replace(ptr={"none": rows.ptr, "float8": "*u8", "int8": "*i8"}[codes])
    scales = Scales("*fp32", "i32", "i32") if codes != "none" else Scales(None, "i32", "i32")
    features = codes != "none"
    arguments = {
        "q": rows, "k": stored, "v": stored, "out_ptr": "*fp32", "lse_ptr": "*fp32",
        "slopes": Slopes("*fp32", "i32") if features else None, "sinks_ptr": "*fp32" if features else None,
        "cache": Cache("*i32", None, "*i32" if features else None, "*i32", "i32", "i32", "i32", "i32"),
        "k_scales": scales, "v_scales": scales, "sizes": Sizes(*["i32"] * 7), "limits": Limits("i32", "i32", None),
        "numbers": Numbers("fp32", "fp32" if features else None, "i32", "fp32", "i32"),
    }  # fmt: skip
    constants = {
        "D": depth, "DV": depth_v, "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n,
        "BLOCK_D": min(block_dim(depth), MAX_BLOCK_D), "BLOCK_DV": block_dim(depth_v),
        "PRECISION": precision(gpu, dtype), "CODES": codes,
    }  # fmt: skip
    return CompileSpec(
        _attention_decode_kernel, arguments, constants, tiles.num_warps, tiles.num_stages, (gpu,)
    )  # fmt: skip


COMPILE_SPECS = [
    *(_decode_spec(gpu, *case) for gpu in TARGETS for case in _COMPILED),
    CompileSpec(
        _merge_splits_kernel,
        {
            "parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "out_ptr": "*bf16", "lse_ptr": "*fp32", "splits": "i32",
            "rows": "i32", "queries": "i32", "heads": "i32",
        },
        {"DV": 128, "BLOCK_DV": 128, "BLOCK_SPLITS": MAX_SPLITS},
    ),
    CompileSpec(
        _append_kernel,
        {
            "k_new": row_types(torch.bfloat16), "v_new": row_types(torch.bfloat16), "k": row_types(torch.bfloat16),
            "v": row_types(torch.bfloat16), "cache": Cache("*i32", None, None, "*i32", *["i32"] * 4), "batch": "i32",
            "kv_heads": "i32",
        },
        {"D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK_DV": 128, "BLOCK_B": 64},
    ),
]  # fmt: skip
