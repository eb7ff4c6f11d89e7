"""Tiny models of the families with adapters, and what can be asked of each."""

from typing import Any

import adapter_cases_speech
import adapter_cases_text
import long_adapter_cases
import tiny
import torch
import transformers as tf
import vision_adapter_cases
from adapter_case import Case
from transformers.models.blip import modeling_blip_text
from transformers.models.roformer import modeling_roformer

NARROW = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32}


def _gptj(cls: Any = tf.GPTJConfig, **options: Any) -> tf.PreTrainedConfig:
    return cls(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, **tiny.SPECIAL, **options)


def _falcon(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
    return tf.FalconConfig(**NARROW, **sizes, **tiny.SPECIAL, **options)


def _xglm(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4, "max_position_embeddings": 128}
    return tf.XGLMConfig(vocab_size=tiny.VOCABULARY, **sizes, **tiny.SPECIAL, **options)


PATCHES = {**tiny.VISION, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 3}
WORDS = {**tiny.SMALL, "encoder_hidden_size": 32, **tiny.SPECIAL, "sep_token_id": 2, "projection_dim": 16}


def _blip() -> tf.PreTrainedConfig:
    return tf.BlipConfig(text_config=WORDS, vision_config=PATCHES, projection_dim=16, image_text_hidden_size=16)


def states() -> torch.Tensor:
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))


def read_states() -> dict[str, torch.Tensor]:
    """States of an encoder, the last two of which are padding in one row."""
    return {
        "encoder_hidden_states": states(),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }


def deberta(cls: Any, **options: Any) -> tf.PreTrainedConfig:
    kind = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8, **options}
    return cls(**tiny.SMALL, type_vocab_size=0, **kind)


def _decoder(cls: Any, **options: Any) -> tf.PreTrainedConfig:
    return cls(**{**tiny.SMALL, **tiny.SPECIAL}, is_decoder=True, **options)


REMBERT = {"input_embedding_size": 16, "output_embedding_size": 16}


def _layoutlmv3(**options: Any) -> tf.PreTrainedConfig:
    sizes = {"input_size": 16, "patch_size": 4, "coordinate_size": 4, "shape_size": 8, "max_2d_position_embeddings": 64}
    return tf.LayoutLMv3Config(**tiny.SMALL, **sizes, **options)


def _page() -> dict[str, torch.Tensor]:
    corners = torch.randint(0, 64, (2, 13, 4), generator=torch.Generator().manual_seed(4))
    return {"bbox": corners.sort(dim=-1).values, "pixel_values": tiny.inputs("vit")["pixel_values"]}


