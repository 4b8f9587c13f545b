"""Attention divided by heads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tpweave.comm.regions import copy_to_ranks
from tpweave.distributed.group import resolve_group
from tpweave.layers.heads import HeadSplit, LocalHeads
from tpweave.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpweave.ops.attention import attention, dropout_seed
from tpweave.ops.rope import rope

Tensor = torch.Tensor


def shard_projections(
    q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, split: HeadSplit, group: Any, *, copy_kv_input: bool = False
) -> tuple[ColumnParallelLinear, ColumnParallelLinear, ColumnParallelLinear, RowParallelLinear]:
    """This rank's parts of an attention's four linear layers.

    The caller passes the queries' input through `copy_to_ranks`, and that of keys and values unless `copy_kv_input`.
    """
    q_rows, kv_rows = split.q.scaled(split.head_dim), split.kv.scaled(split.head_dim)
    return (
        ColumnParallelLinear.from_linear(q, group, q_rows, copy_input=False),
        ColumnParallelLinear.from_linear(k, group, kv_rows, copy_input=copy_kv_input),
        ColumnParallelLinear.from_linear(v, group, kv_rows, copy_input=copy_kv_input),
        RowParallelLinear.from_linear(o, group, q_rows),
    )


def attend_local_heads(
    heads: LocalHeads, q: Tensor, k: Tensor, v: Tensor, *, group: Any = None, function: Callable[..., Any] = attention,
    sinks: Tensor | None = None, alibi_slopes: Tensor | None = None, bias: Tensor | None = None,
    mask: Tensor | None = None, dropout_p: float = 0.0, seed: Any = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Attention over this rank's heads, however its query heads map to its KV heads.

    q: [B, Sq, num_q, D]; k, v: [B, Skv, num_kv, D] (or [T, heads, D] for a `function` that takes that); `function` is
    `tpweave.attention` or like it, and gets `options`. sinks, alibi_slopes, bias and mask are those of all ranks' heads
    (or broadcast over heads), of which this takes its own; `group` sums the gradients of sinks and bias over its ranks.
    Dropout is what one process would draw, if the ranks' generators stand alike. Returns [B, Sq, num_q, D].
    """
    if group is not None:
        sinks, bias = (x if x is None or not x.requires_grad else copy_to_ranks(x, group) for x in (sinks, bias))

    def own(x: Tensor | None, dim: int) -> Tensor | None:
        return x if x is None or x.shape[dim] == 1 else x.narrow(dim, heads.first_q, heads.num_q)

    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None]
    sinks = None if sinks is None else sinks.narrow(0, heads.first_q, heads.num_q)
    alibi_slopes, bias, mask = own(alibi_slopes, -1), own(bias, 1), own(mask, -3)
    seed = dropout_seed(dropout_p, seed)
    if heads.num_q == 0:
        # Nothing to compute, but the result depends on all inputs: backward has its collectives on every rank.
        nothing = sum(x.flatten()[:0].sum() for x in (k, v, sinks, bias) if x is not None)
        return q.sum(-1, keepdim=True).expand(*q.shape[:-1], v.shape[-1]) + nothing
    if heads.kv_index is not None:
        index = torch.tensor(heads.kv_index, device=k.device)
        k, v = k.index_select(-2, index), v.index_select(-2, index)
    if dropout_p > 0:
        options.update(dropout_p=dropout_p, seed=seed, head_offset=heads.first_q)
    given = {"sinks": sinks, "alibi_slopes": alibi_slopes, "bias": bias, "mask": mask}
    return function(q, k, v, **{name: x for name, x in given.items() if x is not None}, **options)


