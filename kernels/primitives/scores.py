"""The attention score and what is around it, once for forward, backward, varlen and decode.

    x = softmax_scale * (q . k);  x = softcap * tanh(x / softcap);  x -= slope |p - j|;  x += bias;  x = -inf if hidden

Query i stands at position p = i + keys - queries. Causal, window and chunk make the keys a query sees one interval
[first, end) whose ends never fall as p grows; `mask` hides keys inside it. Scores are in units of log2(e), for exp2.

Tuples of arguments (each also stands for the Triton tuple that a kernel gets):
    Rows     of q, k, v or dout: pointer and strides of batch entry (or page), sequence and head
    Plane    of bias or mask: pointer and strides of batch entry, head, query and key; 0 where broadcast
    Slopes   of ALiBi: pointer to [.., Hq] in fp32 and the stride of a batch entry
    Sizes    queries and keys (the most of any sequence), query heads, query heads to a KV head, rows of all sequences,
             tokens to a page, stride of the block table's rows
    Ragged   of packed sequences: cu_seqlens_q, cu_seqlens_k, seqused_k and block_table, None where there are none
    Limits   keys seen before and after p, and the chunk length or None
    Numbers  softmax_scale, softcap or None, the dropout's threshold, factor of a kept weight and number of head 0
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Stands for "no limit": farther than any position, and a sum of two of them still fits int32.
UNLIMITED = 1 << 29


class Rows(NamedTuple):
    ptr: Any
    batch: Any
    sequence: Any
    head: Any


class Plane(NamedTuple):
    ptr: Any
    batch: Any
    head: Any
    query: Any
    key: Any


class Slopes(NamedTuple):
    ptr: Any
    batch: Any


class Sizes(NamedTuple):
    queries: Any
    keys: Any
    heads: Any
    group: Any
    total: Any
    page: Any
    table_row: Any


class Ragged(NamedTuple):
    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_k: Any
    block_table: Any


class Limits(NamedTuple):
    before: Any
    after: Any
    chunk: Any


class Numbers(NamedTuple):
    scale: Any
    softcap: Any
    drop_below: Any
    kept_factor: Any
    head_offset: Any


@triton.jit
def tanh(x):
    # Below 0.625 a polynomial, relative error 8e-8: there 1 - 2 / (exp(2x) + 1) would cancel.
    z = x * x
    small = x + x * z * (-0.3333328 + z * (0.13331431 + z * (-0.053739157 + z * (0.020637862 + z * -0.0057040425))))
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b. PRECISION "half" multiplies 16-bit operands as they are; anything else is Triton's, in fp32."""
    if PRECISION == "half":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def load_rows(rows, offs, valid, LENGTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """[len(offs), BLOCK] of rows at offsets `offs`, 0 beyond LENGTH and, unless WHOLE, where not `valid`."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = rows + offs[:, None] + offs_d[None, :]
    if WHOLE and LENGTH == BLOCK:
        return tl.load(ptrs)
    elif WHOLE:
        return tl.load(ptrs, mask=(offs_d < LENGTH)[None, :], other=0.0)
    else:
        return tl.load(ptrs, mask=valid[:, None] & (offs_d < LENGTH)[None, :], other=0.0)


@triton.jit
def sequence(b, sizes, ragged):
    """First query row, queries, first key row and keys of sequence b; the first rows are 0 where strides find b."""
    first_q = 0
    first_k = 0
    queries = sizes.queries
    keys = sizes.keys
    if ragged.cu_seqlens_q is not None:
        first_q = tl.load(ragged.cu_seqlens_q + b)
        queries = tl.load(ragged.cu_seqlens_q + b + 1) - first_q
        first_k = tl.load(ragged.cu_seqlens_k + b)
        keys = tl.load(ragged.cu_seqlens_k + b + 1) - first_k
        if ragged.seqused_k is not None:
            keys = tl.load(ragged.seqused_k + b)
        if ragged.block_table is not None:
            first_k = 0
    return first_q, queries, first_k, keys


@triton.jit
def query_head(rows, b, h, first_q):
    """Pointer to query 0 of head h."""
    return (
        rows.ptr + b.to(tl.int64) * rows.batch + tl.cast(first_q, tl.int64) * rows.sequence + h.to(tl.int64) * rows.head
    )


@triton.jit
def key_head(rows, b, h, first_k, ragged):
    """Pointer to key 0 of KV head h, or to page 0 of it."""
    base = rows.ptr + tl.cast(first_k, tl.int64) * rows.sequence + h.to(tl.int64) * rows.head
    paged: tl.constexpr = ragged.block_table is not None
    return base if paged else base + b.to(tl.int64) * rows.batch


@triton.jit
def query_rows(b, h, first_q, sizes, ragged):
    """Row of query 0 of head h in out [.., Hq, Dv], in units of heads, and in lse ([B, Hq, Sq] or [Hq, total])."""
    if ragged.cu_seqlens_q is not None:
        row = (tl.cast(first_q, tl.int64) * sizes.heads) + h
        stat = h.to(tl.int64) * sizes.total + first_q
    else:
        row = b.to(tl.int64) * sizes.queries * sizes.heads + h
        stat = (b.to(tl.int64) * sizes.heads + h) * sizes.queries
    return row, stat


@triton.jit
def key_offsets(rows, b, offs_j, keys, sizes, ragged):
    """Offsets of keys within one head: by stride, or through the block table's pages."""
    paged: tl.constexpr = ragged.block_table is not None
    if paged:
        table = ragged.block_table + b.to(tl.int64) * sizes.table_row
        page = tl.load(table + offs_j // sizes.page, mask=offs_j < keys, other=0).to(tl.int64)
        return page * rows.batch + (offs_j % sizes.page).to(tl.int64) * rows.sequence
    else:
        return offs_j.to(tl.int64) * rows.sequence


@triton.jit
def visible(position, before, after, chunk):
    """[first, end) of the other side's positions; the same for keys from a query and, with sides swapped, back."""
    first = position - before
    end = position + after + 1
    if chunk is not None:
        # Division rounds towards 0: negative positions belong to chunks that hold no key.
        start = position // chunk * chunk
        first = tl.maximum(first, start)
        end = tl.minimum(end, tl.where(position < 0, 0, start + chunk))
    return first, end


@triton.jit
def tile_ranges(first_begin, first_end, last_begin, last_end, size, BLOCK: tl.constexpr):
    """Which tiles of BLOCK the rows of a program see, from the intervals of its first and last row.

    Returns the first tile with something to see, the first and the end of those that all rows see whole, and the end.
    """
    begin = tl.maximum(first_begin, 0) // BLOCK
    end = tl.maximum(tl.cdiv(tl.minimum(last_end, size), BLOCK), begin)
    whole = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last_begin, 0), BLOCK), begin), end)
    whole_end = tl.minimum(tl.maximum(tl.maximum(tl.minimum(first_end, size), 0) // BLOCK, whole), end)
    return begin, whole, whole_end, end


@triton.jit
def scores(products, b, h, offs_i, offs_j, queries, keys, numbers, slopes, bias, mask):
    """Scores of a tile and, for the gradient of softcap, its tanh.

    offs_i and offs_j are [BLOCK_M, 1] and [1, BLOCK_N], or [1, BLOCK_M] and [BLOCK_N, 1] for a transposed tile.
    """
    if numbers.softcap is not None:
        bent = tanh(products * (numbers.scale / numbers.softcap))
        x = bent * (numbers.softcap * LOG2E)
    else:
        bent = products
        x = products * (numbers.scale * LOG2E)
    if slopes is not None:
        slope = tl.load(slopes.ptr + b.to(tl.int64) * slopes.batch + h) * LOG2E
        x -= slope * tl.abs(offs_i + (keys - queries) - offs_j).to(tl.float32)
    inside = (offs_i < queries) & (offs_j < keys)
    if bias is not None:
        rows = bias.ptr + b.to(tl.int64) * bias.batch + h.to(tl.int64) * bias.head
        ptrs = rows + offs_i.to(tl.int64) * bias.query + offs_j.to(tl.int64) * bias.key
        x += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if mask is not None:
        rows = mask.ptr + b.to(tl.int64) * mask.batch + h.to(tl.int64) * mask.head
        ptrs = rows + offs_i.to(tl.int64) * mask.query + offs_j.to(tl.int64) * mask.key
        x = tl.where(tl.load(ptrs, mask=inside, other=0) != 0, x, float("-inf"))
    return x, bent


@triton.jit
def kept(seed, numbers, b, h, offs_i, first_key, BLOCK_N: tl.constexpr):
    """[len(offs_i), BLOCK_N] of the weights that dropout keeps; first_key is a multiple of BLOCK_N.

    Philox-4x32-10 of key `seed` and counter (16 (j // 64) + j % 16, i, h, b) gives four words, and word (j % 64) // 16
    is key j's: one call for four keys.
    """
    tl.static_assert(BLOCK_N == 32 or BLOCK_N % 64 == 0)
    rows: tl.constexpr = offs_i.shape[0]
    counters: tl.constexpr = BLOCK_N // 4 if BLOCK_N >= 64 else 16
    c0 = (first_key // 64 * 16 + tl.arange(0, counters))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, c0, offs_i[:, None], h + numbers.head_offset, b)
    if BLOCK_N >= 64:
        # [rows, block of 64 keys, counter, word % 2, word // 2]
        words = tl.reshape(tl.join(tl.join(w0, w1), tl.join(w2, w3)), (rows, BLOCK_N // 64, 16, 2, 2))
        words = tl.permute(words, (0, 1, 4, 3, 2))
    else:
        second_half = first_key % 64 != 0
        words = tl.join(tl.where(second_half, w2, w0), tl.where(second_half, w3, w1))
        words = tl.permute(words, (0, 2, 1))
    return tl.reshape(words, (rows, BLOCK_N)) >= tl.cast(numbers.drop_below, tl.uint32)