def _trocr() -> tf.PreTrainedConfig:
    sizes = {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    return tf.TrOCRConfig(
        vocab_size=tiny.VOCABULARY, **sizes, cross_attention_hidden_size=32, max_position_embeddings=128, **tiny.SPECIAL
    )


def _xlm(cls: Any, **options: Any) -> tf.PreTrainedConfig:
    sizes = {"vocab_size": tiny.VOCABULARY, "emb_dim": 32, "n_layers": 3, "n_heads": 4}
    return cls(**sizes, max_position_embeddings=128, **options)


CASES = {
    "mpnet": Case(
        made=lambda: (tf.MPNetForMaskedLM, tf.MPNetConfig(**tiny.SMALL)),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: tiny.inputs("bert"),
    ),
    "gptj": Case(made=lambda: (tf.GPTJForCausalLM, _gptj(rotary_dim=4)), generates=True),
    "gptj-wide": Case(made=lambda: (tf.GPTJForCausalLM, _gptj(rotary_dim=8)), generates=True),
    "bloom": Case(
        made=lambda: (tf.BloomForCausalLM, tf.BloomConfig(**NARROW, n_layer=3, n_head=4, **tiny.SPECIAL)),
        learned={"type": "additive"},
        generates=True,
    ),
    "falcon": Case(made=lambda: (tf.FalconForCausalLM, _falcon()), generates=True, scores=True),
    "falcon-groups": Case(
        made=lambda: (tf.FalconForCausalLM, _falcon(new_decoder_architecture=True, num_kv_heads=2)),
        generates=True,
        scores=True,
    ),
    "falcon-alibi": Case(
        made=lambda: (tf.FalconForCausalLM, _falcon(alibi=True, multi_query=False)),
        scores=True,
        learned={"type": "additive"},
        generates=True,
    ),
    "blip-vision": Case(
        made=lambda: (tf.BlipVisionModel, tf.BlipVisionConfig(**PATCHES)),
        role="encoder",
        given=lambda: {"pixel_values": tiny.inputs("vit")["pixel_values"]},
    ),
    "blip-encoder": Case(
        made=lambda: (tf.BlipTextModel, tf.BlipTextConfig(**WORDS)), role="encoder", given=lambda: tiny.inputs("bert")
    ),
    "blip-decoder": Case(
        made=lambda: (modeling_blip_text.BlipTextLMHeadModel, tf.BlipTextConfig(**WORDS)),
        given=lambda: {**tiny.inputs("llama"), **read_states()},
        generates=True,
    ),
    "blip-captions": Case(
        made=lambda: (tf.BlipForConditionalGeneration, _blip()),
        given=lambda: {**tiny.inputs("llama"), "pixel_values": tiny.inputs("vit")["pixel_values"]},
        generates=True,
    ),
    "deberta_v2": Case(
        made=lambda: (
            tf.DebertaV2ForMaskedLM,
            deberta(tf.DebertaV2Config, share_att_key=True, position_buckets=4, norm_rel_ebd="layer_norm"),
        ),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: tiny.inputs("bert"),
    ),
    "deberta_v2-own": Case(
        made=lambda: (tf.DebertaV2ForMaskedLM, deberta(tf.DebertaV2Config, conv_kernel_size=3)),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: tiny.inputs("bert"),
    ),
    "deberta_v2-plain": Case(
        made=lambda: (tf.DebertaV2ForMaskedLM, deberta(tf.DebertaV2Config, relative_attention=False)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "deberta": Case(
        made=lambda: (tf.DebertaForMaskedLM, deberta(tf.DebertaConfig)),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: tiny.inputs("bert"),
    ),
    "codegen": Case(made=lambda: (tf.CodeGenForCausalLM, _gptj(tf.CodeGenConfig, rotary_dim=4)), generates=True),
    "gpt_neo": Case(
        made=lambda: (
            tf.GPTNeoForCausalLM,
            tf.GPTNeoConfig(
                **NARROW,
                num_layers=3,
                num_heads=4,
                attention_types=[[["local", "global", "local"], 1]],
                window_size=4,
                max_position_embeddings=128,
                **tiny.SPECIAL,
            ),
        ),
        learned={"type": "additive"},  # its windows are masks that linear attention cannot serve
        generates=True,
    ),
    "xglm": Case(made=lambda: (tf.XGLMForCausalLM, _xglm()), generates=True),
    # Without a cache: the model's own puts keys of text and of the encoder into the same layer.
    "xglm-cross": Case(
        made=lambda: (tf.XGLMForCausalLM, _xglm(add_cross_attention=True)),
        given=lambda: {**tiny.inputs("llama"), **read_states()},
    ),
    "megatron_bert": Case(
        made=lambda: (tf.MegatronBertForMaskedLM, tf.MegatronBertConfig(**tiny.SMALL)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "megatron_bert-decoder": Case(made=lambda: (tf.MegatronBertForCausalLM, _decoder(tf.MegatronBertConfig))),
    "rembert": Case(
        made=lambda: (tf.RemBertForMaskedLM, tf.RemBertConfig(**tiny.SMALL, **REMBERT)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "rembert-cross": Case(
        made=lambda: (tf.RemBertForCausalLM, _decoder(tf.RemBertConfig, add_cross_attention=True, **REMBERT)),
        given=lambda: {**tiny.inputs("llama"), **read_states()},
    ),
    "tapas": Case(
        made=lambda: (tf.TapasForMaskedLM, tf.TapasConfig(**tiny.SMALL)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "vilt": Case(
        made=lambda: (tf.ViltModel, tf.ViltConfig(**tiny.SMALL, image_size=16, patch_size=4)),
        role="encoder",
        given=lambda: {**tiny.inputs("bert"), "pixel_values": tiny.inputs("vit")["pixel_values"]},
    ),
    "visual_bert": Case(
        made=lambda: (tf.VisualBertModel, tf.VisualBertConfig(**tiny.SMALL, visual_embedding_dim=32)),
        role="encoder",
        given=lambda: {
            **tiny.inputs("bert"),
            "visual_embeds": states(),
            "visual_attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        },
    ),
    "flava-text": Case(
        made=lambda: (tf.FlavaTextModel, tf.FlavaTextConfig(**tiny.SMALL)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "flava-image": Case(
        made=lambda: (tf.FlavaImageModel, tf.FlavaImageConfig(**PATCHES)),
        role="encoder",
        given=lambda: {"pixel_values": tiny.inputs("vit")["pixel_values"]},
    ),
    "roformer": Case(
        made=lambda: (tf.RoFormerForMaskedLM, tf.RoFormerConfig(**tiny.SMALL)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "roformer-decoder": Case(
        made=lambda: (tf.RoFormerForCausalLM, _decoder(tf.RoFormerConfig, rotary_value=True)), generates=True
    ),
    "roformer-cross": Case(
        made=lambda: (tf.RoFormerForCausalLM, _decoder(tf.RoFormerConfig, add_cross_attention=True)),
        given=lambda: {**tiny.inputs("llama"), **read_states()},
    ),
    "layoutlmv3": Case(
        made=lambda: (tf.LayoutLMv3Model, _layoutlmv3()),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: {**tiny.inputs("bert"), **_page()},
    ),
    "layoutlmv3-order": Case(
        made=lambda: (tf.LayoutLMv3Model, _layoutlmv3(has_spatial_attention_bias=False)),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: {**tiny.inputs("bert"), **_page()},
    ),
    "trocr": Case(
        made=lambda: (tf.TrOCRForCausalLM, _trocr()),
        given=lambda: {**tiny.inputs("llama"), **read_states()},
    ),
    "trocr-alone": Case(made=lambda: (tf.TrOCRForCausalLM, _trocr()), generates=True),
    "gpt_neox_japanese": Case(
        made=lambda: (
            tf.GPTNeoXJapaneseForCausalLM,
            tf.GPTNeoXJapaneseConfig(
                **NARROW,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=128,
                **tiny.SPECIAL,
            ),
        ),
        generates=True,
    ),
    "mpt": Case(
        made=lambda: (
            tf.MptForCausalLM,
            tf.MptConfig(
                vocab_size=tiny.VOCABULARY, d_model=32, n_layers=3, n_heads=4, max_seq_len=128, **tiny.SPECIAL
            ),
        ),
        learned={"type": "additive"},
        generates=True,
    ),
    "swinv2": Case(
        made=lambda: (
            tf.Swinv2Model,
            tf.Swinv2Config(image_size=16, patch_size=1, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
        ),
        role="encoder",
        learned={"type": "additive"},
        given=lambda: {"pixel_values": tiny.inputs("vit")["pixel_values"]},
    ),
    "xlm": Case(
        made=lambda: (tf.XLMModel, _xlm(tf.XLMConfig)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "xlm-causal": Case(made=lambda: (tf.XLMModel, _xlm(tf.XLMConfig, causal=True))),
    "flaubert": Case(
        made=lambda: (tf.FlaubertModel, _xlm(tf.FlaubertConfig)),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    **long_adapter_cases.CASES,
    # Without a cache: the model's own takes keys of text from it for those of the encoder.
    "big_bird-cross": Case(
        made=lambda: (
            tf.BigBirdForCausalLM,
            long_adapter_cases.big_bird(attention_type="original_full", is_decoder=True, add_cross_attention=True),
        ),
        given=lambda: {**tiny.inputs("llama"), **read_states(), "use_cache": False},
    ),
    **vision_adapter_cases.CASES,
}
CASES |= adapter_cases_text.CASES | adapter_cases_speech.CASES
if not hasattr(modeling_roformer, "create_causal_mask"):  # transformers 5.17: these attend to what follows, told or not
    for decoder in (
        "megatron_bert-decoder",
        "rembert-cross",
        "roformer-decoder",
        "roformer-cross",
        "big_bird-decoder",
        "big_bird-cross",
    ):
        CASES.pop(decoder, None)
