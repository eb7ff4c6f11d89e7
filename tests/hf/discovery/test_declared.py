"""What transformers declares of its attention modules is what their code does."""

import pytest
import tiny
import torch
import transformers as tf
from torch import nn
from transformers.models.bart import modeling_bart
from transformers.models.bert import modeling_bert
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

import attn_plugins as ap
from attn_plugins.hf.discovery import by_code
from attn_plugins.hf.discovery.declared import declared_dispatch, declares_cross_attention
from attn_plugins.hf.discovery.modules import role_of


@pytest.mark.parametrize(
    "cls", [modeling_llama.LlamaAttention, modeling_bart.BartAttention, modeling_bert.BertCrossAttention]
)
def test_what_is_declared_is_what_is_found_in_code(cls):
    found = declared_dispatch(cls)
    assert found is not None
    assert found == by_code._find_dispatch(cls)


@pytest.mark.parametrize("cls", [modeling_t5.T5LayerSelfAttention, modeling_llama.LlamaMLP, nn.Linear])
def test_a_class_that_does_not_call_the_interface_itself_is_not_declared(cls):
    assert declared_dispatch(cls) is None


def test_code_is_read_of_what_is_not_declared(monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaPreTrainedModel, "_can_record_outputs", None)
    monkeypatch.setattr(by_code, "_dispatches", {})
    assert declared_dispatch(modeling_llama.LlamaAttention) is None
    assert by_code.dispatch_of(modeling_llama.LlamaAttention) is not None


def test_cross_attention_is_what_a_decoder_declares_whatever_it_is_named():
    decoder = modeling_bart.BartDecoder
    module = tiny.build("bart").model.decoder.layers[0].encoder_attn
    assert declares_cross_attention(decoder, "model.decoder.layers.0.encoder_attn", module)
    assert not declares_cross_attention(decoder, "model.decoder.layers.0.self_attn", module)
    assert not declares_cross_attention(modeling_bart.BartEncoder, "model.encoder.layers.0.encoder_attn", module)


@pytest.mark.parametrize(("own", "role"), [((), "cross"), (("attentions",), "decoder")])
def test_a_role_is_what_is_declared_where_no_name_tells(own, role, monkeypatch):
    """Merged attention is recorded as both."""
    model = tiny.build("llama")
    path, module = "model.layers.0.self_attn", model.model.layers[0].self_attn
    declared = dict.fromkeys((*own, "cross_attentions"), modeling_llama.LlamaAttention)
    monkeypatch.setattr(modeling_llama.LlamaModel, "_can_record_outputs", declared)
    assert role_of(model, path, module) == role


def test_an_encoder_of_sound_that_calls_itself_causal_is_none():
    with torch.device("meta"):
        model = tf.Phi4MultimodalAudioModel(tf.Phi4MultimodalAudioConfig(num_blocks=2))
    assert {row.role for row in ap.describe_attention(model)} == {"encoder"}