class ParallelAttention(nn.Module):
    """Multi-head attention with its projections, each rank computing some of the heads.

    | tensor         | shape        | on each rank |
    |----------------|--------------|--------------|
    | x, y           | [B, S, H]    | the same     |
    | q_proj         | [hq * D, H]  | the rows of its query heads |
    | k_proj, v_proj | [hkv * D, H] | the rows of the KV heads that these read; replicated where ranks share one |
    | o_proj         | [H, hq * D]  | the columns of its query heads |

        forward   y = sum over ranks of attention(x @ q^T, x @ k^T, x @ v^T) @ o^T      (one all-reduce)
        dgrad     dx = sum over ranks of dq @ q + dk @ k + dv @ v                        (one all-reduce)
        wgrad     local; for replicated KV heads summed over their holders, so each ends with the true gradient

    Any number of heads goes over any number of ranks, see `HeadSplit`; a rank may have none.

    Args:
        hidden_size: H.
        num_heads: query heads.
        num_kv_heads: KV heads (default: as many), a divisor of num_heads.
        head_dim: D (default: H / num_heads).
        causal: whether each position sees only itself and those before it.
        bias: whether the projections have one.
        group: see `tpweave.init`.
        splits: query heads per rank (default: even).
        device, dtype: of the parameters.

    Raises:
        ValueError: head counts or splits that do not fit.

    Example:
        >>> attn = tpweave.layers.ParallelAttention(2048, 32, 8, causal=True)
        >>> y = attn(x, cos=cos, sin=sin)
    """

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None, *,
        causal: bool = False, bias: bool = False, group: Any = None, splits: Sequence[int] | None = None,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}: pass head_dim")
            head_dim = hidden_size // num_heads
        make = functools.partial(nn.Linear, bias=bias, device=device, dtype=dtype)
        linears = (
            make(hidden_size, num_heads * head_dim), make(hidden_size, num_kv_heads * head_dim),
            make(hidden_size, num_kv_heads * head_dim), make(num_heads * head_dim, hidden_size),
        )  # fmt: skip
        self._fill(linears, head_dim, causal, resolve_group(group), splits)

    @classmethod
    def from_linears(
        cls, q: nn.Linear, k: nn.Linear, v: nn.Linear, o: nn.Linear, head_dim: int, *, causal: bool = False,
        group: Any = None, splits: Sequence[int] | None = None,
    ) -> ParallelAttention:  # fmt: skip
        """This rank's part of an attention's linear layers, which are left as they are. Arguments as of the class."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._fill((q, k, v, o), head_dim, causal, resolve_group(group), splits)
        return layer

    def _fill(
        self, linears: tuple[nn.Linear, ...], head_dim: int, causal: bool, group: Any, splits: Sequence[int] | None
    ) -> None:
        q, k, v, o = linears
        self.split = HeadSplit.make(
            q.out_features // head_dim, k.out_features // head_dim, head_dim, group.size, splits=splits
        )
        self.heads, self.causal, self.group = self.split.local(group.rank), causal, group
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = shard_projections(q, k, v, o, self.split, group)

    def forward(self, x: Tensor, *, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any) -> Tensor:
        """x: [B, S, H]; cos, sin: as of `tpweave.rope`, for a rotary embedding; options: those of `tpweave.attention`
        (mask, window, softcap, dropout_p ...); what they hold per head is of all heads, and the same on all ranks."""
        x = copy_to_ranks(x, self.group)
        shape = (*x.shape[:2], -1, self.split.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if cos is not None and sin is not None:
            q, k = rope(q, k, cos, sin)
        elif cos is not None or sin is not None:
            raise ValueError("ParallelAttention needs both cos and sin, or neither")
        y = attend_local_heads(self.heads, q, k, v, group=self.group, causal=self.causal, **options)
        return self.o_proj(y.flatten(2))

    def extra_repr(self) -> str:
        q_heads = f"{self.heads.num_q} of {self.split.q.length} query heads"
        kv_heads = f"{self.heads.num_kv} of {self.split.kv.length} KV heads"
        return f"{q_heads}, {kv_heads}, head_dim={self.split.head_dim}, causal={self.causal}"
