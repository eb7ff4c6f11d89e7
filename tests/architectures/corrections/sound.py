"""Model types that read sound or time series."""

from typing import Any

import torch

from corrections import inputs

CLASSES: dict[str, str] = {
    "bark": "BarkSemanticModel",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
}

CODEC = {"upsampling_ratios": [4, 4], "num_quantizers": 2, "codebook_size": 64}
SERIES = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2, 3], "num_time_features": 2}
SMALL_DAC = {"encoder_hidden_size": 4, "downsampling_ratios": [4, 4]}
RATIOS = {"downsampling_ratios": (2, 4), "depths": (1, 1, 1)}
MUSIC = {
    "audio_encoder": {"upsampling_ratios": [4, 4], "codebook_size": 64},
    "decoder": {"pad_token_id": 127, "bos_token_id": 127, "num_codebooks": 2, "decoder_start_token_id": 127},
}
VOCODER = {
    "upsample_initial_channel": 8,
    "upsample_rates": [2],
    "upsample_kernel_sizes": [4],
    "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1]],
}
ALL_HEADS = {"num_key_value_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "clap": {
        "audio_config": {
            "depths": (1, 1),
            "num_attention_heads": (1, 2),
            "num_hidden_layers": 2,
            "window_size": 4,
            "hidden_size": 32,
            "patch_embeds_hidden_size": 16,
        }
    },
    "autoformer": SERIES,
    "clvp": {
        # A rotary position has 32 numbers at least.
        "text_config": {"hidden_size": 128},
        "speech_config": {"hidden_size": 128, "vocab_size": 300},
        "decoder_config": {"max_text_tokens": 64, "vocab_size": 300},
    },
    "csm": {"codec_config": CODEC, "num_codebooks": 4, "depth_decoder_config": {"num_codebooks": 4}},
    "dia": {"delay_pattern": [0, 1, 2], "decoder_config": {"num_channels": 3}},
    "fastspeech2_conformer": {"num_mel_bins": 32},
    "fastspeech2_conformer_with_hifigan": {"model_config": {"num_mel_bins": 32}, "vocoder_config": VOCODER},
    "granite_speech5_ctc": {"encoder_config": {**ALL_HEADS, "context_size": 8}},
    "granite_speech5_encoder": {**ALL_HEADS, "context_size": 8},
    "informer": SERIES,
    "kyutai_speech_to_text": {"codec_config": CODEC, "num_codebooks": 4},
    "mimi": CODEC,
    "mimi_decoder": CODEC,
    "mimi_encoder": CODEC,
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": ALL_HEADS,
    "musicgen": MUSIC,
    "musicgen_melody": MUSIC,
    "nemotron3_5_transcribe_asr_audio": ALL_HEADS,
    "gradium_phonon_tts": ALL_HEADS,
    "nemo_speechlm": {
        "text_config": {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16},
        "audio_config": {"asr_config": ALL_HEADS, "diarization_config": {"audio_config": ALL_HEADS}},
        "word_timestamp_config": ALL_HEADS,
    },
    "nemotron3_5_transcribe_audio": {
        "asr_config": ALL_HEADS,
        "diarization_config": {"audio_config": ALL_HEADS},
    },
    "nemotron3_5_transcribe_word_timestamp": ALL_HEADS,
    "nemotron3_diarization": {"audio_config": ALL_HEADS},
    "nemotron3_diarization_audio": ALL_HEADS,
    "neucodec": {"encoder_hidden_size": 4, "quantization_dim": 64, **ALL_HEADS},
    "pe_audio": {"audio_config": {"dac_config": SMALL_DAC}},
    "pe_audio_encoder": {"dac_config": SMALL_DAC},
    "time_series_transformer": SERIES,
    "timesfm": {"patch_length": 4, "horizon_length": 4},
    "timesfm2_5": {"patch_length": 4, "horizon_length": 4, "output_quantile_len": 8},
    "vibevoice": {"audio_config": RATIOS, "semantic_model_config": RATIOS},
    "vibevoice_acoustic_tokenizer": RATIOS,
    "vibevoice_acoustic_tokenizer_decoder": RATIOS,
    "vibevoice_acoustic_tokenizer_encoder": RATIOS,
    "vibevoice_asr": {
        "acoustic_tokenizer_encoder_config": RATIOS,
        "semantic_tokenizer_encoder_config": RATIOS,
        "acoustic_tokenizer_chunk_size": 64,
    },
    "vits": {**VOCODER, "vocab_size": 128, "noise_scale": 0.0, "use_stochastic_duration_prediction": False},
    "higgs_audio_v2_tokenizer": {
        "acoustic_model_config": {
            "encoder_hidden_size": 4,
            "decoder_hidden_size": 32,
            "downsampling_ratios": [8, 5, 4, 6],  # by default its two parts make different numbers of frames
            "upsampling_ratios": [8, 5, 4, 6],
        }
    },
    "xcodec": {"acoustic_model_config": {"encoder_hidden_size": 4}, "codebook_dim": 96},
    "xcodec2": {"encoder_hidden_size": 4, "quantization_dim": 64, **ALL_HEADS},
}


