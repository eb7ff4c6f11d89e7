"""Model types that read images or video, without text."""

import sys
from typing import Any

import torch

from corrections import Random, inputs

CLASSES: dict[str, str] = {}

RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}
RT_RESNET = {**RESNET, "model_type": "rt_detr_resnet", "layer_type": "basic"}
HGNET = {
    "model_type": "hgnet_v2",
    "embedding_size": 8,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 32],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 16, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
}
SWIN_SIZES = {
    "embed_dim": 16,
    "depths": [2, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "image_size": 128,
    "patch_size": 4,
}
SWIN = {"model_type": "swin", **SWIN_SIZES, "window_size": 2, "image_size": 64}
DINO = {
    "model_type": "dinov2",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "out_indices": [1, 2, 3, 4],
}
LAST, LAST_THREE, ALL = {"out_indices": [4]}, {"out_indices": [2, 3, 4]}, {"out_indices": [1, 2, 3, 4]}
REAL_TIME = {
    "encoder_in_channels": [8, 16, 32],
    "decoder_in_channels": [32, 32, 32],
    "num_queries": 7,
    "hidden_expansion": 0.5,
}
HYBRID = {**REAL_TIME, "num_denoising": 0, "backbone_config": {**HGNET, **LAST_THREE}}
DETR = {"backbone_config": {**RESNET, **LAST}, "num_queries": 7}
DEEPSTACK = {"deepstack_visual_indexes": (0, 1)}
SAM_VISION = {
    "output_channels": 32,
    "image_size": 64,
    "patch_size": 8,
    "window_size": 3,
    "global_attn_indexes": [1],
    "num_pos_feats": 16,
    "mlp_dim": 48,
}
SAM = {"vision_config": SAM_VISION, "prompt_encoder_config": {"image_size": 64, "patch_size": 8}}
HIERA = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 8,
    "image_size": [64, 64],
    "blocks_per_stage": [1, 2, 2, 1],
    "embed_dim_per_stage": [8, 16, 32, 64],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 4, 4, 2],
    "window_positional_embedding_background_size": [4, 4],
    "global_attention_blocks": [2],
    "mlp_ratio": 2.0,
}
SAM2_VISION = {
    "backbone_config": HIERA,
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}
SAM2 = {
    "vision_config": {"model_type": "sam2_vision_model", "fpn_hidden_size": 32, **SAM2_VISION},
    "prompt_encoder_config": {"image_size": 64, "patch_size": 16},
}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "projection_dim": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}
SUPERPOINT = {"keypoint_decoder_dim": 65, "keypoint_threshold": 0.0, "nms_radius": 2, "max_keypoints": 9}
MEMORY = {
    "image_size": 64,
    "vision_config": {**SAM2["vision_config"], "fpn_hidden_size": 128},
    "prompt_encoder_config": {"image_size": 64, "patch_size": 16, "hidden_size": 128},
    "mask_decoder_config": {"hidden_size": 128},
    "memory_attention_hidden_size": 128,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "memory_encoder_output_channels": 64,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
}
"""The models have the number of channels of their memory, 64, in their code, and want more than that of images."""
SAM3_VIT = {"window_size": 3, "global_attn_indexes": [1]}
SAM3_MEMORY_VISION = {
    "fpn_hidden_size": 128,
    "backbone_config": {**SAM3_VIT, "image_size": 64, "patch_size": 16},
    "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
}

INTRACLASS = {
    "reduce_channel": [1, 1, 0],
    "return_channel": [1, 1, 0],
    "vertical_long_to_small_conv_longratio": [[7, 1], [1, 1], [3, 0]],
    "vertical_long_to_small_conv_midratio": [[5, 1], [1, 1], [2, 0]],
    "vertical_long_to_small_conv_shortratio": [[3, 1], [1, 1], [1, 0]],
    "horizontal_small_to_long_conv_longratio": [[1, 7], [1, 1], [0, 3]],
    "horizontal_small_to_long_conv_midratio": [[1, 5], [1, 1], [0, 2]],
    "horizontal_small_to_long_conv_shortratio": [[1, 3], [1, 1], [0, 1]],
    "symmetric_conv_long_longratio": [[7, 7], [1, 1], [3, 3]],
    "symmetric_conv_long_midratio": [[5, 5], [1, 1], [2, 2]],
    "symmetric_conv_long_shortratio": [[3, 3], [1, 1], [1, 1]],
}
"""Kernel, stride and padding of convolutions, for which a config has no default."""

