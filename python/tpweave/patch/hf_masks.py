"""Masks for Transformers' attention functions, and what the attention function reads from them.

Transformers makes one mask a forward and kind of layer, by the mask function that is registered under the name of the
attention. What decides is the mask alone, as in its eager implementation: several models make masks with a window or
with chunks and do not tell the attention function about them. What our mask function returns:

    None                          every key, causal where the module is; then keys beyond the queries are unused
    int32 [B, 1, 1, K]            compact: over the first K keys, 0 for padding, else `w > 0`: causal, the w keys up to
                                  the query's own are seen, or `w < 0`: the keys less than -w places away on both sides
    bool [B, 1, 1, Skv]           not causal, False marks padding
    bool [B, 1, Sq, Skv]          everything is in the mask (True: may see)

int32 is never a mask of Transformers' own and survives what callers do to masks (copies, slices of keys, gradient
checkpointing, precomputed masks of static caches). Packed sequences and chunks become whole masks, since some models
compute with those, and carry a `Layout` besides, from which the attention function runs without reading the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tpweave.reference.ops.attention import visible_keys

Tensor = torch.Tensor

_LAYOUT = "_tpweave_layout"
_UNLIMITED = 2**31 - 1


class Layout(NamedTuple):
    """What a mask says, in the kernels' terms.

    Attributes:
        keys: number of keys that count; there may be more, unused.
        visible: bool [B, 1, 1, keys], False marks padding; None where there is none. With `cu_seqlens` [B, Sq].
        window: (left, right) keys seen around a query, -1 for no limit.
        cu_seqlens: int32 starts of the sequences that share the rows of the batch, and the end; None where each
            row is one.
        max_length: of these sequences.
    """

    keys: int
    visible: Tensor | None
    window: tuple[int, int]
    cu_seqlens: Tensor | None = None
    max_length: int = 0


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False, device: Any = "cpu", **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Transformers' mask interface: see the module's table for what is returned.

    Transformers allows the causal (or bidirectional) skip only where the pattern is nothing but causal (everything),
    `local_size` (of a window or of chunks, which only the mask function tells apart), and padding.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    pattern = mask_function or causal_mask_function
    eager = not torch.compiler.is_compiling()
    if eager and (allow_is_causal_skip or allow_is_bidirectional_skip):
        # Keys up to the last query: a static cache has more.
        seen = int(q_offset) + q_length - kv_offset if allow_is_causal_skip else kv_length
        padding = None
        if attention_mask is not None:
            known = attention_mask[:, kv_offset : kv_offset + seen].bool()
            padding = nn.functional.pad(known, (0, seen - known.shape[1]))
            if bool(padding.all()):
                padding = None
        right = 0 if allow_is_causal_skip else -1
        window = (-1, right)
        if local_size is not None:
            window = (local_size - 1, 0) if allow_is_causal_skip else (local_size, local_size)
        queries = int(q_offset) + torch.arange(q_length, device=device)
        keys = kv_offset + torch.arange(seen, device=device)
        if local_size is None or _is_window(pattern, queries, keys, window, padding, batch_size):
            if seen <= window[0] + 1:
                window = (-1, right)
            if window == (-1, -1):
                return None if padding is None else padding[:, None, None, :]
            ends_with_queries = seen == kv_length and q_length in (1, kv_length)
            if padding is None and window[0] < 0 and (ends_with_queries or 1 < q_length == seen):
                return None
            return _compact(batch_size, seen, padding, window, device)
    whole: Any = sdpa_mask
    mask = whole(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=pattern, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip
    if eager and not use_vmap and 1 < q_length == kv_length and not allow_is_bidirectional_skip:
        layout = _sequences(mask, local_size)
        if layout is not None:
            setattr(mask, _LAYOUT, layout)
    return mask


def layout_of(mask: Tensor) -> Layout | None:
    """The layout that a mask carries, or None where only its entries count."""
    layout = None if torch.compiler.is_compiling() else getattr(mask, _LAYOUT, None)
    if layout is None and mask.dtype == torch.int32 and mask.shape[1:3] == (1, 1):
        code = int(mask.view(-1)[mask.view(-1).abs().argmax()])
        left = -1 if abs(code) == _UNLIMITED else abs(code) - 1
        visible = mask != 0
        layout = Layout(mask.shape[-1], None if bool(visible.all()) else visible, (left, 0 if code > 0 else left))
    return layout


def _is_window(
    pattern: Callable[..., Any], queries: Tensor, keys: Tensor, window: tuple[int, int], padding: Tensor | None,
    batch_size: int,
) -> bool:  # fmt: skip
    """Whether the first and the last two queries see exactly the window: chunks are told apart by two neighbours."""
    chosen = torch.cat([queries[:2], queries[-2:]])[:, None]
    batch = torch.arange(batch_size, device=keys.device)[:, None, None, None]
    got = pattern(batch, batch.new_zeros(1, 1, 1, 1), chosen[None, None], keys[None, None, None])
    wanted = (keys >= chosen - window[0]) & (keys <= chosen + window[1])
    agree = (got == wanted).expand(batch_size, 1, len(chosen), len(keys))
    return bool(agree.all() if padding is None else (agree | ~padding[:, None, None, :]).all())


def _compact(batch: int, keys: int, padding: Tensor | None, window: tuple[int, int], device: Any) -> Tensor:
    left, right = window
    code = _UNLIMITED if left < 0 else left + 1
    mask = torch.full((batch, 1, 1, keys), code if right == 0 else -code, dtype=torch.int32, device=device)
    if padding is not None:
        padding = padding[:, None, None, :]
        mask = mask.masked_fill(~padding, 0)
    setattr(mask, _LAYOUT, Layout(keys, padding, window))
    return mask


def _sequences(mask: Tensor, local_size: int | None) -> Layout | None:
    """The layout of a whole mask [B, 1, S, S] that is causal (with a window) inside sequences that follow one another
    in each row, as packed ones and chunks do. Rows of padding are not compared."""
    rows = mask[:, 0]
    length = rows.shape[-1]
    seen = rows.diagonal(dim1=1, dim2=2)
    starts = nn.functional.pad(~rows.diagonal(-1, 1, 2), (1, 0), value=True)
    sequence = starts.cumsum(1)
    same = (sequence[:, :, None] == sequence[:, None, :]) & seen[:, None, :]
    for window in {(-1, 0), (-1 if local_size is None else local_size - 1, 0)}:
        visible: Any = visible_keys(length, length, True, window, mask.device)
        if bool((((same & visible) == rows) | ~seen[:, :, None]).all()):
            first = starts.flatten().nonzero()[:, 0]
            cu_seqlens = nn.functional.pad(first, (0, 1), value=starts.numel()).to(torch.int32)
            return Layout(length, None if bool(seen.all()) else seen, window, cu_seqlens, int(cu_seqlens.diff().max()))
    return None
