"""Attention of a few new queries over a KV cache, contiguous or paged, that the new keys and values are appended to.

    cache[cache_seqlens : cache_seqlens + Sn] = turned(k_new), v_new;   Sk = cache_seqlens + Sn
    out = softmax(scores(turned(q), K[:Sk])) V[:Sk]      (scores as in `attention`, query i stands at i + Sk - Sq)

Dims: B sequences, Sq queries, Sn new keys, Hq query heads, Hkv KV heads (Hq a multiple), D head dim, Dv value head dim.
The cache is read once for all query heads of a KV head. Sources: Dao et al., "Flash-Decoding", 2023; Kwon et al.,
"PagedAttention", 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch

from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.library import is_plain_call, register_op
from tpweave.native import _C, DTYPE_CODES, data_ptr, dense_last_dim
from tpweave.ops.attention import check_options
from tpweave.reference.ops.attention import AttentionOptions
from tpweave.reference.ops.attention_decode import CacheOptions, attention_decode_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensor = torch.Tensor

CODES = (torch.int8, torch.float8_e4m3fn)
_CACHE_CODES = {**DTYPE_CODES, torch.float8_e4m3fn: 10}  # kFloat8E4M3 of csrc/common/dtype.h
_MAX_HEAD_DIM = 576  # kMaxDecodeDim of csrc/cpu/ops/attention_decode.h


def check_values(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions) -> None:
    """Raise ValueError where lengths, indices or pages lie outside the cache or the rotary tables. Reads them on the
    host: on a GPU that waits for it. (The native row checks the same by itself.)
    """
    lengths, entries, leftpads, table = (
        None if x is None else x.cpu()
        for x in (cache.cache_seqlens, cache.cache_batch_idx, cache.cache_leftpad, cache.block_table)
    )
    new = 0 if cache.k_new is None else cache.k_new.shape[1]
    local = options.causal or max(options.window) >= 0
    _C.attention_decode_check(
        data_ptr(lengths), data_ptr(entries), data_ptr(leftpads), data_ptr(table), q.shape[0],
        0 if table is None else table.shape[1], *k_cache.shape[:2], new,
        -1 if cache.rotary_cos is None else cache.rotary_cos.shape[0], max(new, q.shape[1] if local else 1),
    )  # fmt: skip


def _numbers(x: Tensor | None) -> Tensor | None:
    """A small fp32 table as the kernels read it."""
    return x if x is None or x.dtype == torch.float32 else x.float()


def attention_decode_cpu(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    q = dense_last_dim(q)
    batch, queries, heads, depth = q.shape
    num_entries, keys_per_entry, kv_heads, depth_v = v_cache.shape
    out = torch.empty(batch, queries, heads, depth_v, dtype=q.dtype)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32)
    k_new, v_new = cache.k_new, cache.v_new
    new_keys, k_new_strides, v_new_strides = 0, k_cache.stride()[:3], v_cache.stride()[:3]
    if k_new is not None and v_new is not None:
        k_new, v_new, new_keys = dense_last_dim(k_new), dense_last_dim(v_new), k_new.shape[1]
        k_new_strides, v_new_strides = k_new.stride()[:3], v_new.stride()[:3]
    cos, sin, positions, half, angle_strides = cache.rotary_cos, cache.rotary_sin, -1, 0, (0, 0)
    if cos is not None and sin is not None:
        if cos.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            cos, sin = cos.float(), sin.float()
        cos, sin = dense_last_dim(cos), dense_last_dim(sin)
        (positions, half), angle_strides = cos.shape, (cos.stride(0), sin.stride(0))
    k_scale, v_scale, table = cache.k_scale, cache.v_scale, cache.block_table
    slopes, sinks = _numbers(options.alibi_slopes), _numbers(options.sinks)
    slopes, sinks = None if slopes is None else dense_last_dim(slopes), None if sinks is None else sinks.contiguous()
    left, right = options.window
    _C.attention_decode(
        (q.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), data_ptr(k_new), data_ptr(v_new), out.data_ptr(),
         lse.data_ptr(), cache.cache_seqlens.data_ptr(), data_ptr(cache.cache_batch_idx),
         data_ptr(cache.cache_leftpad), data_ptr(table), data_ptr(cos), data_ptr(sin), data_ptr(k_scale),
         data_ptr(v_scale), data_ptr(slopes), data_ptr(sinks)),
        (q.stride()[:3], k_cache.stride()[:3], v_cache.stride()[:3], k_new_strides, v_new_strides),
        (batch, queries, heads, kv_heads, depth, depth_v, num_entries, keys_per_entry,
         0 if table is None else table.shape[1], new_keys, half, positions),
        (*angle_strides, *(k_scale.stride() if k_scale is not None else (0, 0)),
         *(v_scale.stride() if v_scale is not None else (0, 0)),
         slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0),
        (left, 0 if options.causal else right, options.chunk, options.causal or left >= 0 or right >= 0),
        (DTYPE_CODES[q.dtype], _CACHE_CODES[k_cache.dtype], 0 if cos is None else DTYPE_CODES[cos.dtype]),
        cache.rotary_interleaved, options.softmax_scale, options.softcap, cache.num_splits,
    )  # fmt: skip
    return out, lse


def attention_decode_with_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    check_values(q, k_cache, v_cache, cache, options)
    return attention_decode_reference(q, k_cache, v_cache, cache, options)


def _takes_head_dims(inputs: Inputs) -> str | None:
    for tensor in inputs.tensors[1:3]:
        if tensor.shape[-1] > _MAX_HEAD_DIM:
            return f"takes head dims up to {_MAX_HEAD_DIM}, not {tensor.shape[-1]}"
    return None


def attention_decode_triton(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: CacheOptions, options: AttentionOptions
) -> tuple[Tensor, Tensor]:
    from tpweave.kernels.ops.attention_decode import attention_decode

    if q.device.type == "cpu":
        check_values(q, k_cache, v_cache, cache, options)
    return attention_decode(q, k_cache, v_cache, cache, options)


def _triton_takes(inputs: Inputs) -> str | None:
    q, _, v_cache = inputs.tensors
    if q.dtype not in FLOATS:
        return f"takes q in float32, bfloat16, float16, not {str(q.dtype).removeprefix('torch.')}"
    if max(q.shape[-1], v_cache.shape[-1]) > 576 or v_cache.shape[-1] > 512:
        return f"takes head dims up to 576 and of values up to 512, not {q.shape[-1]} and {v_cache.shape[-1]}"
    return None


ATTENTION_DECODE = Op("attention_decode", [
    Backend("cpu", attention_decode_cpu, Needs(device="cpu", dtypes=FLOATS | set(CODES), rules=(_takes_head_dims,))),
    Backend("triton", attention_decode_triton, Needs(device="cuda", module="triton", rules=(_triton_takes,))),
    Backend("reference", attention_decode_with_reference, Needs()),
])  # fmt: skip


def _impl(
    q, k_cache, v_cache, k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved, cache_seqlens, cache_batch_idx,
    cache_leftpad, block_table, k_scale, v_scale, num_splits, causal, window_left, window_right, chunk, softmax_scale,
    softcap, alibi_slopes, sinks, backend,
):  # fmt: skip
    cache = CacheOptions(
        cache_seqlens, k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved, cache_batch_idx, cache_leftpad,
        block_table, k_scale, v_scale, num_splits,
    )  # fmt: skip
    options = AttentionOptions(
        softmax_scale, causal, (window_left, window_right), chunk, softcap, alibi_slopes, sinks=sinks
    )
    row = ATTENTION_DECODE.choose(Inputs((q, k_cache, v_cache), cache=cache, options=options), backend)
    return row.run(q, k_cache, v_cache, cache, options)


def _fake(q, k_cache, v_cache, *_):
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        q.new_empty(*q.shape[:3], v_cache.shape[-1]),
        q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=lse_dtype),
    )


_attention_decode_op = register_op(
    "attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k_new, Tensor? v_new, "
    "Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, Tensor cache_seqlens, Tensor? cache_batch_idx, "
    "Tensor? cache_leftpad, Tensor? block_table, Tensor? k_scale, Tensor? v_scale, int num_splits, bool causal, "
    "int window_left, int window_right, int chunk, float softmax_scale, float softcap, Tensor? alibi_slopes, "
    "Tensor? sinks, str? backend) -> (Tensor, Tensor)",
    _impl, _fake,
)  # fmt: skip


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k_new: Tensor | None, v_new: Tensor | None) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
        if x is None:
            continue
        if x.dim() != 4 or x.shape[3] == 0:
            raise ValueError(
                f"attention_decode: {name} has shape {tuple(x.shape)}; it needs 4 dims, the head dim at least 1"
            )
        if x.device != q.device:
            raise ValueError(f"attention_decode: {name} is on {x.device}, q on {q.device}")
    if not q.is_floating_point() or q.element_size() == 1:
        raise ValueError(f"attention_decode: q is {q.dtype}; it needs fp32, bf16, fp16 or fp64")
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q.dtype, *CODES):
        raise ValueError(
            f"attention_decode: k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; both need q's {q.dtype}, "
            "torch.int8 or torch.float8_e4m3fn"
        )
    heads, depth = q.shape[2:]
    if k_cache.shape[3] != depth or v_cache.shape[:3] != k_cache.shape[:3]:
        raise ValueError(
            f"attention_decode: q is {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; "
            f"k_cache needs head dim {depth}, v_cache must begin {tuple(k_cache.shape[:3])}"
        )
    kv_heads = k_cache.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"attention_decode: {heads} query heads on {kv_heads} KV heads; the first must be a multiple")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(f"attention_decode: {name} has strides {x.stride()}; its last dim must be dense")
    if k_new is None and v_new is None:
        return
    if k_new is None or v_new is None or k_new.dtype != q.dtype or v_new.dtype != q.dtype:
        k, v = (None if x is None else x.dtype for x in (k_new, v_new))
        raise ValueError(f"attention_decode: k_new and v_new are {k} and {v}; both or none, of q's {q.dtype}")
    for name, x, like in (("k_new", k_new, k_cache), ("v_new", v_new, v_cache)):
        want = (q.shape[0], k_new.shape[1], *like.shape[2:])
        if x.shape != want:
            raise ValueError(f"attention_decode: {name} has shape {tuple(x.shape)}; [B, S_new, Hkv, D] is {want}")


def _check_rotary(q: Tensor, cos: Tensor | None, sin: Tensor | None, k_new: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None or cos.shape != sin.shape or cos.dtype != sin.dtype or cos.dim() != 2:
        seen = [None if x is None else f"{x.dtype} {tuple(x.shape)}" for x in (cos, sin)]
        raise ValueError(
            f"attention_decode: rotary_cos and rotary_sin are {seen[0]} and {seen[1]}; both need [positions, D_rot / 2]"
        )
    if not cos.is_floating_point() or 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"attention_decode: rotary_cos is {cos.dtype} {tuple(cos.shape)}; it needs floating-point angles, at most "
            f"half of the head dim {q.shape[3]}"
        )
    if k_new is None:
        raise ValueError("attention_decode: rotary_cos and rotary_sin turn k_new (and q), which is not given")
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        if x.device != q.device:
            raise ValueError(f"attention_decode: {name} is on {x.device}, q on {q.device}")


def _indices(name: str, x: Tensor, q: Tensor, dims: int = 1) -> Tensor:
    """Lengths, indices or pages as the kernels read them: contiguous int32."""
    if x.dtype not in (torch.int32, torch.int64) or x.device != q.device or x.dim() != dims or x.shape[0] != q.shape[0]:
        shape = f"[{q.shape[0]}]" if dims == 1 else f"[{q.shape[0]}, max_pages]"
        raise ValueError(
            f"attention_decode: {name} is {x.dtype} {tuple(x.shape)} on {x.device}; it needs torch.int32 {shape} "
            f"on {q.device}"
        )
    if x.dtype == torch.int64:
        # A number beyond int32 stays beyond every cache.
        x = x.clamp(-(2**31), 2**31 - 1).to(torch.int32)
    return x.contiguous()


def _scale(name: str, scale: Tensor | float | None, q: Tensor, k_cache: Tensor) -> Tensor | None:
    """[B, Hkv] fp32 with any strides."""
    if scale is None:
        return None
    if k_cache.dtype not in CODES:
        raise ValueError(f"attention_decode: {name} is given, but the cache is {k_cache.dtype}, not int8 or float8")
    batch, kv_heads = q.shape[0], k_cache.shape[2]
    if not isinstance(scale, Tensor):
        scale = torch.tensor(float(scale), device=q.device)
    if (
        not scale.is_floating_point()
        or scale.device != q.device
        or (scale.numel() != 1 and scale.shape not in ((kv_heads,), (batch, kv_heads)))
    ):
        raise ValueError(
            f"attention_decode: {name} is {scale.dtype} {tuple(scale.shape)} on {scale.device}; it takes one number, "
            f"[Hkv] = {(kv_heads,)} or [B, Hkv] = {(batch, kv_heads)} in torch.float32 on {q.device}"
        )
    if scale.numel() == 1:
        scale = scale.reshape(())
    return scale.float().expand(batch, kv_heads)


class DecodeKeywords(TypedDict, total=False):
    """The keywords of `attention_decode`, but for `return_lse`."""

    k_new: Tensor | None
    v_new: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_seqlens: Tensor | int | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    k_scale: Tensor | float | None
    v_scale: Tensor | float | None
    num_splits: int
    causal: bool
    window: tuple[int, int]
    chunk: int
    softmax_scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    backend: str | None


@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_lse: Literal[False] = ..., **options: Unpack[DecodeKeywords]
) -> Tensor: ...
@overload
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, return_lse: bool, **options: Unpack[DecodeKeywords]
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, k_new: Tensor | None = None, v_new: Tensor | None = None,
    rotary_cos: Tensor | None = None, rotary_sin: Tensor | None = None, rotary_interleaved: bool = False,
    cache_seqlens: Tensor | int | None = None, cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None, block_table: Tensor | None = None, k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None, num_splits: int = 0, causal: bool = False,
    window: tuple[int, int] = (-1, -1), chunk: int = 0, softmax_scale: float | None = None, softcap: float = 0.0,
    alibi_slopes: Tensor | None = None, sinks: Tensor | None = None, return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of new queries over a KV cache, to which new keys and values are appended first. Not differentiable.

    Args:
        q: [B, Sq, Hq, D], fp32, bf16, fp16 (native) or fp64 (reference). Any strides. Sq > 1 verifies several
            speculative tokens at once.
        k_cache: [B_cache, S, Hkv, D], or pages [num_pages, page_size, Hkv, D] with a block table; of q's dtype,
            torch.int8 or torch.float8_e4m3fn; Hq must be a multiple of Hkv. Any strides with a dense last dim.
        v_cache: the same with head dim Dv. It may be a view of k_cache, as in multi-head latent attention
            (`k_cache[..., :512]`).
        k_new: [B, Sn, Hkv, D] of q's dtype, written into the cache behind the first cache_seqlens keys.
        v_new: [B, Sn, Hkv, Dv], likewise.
        rotary_cos, rotary_sin: [positions, D_rot / 2], turn k_new (new key i by row cache_seqlens + i) and q (query i
            by row cache_seqlens + i if causal or with a window, else by row cache_seqlens).
        rotary_interleaved: pairs are (2i, 2i + 1), as in GPT-J, instead of (i, i + D_rot / 2), as in Llama.
        cache_seqlens: int32 [B], or one int for all: keys that are in the cache already. None: the cache is full.
        cache_batch_idx: int32 [B], each sequence's entry of the cache; b itself when None. Of sequences that append
            to the same place the last one wins.
        cache_leftpad: int32 [B], so many first keys are hidden and the sequence begins behind them.
        block_table: int32 [B, max_pages], the pages of each sequence, of any page size.
        k_scale, v_scale: fp32, value of one code of an int8 or float8 cache (1 when None): one number, [Hkv] or
            [B, Hkv]. New keys and values are rounded to the nearest code and saturate.
        num_splits: in how many pieces each sequence's keys are worked on; 0 chooses. With a fixed number the result of
            a sequence has the same bits whatever else is in the batch; with any, whatever the number of threads.
        causal, window, chunk, softmax_scale, softcap, alibi_slopes, sinks: as in `attention`; query i stands at
            i + Sk - Sq of the sequence's Sk keys, which begin behind its left padding.
        return_lse: also return the log of each row's sum of exponentials.
        backend: force one row of the table, e.g. `"reference"`.

    Returns:
        out [B, Sq, Hq, Dv] of q's dtype; with `return_lse` `(out, lse)`, lse [B, Hq, Sq] in fp32 (fp64 for fp64). A
        query that sees no key has out 0 and lse -inf (with sinks, the sink).

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together; lengths, indices or pages lie outside the
            cache or the rotary tables. The cache is untouched then. On a GPU the values of lengths, indices and pages
            are not looked at, for that would wait for it.

    Example:
        >>> k_cache, v_cache = torch.zeros(2, 4096, 8, 128), torch.zeros(2, 4096, 8, 128)
        >>> q, k, v = torch.randn(2, 1, 32, 128), torch.randn(2, 1, 8, 128), torch.randn(2, 1, 8, 128)
        >>> lengths = torch.tensor([17, 1000], dtype=torch.int32)
        >>> out = tpweave.attention_decode(q, k_cache, v_cache, k_new=k, v_new=v, cache_seqlens=lengths)
    """
    _check_cache(q, k_cache, v_cache, k_new, v_new)
    batch, queries, heads, depth = q.shape
    if rotary_cos is not None or rotary_sin is not None:
        _check_rotary(q, rotary_cos, rotary_sin, k_new)
    if window != (-1, -1) or chunk != 0 or softcap != 0 or alibi_slopes is not None or sinks is not None:
        check_options(
            "attention_decode", q, (batch, heads, queries, 0), window, chunk, softcap, alibi_slopes, sinks, None, None,
            0.0,
        )  # fmt: skip
    if num_splits < 0:
        raise ValueError(f"attention_decode: num_splits is {num_splits}; it takes a number of pieces, or 0 to choose")
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("attention_decode: cache_batch_idx and block_table say the same; give one")
        block_table = _indices("block_table", block_table, q, dims=2)
    elif cache_batch_idx is not None:
        cache_batch_idx = _indices("cache_batch_idx", cache_batch_idx, q)
    elif k_cache.shape[0] < batch:
        raise ValueError(f"attention_decode: k_cache holds {k_cache.shape[0]} sequences, q {batch}; it needs as many")
    if cache_leftpad is not None:
        cache_leftpad = _indices("cache_leftpad", cache_leftpad, q)
    if isinstance(cache_seqlens, torch.Tensor):
        cache_seqlens = _indices("cache_seqlens", cache_seqlens, q)
    else:
        if cache_seqlens is None:
            cache_seqlens = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    if k_scale is not None or v_scale is not None:
        k_scale, v_scale = _scale("k_scale", k_scale, q, k_cache), _scale("v_scale", v_scale, q, k_cache)
    if k_new is not None:
        # What autograd saved of the cache is no longer what it saved.
        torch.autograd.graph.increment_version((k_cache, v_cache))
    run = _impl if is_plain_call(q, k_cache, v_cache, k_new, v_new) else _attention_decode_op
    out, lse = run(
        q, k_cache, v_cache, k_new, v_new, rotary_cos, rotary_sin, rotary_interleaved, cache_seqlens, cache_batch_idx,
        cache_leftpad, block_table, k_scale, v_scale, num_splits, causal, window[0], window[1], chunk,
        depth**-0.5 if softmax_scale is None else softmax_scale, softcap, alibi_slopes, sinks, backend,
    )  # fmt: skip
    return (out, lse) if return_lse else out
