"""Tiny random models of the architectures that differ in how they call attention, built from configs, no download."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

VOCABULARY = 97
TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SMALL = {**TEXT, "num_hidden_layers": 3, "max_position_embeddings": 128, "pad_token_id": 0}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HALVES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **SPECIAL,
    "decoder_start_token_id": 1,
}


def _gemma3(**changes: Any) -> tf.PreTrainedConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    return tf.Gemma3TextConfig(**GROUPED, sliding_window=6, layer_types=kinds, query_pre_attn_scalar=8, **changes)


def _gpt_oss() -> tf.PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return tf.GptOssConfig(**GROUPED, sliding_window=6, layer_types=kinds, num_local_experts=2, num_experts_per_tok=1)


def _llava() -> tf.PreTrainedConfig:
    vision = {**VISION, "num_attention_heads": 4, "intermediate_size": 48, "projection_dim": 16}
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision),
        text_config=tf.LlamaConfig(**GROUPED),
        image_token_index=VOCABULARY - 1,
        image_seq_length=16,
        vision_feature_layer=-1,
    )


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 16, "patch_size": 4}

DECODERS: dict[str, Callable[[], tuple[type, tf.PreTrainedConfig]]] = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**GROUPED)),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, **SPECIAL),
    ),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**GROUPED)),
    "gpt_neox": lambda: (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**SMALL)),
    "opt": lambda: (
        tf.OPTForCausalLM,
        tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128,
            **SPECIAL,
        ),
    ),
}
OWN_PATTERN = {
    "gemma3": lambda: (tf.Gemma3ForCausalLM, _gemma3()),
    "gemma2": lambda: (
        tf.Gemma2ForCausalLM,
        tf.Gemma2Config(**GROUPED, sliding_window=6, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
    ),
    "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**GROUPED, sliding_window=6)),
    "gpt_oss": lambda: (tf.GptOssForCausalLM, _gpt_oss()),
}
ENCODERS = {
    "bert": lambda: (tf.BertForSequenceClassification, tf.BertConfig(**SMALL)),
    "distilbert": lambda: (
        tf.DistilBertModel,
        tf.DistilBertConfig(vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    ),
}
ENCODER_DECODERS = {
    "bart": lambda: (tf.BartForConditionalGeneration, tf.BartConfig(**HALVES, max_position_embeddings=128)),
    "t5": lambda: (
        tf.T5ForConditionalGeneration,
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
}
OTHERS = {
    "whisper": lambda: (
        tf.WhisperForConditionalGeneration,
        tf.WhisperConfig(**HALVES, num_mel_bins=8, max_source_positions=20, max_target_positions=64),
    ),
    "vit": lambda: (tf.ViTModel, tf.ViTConfig(**VISION, num_attention_heads=4, intermediate_size=48)),
    "llava": lambda: (tf.LlavaForConditionalGeneration, _llava()),
}
NEEDS = {
    "gemma3": {"any_mask"},
    "gemma2": {"any_mask", "softcap"},
    "mistral": {"any_mask"},
    "gpt_oss": {"any_mask", "sinks"},
    "t5": {"position_bias"},
}
"""What the self-attention of a model asks of an attention beyond its direction."""
MODELS = {**DECODERS, **OWN_PATTERN, **ENCODERS, **ENCODER_DECODERS, **OTHERS}


def config_of(name: str) -> tf.PreTrainedConfig:
    return MODELS[name]()[1]


def build(name: str, seed: int = 0, **flag: Any) -> Any:
    """A model with random weights large enough that attention matters, in eval mode."""
    cls, config = MODELS[name]()
    for key, value in flag.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = cls._from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "attn_plugin" not in path:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


def inputs(name: str, batch: int = 2, length: int = 13, padded: bool = True, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass; text is padded on the left for decoders, on the right elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY - 1, (batch, length), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(batch, 8, 40, generator=generator), "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    if padded:
        if name in DECODERS | OWN_PATTERN:
            mask[0, :5] = 0
        else:
            mask[0, -5:] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "llava":
        ids[:, :16] = VOCABULARY - 1
        mask[:] = 1
        given["pixel_values"] = torch.randn(batch, 3, 16, 16, generator=generator)
    if name in ENCODER_DECODERS:
        given["decoder_input_ids"] = torch.randint(3, VOCABULARY - 1, (batch, 7), generator=generator)
    return given


def output(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits, or the last hidden state, at tokens that are not padding."""
    return numbers(model(**given), given)


def numbers(made: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same of what a model has made."""
    out = made.logits if getattr(made, "logits", None) is not None else made.last_hidden_state
    mask = given.get("attention_mask")
    return out[mask.bool()] if mask is not None and mask.shape == out.shape[:2] else out
