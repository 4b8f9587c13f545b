"""Tiny random models of Transformers' families, and inputs for them."""

import torch

VOCAB, PAD = 61, 0
TEXT = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "pad_token_id": PAD}
DECODER = {
    **TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip


def decoders():
    """name -> (class name, config): models that predict the next token, with windows and chunks of 4 or 5 tokens."""
    import transformers as hf

    return {
        "llama": ("LlamaForCausalLM", lambda: hf.LlamaConfig(**DECODER)),
        "qwen2": (
            "Qwen2ForCausalLM",
            lambda: hf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1),
        ),
        "qwen3": ("Qwen3ForCausalLM", lambda: hf.Qwen3Config(**DECODER)),
        "mistral": ("MistralForCausalLM", lambda: hf.MistralConfig(**DECODER, sliding_window=4)),
        "gemma2": (
            "Gemma2ForCausalLM",
            lambda: hf.Gemma2Config(
                **DECODER, sliding_window=5, attn_logit_softcapping=2.0, query_pre_attn_scalar=3, **LAYERS
            ),
        ),
        "gemma3": ("Gemma3ForCausalLM", lambda: hf.Gemma3TextConfig(**DECODER, sliding_window=5, **LAYERS)),
        "gpt_oss": (
            "GptOssForCausalLM",
            lambda: hf.GptOssConfig(
                **DECODER, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None, **LAYERS
            ),
        ),
        "llama4": (
            "Llama4ForCausalLM",
            lambda: hf.Llama4TextConfig(
                **DECODER,
                intermediate_size_mlp=20,
                num_local_experts=2,
                interleave_moe_layer_step=2,
                no_rope_layers=[1, 0],
                attention_chunk_size=5,
            ),
        ),
        # Its mask has a window that its attention is not told of.
        "phimoe": (
            "PhimoeForCausalLM",
            lambda: hf.PhimoeConfig(**{**DECODER, "sliding_window": 5, "num_local_experts": 2}),
        ),
        "gpt2": (
            "GPT2LMHeadModel",
            lambda: hf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=24,
                n_layer=2,
                n_head=3,
                n_positions=64,
                bos_token_id=1,
                eos_token_id=None,
                pad_token_id=PAD,
                attn_pdrop=0.0,
                embd_pdrop=0.0,
                resid_pdrop=0.0,
            ),
        ),
    }


def others():
    """name -> (class name, config): encoders, encoder-decoders, and models of images or sound."""
    import transformers as hf

    text = {**TEXT, "num_attention_heads": 3, "max_position_embeddings": 32}
    clip_text = {**text, "eos_token_id": 2, "bos_token_id": 1}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {
        "bert": ("BertForMaskedLM", lambda: hf.BertConfig(**text, **no_dropout)),
        "modernbert": (
            "ModernBertForMaskedLM",
            lambda: hf.ModernBertConfig(
                **text,
                local_attention=6,
                global_attn_every_n_layers=2,
                reference_compile=False,
                bos_token_id=1,
                eos_token_id=2,
                cls_token_id=1,
                sep_token_id=2,
            ),
        ),
        "vit": ("ViTForImageClassification", lambda: hf.ViTConfig(**VISION, **no_dropout, num_labels=3)),
        "clip": (
            "CLIPModel",
            lambda: hf.CLIPConfig(text_config=clip_text, vision_config=VISION, projection_dim=16),
        ),
        "siglip": (
            "SiglipModel",
            lambda: hf.SiglipConfig(text_config={**clip_text, "projection_size": 24}, vision_config=VISION),
        ),
        "whisper": (
            "WhisperForConditionalGeneration",
            lambda: hf.WhisperConfig(
                vocab_size=VOCAB,
                d_model=24,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=3,
                decoder_attention_heads=3,
                encoder_ffn_dim=20,
                decoder_ffn_dim=20,
                num_mel_bins=6,
                max_source_positions=10,
                max_target_positions=32,
                pad_token_id=PAD,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                suppress_tokens=None,
                begin_suppress_tokens=None,
                dropout=0.0,
            ),
        ),
        "t5": (
            "T5ForConditionalGeneration",
            lambda: hf.T5Config(
                vocab_size=VOCAB,
                d_model=24,
                d_kv=8,
                d_ff=20,
                num_layers=2,
                num_heads=3,
                dropout_rate=0.0,
                pad_token_id=PAD,
                decoder_start_token_id=PAD,
                eos_token_id=1,
            ),
        ),
        "llava": (
            "LlavaForConditionalGeneration",
            lambda: hf.LlavaConfig(
                text_config=hf.LlamaConfig(**DECODER),
                vision_config=hf.CLIPVisionConfig(**VISION),
                image_token_index=3,
                image_seq_length=9,
                vision_feature_select_strategy="default",
                vision_feature_layer=-1,
            ),
        ),
        "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    }


def _qwen2_5_vl():
    import transformers as hf

    return hf.Qwen2_5_VLConfig(
        text_config={
            **DECODER, "hidden_size": 32,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 20, "out_hidden_size": 32, "depth": 2, "num_heads": 3,
            "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 2, "window_size": 8,
            "fullatt_block_indexes": [1], "in_channels": 3,
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6, pad_token_id=PAD,
    )  # fmt: skip


def build(name):
    """(a model with the eager implementation, the same with tpweave's), weights alike and away from their constants."""
    import transformers as hf

    import tpweave

    tpweave.register_attention()
    known = decoders()
    kind, config = known[name] if name in known else others()[name]
    models = []
    for implementation in ("eager", "tpweave"):
        torch.manual_seed(0)
        made = config()
        made._attn_implementation = implementation
        model = getattr(hf, kind)(made).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.2)
        models.append(model)
    return models


def padded_text(side, lengths=(11, 7, 2)):
    """Tokens [B, S] padded on the left or right, their mask, and labels without the padding."""
    generator = torch.Generator().manual_seed(1)
    size = max(lengths)
    ids = torch.randint(10, VOCAB, (len(lengths), size), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, slice(length, None) if side == "right" else slice(0, size - length)] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    # The first token after padding is predicted at a position that sees nothing: what stands there is undefined.
    first = torch.diff(mask, prepend=mask[:, :1], dim=1) == 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | first, -100)}


def inputs_of(name):
    """Inputs of `others()`'s model, with a loss."""
    torch.manual_seed(3)
    text = padded_text("right")
    if name in ("bert", "modernbert"):
        return text
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12), "labels": torch.tensor([0, 2])}
    if name in ("clip", "siglip"):
        text.pop("labels")
        return {**text, "pixel_values": torch.randn(3, 3, 12, 12), "return_loss": True}
    if name == "whisper":
        return {"input_features": torch.randn(3, 6, 20), "labels": text["labels"]}
    if name == "t5":
        return text
    ids = torch.randint(10, VOCAB, (2, 20))
    if name == "llava":
        ids[:, 2:11] = 3
        mask = torch.ones_like(ids)
        mask[1, 17:] = 0
        return {
            "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 12, 12),
            "labels": ids.masked_fill(mask == 0, -100),
        }  # fmt: skip
    # Images of 8 x 4 and 4 x 12 patches: 8 and 12 tokens.
    ids[0, 1], ids[0, 2:10] = 5, 3
    ids[1, 1], ids[1, 2:14] = 5, 3
    kinds = (ids == 3).int()
    grid = torch.tensor([[1, 8, 4], [1, 4, 12]])
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(32 + 48, 12),
        "image_grid_thw": grid, "mm_token_type_ids": kinds, "labels": ids,
    }  # fmt: skip
