"""Cross entropy of a linear layer onto a vocabulary that is divided over the ranks, without the logits.

    x = hidden @ weight^T + bias, through softcap;  lse = log(sum(exp(x)));  p = exp(x - lse)
    loss = (1 - e) (lse - x[label]) + e (lse - mean(x)) + z lse^2;  entropy H = -sum(p (x - lse))
    dx = dloss (p (1 + 2 z lse) - (1 - e) onehot(label) - e / V) - dH p (x - lse + H);  dx *= 1 - (x / softcap)^2
    dhidden = dx @ weight;  dweight = dx^T @ hidden;  dbias = sum over tokens of dx

The row `chunked` holds the logits of a few tokens at a time. The ranks exchange five numbers a token, and add up
dhidden once. Where only the sum of the losses is wanted, its gradients are made while the chunk's logits are there
(three matmuls in all, as by autograd); per-token losses and entropies are differentiated by computing the logits again.

hidden, labels and the loss are the same on all ranks, and so is the loss's gradient (the convention of
`tpweave.comm.regions`); dhidden has the parts of all ranks.

Dims: T tokens, D hidden size, V vocabulary (v on this rank). Sources: Hsu et al., "Liger Kernel", 2024 (gradients in
the forward); Shoeybi et al., "Megatron-LM", 2019 (a divided vocabulary); Wijmans et al., "Cut Your Losses", 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import torch

from tpweave.comm.all_gather import all_gather
from tpweave.comm.all_reduce import all_reduce
from tpweave.dispatch import FLOATS, Backend, Inputs, Needs, Op
from tpweave.distributed.group import TPGroup, resolve_group
from tpweave.distributed.splits import check_splits
from tpweave.library import is_plain_call, register_op
from tpweave.native import _C
from tpweave.reference.comm.linear_cross_entropy import LossOptions, linear_cross_entropy_reference

if TYPE_CHECKING:
    from tpweave.distributed.group import GroupLike

Tensor = torch.Tensor
Outcome = tuple[Tensor, Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]

# Logits of a chunk on one rank: 64 MB in fp32. Small beside the logits of a batch, and enough tokens at any vocabulary
# that the matmuls do not suffer.
_CHUNK_ELEMENTS = 1 << 24
# Rows of dweight whose part of a chunk is made at a time, so that no second dweight is needed to add to.
_ROW_BLOCK = 1 << 14


def _multiplies_wide(weight: Tensor) -> bool:
    """Whether products are made in fp32, a block of rows after the other: torch has no fast product of fp16 on a CPU,
    and of bf16 only where there are instructions for it (64 rows, K 2048, N 4096, one thread of Zen 3: bf16 123 ms,
    fp32 18 ms)."""
    return weight.is_cpu and (
        weight.dtype == torch.float16 or (weight.dtype == torch.bfloat16 and _C.active_isa() != "avx512bf16")
    )


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    for first in range(0, weight.shape[0], _ROW_BLOCK):
        yield slice(first, first + _ROW_BLOCK)


class _Chunk:
    """The logits x of some tokens on this rank, in one buffer that later holds exp(x - top) and dx."""

    top: Tensor  # [tokens], the largest x on this rank
    weights: Tensor  # exp(x - top)

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: LossOptions) -> None:
        if _multiplies_wide(weight):
            self.x = torch.empty(hidden.shape[0], weight.shape[0])
            for block in _row_blocks(weight):
                self.x[:, block] = hidden.float() @ weight[block].float().t()
            if bias is not None:
                self.x += bias
        else:
            x = hidden @ weight.t() if bias is None else torch.addmm(bias, hidden, weight.t())
            self.x = x.float()
        self.softcap = options.softcap
        self.tanh: Tensor | None = None
        if self.softcap > 0:
            self.tanh = self.x.div_(self.softcap).tanh_()
            self.x = self.tanh * self.softcap

    def statistics(
        self, local_labels: Tensor, group: TPGroup, entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """lse, x at the label, sum of x and, for an entropy, sum of p x, over the whole vocabulary; [tokens] each."""
        tokens, rows = self.x.shape
        mine = torch.zeros(5, tokens, device=self.x.device)
        mine[0] = float("-inf")
        if rows > 0:
            here = (local_labels >= 0) & (local_labels < rows)
            mine[2] = self.x.gather(1, local_labels.clamp(0, rows - 1)[:, None])[:, 0].where(here, 0.0)
            mine[3] = self.x.sum(1)
            mine[0] = self.x.amax(1)
            # A vocabulary may be hidden with logits of -inf; p x is 0 there.
            self.top = mine[0].masked_fill(mine[0] == float("-inf"), 0.0)
            if entropy:
                self.weights = torch.exp(self.x - self.top[:, None])
                self.x.clamp_min_(-1e30)
                mine[4] = (self.weights * self.x).sum(1)
            else:
                self.weights = self.x.sub_(self.top[:, None]).exp_()
            mine[1] = self.weights.sum(1)
        every = mine[None] if group.size == 1 else all_gather(mine[None], 0, group)
        top = every[:, 0].amax(0)
        factors = torch.exp(every[:, 0] - top)
        total = (every[:, 1] * factors).sum(0)
        mean_x = (every[:, 4] * factors).sum(0) / total if entropy else None
        return top + total.log(), every[:, 2].sum(0), every[:, 3].sum(0), mean_x

    def gradient(
        self, lse: Tensor, local_labels: Tensor, dloss: Tensor, entropy: Tensor, dentropy: Tensor | None,
        options: LossOptions,
    ) -> Tensor:  # fmt: skip
        """dx [tokens, v], in the buffer of exp(x) or of x."""
        rows = self.x.shape[1]
        if rows == 0:
            return self.x
        factor = dloss * (1 + 2 * options.z_loss * lse)
        to_p = torch.exp(self.top - lse)
        if dentropy is None:
            dx = self.weights.mul_((factor * to_p)[:, None])
        else:
            p = self.weights.mul_(to_p[:, None])
            dx = self.x.add_((entropy - lse)[:, None]).mul_(-dentropy[:, None]).add_(factor[:, None]).mul_(p)
        smooth = options.label_smoothing
        if smooth > 0:
            dx.sub_((dloss * (smooth / sum(options.splits)))[:, None])
        here = (local_labels >= 0) & (local_labels < rows)
        at_label = (-(1 - smooth) * dloss).where(here, 0.0)
        dx.scatter_add_(1, local_labels.clamp(0, rows - 1)[:, None], at_label[:, None])
        if self.tanh is not None:
            dx.mul_(self.tanh.square_().neg_().add_(1.0))
        return dx


def _chunks(tokens: int, splits: Sequence[int]) -> Iterator[slice]:
    """The same on all ranks: each chunk is a collective."""
    step = max(1, _CHUNK_ELEMENTS // max(1, *splits))
    for first in range(0, tokens, step):
        yield slice(first, min(first + step, tokens))


def _add_products(dx: Tensor, hidden: Tensor, weight: Tensor, dhidden: Tensor, dweight: Tensor, *, first: bool) -> None:
    """dhidden = dx @ weight; dweight (fp32) += dx^T @ hidden, or = for the first tokens."""
    wide = _multiplies_wide(weight)
    h, dx = (hidden.float(), dx) if wide else (hidden, dx.to(weight.dtype))
    total = torch.zeros(hidden.shape) if wide else torch.mm(dx, weight, out=dhidden)
    for block in _row_blocks(weight):
        if wide:
            total.addmm_(dx[:, block], weight[block].float())
        if h.dtype == torch.float32:
            dweight[block].addmm_(dx[:, block].t(), h, beta=0 if first else 1)
        elif first:
            dweight[block] = dx[:, block].t() @ h
        else:
            dweight[block] += dx[:, block].t() @ h
    if wide:
        dhidden.copy_(total)


def linear_cross_entropy_chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, group: TPGroup, options: LossOptions,
    dloss: Tensor | None, dentropy: Tensor | None = None,
) -> Outcome:  # fmt: skip
    tokens = hidden.shape[0]
    smooth, vocabulary = options.label_smoothing, sum(options.splits)
    kept = labels != options.ignore_index
    local_labels = (labels - sum(options.splits[: group.rank])).where(kept, -1)
    loss, lse = (torch.empty(tokens, device=hidden.device) for _ in range(2))
    entropy = torch.zeros(tokens, device=hidden.device)
    dhidden = dweight = dbias = None
    if dloss is not None:
        dloss = dloss.float() * kept
        dentropy = None if dentropy is None else dentropy.float() * kept
        dhidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        dweight = (torch.empty if tokens > 0 else torch.zeros)(weight.shape, device=weight.device)
        dbias = None if bias is None else torch.zeros(bias.shape, device=bias.device)
    for part in _chunks(tokens, options.splits):
        chunk = _Chunk(hidden[part], weight, bias, options)
        top, target, total, mean_x = chunk.statistics(local_labels[part], group, options.entropy)
        lse[part] = top
        token_loss = (1 - smooth) * (top - target) + options.z_loss * top * top
        # Without smoothing a logit of -inf costs nothing.
        loss[part] = token_loss + smooth * (top - total / vocabulary) if smooth > 0 else token_loss
        if mean_x is not None:
            entropy[part] = top - mean_x
        if dloss is None or dhidden is None or dweight is None:
            continue
        dx = chunk.gradient(
            top, local_labels[part], dloss[part], entropy[part], None if dentropy is None else dentropy[part], options
        )
        if dbias is not None:
            dbias += dx.sum(0)
        _add_products(dx, hidden[part], weight, dhidden[part], dweight, first=part.start == 0)
    loss, entropy = loss.where(kept, 0.0), entropy.where(kept, 0.0)
    if dhidden is None or dweight is None:
        return loss, lse, entropy, None, None, None
    if group.size > 1:
        dhidden = all_reduce(dhidden, group)
    dbias = None if dbias is None or bias is None else dbias.to(bias.dtype)
    return loss, lse, entropy, dhidden, dweight.to(weight.dtype), dbias


LINEAR_CROSS_ENTROPY = Op("linear_cross_entropy", [
    Backend("chunked", linear_cross_entropy_chunked, Needs(dtypes=FLOATS)),
    Backend("reference", linear_cross_entropy_reference, Needs()),
])  # fmt: skip


def _run(hidden, weight, bias, labels, dloss, dentropy, group_name, splits, settings, backend):
    group = TPGroup.by_name(group_name)
    row = LINEAR_CROSS_ENTROPY.choose(Inputs([hidden, weight, bias], group=group), backend)
    return row.run(hidden, weight, bias, labels, group, LossOptions(tuple(splits), *settings), dloss, dentropy)


def _sum_impl(hidden, weight, bias, labels, group_name, splits, *rest):
    """The losses' sum or mean, and its gradients where they will be asked for."""
    *settings, mean, gradients, backend = rest
    count = (labels != settings[0]).sum() if mean else torch.ones((), device=hidden.device)
    dloss = (1 / count.clamp(min=1)).expand(labels.shape) if gradients else None
    loss, _, _, *grads = _run(
        hidden, weight, bias, labels, dloss, None, group_name, splits, [*settings, False], backend
    )
    return loss.sum() / count, *(hidden.new_empty(0) if grad is None else grad for grad in grads)


