"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from tpweave.patch.family import AttentionSpec, Family, GatedMLPSpec

MISTRAL = Family(
    name="mistral",
    attention=(AttentionSpec(module="MistralAttention"),),
    gated_mlps=(GatedMLPSpec(module="MistralMLP"),),
    embeddings=(("MistralModel", "embed_tokens"),),
    heads=(("MistralForCausalLM", "lm_head"),),
    rms_norms={"MistralRMSNorm": "variance_epsilon"},
    reasons={"Linear": "task head: every rank computes it"},
)
