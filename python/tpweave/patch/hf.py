"""Transformers' attention through `tpweave.attention`: `attn_implementation="tpweave"`. This file and `hf_masks.py` are
the only ones that know Transformers' interfaces; they import it lazily. Tested with 5.17.0, 5.18.0, 5.19.0,
5.20.2, 5.21.1, 5.22.2 and 5.23.0.

Attention functions of Transformers get q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D] and a mask that a mask function made
for their name. Both are registered under `ATTENTION_NAME`: a name without a mask function would silently lose all
masks, and names that contain "flash", "sdpa" or "flex_attention" are treated specially by many models.

One of these special cases is wanted: vision towers of packed images (Qwen2-VL and its relatives) hand the whole pack
with `cu_seq_lens_q` to implementations with "flash" in their name, and loop over the images for all others. A model
cannot be given such a name, for then Transformers looks for a package of flash attention. The attention modules of
such towers alone get it, through a view of their config (`_PackedConfig`), when they first run.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from tpweave.dispatch import warn_once
from tpweave.errors import UnsupportedModelError
from tpweave.layers.attention import attend_local_heads
from tpweave.layers.heads import LocalHeads
from tpweave.ops.attention import dropout_seed
from tpweave.ops.attention_varlen import attention_varlen
from tpweave.patch.hf_masks import Layout, attention_mask, layout_of

Tensor = torch.Tensor

ATTENTION_NAME = "tpweave"
PACKED_NAME = "tpweave_flash"
OLDEST = (5, 17)


@functools.cache
def register_attention() -> None:
    """Make `attn_implementation="tpweave"` known to Transformers 5.17 and newer.

    After it, models take that name at construction (`from_pretrained`, `from_config`) and in
    `model.set_attn_implementation`. Padding, packed sequences, sliding windows, chunks, softcap, sinks, position
    biases, dropout, caches and gradient checkpointing work as with the eager implementation. Nothing is registered by
    `import tpweave`: it would have to load Transformers, or would depend on what was imported before.

    Packed sequences are those of `position_ids` that start again in a row, or of `cu_seq_lens_q`, `cu_seq_lens_k`,
    `max_length_q` and `max_length_k` (as for flash attention), which `tpweave.pack_padded` makes from a padded batch.
    Attention weights are computed where `output_attentions=True` asks for them, at the price of a second pass.

    Raises:
        UnsupportedModelError: Transformers is older than 5.17.

    Example:
        >>> tpweave.register_attention()
        >>> model = AutoModelForCausalLM.from_pretrained("path/to/model", attn_implementation="tpweave")
    """
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise UnsupportedModelError(f"Transformers {transformers.__version__} is too old: tpweave needs 5.17 or newer")
    for name in (ATTENTION_NAME, PACKED_NAME):
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, attention_mask)


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


class _PackedConfig:
    """A view of a config that names our attention `PACKED_NAME`, for as long as the config itself names it at all."""

    def __init__(self, config: Any) -> None:
        self.tpweave_config = config

    @property
    def _attn_implementation(self) -> str | None:
        name = self.tpweave_config._attn_implementation
        return PACKED_NAME if name == ATTENTION_NAME else name

    def __getattr__(self, name: str) -> Any:
        if name == "tpweave_config" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tpweave_config, name)


@functools.cache
def _takes_packed_images(kind: type[nn.Module]) -> bool:
    return "cu_seqlens" in inspect.signature(kind.forward).parameters


def _stop_looping(module: nn.Module) -> None:
    """From its next call on, a tower's attention that gets `cu_seqlens` passes them to us instead of looping."""
    config = module.__dict__.get("config")
    kind: Any = type(module)
    if getattr(config, "_attn_implementation", None) == ATTENTION_NAME and _takes_packed_images(kind):
        module.__dict__["config"] = _PackedConfig(config)


def _weights_wanted() -> bool:
    """Whether the model under way records attention weights: some do not tell the attention function so."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    collector = getattr(capturing, "_active_collector", None)
    recorded = None if collector is None else collector.get()
    return any("attentions" in name for name in recorded or ())


class _Sequences(NamedTuple):
    """Sequences that lie one after the other: int32 offsets [N + 1], and the longest's length."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, offsets: Tensor) -> _Sequences:
        offsets, longest = offsets.to(torch.int32), int(offsets.diff().max())
        return cls(offsets, offsets, longest, longest)


def _given_sequences(cu_q: Tensor | None, cu_k: Tensor | None, max_q: Any, max_k: Any) -> _Sequences | None:
    if cu_q is None:
        return None
    cu_k = cu_q if cu_k is None else cu_k
    longest = [int(cu.diff().max() if given is None else given) for cu, given in ((cu_q, max_q), (cu_k, max_k))]
    return _Sequences(cu_q.to(torch.int32), cu_k.to(torch.int32), *longest)