CONFIGS: dict[str, dict[str, Any]] = {
    "pp_ocrv5_server_det": {"intraclass_block_config": INTRACLASS, "kernel_list": [3, 2, 2]},
    "pp_ocrv6_medium_det": {"intraclass_block_config": INTRACLASS},
    "exaone4_5_vision": {"window_size": 32, "fullatt_block_indexes": (1,)},
    "qwen2_5_vl_vision": {"window_size": 32, "fullatt_block_indexes": (1,)},
    "muse_glimmer_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "muse_spark_vision": {"pos_emb_height": 4, "pos_emb_width": 4},
    "kimi_k25_vision": {"pos_emb_height": 8, "pos_emb_width": 8},
    "cohere_compass_vision": DEEPSTACK,
    "qwen3_vl_vision": DEEPSTACK,
    "qwen3_vl_moe_vision": DEEPSTACK,
    "detr": DETR,
    "conditional_detr": DETR,
    "dab-detr": DETR,
    "table-transformer": DETR,
    "deformable_detr": {"backbone_config": {**RESNET, **LAST_THREE}, "num_queries": 7},
    "rt_detr": {**REAL_TIME, "num_denoising": 0, "backbone_config": {**RT_RESNET, **LAST_THREE}},
    "rt_detr_v2": {**REAL_TIME, "num_denoising": 0, "backbone_config": {**RT_RESNET, **LAST_THREE}},
    "d_fine": HYBRID,
    "deimv2": HYBRID,
    "pp_doclayout_v2": {
        **HYBRID,
        "class_thresholds": [0.3, 0.5],
        "class_order": [1, 0],
        "num_labels": 2,
        "reading_order_config": {
            "coordinate_size": 5,
            "shape_size": 6,
            "num_classes": 2,
            "max_2d_position_embeddings": 1024,
            "start_token_id": 0,
            "pad_token_id": 1,
            "end_token_id": 2,
            "pred_token_id": 3,
        },
    },
    "pp_doclayout_v3": {**HYBRID, "backbone_config": {**HGNET, **ALL}, "x4_feat_dim": 8},
    "pp_doclayout_v4": HYBRID,
    **dict.fromkeys(("swin", "donut-swin", "swinv2", "maskformer-swin"), SWIN_SIZES),
    "swin2sr": {**SWIN_SIZES, "image_size": 16, "patch_size": 1, "embed_dim": 32, "depths": [2], "num_heads": [4]},
    "depth_anything": {"backbone_config": {**DINO, "reshape_hidden_states": False}, "patch_size": 8},
    "prompt_depth_anything": {"backbone_config": {**DINO, "reshape_hidden_states": False}, "patch_size": 8},
    "bit": {"num_groups": 2},
    "beit": {"use_relative_position_bias": True},
    "zoedepth": {
        "backbone_config": {
            **{k: v for k, v in DINO.items() if k != "mlp_ratio"},
            "model_type": "beit",
            "intermediate_size": 48,
            "reshape_hidden_states": False,
            "use_relative_position_bias": True,
        },
        "num_attractors": [4, 2, 2, 1],
        "min_temp": 1.0,  # a colder softmax at its end makes 1e-4 of 1e-6
        "bin_configurations": [{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        "patch_size": 8,
    },
    "tipsv2_dpt": {"backbone_config": {**DINO, "model_type": "tipsv2_vision_model", "reshape_hidden_states": False}},
    "chmv2": {
        "backbone_config": {**DINO, "model_type": "dinov3_vit", "return_class_token": True},
        "patch_size": 8,
        "post_process_channels": [16, 16, 32, 32],
        "number_output_channels": 16,
    },
    "upernet": {"backbone_config": {**SWIN, **ALL}, "auxiliary_channels": 16},
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "pvt": {
        "num_encoder_blocks": 2,
        "hidden_sizes": [16, 32],
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "mlp_ratios": [2, 2],
        "patch_sizes": [4, 2],
        "strides": [4, 2],
        "sequence_reduction_ratios": [2, 1],
    },
    "slanext": {"vision_config": SAM_VISION, "post_conv_in_channels": 32, "max_text_length": 5},
    "seggpt": {"image_size": [32, 16], "merge_index": 0, "intermediate_hidden_state_indices": [1]},
    "cvt": {"depth": [1, 2, 3], "embed_dim": [8, 24, 48]},
    "mobilevit": {"hidden_sizes": [16, 16, 32], "neck_hidden_sizes": [8, 8, 8, 16, 16, 16, 32], "image_size": 64},
    "efficientnet": {
        "hidden_dim": 1280,
        "in_channels": [32, 8],
        "out_channels": [8, 8],
        "num_block_repeats": [1, 1],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
    },
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1, 1],
        "out_features": [8, 8, 16, 32],
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "lightglue": {"keypoint_detector_config": SUPERPOINT, "num_key_value_heads": 4},
    "superglue": {
        "keypoint_detector_config": SUPERPOINT,
        "keypoint_encoder_sizes": [8, 16],
        "gnn_layers_types": ["self", "cross"],
    },
    "tvp": {
        "backbone_config": {**RESNET, **LAST},
        "max_img_size": 64,
        "visual_prompt_size": 8,
        "max_grid_col_position_embeddings": 10,
        "max_grid_row_position_embeddings": 10,
        "num_frames": 2,
    },
    "minicpm_ocr_vision": {"insert_layer_id": 0},
    "minicpmv4_7_vision": {"insert_layer_id": 0},
    "videoprism_vision_model": {"tubelet_size": [1, 8, 8], "num_frames": 4, "num_temporal_layers": 2},
    "vjepa2": {"crop_size": 32, "frames_per_clip": 4, "num_pooler_layers": 1},
    "videomt": {"num_queries": 7, "num_blocks": 1},
    **{
        name: {"backbone_config": {**SWIN, **LAST_THREE}, "num_queries": 7, "max_text_len": 16}
        for name in ("grounding-dino", "mm-grounding-dino")
    },
    "omdet-turbo": {
        "backbone_config": {**SWIN, **LAST_THREE},
        "text_config": {"model_type": "clip_text_model", **TEXT, "hidden_size": 16, "projection_dim": 16},
        "image_size": 64,
        "apply_layernorm_after_vision_backbone": False,
        "encoder_in_channels": [32, 64, 128],
        "vision_features_channels": [32, 32, 32],
        "class_embed_dim": 16,
        "text_projection_in_dim": 16,
        "text_projection_out_dim": 16,
        "num_queries": 7,
    },
    "sam2_video": MEMORY,
    "sam3_tracker_video": {**MEMORY, "vision_config": SAM3_MEMORY_VISION},
    "sam3_video": {
        "detector_config": {
            "vision_config": SAM3_MEMORY_VISION,
            "detr_encoder_config": {"hidden_size": 128},
            "detr_decoder_config": {"hidden_size": 128, "num_queries": 3},
            "geometry_encoder_config": {"hidden_size": 128},
            "mask_decoder_config": {"hidden_size": 128},
        },
        "tracker_config": {**MEMORY, "vision_config": SAM3_MEMORY_VISION},
        "low_res_mask_size": 16,
        "fill_hole_area": 0,
        # Whatever is detected is followed, from the first frame on.
        **dict.fromkeys(("score_threshold_detection", "det_nms_thresh", "new_det_thresh"), 0.0),
        "hotstart_delay": 0,
    },
    "edgetam_video": {
        **MEMORY,
        "memory_attention_rope_k_sizes": [2, 2],
        "perceiver_resampler_hidden_size": 64,
        "perceiver_resampler_attention_head_dim": 64,
        "perceiver_resampler_num_latents": 4,
        "perceiver_resampler_num_latents_2d": 4,
    },
    "oneformer": {"backbone_config": {**SWIN, **ALL}, "num_queries": 7, "is_training": False},
    "mask2former": {"backbone_config": {**SWIN, **ALL}, "num_queries": 7, "feature_size": 32, "mask_feature_size": 32},
    "maskformer": {
        "backbone_config": {**SWIN, **ALL},
        "decoder_config": {"num_queries": 7},
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
    },
    "vitmatte": {
        "backbone_config": {
            "model_type": "vitdet",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 16,
            "num_channels": 4,
            "out_features": ["stage2"],
        },
        "convstream_hidden_sizes": [8, 8, 8],
        "fusion_hidden_sizes": [16, 8, 8, 8],
    },
    "rf_detr": {
        "backbone_config": {**DINO, "model_type": "rf_detr_dinov2", "num_windows": 2},
        "num_queries": 7,
        "group_detr": 2,
    },
    "sam": SAM,
    "sam_hq": {**SAM, "mask_decoder_config": {"vit_dim": 32}},
    "sam2": SAM2,
    "sam2_vision_model": SAM2_VISION,
    "sam2_hiera_det_model": {key: value for key, value in HIERA.items() if key != "model_type"},
    "pp_formulanet": {"vision_config": {**SAM_VISION, "post_conv_in_channels": 32}},
    "sam3_vit_model": SAM3_VIT,
    "sam3_vision_model": {"backbone_config": SAM3_VIT},
    "sam3": {"vision_config": {"backbone_config": SAM3_VIT}},
    "sam3_lite_text": {"vision_config": {"backbone_config": SAM3_VIT}},
    "sam3_tracker": {
        "vision_config": {"backbone_config": SAM3_VIT, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        "prompt_encoder_config": {"image_size": 32, "patch_size": 8},
    },
    "rf_detr_dinov2": {"num_windows": 2},
    "lw_detr_vit": {"num_windows": 4, "image_size": 64, "window_block_indices": [0]},
    "lw_detr": {
        "backbone_config": {
            "model_type": "lw_detr_vit",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2,
            "image_size": 64,
            "pretrain_image_size": 32,
            "patch_size": 8,
            "num_windows": 4,
            "window_block_indices": [0],
            "out_indices": [1, 2],
        },
        "projector_scale_factors": [1.0],
        "num_queries": 7,
        "group_detr": 2,
    },
    "depth_pro": {
        "patch_size": 16,
        **dict.fromkeys(
            ("image_model_config", "patch_model_config", "fov_model_config"),
            {key: value for key, value in DINO.items() if key != "out_indices"} | {"image_size": 16},
        ),
        "intermediate_hook_ids": [2, 0],
        "intermediate_feature_dims": [16, 16],
        "scaled_images_feature_dims": [32, 32, 16],
        "use_fov_model": True,
    },
}


@inputs("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4")
def large_images(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values": source(2, 3, 96, 96)}


@inputs("detr", "conditional_detr", "dab-detr", "table-transformer", "deformable_detr")
def padded_images(model: Any, source: Random) -> dict[str, Any]:
    mask = torch.ones(2, 96, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    return {"pixel_values": source(2, 3, 96, 96), "pixel_mask": mask}


@inputs("efficientloftr", "lightglue", "superglue")
def pairs_of_images(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values": source(2, 2, 1, 64, 64)}


@inputs("sam", "sam_hq", "sam2", "sam3_tracker")
def images_with_points(model: Any, source: Random) -> dict[str, Any]:
    size = model.config.prompt_encoder_config.image_size
    return {
        "pixel_values": source(2, 3, size, size),
        "input_points": size * source(2, 1, 3, 2).sigmoid(),
        "input_labels": torch.tensor([[[1, 0, 1]]] * 2),
    }


@inputs("seggpt")
def images_with_an_example(model: Any, source: Random) -> dict[str, Any]:
    return {name: source(2, 3, 16, 16) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")}


@inputs("videoprism_vision_model", "vjepa2", "videomt")
def videos(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values_videos": source(2, 4, 3, 32, 32)}


@inputs("siglip2_vision_model")
def patches_of_two_sizes(model: Any, source: Random) -> dict[str, Any]:
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    return {
        "pixel_values": source(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [4, 3]]),
    }


@inputs("gemma4_vision")
def patches_with_positions(model: Any, source: Random) -> dict[str, Any]:
    place = torch.cartesian_prod(torch.arange(6), torch.arange(6)).flip(-1).repeat(2, 1, 1)
    place[1, 18:] = -1  # the second image is half as high
    return {"pixel_values": source(2, 36, 3 * 8 * 8), "pixel_position_ids": place}


@inputs("minicpm_ocr_vision", "minicpmv4_7_vision")
def patches_in_a_row(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values": source(1, 3, 8, 48 * 8), "target_sizes": torch.tensor([[4, 4], [4, 8]], dtype=torch.int32)}


@inputs("inkling2_vision")
def merged_patches(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values": source(12, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 2, 4]])}


@inputs("pix2struct")
def flattened_patches(model: Any, source: Random) -> dict[str, Any]:
    config = model.config.vision_config
    place = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float().repeat(2, 1, 1)
    mask = torch.ones(2, 16)
    mask[1, 12:] = 0
    patches = torch.cat([place, source(2, 16, config.patch_embed_hidden_size)], dim=2) * mask[:, :, None]
    return {"flattened_patches": patches, "attention_mask": mask, "decoder_input_ids": source.ids(2, 7)}


@inputs("oneformer")
def images_with_task(model: Any, source: Random) -> dict[str, Any]:
    return {"pixel_values": source(2, 3, 64, 64), "task_inputs": source.ids(2, model.config.task_seq_len).float()}


@inputs("sam2_video", "sam3_tracker_video", "edgetam_video")
def second_frame(model: Any, source: Random) -> dict[str, Any]:
    """The frame after one with points: it is attended together with the memory of that."""
    module = sys.modules[type(model).__module__]
    kind = next(value for name, value in vars(module).items() if name.endswith("InferenceSession"))
    session = kind(video=source(2, 3, 64, 64), video_height=64, video_width=64, dtype=torch.float32)
    points = {"point_coords": 64 * source(1, 1, 3, 2).sigmoid(), "point_labels": torch.tensor([[[1, 0, 1]]])}
    session.add_point_inputs(session.obj_id_to_idx(1), 0, points)
    session.obj_with_new_inputs = [1]
    model(session, frame_idx=0)
    return {"inference_session": session, "frame_idx": 1}


@inputs("sam3_video")
def second_frame_with_a_prompt(model: Any, source: Random) -> dict[str, Any]:
    """The frame after one in which objects were found by a text, which is read anew."""
    module = sys.modules[type(model).__module__]
    video = source(2, 3, 64, 64)
    session = module.Sam3VideoInferenceSession(video, video_height=64, video_width=64, dtype=torch.float32)
    prompt = session.add_prompt("a thing")
    session.prompt_input_ids[prompt] = source.ids(1, 9)
    session.prompt_attention_masks[prompt] = torch.ones(1, 9, dtype=torch.long)
    model(session, frame_idx=0)
    session.prompt_embeddings.clear()
    return {"inference_session": session, "frame_idx": 1}


@inputs("grounding-dino", "mm-grounding-dino")
def images_with_names(model: Any, source: Random) -> dict[str, Any]:
    ids, mask = source.ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[:, [0, 5, 8]] = torch.tensor([101, 102, 102])  # texts attend within what these tokens separate
    mask[1, 6:] = 0
    return {"pixel_values": source(2, 3, 96, 96), "input_ids": ids, "attention_mask": mask}


@inputs("omdet-turbo")
def images_with_classes_and_task(model: Any, source: Random) -> dict[str, Any]:
    for cache in (model.language_cache_class, model.language_cache_prompt):
        cache.has = lambda key: False  # texts are read in every run, not remembered from another attention's
    return {
        "pixel_values": source(2, 3, 64, 64),
        "classes_input_ids": source.ids(4, 5),
        "classes_attention_mask": torch.ones(4, 5, dtype=torch.long),
        "tasks_input_ids": source.ids(2, 9),
        "tasks_attention_mask": torch.ones(2, 9, dtype=torch.long),
        "classes_structure": torch.tensor([2, 2]),
    }


@inputs("tvp")
def one_video_with_text(model: Any, source: Random) -> dict[str, Any]:
    """One: TvpVisualInputEmbedding makes column positions for no more."""
    return {
        "pixel_values": source(1, 2, 3, 64, 64),
        "input_ids": source.ids(1, 9),
        "attention_mask": torch.ones(1, 9, dtype=torch.long),
    }
