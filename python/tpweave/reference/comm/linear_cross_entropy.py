"""Cross entropy of a linear layer's outputs, from full logits, wide all the way.

Dims: T tokens, D hidden size, V vocabulary (v on this rank).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from tpweave.distributed.exchange import agree, describe
from tpweave.reference.comm.all_gather import all_gather_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import TPGroup

Tensor = torch.Tensor


class LossOptions(NamedTuple):
    """What is made of the logits x: with c = softcap, e = label_smoothing, z = z_loss and lse = log(sum(exp(x))),

        x = c * tanh(x / c);  loss = (1 - e) (lse - x[label]) + e (lse - mean(x)) + z lse^2;  0 for ignored tokens

    Attributes:
        splits: rows of the vocabulary on each rank.
        ignore_index: the label of tokens without loss.
        entropy: whether the entropy is wanted; a row may return anything in its place otherwise.
    """

    splits: tuple[int, ...]
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    entropy: bool = True


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, group: TPGroup, options: LossOptions,
    dloss: Tensor | None, dentropy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Loss, lse and entropy [T]; and where `dloss` [T] is given, dhidden, and dweight and dbias of this rank's rows.

        p = exp(x - lse);  H = -sum(p (x - lse));  dx = dH (-p (x - lse + H))
        dx += dloss (p (1 + 2 z lse) - (1 - e) onehot(label) - e / V);  dx *= 1 - tanh^2 with a softcap
        dhidden = dx weight;  dweight = dx^T hidden;  dbias = sum over tokens of dx

    hidden [T, D] and labels [T] are equal on all ranks, weight [v, D] and bias [v] are this rank's rows. Gradients are
    those of sum(dloss * loss + dentropy * entropy), dhidden with the parts of all ranks.
    """
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    splits, smooth = options.splits, options.label_smoothing
    if group.size > 1:
        agree(group, hidden.device, describe("linear_cross_entropy", hidden.dtype, hidden.shape, splits=list(splits)))
    h, w = hidden.to(wide), all_gather_reference(weight, 0, group, splits).to(wide)
    x = h @ w.t()
    if bias is not None:
        x = x + all_gather_reference(bias, 0, group, splits).to(wide)
    slope: Tensor | float = 1.0
    if options.softcap > 0:
        tanh = torch.tanh(x / options.softcap)
        x, slope = options.softcap * tanh, 1 - tanh * tanh
    kept = labels != options.ignore_index
    target = labels.where(kept, 0)[:, None]
    lse = torch.logsumexp(x, -1)
    loss = (1 - smooth) * (lse - x.gather(1, target)[:, 0]) + options.z_loss * lse * lse
    if smooth > 0:
        loss = loss + smooth * (lse - x.mean(-1))
    log_p = x - lse[:, None]
    p = torch.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    results = loss * kept, lse, entropy * kept
    if dloss is None:
        return *results, None, None, None
    onehot = torch.zeros_like(x).scatter_(1, target, 1.0)
    dx = p * (1 + 2 * options.z_loss * lse)[:, None] - (1 - smooth) * onehot - smooth / x.shape[1]
    dx = dx * (dloss.to(wide) * kept)[:, None]
    if dentropy is not None:
        dx = dx - p * (log_p + entropy[:, None]) * (dentropy.to(wide) * kept)[:, None]
    dx = dx * slope
    start = sum(splits[: group.rank])
    mine = dx[:, start : start + splits[group.rank]]
    dbias = None if bias is None else mine.sum(0).to(bias.dtype)
    return *results, (dx @ w).to(hidden.dtype), (mine.t() @ h).to(weight.dtype), dbias
