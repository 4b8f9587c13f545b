"""Qwen2: Llama with biases on queries, keys and values, and a sliding window in some layers."""

from __future__ import annotations

from tpweave.patch.family import AttentionSpec, Family, GatedMLPSpec

QWEN2 = Family(
    name="qwen2",
    attention=(AttentionSpec(module="Qwen2Attention"),),
    gated_mlps=(GatedMLPSpec(module="Qwen2MLP"),),
    embeddings=(("Qwen2Model", "embed_tokens"),),
    heads=(("Qwen2ForCausalLM", "lm_head"),),
    rms_norms={"Qwen2RMSNorm": "variance_epsilon"},
    reasons={"Linear": "task head: every rank computes it"},
)
