"""Model types that read text alone."""

from typing import Any

import torch

from corrections import inputs

DOTS3 = {
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 12,
}
CLASSES: dict[str, str] = {"perceiver": "PerceiverForMaskedLM", "reformer": "ReformerModel"}

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {
        "use_cache": False,  # its caches cannot be made: the config has no num_hidden_layers
        "vocab_size": 260,
        "patching_threshold": 5.14,  # some bytes begin a patch and some do not
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"vocab_size": 260},
        "decoder_config": {"vocab_size": 260},
        "patcher_config": {"vocab_size": 260},
    },
    "bros": {"hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "diffusion_gemma": {
        "canvas_length": 8,
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    },
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "esm": {"pad_token_id": 0, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": 4, "vocab_size": 128},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        }
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 5},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "led": {"attention_window": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "lxmert": {"l_layers": 1, "r_layers": 1, "x_layers": 2},
    "perceiver": {"num_latents": 6, "num_self_attends_per_block": 2, "qk_channels": 16, "v_channels": 32},
    "qwen4_exp_text": {**INDEXER, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "t5gemma2_encoder": {"mm_tokens_per_image": 4, "text_config": {"dropout_rate": 0.0}},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [4, 4]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}


@inputs("decision_transformer")
def episodes(model: Any, source: Any) -> dict[str, Any]:
    config = model.config
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    return {
        "states": source(2, 6, config.state_dim),
        "actions": source(2, 6, config.act_dim),
        "returns_to_go": source(2, 6, 1),
        "timesteps": torch.arange(6).expand(2, -1),
        "attention_mask": mask,
    }


@inputs("jev")
def questions(model: Any, source: Any) -> dict[str, Any]:
    return {
        "input_ids": source.ids(1, 13),
        "marks": torch.tensor([[6, 12]]),
        "num_options": torch.tensor([[2, 3]]),
        "question_type_ids": torch.tensor([[0, 1]]),
    }


@inputs("bros")
def page(model: Any, source: Any) -> dict[str, Any]:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, -4:] = 0
    return {"input_ids": source.ids(2, 13), "attention_mask": mask, "bbox": source(2, 13, 4).sigmoid()}


@inputs("perceiver")
def tokens_for_latents(model: Any, source: Any) -> dict[str, Any]:
    length = model.config.max_position_embeddings
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -4:] = 0
    return {"inputs": source.ids(2, length), "attention_mask": mask}


@inputs("fsmt")
def translation(model: Any, source: Any) -> dict[str, Any]:
    """Without a cache: with one its decoder, given several tokens, shows all to each."""
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, -4:] = 0
    ids, translated = source.ids(2, 13), source.ids(2, 7)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": translated, "use_cache": False}


@inputs("lxmert")
def text_about_regions(model: Any, source: Any) -> dict[str, Any]:
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, -4:] = 0
    regions = {"visual_feats": source(2, 5, model.config.visual_feat_dim), "visual_pos": source(2, 5, 4).sigmoid()}
    return {"input_ids": source.ids(2, 13), "attention_mask": mask, **regions}
