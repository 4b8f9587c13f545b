"""The one place that knows Transformers' interfaces: written for 5.17 to 5.23, tested with 5.23. Imports it lazily.

Attention functions of Transformers get q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D] and a mask that a mask function made
for their name. Both are registered under `ATTENTION_NAME`: a name without a mask function would silently lose all
masks, and names that contain "flash", "sdpa" or "flex_attention" are treated specially by many models.

Masks that our mask function makes, and what the attention function makes of them:

    None                          no padding; causal where the module is, and then keys beyond the queries are unused
    uint8 [B, 1, 1, K]            causal (with the module's window) over the first K keys, of which 0 marks padding
    bool [B, 1, 1, Skv]           not causal, False marks padding
    bool [B, 1 or Hq, Sq, Skv]    everything is in the mask (True: may see)
    floating [B, 1 or Hq, Sq, Skv]  likewise, added to the scores; only callers' own masks

The first three keep the kernel free of Sq x Skv masks. uint8 is never a mask of Transformers' own, and survives what
callers do to masks (copies, gradient checkpointing, precomputed masks of static caches).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tpweave.dispatch import warn_once
from tpweave.errors import UnsupportedModelError
from tpweave.layers.attention import attend_local_heads
from tpweave.layers.heads import LocalHeads
from tpweave.reference.ops.attention import visible_keys

Tensor = torch.Tensor

ATTENTION_NAME = "tpweave"
OLDEST = (5, 17)


@functools.cache
def register_attention() -> None:
    """Make `ATTENTION_NAME` known to Transformers.

    Raises:
        UnsupportedModelError: Transformers is older than 5.17.
    """
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise UnsupportedModelError(f"Transformers {transformers.__version__} is too old: tpweave needs 5.17 or newer")
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, attention_mask)


def use_attention(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Give `model` configs of its own that name our attention. Returns (module, config before) to undo it.

    Models may share a config object: it is copied, so that no other model changes.
    """
    copies: dict[int, Any] = {}
    before = []
    for module in model.modules():
        config = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation"):
            if id(config) not in copies:
                copies[id(config)] = copy.deepcopy(config)
                copies[id(config)]._attn_implementation = ATTENTION_NAME
            before.append((module, config))
            module.config = copies[id(config)]
    return before


def attention_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None, attention_mask: Tensor | None = None,
    local_size: int | None = None, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False, device: Any = "cpu", **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """Transformers' mask interface: see the module's table for what is returned.

    Transformers allows the causal (or bidirectional) skip only where the pattern is nothing but causal (everything),
    the window `local_size`, and padding.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain_full = allow_is_bidirectional_skip and not allow_is_causal_skip and local_size is None
    if not torch.compiler.is_compiling() and (allow_is_causal_skip or plain_full):
        # Keys up to the last query: a static cache has more.
        seen = int(q_offset) + q_length - kv_offset if allow_is_causal_skip else kv_length
        visible = None
        if attention_mask is not None:
            known = attention_mask[:, kv_offset : kv_offset + seen].bool()
            visible = nn.functional.pad(known, (0, seen - known.shape[1]))
            if bool(visible.all()):
                visible = None
        if plain_full:
            return None if visible is None else visible[:, None, None, :]
        if visible is None:
            ends_with_queries = seen == kv_length and q_length in (1, kv_length)
            if ends_with_queries or (q_length > 1 and seen == q_length):
                return None
            visible = torch.ones(batch_size, seen, dtype=torch.bool, device=device)
        return visible.to(torch.uint8)[:, None, None, :]
    whole: Any = sdpa_mask
    return whole(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function or causal_mask_function, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device, **kwargs,
    )  # fmt: skip


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface over this rank's heads: q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D].

    Returns:
        ([B, Sq, Hq, D], None): attention weights are never formed.

    Raises:
        ValueError: a feature of other families (softcap, sinks, position bias, paged cache), or a mask per head.
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"tpweave's attention takes no {name}; attention=False keeps the model's own")
    if kwargs.get("output_attentions"):
        warn_once("output_attentions: tpweave's attention never forms the weights, they are None")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    heads = getattr(module, "tpweave_heads", None) or LocalHeads(0, q.shape[2], k.shape[2], None)
    mask, bias = attention_mask, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None:
        if causal and q.shape[1] > 1:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    elif mask.shape[1] != 1:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}; it must be the same for all heads")
    elif mask.dtype == torch.uint8 and mask.shape[2] == 1:
        k, v = k[:, : mask.shape[-1]], v[:, : mask.shape[-1]]
        mask, causal = mask.bool(), True
    elif mask.dtype == torch.bool:
        causal = False
    elif mask.is_floating_point():
        mask, bias, causal = None, mask, False
    else:
        raise ValueError(f"attention_mask is {mask.dtype} {tuple(mask.shape)}; a 4-D mask is boolean or floating-point")
    # A mask that is whole has the window in it already.
    window = (sliding_window - 1, 0) if sliding_window is not None and causal else (-1, -1)
    if dropout > 0.0 or bias is not None:
        warn_once("attention with dropout or an additive mask runs unfused, in torch's scaled_dot_product_attention")
        return _unfused(heads, q, k, v, mask, bias, causal, window, scaling, dropout), None
    return attend_local_heads(heads, q, k, v, causal=causal, window=window, softmax_scale=scaling, mask=mask), None


def _unfused(
    heads: LocalHeads, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, causal: bool,
    window: tuple[int, int], scaling: float | None, dropout: float,
) -> Tensor:  # fmt: skip
    """The same by torch, for what `tpweave.attention` does not take. Masks as there, dropout besides."""
    for other in (mask, visible_keys(q.shape[1], k.shape[1], causal, window, q.device)):
        if other is not None:
            bias = torch.where(other, 0.0 if bias is None else bias, float("-inf")).to(q.dtype)
    # Ranks have different numbers of heads, so they draw different numbers of random values here. Each draws from a
    # generator of its own, seeded from the common one: that stays in step, for the dropouts outside.
    seed = int(torch.randint(2**62, ())) + heads.first_q
    with torch.random.fork_rng(devices=[q.device] if q.is_cuda else [], enabled=dropout > 0.0):
        if dropout > 0.0:
            torch.manual_seed(seed)
        return attend_local_heads(
            heads, q, k, v, function=lambda q, k, v: nn.functional.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias, dropout, scale=scaling, enable_gqa=True
            ).transpose(1, 2)
        )  # fmt: skip
