"""Model types that read text together with images, video or sound."""

from typing import Any

import torch

from corrections import inputs, media

B = 2
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

CLASSES: dict[str, str] = {"shieldgemma2": "ShieldGemma2ForImageClassification"}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5gemma2": {"encoder": {"mm_tokens_per_image": 4}},
    "qwen4_exp": {
        "text_config": {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    },
    "nemotron_h_omni": {"text_config": {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16}},
    "neomme": {"head_dim": 16},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "emu3": {
        "vocabulary_map": {
            "<image>": 100,
            "<|extra_200|>": 101,
            **{f"<|visual token {i:06}|>": 110 + i for i in range(8)},
        },
        "vq_config": {"codebook_size": 8, "base_channels": 32, "channel_multiplier": [1, 1]},
    },
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"]},
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
    },
    "align": {
        "projection_dim": 8,
        "vision_config": {
            "in_channels": [32],
            "out_channels": [32],
            "kernel_sizes": [3],
            "depthwise_padding": [],
            "strides": [1],
            "num_block_repeats": [1],
            "expand_ratios": [1],
            "hidden_dim": 32,
            "width_coefficient": 0.025,
        },
    },
    "blip-2": {"image_token_index": 100, "num_query_tokens": 4},
    "bridgetower": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "text_config": {"hidden_size": 64},
        "vision_config": {"hidden_size": 64},
    },
    "chameleon": {
        "vocabulary_map": {"<image>": 100, **{f"IMGIMG{chr(65 + i)}Z": 110 + i for i in range(8)}},
        "vq_config": {"base_channels": 32, "resolution": 32, "channel_multiplier": [1, 1], "num_embeddings": 8},
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": {"global_attn_indexes": [0, 1]}},
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [48, 32],
        }
    },
    "granite4_vision": {
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
        "image_grid_pinpoints": [[64, 64]],
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 128},  # its Q-Former's heads are of 64 each
    },
    "mllama": {"vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 64}},
    "molmo2": {
        "image_patch_id": 100,
        "vision_config": {"num_position_embeddings": 16},
        "adapter_config": {"vision_feature_layer": [-1, -2]},
    },
    "aria": {"projector_patch_to_query_dict": {16: 8}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "gemma3": {"mm_tokens_per_image": 4},
    "shieldgemma2": {"mm_tokens_per_image": 4, "yes_token_index": 10, "no_token_index": 11},
    "llama4": {
        "vision_config": {
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        }
    },
    "llava_next": {"image_grid_pinpoints": [[64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 64]]},
    "vipllava": {"vision_feature_layers": [-1, -2]},
    "voxtral": {"audio_token_id": 100, "audio_config": {"intermediate_size": 128}},
    "glmasr": {"audio_config": {"intermediate_size": 128}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 1, 1]}, "head_dim": 8}},
    "instructblip": {"image_token_index": 100, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_index": 100, "num_query_tokens": 4},
    "kimi_k25": {"vision_config": {"pos_emb_height": 8, "pos_emb_width": 8}},
    "kosmos-2": {"latent_query_num": 4, "text_config": {"layers": 2}},
    "kosmos-2.5": {
        "latent_query_num": 4,
        "text_config": {"layers": 2},
        "vision_config": {"patch_embed_hidden_size": 192},
    },
    "minicpm_ocr": {"image_token_id": 100, "insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpmv4_6": {"image_token_id": 100, "insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "minicpmv4_7": {"image_token_id": 100, "insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {"out_hidden_size": 128},
    "phi4_multimodal": {
        "vision_config": {"crop_size": 32, "image_token_id": 98},
        "audio_config": {"audio_token_id": 99, "ext_pw_out_channel": 32, "depthwise_separable_out_channel": 32},
    },
    "qwen2_5_omni_thinker": {"vision_start_token_id": 105},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 105},
    "step3p7": {"text_config": {"sliding_window": 5}},
}


@inputs("blip_2_qformer")
def _(model: Any, source: Any) -> dict[str, Any]:
    return {
        "query_embeds": source(B, 4, 32),
        "encoder_hidden_states": source(B, 9, model.config.encoder_hidden_size),
        "encoder_attention_mask": torch.tensor([[1] * 9, [1] * 6 + [0] * 3]),
    }


@media("image", "colqwen2")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(B, 16, 384), "image_grid_thw": torch.tensor([[1, 4, 4]] * B)}


@media("image", "deepseek_vl_hybrid")
def _(config: Any, source: Any) -> dict[str, Any]:
    size = config.high_res_vision_config.image_size
    return {"pixel_values": source(B, 3, 32, 32), "high_res_pixel_values": source(B, 3, size, size)}


@media("other", "evolla")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"protein_input_ids": source.ids(B, 9, below=20), "protein_attention_mask": torch.ones(B, 9).long()}


@media("image", "glm_image")
def _(config: Any, source: Any) -> dict[str, Any]:
    """One image to read and one to make, a text."""
    return {
        "pixel_values": source(B * 16, 192),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2 * B),
        "images_per_sample": torch.tensor([2] * B),
    }


