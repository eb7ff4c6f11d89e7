"""Tiny models of families with adapters that read sound, or make it."""

from typing import Any

import tiny
import torch
import transformers as tf
from adapter_case import Case
from transformers.models.bark import modeling_bark
from transformers.models.clvp import modeling_clvp

SOUND = {
    **{name: size for name, size in tiny.SMALL.items() if name not in ("max_position_embeddings", "pad_token_id")},
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (8, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
WIDE = {"type": "additive"}


def sound() -> dict[str, torch.Tensor]:
    """Of 220 samples, 13 frames, of which the first has 8."""
    mask = torch.ones(2, 220, dtype=torch.long)
    mask[0, 140:] = 0
    return {"input_values": torch.randn(2, 220, generator=torch.Generator().manual_seed(4)), "attention_mask": mask}


def frames(made: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([made.last_hidden_state[0, :8], made.last_hidden_state[1]])


def _wavlm(**options: Any) -> tf.PreTrainedConfig:
    return tf.WavLMConfig(**SOUND, num_buckets=8, max_bucket_distance=12, **options)


def _bark(cls: Any, **options: Any) -> tf.PreTrainedConfig:
    sizes = {"block_size": 64, "num_layers": 3, "num_heads": 4, "hidden_size": 32}
    return cls(input_vocab_size=tiny.VOCABULARY, output_vocab_size=tiny.VOCABULARY, **sizes, **options)


def _speech() -> dict[str, torch.Tensor]:
    return {**sound(), "decoder_input_ids": tiny.inputs("bart")["decoder_input_ids"]}


def _vits() -> tf.PreTrainedConfig:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "flow_size": 8, "spectrogram_bins": 9, "num_attention_heads": 4}
    flows = {
        "prior_encoder_num_flows": 1,
        "prior_encoder_num_wavenet_layers": 1,
        "posterior_encoder_num_wavenet_layers": 1,
    }
    vocoder = {"upsample_initial_channel": 8, "upsample_rates": (2,), "upsample_kernel_sizes": (4,)}
    blocks = {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1,),), "noise_scale": 0.0, "layerdrop": 0.0}
    durations = {"use_stochastic_duration_prediction": False, "duration_predictor_filter_channels": 8}
    parts = {**sizes, **flows, **vocoder, **blocks, **durations}
    return tf.VitsConfig(vocab_size=tiny.VOCABULARY, num_hidden_layers=3, window_size=2, **parts)


def _fastspeech() -> tf.PreTrainedConfig:
    sizes = {"hidden_size": 32, "vocab_size": tiny.VOCABULARY, "num_mel_bins": 8, "encoder_kernel_size": 3}
    halves = {
        f"{half}_{of}": n
        for half in ("encoder", "decoder")
        for of, n in (("layers", 2), ("linear_units", 48), ("num_attention_heads", 4))
    }
    predictors = {f"{of}_predictor_channels": 8 for of in ("duration", "energy", "pitch")}
    postnet = {"speech_decoder_postnet_units": 8, "speech_decoder_postnet_layers": 2, "decoder_kernel_size": 3}
    return tf.FastSpeech2ConformerConfig(**sizes, **halves, **predictors, **postnet)


CASES = {
    "wavlm": Case(made=lambda: (tf.WavLMModel, _wavlm()), role="encoder", learned=WIDE, given=sound, read=frames),
    "wavlm-stable": Case(
        made=lambda: (tf.WavLMModel, _wavlm(do_stable_layer_norm=True)),
        role="encoder",
        learned=WIDE,
        given=sound,
        read=frames,
    ),
    "sew_d": Case(
        made=lambda: (
            tf.SEWDModel,
            tf.SEWDConfig(**{**SOUND, "squeeze_factor": 1}, position_buckets=4, max_position_embeddings=64),
        ),
        role="encoder",
        learned=WIDE,
        given=sound,
        read=frames,
    ),
    "speecht5": Case(
        made=lambda: (
            tf.SpeechT5ForSpeechToText,
            tf.SpeechT5Config(
                **{k: v for k, v in SOUND.items() if k not in ("layerdrop", *tiny.SMALL)},
                **{k: v for k, v in tiny.HALVES.items() if k != "d_model"},
                hidden_size=32,
                encoder_max_relative_position=6,
                max_text_positions=64,
            ),
        ),
        role="encoder",
        learned=WIDE,
        given=_speech,
        generates=True,
    ),
    "clvp-encoder": Case(
        made=lambda: (
            modeling_clvp.ClvpEncoder,
            tf.ClvpEncoderConfig(**{**tiny.TEXT, "hidden_size": 128}, num_hidden_layers=3, projection_dim=16),
        ),
        role="encoder",
        given=lambda: tiny.inputs("bert"),
    ),
    "clvp-decoder": Case(
        made=lambda: (
            tf.ClvpDecoder,
            tf.ClvpDecoderConfig(
                vocab_size=tiny.VOCABULARY,
                max_position_embeddings=64,
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
            ),
        ),
    ),
    "bark": Case(made=lambda: (modeling_bark.BarkCausalModel, _bark(modeling_bark.BarkSemanticConfig)), generates=True),
    "bark-fine": Case(
        made=lambda: (tf.BarkFineModel, _bark(modeling_bark.BarkFineConfig, n_codes_total=3)),
        role="encoder",
        given=lambda: {
            "codebook_idx": 1,
            "input_ids": torch.stack([tiny.inputs("bert", seed=seed)["input_ids"] for seed in (1, 2, 3)], dim=-1),
        },
    ),
    "vits": Case(
        made=lambda: (tf.VitsModel, _vits()),
        role="encoder",
        learned=WIDE,
        given=lambda: tiny.inputs("bert"),
        read=lambda made, given: made.waveform,
    ),
    "fastspeech2_conformer": Case(
        made=lambda: (tf.FastSpeech2ConformerModel, _fastspeech()),
        role="encoder",
        learned=WIDE,
        given=lambda: tiny.inputs("bert"),
        read=lambda made, given: torch.cat([made.encoder_last_hidden_state.flatten(), made.spectrogram.flatten()]),
    ),
}
