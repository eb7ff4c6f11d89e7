"""Tiny models for long texts of the families with adapters, whose own attention is sparse where texts are long."""

from typing import Any

import tiny
import torch
import transformers as tf
from adapter_case import Case
from transformers.models.bigbird_pegasus import modeling_bigbird_pegasus

NARROW = {**tiny.SMALL, "max_position_embeddings": 128}
HALVES = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 3),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **tiny.SPECIAL,
    "decoder_start_token_id": 1,
}


def longformer(*windows: int) -> tf.PreTrainedConfig:
    return tf.LongformerConfig(**NARROW, attention_window=list(windows), sep_token_id=2)


def led(*windows: int) -> tf.PreTrainedConfig:
    lengths = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128}
    return tf.LEDConfig(**HALVES, **lengths, attention_window=list(windows))


def big_bird(**options: Any) -> tf.PreTrainedConfig:
    return tf.BigBirdConfig(**{**NARROW, "block_size": 2, "num_random_blocks": 2, **options})


def bigbird_pegasus(**options: Any) -> tf.PreTrainedConfig:
    blocks = {"block_size": 2, "num_random_blocks": 2, **options}
    return tf.BigBirdPegasusConfig(**HALVES, **blocks, max_position_embeddings=128)


def marked(name: str) -> dict[str, torch.Tensor]:
    """Inputs with some tokens that have global attention."""
    given = tiny.inputs(name)
    marks = torch.zeros_like(given["input_ids"])
    marks[:, 0] = marks[0, 7] = 1
    return {**given, "global_attention_mask": marks}


CASES = {
    "longformer": Case(
        made=lambda: (tf.LongformerForMaskedLM, longformer(64, 64, 64)),
        role="encoder",
        given=lambda: marked("bert"),
        weighs=False,  # in a window's form
    ),
    "led": Case(
        made=lambda: (tf.LEDForConditionalGeneration, led(64, 64, 64)),
        role="encoder",
        given=lambda: marked("bart"),
        weighs=False,
        generates=True,
    ),
    "big_bird": Case(
        made=lambda: (tf.BigBirdForMaskedLM, big_bird()), role="encoder", given=lambda: tiny.inputs("bert")
    ),
    "bigbird_pegasus": Case(
        made=lambda: (modeling_bigbird_pegasus.BigBirdPegasusEncoder, bigbird_pegasus()),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "big_bird-decoder": Case(
        made=lambda: (
            tf.BigBirdForCausalLM,
            big_bird(attention_type="original_full", is_decoder=True, bos_token_id=1, eos_token_id=2),
        ),
        generates=True,
    ),
}