def _sum_fake(hidden, weight, bias, labels, group_name, splits, *rest):
    gradients = rest[-2]
    grads = (x.new_empty(x.shape if gradients else 0) if x is not None else hidden.new_empty(0)
             for x in (hidden, weight, bias))  # fmt: skip
    return hidden.new_empty((), dtype=_wide(hidden)), *grads


def _sum_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.has_bias = inputs[2] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _sum_backward(ctx, dsum, *_):
    if dsum is None:
        return (None,) * 13
    dhidden, dweight, dbias = ctx.saved_tensors
    grads = [dhidden, dweight, dbias if ctx.has_bias else None]
    # Mostly the loss is the end; on a GPU asking would cost more than multiplying.
    if not (dsum.is_cpu and is_plain_call(dsum) and dsum.item() == 1):
        grads = [None if grad is None else (grad * dsum).to(grad.dtype) for grad in grads]
    return *grads, *(None,) * 10


def _tokens_impl(hidden, weight, bias, labels, group_name, splits, *settings_backend):
    *settings, backend = settings_backend
    return _run(hidden, weight, bias, labels, None, None, group_name, splits, [*settings, True], backend)[:3]


def _wide(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _tokens_fake(hidden, weight, bias, labels, *_):
    return tuple(labels.new_empty(labels.shape, dtype=_wide(hidden)) for _ in range(3))


def _tokens_setup_context(ctx, inputs, output):
    hidden, weight, bias, labels, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, bias, labels)
    ctx.mark_non_differentiable(output[1])


