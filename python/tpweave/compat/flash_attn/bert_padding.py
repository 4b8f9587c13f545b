"""flash-attn's `bert_padding`: from padded batches to packed tokens and back, differentiable.

Dims: B batch, S sequence, T tokens kept.
"""

from __future__ import annotations

from typing import Any

import torch

Tensor = torch.Tensor


class IndexFirstAxis(torch.autograd.Function):
    """The rows of a tensor at `indices`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.new_zeros(ctx.rows, *grad_output.shape[1:]).index_add_(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """A tensor of `first_axis_dim` rows: `values` at `indices`, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        return values.new_zeros(first_axis_dim, *values.shape[1:]).index_copy_(0, indices, values)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """The rows of a tensor at `indices`, and the tensor itself."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask keeps, one sequence after the other.

    Args:
        hidden_states: [B, S, ...].
        attention_mask: [B, S], bool or integer, nonzero for tokens to keep.
        unused_mask: [B, S] likewise: tokens to keep as well that no sequence uses; disjoint from the first.

    Returns:
        tokens [T, ...]; their indices in the flattened input [T]; cu_seqlens [B + 1] int32 (offsets of the sequences,
        unused tokens included); the longest sequence; the number of used tokens of each sequence [B] int32.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    longest = int(lengths.max()) if len(lengths) else 0
    return tokens, indices, _offsets(lengths), longest, attention_mask.sum(-1, dtype=torch.int32)


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows hold several sequences each, one after the other from the row's start.

    Args:
        hidden_states: [B, S, ...].
        attention_mask_in_length: [B, S] integers: each row's sequence lengths in order, zeros elsewhere, so
            `[2, 3, 0, 0, 0, 0]` is a sequence of 2, one of 3 and a token of padding.

    Returns:
        tokens [T, ...]; their indices in the flattened input [T]; cu_seqlens int32, one offset a sequence and the
        total; the longest sequence.
    """
    used = attention_mask_in_length.sum(-1, keepdim=True)
    lengths = attention_mask_in_length[attention_mask_in_length != 0]
    position = torch.arange(attention_mask_in_length.shape[1], device=used.device)
    indices = (position < used).flatten().nonzero().flatten()
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, _offsets(lengths), int(lengths.max()) if len(lengths) else 0


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens [T, ...] back in their places of a padded batch [batch, seqlen, ...], zeros elsewhere.

    `indices` [T] are those that `unpad_input` returned.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))
