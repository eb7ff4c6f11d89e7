"""Model types that hold a model of timm."""

from typing import Any

import torch

from corrections import inputs, media

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
PERCEPTION = {**VIT, "ref_feat_shape": (4, 4)}
HYBRID = {"layers": (1, 1, 1, 1, 1), "embed_dims": (8, 16, 32, 32, 32)}
"""FastViT's: attention, with heads of 32 each, in its last two stages."""
CONVOLUTIONS = {"features_only": True, "out_indices": (0, 1, 2, 3), "embed_dim": (8, 16, 32, 64), "depth": (1,) * 4}

TRACKER = {
    "backbone_config": {
        "model_type": "timm_wrapper",
        "architecture": "repvit_m1",
        "model_args": CONVOLUTIONS,
        "num_classes": 2,
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
FRAMES = {
    "model_type": "timm_wrapper",
    "architecture": "vit_pe_core_large_patch14_336",
    "model_args": {**PERCEPTION, "attn_pool_num_heads": 4},
    "num_classes": 32,
}
FRAMES_ENCODER = {"vision_config": FRAMES, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
SOUND_ENCODER = {"dac_config": {"encoder_hidden_size": 4, "downsampling_ratios": [4, 4]}}
BOTH_ENCODER = {"audio_config": SOUND_ENCODER, "video_config": FRAMES_ENCODER}
MOBILE = {"channel_multiplier": 0.125, "num_features": 32}

CONFIGS: dict[str, dict[str, Any]] = {
    "timm_wrapper": {"architecture": "vit_tiny_patch16_224", "model_args": VIT},
    "timm_backbone": {"backbone": "test_vit", "out_indices": [1, 3]},
    "edgetam_vision_model": TRACKER,
    "edgetam": {
        "vision_config": {"model_type": "edgetam_vision_model", "fpn_hidden_size": 32, **TRACKER},
        "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
    },
    "fast_vlm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "hidden_size": 64,
            "model_args": HYBRID,
        }
    },
    "perception_lm": {
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_pe_lang_large_patch14_448",
            "model_args": {**PERCEPTION, "global_pool": ""},
        }
    },
    "pe_video_encoder": FRAMES_ENCODER,
    "pe_video": {"video_config": FRAMES_ENCODER},
    "pe_audio_video_encoder": BOTH_ENCODER,
    "pe_audio_video": {"audio_video_config": BOTH_ENCODER},
    "gemma3n_vision": {"model_args": MOBILE, "hidden_size": 32},
    "gemma3n": {
        "vision_soft_tokens_per_image": 256,
        "vision_config": {"model_args": MOBILE, "hidden_size": 32, "vocab_offset": 128, "vocab_size": 8},
        "audio_config": {"vocab_offset": 136, "vocab_size": 8},
    },
}


@inputs("timm_backbone")
def images_for_test_vit(model: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(2, 3, 64, 64)}


@inputs("edgetam_vision_model")
def faint_images(model: Any, source: Any) -> dict[str, Any]:
    """RepViT with random weights makes them 1e5 times as large."""
    return {"pixel_values": 1e-4 * source(2, 3, 64, 64)}


@inputs("edgetam")
def faint_images_with_points(model: Any, source: Any) -> dict[str, Any]:
    points = {"input_points": 64 * source(2, 1, 3, 2).sigmoid(), "input_labels": torch.tensor([[[1, 0, 1]]] * 2)}
    return {**faint_images(model, source), **points}


@media("image", "fast_vlm")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(2, 3, 128, 128)}


@media("image", "perception_lm")
def _(config: Any, source: Any) -> dict[str, Any]:
    return {"pixel_values": source(2, 1, 3, 32, 32)}


@inputs("pe_video_encoder")
def frames(model: Any, source: Any) -> dict[str, Any]:
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[0, 3:] = 0
    return {"pixel_values_videos": source(2, 5, 3, 32, 32), "padding_mask_videos": mask}


@inputs("pe_video")
def frames_and_text(model: Any, source: Any) -> dict[str, Any]:
    return {**frames(model, source), "input_ids": source.ids(2, 13), "attention_mask": torch.ones(2, 13).long()}


@inputs("pe_audio_video_encoder")
def frames_and_sound(model: Any, source: Any) -> dict[str, Any]:
    return {**frames(model, source), "input_values": source(2, 1, 640)}


@inputs("pe_audio_video")
def frames_sound_and_text(model: Any, source: Any) -> dict[str, Any]:
    return {**frames_and_text(model, source), "input_values": source(2, 1, 640)}
