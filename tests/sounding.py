"""Tiny models that hear, and recordings of tones, as files that a user would have."""

import json

import numpy as np
import soundfile
import torch
from conftest import SPECIAL, WORDS, tokenizer, write_rows
from transformers import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)

RATE = 16000


def tone(pitch, seconds=0.5, rate=RATE):
    """A sine of so many Hz, float32."""
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def recordings(folder, count=16, column="audio", name="rows.jsonl"):
    """A table of tones, and beside it their files: the pitch tells the first word of the transcript."""
    rows = []
    for number in range(count):
        words = [WORDS[number % 3], *WORDS[3 + number % 4 : 5 + number % 4]]
        sound = tone(200 * (1 + number % 3), 0.3 + 0.1 * (number % 5))
        soundfile.write(folder / f"{number}.wav", sound, RATE)
        rows.append({column: f"{number}.wav", "text": " ".join(words)})
    return write_rows(folder / name, rows)


def whisper(folder):
    """Hears a second, and writes words."""
    made = tokenizer(encoder=True)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    places = {"max_source_positions": 50, "max_target_positions": 24}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    easy = {"init_std": 0.2, "dropout": 0.1, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=len(SPECIAL) + len(WORDS), **sizes, **heads, **places, **ids, **easy)
    )
    written = {"suppress_tokens": [0, 1, 3], "begin_suppress_tokens": [2]}  # at least a word
    for name, value in {"is_multilingual": False, "no_timestamps_token_id": 0, **written}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    WhisperProcessor(extractor, made).save_pretrained(folder)
    return str(folder)


def ctc(folder, cls=Wav2Vec2ForCTC):
    """Names letters, of which it knows capitals alone."""
    folder.mkdir(exist_ok=True)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    (folder / "vocab.json").write_text(json.dumps({letter: at for at, letter in enumerate(letters)}))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    layers = {
        "conv_dim": (16, 16, 16),
        "conv_kernel": (10, 8, 8),
        "conv_stride": (8, 4, 4),
        "feat_extract_norm": "layer",
    }
    places = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "do_stable_layer_norm": True}
    still = {"mask_time_prob": 0.0, "layerdrop": 0.0}
    torch.manual_seed(0)
    cls(cls.config_class(vocab_size=len(letters), **sizes, **layers, **places, **still)).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))).save_pretrained(folder)
    return str(folder)