@media("image", "granite_docling")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(B, 1, 3, 32, 32), "pixel_attention_mask": torch.ones(B, 1).bool()}


@media("image", "idefics")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(B, 1, 3, 32, 32), "image_attention_mask": torch.ones(B, 13, 1).long()}


@media("image", "instructblip")
def _(config: Any, source: Any) -> dict[str, Any]:
    ids = source.ids(B, 6)
    return {"pixel_values": source(B, 3, 32, 32), "qformer_input_ids": ids, "qformer_attention_mask": ids > 0}


@media("video", "instructblipvideo")
def _(config: Any, source: Any) -> dict[str, Any]:
    ids = source.ids(B, 6)
    return {"pixel_values": source(B, 4, 3, 32, 32), "qformer_input_ids": ids, "qformer_attention_mask": ids > 0}


@media("image", "kosmos-2")
def _(config: Any, source: Any) -> dict[str, Any]:
    places = torch.zeros(B, 13).bool()
    places[:, 5:9] = True
    return {"pixel_values": source(B, 3, 32, 32), "image_embeds_position_mask": places}


@media("image", "kosmos-2.5")
def _(config: Any, source: Any) -> dict[str, Any]:
    places = torch.zeros(B, 13).bool()
    places[:, 5:9] = True
    patches = torch.cat([1 + torch.arange(16).reshape(1, 8, 2).expand(B, -1, -1) % 4, source(B, 8, 192)], dim=-1)
    return {"flattened_patches": patches, "image_embeds_position_mask": places.long()}


@media("image", "inkling2")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(B * 4, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2]] * B)}


@media("image", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(1, 3, 8, 8 * 16 * B), "target_sizes": torch.tensor([[4, 4]] * B)}


@media("image", "mllama")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {
        "pixel_values": source(B, 1, 4, 3, 32, 32),
        "aspect_ratio_ids": torch.ones(B, 1).long(),
        "aspect_ratio_mask": torch.ones(B, 1, 4).long(),
    }


@media("image", "molmo2")
def _(config: Any, source: Any) -> dict[str, Any]:
    """Two images of 16 patches, which the pooling attends by four, and the last of them by two."""
    pooled = torch.arange(16 * B).view(-1, 4)
    pooled[-1, 2:] = -1
    return {
        "pixel_values": source(B, 16, 3 * config.vision_config.patch_size**2),
        "image_token_pooling": pooled,
        "image_grids": torch.tensor([[2, 2, 0, 0]] * B),
    }


@inputs("muse_glimmer_assistant")
def _(model: Any, source: Any) -> dict[str, Any]:
    """With masks: those that it makes are as long as the noise, while its keys are those of the context too."""
    context, seen = source(B, 6, model.encoder.fc.in_features), torch.ones(B, 1, 5, 11, dtype=torch.bool)
    seen[0, :, :, :2] = False
    return {
        "noise_embeds": source(B, 5, model.config.hidden_size),
        "context_hidden_states": context,
        "attention_mask": {"full_attention": seen, "sliding_attention": seen},
    }


@media("audio", "muse_spark")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"input_values": source(B, 960)}


@media("image", "phi4_multimodal")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {
        "image_pixel_values": source(B, 2, 3, 32, 32),
        "image_sizes": torch.tensor([[32, 32]] * B),
        "image_attention_mask": torch.ones(B, 2, 4, 4).long(),
    }


@media("audio", "phi4_multimodal")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {
        "audio_input_features": source(B, 40, config.audio_config.input_size),
        "audio_embed_sizes": torch.tensor([5] * B),
        "audio_attention_mask": torch.ones(B, 40).bool(),
    }


@media("audio", "granite_speech", "granite_speech_plus")
def _(config: Any, source: Any) -> dict[str, Any]:
    """All but one of the 9 features that the projector makes of the sound."""
    mask = torch.ones(B, 9).bool()
    mask[:, -1] = False
    return {"input_features": source(B, 40, config.encoder_config.input_dim), "input_features_mask": mask}


@media("other", "pi0")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {
        "state": source(B, config.max_state_dim),
        "noise": source(B, config.chunk_size, config.max_action_dim),
        "timestep": torch.tensor([0.3, 0.6]),
        "pixel_values": source(B, 1, 3, 32, 32),
        "pixel_attention_mask": torch.ones(B, 1).bool(),
    }


@media("audio", "fun_asr_nano")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"input_features": source(B, 24, 112), "input_features_mask": torch.ones(B, 24).long()}


@media("image", "video_llama_3")
def _(config: Any, source: Any) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4]] * B)
    return {"pixel_values": source(16 * B, 192), "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2] * B)}


@media("other", "udop")
def _(config: Any, source: Any) -> dict[str, Any]:
    corners = source(B, 13, 2).sigmoid() / 2
    return {"bbox": torch.cat([corners, corners + 0.3], dim=-1), "pixel_values": source(B, 3, 32, 32)}
