"""Qwen3: Qwen2 without those biases, with an RMS norm over each head's dims of queries and keys."""

from __future__ import annotations

from tpweave.patch.family import AttentionSpec, Family, GatedMLPSpec

QWEN3 = Family(
    name="qwen3",
    attention=(AttentionSpec(module="Qwen3Attention", head_norms=("q_norm", "k_norm")),),
    gated_mlps=(GatedMLPSpec(module="Qwen3MLP"),),
    embeddings=(("Qwen3Model", "embed_tokens"),),
    heads=(("Qwen3ForCausalLM", "lm_head"),),
    rms_norms={"Qwen3RMSNorm": "variance_epsilon"},
    reasons={"Linear": "task head: every rank computes it"},
)
