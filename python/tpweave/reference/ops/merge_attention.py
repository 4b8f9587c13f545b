"""Parts of an attention over different keys joined by their log-sum-exps, in plain torch: the definition.

Dims: B batch, Sq queries, H heads, D value head dim, P parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def part_weights(lses: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The share [B, H, Sq] of each part, exp(lse_p - lse), and lse = log(sum of exp(lse_p)); 0 and -inf where all parts
    are empty.
    """
    stacked = torch.stack(list(lses))
    top = stacked.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    lse = top + (stacked - top).exp().sum(0).log()
    empty = torch.isneginf(lse)
    weights = (stacked - lse.masked_fill(empty, 0.0)).exp()
    return list(weights.unbind()), lse


def merge_attention_reference(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """out = sum over parts of exp(lse_p - lse) * out_p, lse = log(sum of exp(lse_p)), in fp32 (fp64 for fp64).

    outs: P tensors [B, Sq, H, D]; lses: as many [B, H, Sq]. Returns out of the outs' dtype and lse of the lses'.
    Source: Dao et al., "Flash-Decoding", 2023.
    """
    wide = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    weights, lse = part_weights([part.to(wide) for part in lses])
    out = torch.zeros(outs[0].shape, dtype=wide, device=outs[0].device)
    for part, weight in zip(outs, weights, strict=True):
        out = out + part.to(wide) * weight.transpose(1, 2).unsqueeze(-1)
    return out.to(outs[0].dtype), lse


def merge_attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, outs: Sequence[Tensor], lses: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the parts: dout_p = w_p dout,  dlse_p = w_p (dout . (out_p - out) + dlse),  w_p = exp(lse_p - lse).

    Shapes as in the forward, whose results are `out` and `lse`; `dlse` may be None.
    """
    wide = lse.dtype
    shift = lse.masked_fill(torch.isneginf(lse), 0.0)
    douts, dlses = [], []
    for part, part_lse in zip(outs, lses, strict=True):
        weight = (part_lse.to(wide) - shift).exp()
        douts.append((dout.to(wide) * weight.transpose(1, 2).unsqueeze(-1)).to(part.dtype))
        row = (dout.to(wide) * (part.to(wide) - out.to(wide))).sum(-1).transpose(1, 2)
        if dlse is not None:
            row = row + dlse
        dlses.append((row * weight).to(part_lse.dtype))
    return douts, dlses