def padded(length: int) -> torch.Tensor:
    """Mask of two rows, the first of which ends earlier."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, -length // 4 :] = 0
    return mask


@inputs("informer", "time_series_transformer")
def series(model: Any, source: Any) -> dict[str, Any]:
    config = model.config
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": source(2, past),
        "past_time_features": source(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": source(2, config.prediction_length),
        "future_time_features": source(2, config.prediction_length, config.num_time_features),
    }


@inputs("patchtst", "patchtsmixer")
def channels(model: Any, source: Any) -> dict[str, Any]:
    return {"past_values": source(2, model.config.context_length, model.config.num_input_channels)}


@inputs("timesfm", "timesfm2_5")
def patches(model: Any, source: Any) -> dict[str, Any]:
    length = 8 * model.config.patch_length
    padding = torch.zeros(2, length, dtype=torch.long)
    padding[0, -length // 4 :] = 1  # at the end: queries that see no key at all are of no account
    given = {"past_values": source(2, length), "past_values_padding": padding}
    return {**given, "freq": torch.zeros(2, 1, dtype=torch.long)} if hasattr(model.config, "freq_size") else given


@inputs("clap")
def clap(model: Any, source: Any) -> dict[str, Any]:
    audio = model.config.audio_config
    features = source(2, 1, audio.spec_size * audio.spec_size // audio.num_mel_bins, audio.num_mel_bins)
    return {
        "input_ids": source.ids(2, 13),
        "attention_mask": padded(13),
        "input_features": features,
        "is_longer": torch.zeros(2, 1, dtype=torch.bool),
    }


@inputs("dia")
def dia(model: Any, source: Any) -> dict[str, Any]:
    ids = source.ids(2, 7, model.config.decoder_config.num_channels)
    return {"input_ids": source.ids(2, 13), "attention_mask": padded(13), "decoder_input_ids": ids}


@inputs("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")
def latents(model: Any, source: Any) -> dict[str, Any]:
    return {model.main_input_name: source(2, model.config.hidden_size, 9)}


@inputs("granite_speech5_ctc", "granite_speech5_encoder")
def granite(model: Any, source: Any) -> dict[str, Any]:
    width = model.get_submodule("encoder" if hasattr(model, "encoder") else "").input_linear.in_features
    return {"input_features": source(2, 24, width), "attention_mask": padded(24)}


@inputs("nemotron3_5_transcribe_word_timestamp")
def embeddings(model: Any, source: Any) -> dict[str, Any]:
    return {"inputs_embeds": source(2, 13, model.config.hidden_size), "attention_mask": padded(13)}


@inputs("neucodec", "xcodec2")
def codecs(model: Any, source: Any) -> dict[str, Any]:
    return {"input_values": source(2, 1, 3200), "input_features": source(2, 10, 32)}


@inputs("pe_audio")
def pe_audio(model: Any, source: Any) -> dict[str, Any]:
    return {
        "input_ids": source.ids(2, 13),
        "attention_mask": padded(13),
        "input_values": source(2, 1, 640),
    }


@inputs("speech-encoder-decoder")
def speech(model: Any, source: Any) -> dict[str, Any]:
    return {"input_values": source(2, 6400), "attention_mask": padded(6400), "decoder_input_ids": source.ids(2, 7)}


@inputs("kyutai_speech_to_text")
def streams(model: Any, source: Any) -> dict[str, Any]:
    mask = padded(13).flip(1)
    return {"input_ids": source.ids(2, 13, model.config.num_codebooks + 1), "attention_mask": mask}


@inputs("musicgen", "musicgen_melody")
def music(model: Any, source: Any) -> dict[str, Any]:
    given = {"input_ids": source.ids(2, 9), "attention_mask": padded(9)}
    return {**given, "decoder_input_ids": source.ids(2 * model.config.decoder.num_codebooks, 7, below=60)}


@inputs("fun_asr_nano_encoder")
def stacked_features(model: Any, source: Any) -> dict[str, Any]:
    width = model.layers[0].self_attn.q_proj.in_features
    return {"input_features": source(2, 40, width), "input_features_mask": padded(40)}


@inputs("qwen3_asr_encoder")
def masked_features(model: Any, source: Any) -> dict[str, Any]:
    return {"input_features": source(2, model.config.num_mel_bins, 200), "input_features_mask": padded(200)}


@inputs("voxtral_realtime")
def realtime(model: Any, source: Any) -> dict[str, Any]:
    features = source(2, model.config.audio_config.num_mel_bins, 13 * model.config.audio_length_per_tok)
    return {"input_ids": source.ids(2, 13), "attention_mask": padded(13).flip(1), "input_features": features}


@inputs("voxtral_realtime_text")
def timed(model: Any, source: Any) -> dict[str, Any]:
    given = {"input_ids": source.ids(2, 13), "attention_mask": padded(13).flip(1)}
    return {**given, "t_cond": source(1, 1, model.config.hidden_size)}


@inputs("higgs_audio_v2_tokenizer")
def whole_frames(model: Any, source: Any) -> dict[str, Any]:
    return {"input_values": source(2, 1, 10 * model.config.hop_length)}


@inputs("xcodec")
def mono(model: Any, source: Any) -> dict[str, Any]:
    return {"input_values": source(2, 1, 6400)}


@inputs("wav2vec2-bert")
def frames(model: Any, source: Any) -> dict[str, Any]:
    return {"input_features": source(2, 20, model.config.feature_projection_input_dim), "attention_mask": padded(20)}


@inputs("clvp")
def voices(model: Any, source: Any) -> dict[str, Any]:
    return {"input_ids": source.ids(2, 13), "input_features": source(2, 16, 20)}
