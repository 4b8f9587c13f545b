"""An embedding table divided over ranks by vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tpweave.comm.vocab_parallel_embedding import vocab_parallel_embedding
from tpweave.distributed.group import resolve_group
from tpweave.layers.sharding import Shard, ShardedModule

Tensor = torch.Tensor


class VocabParallelEmbedding(ShardedModule):
    """`nn.Embedding` of which each rank holds the rows of some tokens.

    | tensor         | shape    | on each rank |
    |----------------|----------|--------------|
    | ids            | [...]    | the same, integers in [0, V) |
    | weight_shard_v | [v, H]   | its rows     |
    | y              | [..., H] | the same     |

        forward   y = weight_shard_v[id - start] of the rank where start <= id < stop   (`vocab_parallel_embedding`)
        wgrad     dweight_shard_v[id - start] += dy where start <= id < stop

    Args:
        num_embeddings: V.
        embedding_dim: H.
        padding_idx: the token whose row gets no gradient.
        group: see `tpweave.init`.
        splits: rows per rank (default: even).
        device, dtype: of the table; initialised whole and then sliced, as `ColumnParallelLinear`.

    Raises:
        ValueError: splits that do not fit or overlap; an id outside [0, V).

    Example:
        >>> embed = tpweave.layers.VocabParallelEmbedding.from_embedding(model.embed_tokens, group)
    """

    weight: nn.Parameter

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, group: Any = None,
        splits: Sequence[int] | Shard | None = None, device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.group, self.shards = resolve_group(group), {}
        self._fill(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype), splits)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, group: Any = None, splits: Sequence[int] | Shard | None = None
    ) -> VocabParallelEmbedding:
        """This rank's part of `embedding`, which is left as it is.

        Raises:
            ValueError: the embedding renormalises rows, scales gradients by frequency or makes sparse gradients.
        """
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ValueError("VocabParallelEmbedding has no max_norm, scale_grad_by_freq or sparse gradients")
        layer = cls._bare(resolve_group(group))
        layer._fill(embedding, splits)
        return layer

    def _fill(self, embedding: nn.Embedding, splits: Sequence[int] | Shard | None) -> None:
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.shard = Shard.of(embedding.num_embeddings, self.group.size, splits, type(self).__name__)
        if self.shard.has_replicas:
            raise ValueError(f"VocabParallelEmbedding needs parts that do not overlap, got {list(self.shard.ranges)}")
        self.padding_idx = embedding.padding_idx
        self._adopt("weight", embedding.weight, 0, self.shard)

    def forward(self, ids: Tensor) -> Tensor:
        splits = [stop - start for start, stop in self.shard.ranges]
        return vocab_parallel_embedding(ids, self.weight, self.group, splits=splits, padding_idx=self.padding_idx)

    def extra_repr(self) -> str:
        start, stop = self.shard.ranges[self.group.rank]
        return f"{self.num_embeddings} [{start}:{stop}], {self.embedding_dim}"
