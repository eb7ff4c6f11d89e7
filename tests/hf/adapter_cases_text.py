"""Tiny models of families with adapters that read text, or pages, images and videos, some of them beside it."""

from typing import Any

import tiny
import torch
import transformers as tf
from adapter_case import Case

WIDE = {"type": "additive"}
"""An attention with weights of its own where the module adds a bias."""


def encoder(**options: Any) -> Case:
    return Case(**{"role": "encoder", "given": lambda: tiny.inputs("bert"), **options})


def _boxes() -> dict[str, torch.Tensor]:
    corners = torch.randint(0, 64, (2, 13, 4), generator=torch.Generator().manual_seed(4))
    return {**tiny.inputs("bert"), "bbox": corners.sort(dim=-1).values}


def _bros() -> dict[str, torch.Tensor]:
    given = _boxes()
    return {**given, "bbox": given["bbox"] / 64}


def _entities() -> dict[str, torch.Tensor]:
    places = torch.tensor([[[1, 2, -1], [4, -1, -1]], [[0, -1, -1], [5, 6, 7]]])
    return {
        **tiny.inputs("bert"),
        "entity_ids": torch.tensor([[3, 4], [5, 6]]),
        "entity_position_ids": places,
        "entity_attention_mask": torch.tensor([[1, 1], [1, 0]]),
    }


