"""The flag on tiny models: a spread of model types by default, all of them with ``-m architectures``."""

import checks
import pytest
import tiny_model

SPREAD = (
    *("llama", "gpt2", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "cohere", "olmo2", "phi3", "mixtral"),
    *("bert", "roberta", "albert", "distilbert", "modernbert", "electra", "ernie", "xlm-roberta", "eurobert"),
    *("t5", "bart", "whisper", "wav2vec2", "hubert", "data2vec-audio", "speech_to_text", "pegasus", "blenderbot"),
    *("mt5", "vit", "dinov2", "siglip", "deit", "videomae", "beit", "dinov3_vit", "ijepa", "aya_vision", "qwen2_vl"),
)
"""Of every kind: causal, bidirectional and cross, text, images, video, sound and text with images."""


def cases() -> list:
    return [
        pytest.param(name, marks=() if name in SPREAD else pytest.mark.architectures, id=name)
        for name in tiny_model.model_types()
    ]


@pytest.mark.parametrize("model_type", cases())
def test_every_attention_module_of_a_model_type_is_served(model_type):
    row = checks.examine(model_type)
    if row.status in ("no attention", "inline attention", "not built") and model_type not in SPREAD:
        pytest.skip(f"{row.status}: {row.reason}")
    assert row.status == "passed", row.reason
