"""BERT: post-norm encoder (or decoder) with biases everywhere, GELU MLP, learned positions."""

from __future__ import annotations

from tpweave.patch.family import AttentionSpec, Family, MLPSpec

_SMALL = "small, and needed whole: every rank computes it"

BERT = Family(
    name="bert",
    attention=(
        AttentionSpec(
            module="BertAttention",
            core="self",
            q="self.query",
            k="self.key",
            v="self.value",
            o="output.dense",
            head_dim="attention_head_size",
            local_attributes={"num_attention_heads": "q_heads", "all_head_size": "q_size"},
            cross=frozenset({"BertCrossAttention"}),
        ),
    ),
    mlps=(MLPSpec(module="BertLayer", up="intermediate.dense", down="output.dense"),),
    embeddings=(("BertEmbeddings", "word_embeddings"),),
    heads=(("BertLMPredictionHead", "decoder"),),
    aliases=frozenset({("BertLMPredictionHead", "bias")}),
    layer_norms=True,
    reasons={
        "Embedding": "positions and token types: small, and needed whole",
        "Linear": "pooler or task head, one row a sequence or once a model: every rank computes it",
        "BertPooler": _SMALL,
        "BertPredictionHeadTransform": _SMALL,
    },
)
