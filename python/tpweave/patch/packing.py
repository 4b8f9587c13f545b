"""Padded batches as one row of packed sequences, so that no padding is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensor = torch.Tensor


def pack_padded(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tokens of a padded batch in one row, as models with `attn_implementation="tpweave"` take them.

    Encoders and decoders then compute each token but no padding, and attention stays inside each sequence.

    Args:
        batch: tensors [B, S, ...], among them "attention_mask", where 0 marks padding on either side (what a tokenizer
            returns); all others (input_ids, token_type_ids, labels ...) are packed alike.

    Returns:
        The same names but "attention_mask", as [1, T, ...] over the T tokens that are no padding, in the order of the
        rows, with "position_ids" [1, T] that start at 0 in each sequence unless `batch` has its own, and
        "cu_seq_lens_q", "cu_seq_lens_k" (int32 [B + 1]), "max_length_q" and "max_length_k" (int). Rows without a
        token are empty sequences.

    Raises:
        ValueError: no attention mask, or a tensor that does not begin with its [B, S].

    Example:
        >>> tokens = tokenizer(texts, padding=True, return_tensors="pt")
        >>> hidden = model(**tpweave.pack_padded(tokens)).last_hidden_state  # [1, T, H]
        >>> hidden = tpweave.pad_packed(hidden, tokens["attention_mask"])  # [B, S, H]
    """
    if "attention_mask" not in batch or batch["attention_mask"].dim() != 2:
        raise ValueError(f"pack_padded: the batch has {sorted(batch)}; it needs a 2-D attention_mask [B, S]")
    seen = batch["attention_mask"].bool()
    for name, x in batch.items():
        if x.shape[:2] != seen.shape:
            raise ValueError(
                f"pack_padded: {name} is {tuple(x.shape)}, the attention_mask {tuple(seen.shape)}; both begin [B, S]"
            )
    packed: dict[str, Any] = {name: x[seen][None] for name, x in batch.items() if name != "attention_mask"}
    if "position_ids" not in packed:
        packed["position_ids"] = (seen.cumsum(1) - 1)[seen][None]
    lengths = seen.sum(1)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max()) if len(lengths) else 0
    packed.update(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest)
    return packed


def pad_packed(x: Tensor, attention_mask: Tensor, fill: float = 0.0) -> Tensor:
    """Back from `pack_padded`: [1, T, ...] to [B, S, ...], with `fill` where `attention_mask` is 0. Differentiable.

    Raises:
        ValueError: x does not hold as many tokens as the mask.

    Example:
        >>> hidden = tpweave.pad_packed(packed_hidden, tokens["attention_mask"])
    """
    seen = attention_mask.bool()
    tokens = int(seen.sum())
    if x.shape[:2] != (1, tokens):
        raise ValueError(
            f"pad_packed: x is {tuple(x.shape)}; the mask has {tokens} tokens: it needs (1, {tokens}, ...)"
        )
    padded = x.new_full((*seen.shape, *x.shape[2:]), fill)
    return padded.index_put((seen,), x[0])
