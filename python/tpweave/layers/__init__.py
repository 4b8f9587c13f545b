"""nn.Modules whose parameters are split over the ranks of a group."""

from __future__ import annotations

from tpweave.layers.attention import ParallelAttention
from tpweave.layers.embedding import VocabParallelEmbedding
from tpweave.layers.linear import ColumnParallelLinear, RowParallelLinear
from tpweave.layers.mlp import ParallelMLP
from tpweave.layers.norm import LayerNorm, RMSNorm

__all__ = [
    "ColumnParallelLinear",
    "LayerNorm",
    "ParallelAttention",
    "ParallelMLP",
    "RMSNorm",
    "RowParallelLinear",
    "VocabParallelEmbedding",
]
