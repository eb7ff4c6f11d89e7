"""Tiny models of images and video of the families with adapters."""

import importlib
import importlib.util
from typing import Any

import tiny
import torch
import transformers as tf
from adapter_case import Case
from transformers.models.donut import modeling_donut_swin
from transformers.models.maskformer import modeling_maskformer_swin
from transformers.models.sam import modeling_sam
from transformers.models.sam_hq import modeling_sam_hq
from transformers.models.slanext import modeling_slanext

PATCHES = {**tiny.VISION, "num_attention_heads": 4, "num_hidden_layers": 3}
ON_GRID = {**PATCHES, "mlp_dim": 48, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16}
SWIN = {"image_size": 16, "patch_size": 1, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
BIASED: dict[str, Any] = {"role": "encoder", "learned": {"type": "additive"}}
FEWER_KEYS: dict[str, Any] = {"narrow": {"type": "topk", "topk": 1}}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1], "out_indices": [4]}


def pixels(size: int = 16, width: int | None = None) -> dict[str, torch.Tensor]:
    shape = (2, 3, size, width or size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}


def wide() -> dict[str, torch.Tensor]:
    """Of more columns than rows, which modules that lay tokens out on a grid must not exchange."""
    return pixels(16, 32)


def padded_pixels() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 96, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    return {**pixels(96), "pixel_mask": mask}


def with_prompts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    prompt, masks = (torch.randn(2, 3, 16, 16, generator=generator) for _ in range(2))
    return {**pixels(), "prompt_pixel_values": prompt, "prompt_masks": masks}


def video() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


def reader(family: str, model: str, config: str, **options: Any) -> tuple[type, tf.PreTrainedConfig]:
    """A copy of SAM's encoder in a model that reads pages."""
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(modeling, model), getattr(modeling, config)(**ON_GRID, **options)


def _detr(cls: Any) -> tf.PreTrainedConfig:
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_queries": 5}
    width = {"hidden_size": 32} if cls is tf.DabDetrConfig else {"d_model": 32}
    return cls(backbone_config=tf.ResNetConfig(**RESNET), **layers, **sizes, **width)