def _words_and_entities(made: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    entities = made.entity_last_hidden_state[given["entity_attention_mask"].bool()]
    return torch.cat([tiny.numbers(made, given), entities])


def _luke(**options: Any) -> tf.PreTrainedConfig:
    return tf.LukeConfig(**tiny.SMALL, entity_vocab_size=9, entity_emb_size=16, **options)


def _halves(name: str) -> dict[str, torch.Tensor]:
    given = tiny.inputs(name)
    return {**given, "decoder_input_ids": tiny.inputs("bart")["decoder_input_ids"]}


def _mvp(**options: Any) -> tf.PreTrainedConfig:
    return tf.MvpConfig(**tiny.HALVES, max_position_embeddings=128, **options)


def _xlnet(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48}
    return tf.XLNetConfig(vocab_size=tiny.VOCABULARY, **sizes, mem_len=0, **tiny.SPECIAL, **options)


def _two_segments() -> dict[str, torch.Tensor]:
    return {**tiny.inputs("bert"), "token_type_ids": (torch.arange(13) > 6).long().expand(2, -1)}


def _predicted() -> dict[str, torch.Tensor]:
    """Every token sees those before it in an order, and two are predicted."""
    given = tiny.inputs("bert")
    hidden = torch.ones(2, 13, 13).triu()
    targets = torch.zeros(2, 2, 13)
    targets[:, 0, 3] = targets[:, 1, 6] = 1
    return {**given, "perm_mask": hidden, "target_mapping": targets}


def _funnel(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "num_decoder_layers": 1}
    return tf.FunnelConfig(vocab_size=tiny.VOCABULARY, **{**sizes, "block_sizes": [3, 2]}, **options)


def _prophetnet() -> tf.PreTrainedConfig:
    halves = {
        f"num_{half}_{of}": n for half in ("encoder", "decoder") for of, n in (("layers", 3), ("attention_heads", 4))
    }
    sizes = {"hidden_size": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
    return tf.ProphetNetConfig(vocab_size=tiny.VOCABULARY, **sizes, **halves, **tiny.SPECIAL, decoder_start_token_id=1)


def _seen() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {
        **tiny.inputs("bert"),
        "visual_feats": torch.randn(2, 5, 8, generator=generator),
        "visual_pos": torch.rand(2, 5, 4, generator=generator),
        "visual_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
    }


def _perceiver(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"num_latents": 6, "d_latents": 32, "d_model": 24, "num_self_attends_per_block": 2}
    heads = {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "qk_channels": 16, "v_channels": 32}
    return tf.PerceiverConfig(**sizes, **heads, vocab_size=tiny.VOCABULARY, max_position_embeddings=13, **options)


def _tvp() -> tf.PreTrainedConfig:
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    grid = {"max_grid_col_position_embeddings": 10, "max_grid_row_position_embeddings": 10}
    sizes = {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2}
    return tf.TvpConfig(backbone_config=backbone, **tiny.SMALL, **grid, **sizes)


def _film() -> dict[str, torch.Tensor]:
    """One: the model makes column positions for no more."""
    pixels = torch.randn(1, 2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    return {**{name: part[:1] for name, part in tiny.inputs("bert").items()}, "pixel_values": pixels}


def _superglue() -> tf.PreTrainedConfig:
    detector = tf.SuperPointConfig(
        encoder_hidden_sizes=[8, 8, 8, 8],
        decoder_hidden_size=8,
        keypoint_decoder_dim=65,
        descriptor_decoder_dim=32,
        max_keypoints=9,
        keypoint_threshold=0.0,
        nms_radius=2,
    )
    kinds = ["self", "cross", "self", "cross"]
    return tf.SuperGlueConfig(
        keypoint_detector_config=detector,
        hidden_size=32,
        keypoint_encoder_sizes=[8, 16],
        gnn_layers_types=kinds,
        sinkhorn_iterations=5,
    )


def _gpt(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return tf.OpenAIGPTConfig(vocab_size=tiny.VOCABULARY, **sizes, **tiny.SPECIAL, **options)


def _imagegpt(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return tf.ImageGPTConfig(vocab_size=tiny.VOCABULARY, **sizes, **tiny.SPECIAL, **options)


CASES = {
    "luke": encoder(made=lambda: (tf.LukeModel, _luke()), given=_entities, read=_words_and_entities, in_rows=False),
    "luke-words": encoder(made=lambda: (tf.LukeModel, _luke())),
    "luke-alike": encoder(
        made=lambda: (tf.LukeModel, _luke(use_entity_aware_attention=False)), given=_entities, in_rows=False
    ),
    "lilt": encoder(
        made=lambda: (tf.LiltModel, tf.LiltConfig(**{**tiny.SMALL, "hidden_size": 48}, max_2d_position_embeddings=64)),
        given=_boxes,
    ),
    "bros": encoder(
        made=lambda: (tf.BrosModel, tf.BrosConfig(**{**tiny.SMALL, "hidden_size": 64})), learned=WIDE, given=_bros
    ),
    "convbert": encoder(
        made=lambda: (tf.ConvBertModel, tf.ConvBertConfig(**tiny.SMALL, embedding_size=32, conv_kernel_size=3))
    ),
    "squeezebert": encoder(
        made=lambda: (tf.SqueezeBertModel, tf.SqueezeBertConfig(**tiny.SMALL, embedding_size=32)), scores=True
    ),
    "ibert": encoder(made=lambda: (tf.IBertModel, tf.IBertConfig(**tiny.SMALL))),
    "canine": encoder(
        made=lambda: (
            tf.CanineModel,
            tf.CanineConfig(
                **tiny.SMALL,
                local_transformer_stride=4,
                downsampling_rate=2,
                num_hash_buckets=16,
                upsampling_kernel_size=2,
            ),
        )
    ),
    "xlnet": encoder(made=lambda: (tf.XLNetModel, _xlnet()), learned=WIDE, given=_two_segments),
    "xlnet-predicting": encoder(made=lambda: (tf.XLNetModel, _xlnet()), learned=WIDE, given=_predicted, in_rows=False),
    "xlnet-causal": Case(
        made=lambda: (tf.XLNetModel, _xlnet(attn_type="uni")),
        learned=WIDE,
        given=lambda: {"input_ids": tiny.inputs("bert")["input_ids"]},
    ),
    "funnel": encoder(made=lambda: (tf.FunnelModel, _funnel()), learned=WIDE),
    "funnel-factorized": encoder(
        made=lambda: (tf.FunnelModel, _funnel(attention_type="factorized", pool_q_only=False)), learned=WIDE
    ),
    "cpmant": encoder(
        made=lambda: (
            tf.CpmAntForCausalLM,
            tf.CpmAntConfig(
                vocab_size=tiny.VOCABULARY,
                hidden_size=32,
                num_attention_heads=4,
                dim_head=8,
                dim_ff=48,
                num_hidden_layers=3,
                prompt_length=2,
                prompt_types=4,
                position_bias_num_buckets=32,
                position_bias_max_distance=64,
            ),
        ),
        learned=WIDE,
        given=lambda: {"input_ids": tiny.inputs("llama")["input_ids"] * tiny.inputs("llama")["attention_mask"]},
        read=lambda made, given: made.logits[given["input_ids"] != 0],
    ),
    "mvp": encoder(
        made=lambda: (tf.MvpForConditionalGeneration, _mvp()), given=lambda: tiny.inputs("bart"), generates=True
    ),
    "mvp-prompt": encoder(
        made=lambda: (tf.MvpForConditionalGeneration, _mvp(use_prompt=True, prompt_length=3, prompt_mid_dim=8)),
        given=lambda: tiny.inputs("bart"),
        generates=True,
        states=False,
    ),
    "fsmt": encoder(
        made=lambda: (
            tf.FSMTForConditionalGeneration,
            tf.FSMTConfig(
                **{k: v for k, v in tiny.HALVES.items() if k != "vocab_size"},
                src_vocab_size=tiny.VOCABULARY,
                tgt_vocab_size=tiny.VOCABULARY,
                max_position_embeddings=64,
                num_beams=1,
            ),
        ),
        given=lambda: {**tiny.inputs("bart"), "use_cache": False},
        generates=True,
        states=False,
        uncached=False,
    ),
    "prophetnet": encoder(
        made=lambda: (tf.ProphetNetForConditionalGeneration, _prophetnet()),
        given=lambda: tiny.inputs("bart"),
        scores=True,
    ),
    "lxmert": encoder(
        made=lambda: (
            tf.LxmertModel,
            tf.LxmertConfig(
                **{k: v for k, v in tiny.SMALL.items() if k != "num_hidden_layers"},
                l_layers=1,
                r_layers=1,
                x_layers=2,
                visual_feat_dim=8,
            ),
        ),
        given=_seen,
        read=lambda made, given: torch.cat(
            [made.language_output[given["attention_mask"].bool()], made.vision_output.flatten(0, 1)]
        ),
    ),
    "perceiver": encoder(
        made=lambda: (tf.PerceiverForMaskedLM, _perceiver()),
    ),
    "openai": Case(made=lambda: (tf.OpenAIGPTLMHeadModel, _gpt())),
    "imagegpt": Case(made=lambda: (tf.ImageGPTForCausalImageModeling, _imagegpt()), generates=True),
    "imagegpt-scaled": Case(
        made=lambda: (
            tf.ImageGPTForCausalImageModeling,
            _imagegpt(scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        ),
        generates=True,
    ),
    "tvp": encoder(made=lambda: (tf.TvpModel, _tvp()), given=_film),
    "superglue": encoder(
        made=lambda: (tf.SuperGlueForKeypointMatching, _superglue()),
        given=lambda: {"pixel_values": torch.randn(2, 2, 1, 64, 64, generator=torch.Generator().manual_seed(4))},
        read=lambda made, given: made.matching_scores,
    ),
}