def _restarting(position_ids: Tensor | None, shape: Sequence[int]) -> _Sequences | None:
    """The sequences of one row whose positions start again at its first one: GPT-OSS makes masks that ignore them."""
    if position_ids is None or position_ids.shape != shape or shape[0] != 1 or torch.compiler.is_compiling():
        return None
    positions = position_ids[0]
    starts = positions.diff(prepend=positions[:1] - 2) != 1
    if int(starts.sum()) < 2 or not bool((positions[starts] == positions[0]).all()):
        return None
    return _Sequences.of(nn.functional.pad(starts.nonzero()[:, 0], (0, 1), value=len(positions)))


def _within(given: _Sequences | None, layout: Layout) -> _Sequences:
    """The sequences of a layout, which may be chunks of the ones given."""
    assert layout.cu_seqlens is not None
    if given is None:
        return _Sequences(layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length)
    return _Sequences.of(torch.cat([layout.cu_seqlens, given.cu_seqlens_q]).unique())


def _is_mask_dtype(mask: Tensor) -> bool:
    return mask.dtype == torch.bool or mask.is_floating_point()


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, softcap: float | None = None, is_causal: bool | None = None,
    s_aux: Tensor | None = None, position_bias: Tensor | None = None, cache: Any = None,
    cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: Any = None,
    max_length_k: Any = None, output_attentions: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Transformers' attention interface over this rank's heads: q [B, Hq, Sq, D], k and v [B, Hkv, Skv, D].

    A `sliding_window` among `kwargs` is not read: the mask has it, where the model means it.

    Returns:
        ([B, Sq, Hq, D], None), or in place of None the weights [B, Hq, Sq, Skv] with `output_attentions`.

    Raises:
        ValueError: a mask of an integer dtype or not of 4 dims, or packed sequences with a position bias.
    """
    if not torch.compiler.is_compiling():
        _stop_looping(module)
        output_attentions = output_attentions or _weights_wanted()
    if cache is not None:
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask, bias, window = attention_mask, position_bias, (-1, -1)
    layout = None if mask is None else layout_of(mask)
    if mask is not None and layout is None and (mask.dim() != 4 or not _is_mask_dtype(mask)):
        raise ValueError(f"attention_mask is {mask.dtype} {tuple(mask.shape)}; it needs 4 dims, bool or floating-point")
    heads = getattr(module, "tpweave_heads", None) or LocalHeads(0, q.shape[2], k.shape[2], None)
    options: dict[str, Any] = {
        "group": getattr(module, "tpweave_group", None), "softmax_scale": scaling, "softcap": softcap or 0.0,
        "sinks": s_aux, "dropout_p": dropout, "seed": dropout_seed(dropout, None),
    }  # fmt: skip
    sequences = None
    if mask is None or (layout is not None and (layout.visible is None or layout.cu_seqlens is not None)):
        given = _given_sequences(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
        if given is None and causal and k.shape[1] == q.shape[1]:
            given = _restarting(kwargs.get("position_ids"), q.shape[:2])
        sequences = given if layout is None or layout.cu_seqlens is None else _within(given, layout)
    # A whole mask tells the sequences too.
    if sequences is not None and given is None and (bias is not None or output_attentions):
        sequences = None
    if sequences is not None:
        if bias is not None:
            raise ValueError("packed sequences with a position bias: pass a mask or padded sequences instead")
        if output_attentions:
            warn_once("output_attentions: attention over packed sequences forms no weights, they are None")
        if layout is not None:
            window, causal = layout.window, layout.window[1] == 0
        out = _attend_packed(heads, q, k, v, sequences, causal=causal, window=window, **options)
        if layout is not None and layout.visible is not None:
            out = out.masked_fill(~layout.visible[..., None, None], 0.0)
        return out, None
    if mask is None:
        causal = causal and q.shape[1] > 1
        if causal:
            k, v = k[:, : q.shape[1]], v[:, : q.shape[1]]
    elif layout is not None and mask.dtype == torch.int32:
        k, v = k[:, : layout.keys], v[:, : layout.keys]
        mask, window, causal = layout.visible, layout.window, layout.window[1] == 0
    elif mask.is_floating_point():
        bias, mask, causal = mask[..., : k.shape[1]] if bias is None else bias + mask, None, False
    else:
        causal = False
    bias = None if bias is None else bias[..., : k.shape[1]]

    def attend(values: Tensor) -> Tensor:
        return attend_local_heads(
            heads, q, k, values, causal=causal, window=window, mask=mask, bias=bias, **options
        )  # fmt: skip

    weights = None
    if output_attentions:
        # The weights are the output for values that are the rows of the identity.
        keys = k.shape[1]
        identity = torch.eye(keys, dtype=v.dtype, device=v.device)[:, None].expand(*v.shape[:3], keys)
        weights = nn.functional.pad(attend(identity).transpose(1, 2), (0, key.shape[2] - keys))
    return attend(v), weights


def _attend_packed(heads: LocalHeads, q: Tensor, k: Tensor, v: Tensor, sequences: _Sequences, **options: Any) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        out: Any = attention_varlen(q, k, v, *sequences, **options)
        return out

    flat = (x.flatten(0, 1) for x in (q, k, v))
    return attend_local_heads(heads, *flat, function=attend, **options).unflatten(0, q.shape[:2])