def _pyramid(cls: Any, **options: Any) -> tf.PreTrainedConfig:
    sizes = {"hidden_sizes": [16, 32], "depths": [1, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}
    sizes |= {"strides": [4, 2], "patch_sizes": [7, 3] if cls is not tf.PvtConfig else [4, 2]}
    return cls(num_encoder_blocks=2, image_size=16, **sizes, **options)


def _levit() -> tf.PreTrainedConfig:
    sizes = {"hidden_sizes": [16, 24], "num_attention_heads": [2, 3], "depths": [2, 1], "key_dim": [8, 8]}
    ratios = {"mlp_ratio": [2, 2], "attention_ratio": [2, 2], "down_ops": [["Subsample", 8, 2, 4, 2, 2], [""]]}
    return tf.LevitConfig(image_size=64, patch_size=16, **sizes, **ratios)


def _cvt(stride: int) -> tf.PreTrainedConfig:
    stages = {"patch_sizes": [3], "patch_stride": [4], "patch_padding": [1], "embed_dim": [32], "num_heads": [4]}
    rates = {"attention_drop_rate": [0.0], "drop_rate": [0.0], "drop_path_rate": [0.0], "mlp_ratio": [2.0]}
    projections = {"qkv_projection_method": ["dw_bn"], "kernel_qkv": [3], "padding_kv": [1], "stride_kv": [stride]}
    last = {"padding_q": [1], "stride_q": [1], "qkv_bias": [True], "cls_token": [True], "depth": [3]}
    return tf.CvtConfig(**stages, **rates, **projections, **last)


def _hiera(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"image_size": [32, 32], "patch_size": [7, 7], "embed_dim": 8, "num_heads": [1, 2], "depths": [2, 2]}
    units = {"masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1}
    return tf.HieraConfig(**sizes, **units, mlp_ratio=2.0, embed_dim_multiplier=2.0, **options)


def _groupvit(cls: Any) -> tf.PreTrainedConfig:
    if cls is tf.GroupViTTextConfig:
        return cls(**{**tiny.SMALL, **tiny.SPECIAL})
    groups = {"depths": [2, 1, 1], "num_group_tokens": [6, 3, 0], "num_output_groups": [6, 3, 0]}
    return cls(**PATCHES, intermediate_size=48, **groups)


CASES = {
    "data2vec": Case(
        made=lambda: (
            tf.Data2VecVisionModel,
            tf.Data2VecVisionConfig(**PATCHES, intermediate_size=48, use_relative_position_bias=True),
        ),
        given=pixels,
        **BIASED,
    ),
    "data2vec-shared": Case(
        made=lambda: (
            tf.Data2VecVisionModel,
            tf.Data2VecVisionConfig(**PATCHES, intermediate_size=48, use_shared_relative_position_bias=True),
        ),
        given=pixels,
        **BIASED,
    ),
    "mobilevit": Case(
        made=lambda: (
            tf.MobileViTModel,
            tf.MobileViTConfig(
                image_size=64,
                hidden_sizes=[16, 16, 32],
                neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
                num_attention_heads=4,
                mlp_ratio=1.0,
            ),
        ),
        role="encoder",
        given=lambda: pixels(64),
        weighs=False,
    ),
    "sam": Case(made=lambda: (modeling_sam.SamVisionModel, tf.SamVisionConfig(**ON_GRID)), given=pixels, **BIASED),
    "sam-unbiased": Case(
        made=lambda: (modeling_sam.SamVisionModel, tf.SamVisionConfig(**ON_GRID, use_rel_pos=False)),
        role="encoder",
        given=pixels,
    ),
    "sam_hq": Case(
        made=lambda: (modeling_sam_hq.SamHQVisionModel, tf.SamHQVisionConfig(**ON_GRID)), given=pixels, **BIASED
    ),
    "seggpt": Case(
        made=lambda: (
            tf.SegGptModel,
            tf.SegGptConfig(
                **{**PATCHES, "image_size": [32, 16]},
                mlp_dim=48,
                merge_index=0,
                intermediate_hidden_state_indices=[1, 2],
                pretrain_image_size=16,
                decoder_hidden_size=8,
            ),
        ),
        given=with_prompts,
        **BIASED,
    ),
    "slanext": Case(
        made=lambda: (modeling_slanext.SLANeXtVisionEncoder, modeling_slanext.SLANeXtVisionConfig(**ON_GRID)),
        given=pixels,
        **BIASED,
    ),
    "got_ocr2": Case(
        made=lambda: reader("got_ocr2", "GotOcr2VisionEncoder", "GotOcr2VisionConfig"), given=pixels, **BIASED
    ),
    "pp_formulanet": Case(
        made=lambda: reader(
            "pp_formulanet", "PPFormulaNetVisionModel", "PPFormulaNetVisionConfig", post_conv_in_channels=16
        ),
        given=pixels,
        **BIASED,
    ),
    "deepseek_ocr2": Case(
        made=lambda: reader("deepseek_ocr2", "DeepseekOcr2SamVisionEncoder", "DeepseekOcr2SamVisionConfig"),
        given=pixels,
        **BIASED,
    ),
    "unlimited_ocr": Case(
        made=lambda: reader("unlimited_ocr", "UnlimitedOcrSamVisionEncoder", "UnlimitedOcrSamVisionConfig"),
        given=pixels,
        **BIASED,
    ),
    "vitdet": Case(
        made=lambda: (
            tf.VitDetModel,
            tf.VitDetConfig(
                **PATCHES, use_relative_position_embeddings=True, window_block_indices=[0, 2], window_size=3
            ),
        ),
        given=pixels,
        **BIASED,
    ),
    "donut": Case(
        made=lambda: (modeling_donut_swin.DonutSwinModel, tf.DonutSwinConfig(**SWIN)), given=pixels, **BIASED
    ),
    "maskformer": Case(
        made=lambda: (modeling_maskformer_swin.MaskFormerSwinModel, tf.MaskFormerSwinConfig(**SWIN)),
        given=pixels,
        weighs=False,
        **BIASED,
    ),
    "swin2sr": Case(made=lambda: (tf.Swin2SRModel, tf.Swin2SRConfig(**SWIN)), given=pixels, **BIASED),
    "timesformer": Case(
        made=lambda: (tf.TimesformerModel, tf.TimesformerConfig(**PATCHES, intermediate_size=48, num_frames=3)),
        role="encoder",
        given=video,
    ),
    "mgp_str": Case(
        made=lambda: (tf.MgpstrModel, tf.MgpstrConfig(**{**PATCHES, "image_size": [16, 16]}, mlp_ratio=2.0)),
        role="encoder",
        given=pixels,
    ),
    "hiera": Case(
        made=lambda: (tf.HieraModel, _hiera()),
        role="encoder",
        given=lambda: pixels(32),
        in_rows=False,
        **FEWER_KEYS,
    ),
    "glpn": Case(made=lambda: (tf.GLPNModel, _pyramid(tf.GLPNConfig, sr_ratios=[1, 1])), role="encoder", given=pixels),
    "glpn-pooled": Case(
        made=lambda: (tf.GLPNModel, _pyramid(tf.GLPNConfig, sr_ratios=[2, 1])),
        role="encoder",
        given=wide,
        **FEWER_KEYS,
    ),
    "pvt": Case(
        made=lambda: (tf.PvtModel, _pyramid(tf.PvtConfig, sequence_reduction_ratios=[2, 1])),
        role="encoder",
        given=pixels,
        **FEWER_KEYS,
    ),
    "pvt_v2": Case(
        made=lambda: (tf.PvtV2Model, _pyramid(tf.PvtV2Config, sr_ratios=[2, 1])),
        role="encoder",
        given=wide,
        weighs=False,
        **FEWER_KEYS,
    ),
    "pvt_v2-linear": Case(
        made=lambda: (tf.PvtV2Model, _pyramid(tf.PvtV2Config, sr_ratios=[2, 1], linear_attention=True)),
        role="encoder",
        given=pixels,
        weighs=False,
        **FEWER_KEYS,
    ),
    "cvt": Case(made=lambda: (tf.CvtModel, _cvt(1)), role="encoder", given=pixels, weighs=False),
    "cvt-pooled": Case(made=lambda: (tf.CvtModel, _cvt(2)), role="encoder", given=wide, weighs=False, **FEWER_KEYS),
    "levit": Case(
        made=lambda: (tf.LevitModel, _levit()),
        given=lambda: pixels(64),
        weighs=False,
        in_rows=False,
        **BIASED,
        **FEWER_KEYS,
    ),
    "groupvit": Case(
        made=lambda: (tf.GroupViTVisionModel, _groupvit(tf.GroupViTVisionConfig)), role="encoder", given=pixels
    ),
    "groupvit-text": Case(made=lambda: (tf.GroupViTTextModel, _groupvit(tf.GroupViTTextConfig))),
    "dab_detr": Case(made=lambda: (tf.DabDetrModel, _detr(tf.DabDetrConfig)), role="encoder", given=padded_pixels),
    "table_transformer": Case(
        made=lambda: (tf.TableTransformerModel, _detr(tf.TableTransformerConfig)),
        role="encoder",
        # The decoder's first layer attends to zeros, whose values are all the same: no weight gets a gradient there.
        learned={"type": "linear", "feature_map": "hedgehog", "modules": "encoder.*"},
        given=padded_pixels,
    ),
}
if importlib.util.find_spec("transformers.models.unlimited_ocr") is None:  # transformers 5.17
    del CASES["unlimited_ocr"]
