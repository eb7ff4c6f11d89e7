"""Where adapters go unless that is said, and what trains whole beside them."""

import pytest
from conftest import tokenizer
from sounding import ctc
from transformers import BartConfig, BartForSequenceClassification, HubertForCTC, Wav2Vec2ForCTC

from attn_plugins.core.options import build
from attn_plugins.tasks import trained_task
from attn_plugins.training.config import FinetuneConfig
from attn_plugins.training.finetune import choose_parameters
from attn_plugins.training.models import load

LOCAL = {"type": "local", "window_size": 4}


def trained(folder, task, attention):
    """Paths of layers with adapters, and of what trains whole."""
    tree = {"model": folder, "data": {"source": "x"}, "output_dir": "x", "task": task, "attention": attention}
    loaded = load(folder, kind=trained_task(task).model, attention=attention)
    model = choose_parameters(build(FinetuneConfig, tree), loaded)
    names = [name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad]
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    return adapted, {name.partition(".modules_to_save.")[0] for name in names if ".lora_" not in name}


@pytest.mark.parametrize("cls", [Wav2Vec2ForCTC, HubertForCTC])
def test_of_swapped_ctc_models_they_go_to_values_and_outputs(tmp_path, cls):
    adapted, whole = trained(ctc(tmp_path / "model", cls), "speech-recognition", LOCAL)
    layers = f"{cls.base_model_prefix}.encoder.layers"
    names = ("v_proj", "out_proj")
    assert adapted == {f"{layers}.{layer}.attention.{name}" for layer in (0, 1) for name in names}
    assert whole == set()


def test_a_new_head_gets_none_where_all_linear_layers_do(tmp_path):
    folder = ctc(tmp_path / "model")
    Wav2Vec2ForCTC.from_pretrained(folder).wav2vec2.save_pretrained(folder)
    adapted, whole = trained(folder, "speech-recognition", None)
    assert whole == {"lm_head"}
    assert "lm_head" not in adapted
    assert "wav2vec2.encoder.layers.0.feed_forward.output_dense" in adapted


def test_a_layer_of_such_a_name_in_a_head_gets_none(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    ids = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
    BartForSequenceClassification(BartConfig(vocab_size=20, **sizes, **heads, **ids)).save_pretrained(tmp_path)
    tokenizer(encoder=True).save_pretrained(tmp_path)
    adapted, whole = trained(str(tmp_path), "classification", {**LOCAL, "roles": ["encoder", "decoder"]})
    places = ("encoder.layers.0.self_attn", "decoder.layers.0.self_attn", "decoder.layers.0.encoder_attn")
    assert adapted == {f"model.{place}.{name}" for place in places for name in ("v_proj", "out_proj")}
    assert whole == {"classification_head"}
