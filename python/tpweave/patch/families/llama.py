"""Llama: pre-norm decoder, grouped query heads, rotary positions, SwiGLU."""

from __future__ import annotations

from tpweave.patch.family import AttentionSpec, Family, GatedMLPSpec

LLAMA = Family(
    name="llama",
    attention=(AttentionSpec(module="LlamaAttention"),),
    gated_mlps=(GatedMLPSpec(module="LlamaMLP"),),
    embeddings=(("LlamaModel", "embed_tokens"),),
    heads=(("LlamaForCausalLM", "lm_head"),),
    rms_norms={"LlamaRMSNorm": "variance_epsilon"},
    reasons={"Linear": "task head: every rank computes it"},
)
