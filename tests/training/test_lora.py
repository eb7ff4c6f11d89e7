"""Where adapters go unless that is said, and what trains whole beside them."""

import pytest
import torch
from conftest import tokenizer
from sounding import ctc
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    HubertForCTC,
    Wav2Vec2ForCTC,
)

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
@pytest.mark.parametrize("attention", [None, LOCAL])
def test_of_ctc_models_they_go_to_the_same_layers_whatever_the_attention(tmp_path, cls, attention):
    adapted, whole = trained(ctc(tmp_path / "model", cls), "speech-recognition", attention)
    layers = f"{cls.base_model_prefix}.encoder.layers"
    names = ("attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.out_proj")
    names += ("feed_forward.intermediate_dense", "feed_forward.output_dense")
    assert "lm_head" not in adapted
    inside = {name for name in adapted if name.startswith(layers)}
    assert inside == {f"{layers}.{layer}.{name}" for layer in (0, 1) for name in names}
    assert whole == set()


def test_a_new_head_gets_none_where_all_linear_layers_do(tmp_path):
    folder = ctc(tmp_path / "model")
    Wav2Vec2ForCTC.from_pretrained(folder).wav2vec2.save_pretrained(folder)
    adapted, whole = trained(folder, "speech-recognition", None)
    assert whole == {"lm_head"}
    assert "lm_head" not in adapted
    assert "wav2vec2.encoder.layers.0.feed_forward.output_dense" in adapted


def test_of_a_classifier_whose_layers_are_of_another_kind_all_get_some(tmp_path):
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, pad_token_id=3)
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(encoder=True).save_pretrained(tmp_path)
    adapted, whole = trained(str(tmp_path), "classification", LOCAL)
    names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert adapted == {f"transformer.h.0.{name}" for name in names}
    assert whole == {"score"}


def test_what_trains_whole_gets_none_inside(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    ids = {"pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 2}
    BartForSequenceClassification(BartConfig(vocab_size=20, **sizes, **heads, **ids)).save_pretrained(tmp_path)
    tokenizer(encoder=True).save_pretrained(tmp_path)
    linear = {"type": "linear", "roles": ["encoder"]}
    adapted, whole = trained(str(tmp_path), "classification", linear)
    assert "model.decoder.layers.0.encoder_attn.v_proj" in adapted
    assert not any("attn_plugin" in name or "classification_head" in name for name in adapted)
    assert whole == {"classification_head", "model.encoder.layers.0.self_attn.attn_plugin"}


def test_whatever_an_adapter_was_trained_in_is_loaded_with_it(tmp_path):
    """Its head too, where its base model was saved without one, and not the base model with nothing put in."""
    config = BertConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(tmp_path / "base")
    tokenizer(encoder=True).save_pretrained(tmp_path / "base")
    loaded = load(str(tmp_path / "base"), kind="classification", attention=LOCAL)
    tree = {"model": "x", "data": {"source": "x"}, "output_dir": "x", "task": "classification", "attention": LOCAL}
    model = choose_parameters(build(FinetuneConfig, tree), loaded)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(weight)
    model.save_pretrained(tmp_path / "adapter")
    again = load(str(tmp_path / "adapter"), kind="any")
    ids = torch.arange(4, 10)[None]
    with torch.no_grad():
        want, got = (one.eval()(input_ids=ids).logits for one in (model, again.model))
    torch.testing.assert_close(got, want)