def _tokens_backward(ctx, dloss, _, dentropy):
    hidden, weight, bias, labels = ctx.saved_tensors
    grads = _tokens_bwd_op(dloss, dentropy, hidden, weight, bias, labels, *ctx.rest)
    return *grads[:2], None if bias is None else grads[2], *(None,) * 8


def _tokens_bwd_impl(dloss, dentropy, hidden, weight, bias, labels, group_name, splits, *settings_backend):
    *settings, backend = settings_backend
    grads = _run(hidden, weight, bias, labels, dloss, dentropy, group_name, splits, [*settings, True], backend)[3:]
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


def _tokens_bwd_fake(dloss, dentropy, hidden, weight, bias, *_):
    return tuple(hidden.new_empty(0) if x is None else x.new_empty(x.shape) for x in (hidden, weight, bias))


_SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, str group_name, int[] splits, int ignore_index, "
    "float label_smoothing, float z_loss, float softcap"
)
_sum_op = register_op(
    f"linear_cross_entropy_sum({_SCHEMA}, bool mean, bool gradients, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_impl, _sum_fake, _sum_backward, _sum_setup_context,
)  # fmt: skip
_tokens_bwd_op = register_op(
    f"linear_cross_entropy_tokens_bwd(Tensor dloss, Tensor dentropy, {_SCHEMA}, str? backend) -> "
    "(Tensor, Tensor, Tensor)",
    _tokens_bwd_impl, _tokens_bwd_fake,
)  # fmt: skip
_tokens_op = register_op(
    f"linear_cross_entropy_tokens({_SCHEMA}, str? backend) -> (Tensor, Tensor, Tensor)",
    _tokens_impl, _tokens_fake, _tokens_backward, _tokens_setup_context,
)  # fmt: skip


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_smoothing: float, softcap: float,
    reduction: str,
) -> None:  # fmt: skip
    op = "linear_cross_entropy"
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden is {tuple(hidden.shape)}, weight is {tuple(weight.shape)}; they must be [..., D] and [v, D]"
        )
    if labels.shape != hidden.shape[:-1] or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"{op}: labels is {labels.dtype} {tuple(labels.shape)}; it must be torch.int64 {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, weight's rows need {(weight.shape[0],)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != hidden.dtype or x.device != hidden.device):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, hidden {hidden.dtype} on {hidden.device}")
    if not hidden.is_floating_point() or labels.device != hidden.device:
        raise ValueError(f"{op}: hidden is {hidden.dtype} on {hidden.device}, labels on {labels.device}")
    if not 0 <= label_smoothing <= 1 or not 0 <= softcap < float("inf"):
        raise ValueError(
            f"{op}: label_smoothing is {label_smoothing}, softcap {softcap}; they take [0, 1] and [0, inf)"
        )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is '{reduction}'; there are mean, sum, none")


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    # On a GPU this would wait for the device; in a compiled graph it would break it.
    if torch.compiler.is_compiling() or not labels.is_cpu:
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))]
    if wrong.numel() > 0:
        raise ValueError(
            f"linear_cross_entropy: label {int(wrong[0])} is not in [0, {vocabulary}), nor ignore_index {ignore_index}"
        )


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, group: GroupLike = None, *, bias: Tensor | None = None,
    ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean", return_entropy: bool = False,
    splits: Sequence[int] | None = None, backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Cross entropy of `hidden @ weight.T + bias` against `labels`, never holding the logits of more than some tokens.

    Args:
        hidden: [..., D], the same on all ranks; fp32, bf16, fp16 (chunked) or fp64 (reference).
        weight: [v, D], this rank's rows of the vocabulary, of hidden's dtype.
        labels: [...] int64 in [0, V), numbers of the whole vocabulary, the same on all ranks.
        group: the ranks over which the vocabulary is divided: None (the default group; a lone process has it whole), a
            `TPGroup`, a `ProcessGroup` or a 1-D `DeviceMesh`.
        bias: [v].
        ignore_index: the label of tokens without loss, as of `torch.nn.functional.cross_entropy`.
        label_smoothing: share of the target that is spread over the vocabulary.
        z_loss: factor of lse^2, which is added to each token's loss (Chowdhery et al., "PaLM", 2022).
        softcap: logits become softcap * tanh(logit / softcap); 0 for none.
        reduction: "mean" over the tokens not ignored (NaN where there are none, as torch), "sum", or "none":
            each token's loss [...], for plain settings its negative log-probability.
        return_entropy: also return the entropy [...] in nats of each token's distribution, differentiable, 0 for
            ignored tokens.
        splits: each rank's v, the same list on all ranks; None asks the ranks, which breaks a compiled graph.
        backend: force one row of the table; the same on all ranks.

    Returns:
        the loss in fp32 (fp64 for fp64), with `return_entropy` `(loss, entropy)`. Gradients flow to hidden, weight and
        bias; they take the gradient of the loss to be the same on all ranks.

    Raises:
        ValueError: shapes, dtypes, devices or options do not fit together, or a label outside the vocabulary.
        CollectiveMismatchError: the ranks' shapes differ.
        PeerFailureError: a rank died or did not come before the timeout.

    Example:
        >>> loss = tpweave.linear_cross_entropy(hidden[:, :-1], lm_head.weight, tokens[:, 1:])
    """
    _check(hidden, weight, bias, labels, label_smoothing, softcap, reduction)
    found = resolve_group(group)
    if splits is not None:
        sizes = check_splits("linear_cross_entropy", "splits", splits, found.size)
        if sizes[found.rank] != weight.shape[0]:
            raise ValueError(
                f"linear_cross_entropy: weight has {weight.shape[0]} rows, splits {sizes} gives rank {found.rank} "
                f"{sizes[found.rank]}"
            )
    elif found.size == 1:
        sizes = [weight.shape[0]]
    else:
        sizes = all_gather(torch.tensor([weight.shape[0]]), 0, found).tolist()
    if sum(sizes) == 0:
        raise ValueError("linear_cross_entropy: the vocabulary is empty on all ranks")
    _check_labels(labels, ignore_index, sum(sizes))
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long()
    call = (flat, weight, bias, flat_labels, found.name, sizes, ignore_index, label_smoothing, z_loss, softcap)
    if reduction != "none" and not return_entropy:
        learns = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
        return _sum_op(*call, reduction == "mean", torch.is_grad_enabled() and learns, backend)[0]
    loss, _, entropy = _tokens_op(*call, backend)
    if reduction == "none":
        loss = loss.view(labels.shape)
    else:
        loss = loss.sum() / ((flat_labels != ignore_index).sum() if reduction == "mean" else 1)
    return (loss, entropy.view(labels.shape)) if return_entropy else loss
