"""Sinks where no rule says how many: those of a causal model, and the tokens that stand first in an encoder."""

import json

import pytest
import torch
import transformers as tf
from tiny import GROUPED, HALVES, SMALL, TEXT, VISION

from attn_plugins import cache_bytes, describe_attention, swap_attention

PICTURES = {**VISION, "num_attention_heads": 4, "intermediate_size": 48}
NO_WIDTH = {key: value for key, value in PICTURES.items() if key != "intermediate_size"}
REGISTERS = {"num_register_tokens": 3}
T5 = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
SPEECH = {**TEXT, "num_hidden_layers": 1, "conv_dim": (32,) * 7, "num_conv_pos_embedding_groups": 4}
ENCODERS = {
    "bert": (1, lambda: tf.BertModel(tf.BertConfig(**SMALL))),
    "roberta": (1, lambda: tf.RobertaModel(tf.RobertaConfig(**SMALL))),
    "t5": (0, lambda: tf.T5EncoderModel(tf.T5Config(**T5))),
    "vit": (1, lambda: tf.ViTModel(tf.ViTConfig(**PICTURES))),
    "deit": (1 + 1, lambda: tf.DeiTModel(tf.DeiTConfig(**PICTURES))),
    "dinov2": (1, lambda: tf.Dinov2Model(tf.Dinov2Config(**NO_WIDTH))),
    "dinov2_with_registers": (
        1 + 3,
        lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**NO_WIDTH, **REGISTERS)),
    ),
    "dinov3": (1 + 3, lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**PICTURES, **REGISTERS))),
    "clip": (1, lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**PICTURES))),
    "siglip": (0, lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**PICTURES))),
    "wav2vec2": (0, lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**SPEECH))),
}
"""Tokens that stand first in every input, and the model."""
SMALLEST = {
    "local": ("num_sink_tokens", {"window_size": 4}),
    "longformer": ("num_global_tokens", {"window_size": 4}),
    "block_local": ("num_sink_tokens", {"block_size": 4}),
    "strided": ("num_sink_tokens", {"stride": 7}),
    "fixed": ("num_sink_tokens", {"stride": 4, "num_summary_columns": 1}),
}
"""Whose option it is, and options that leave much else unseen."""


def told(model, option="num_sink_tokens"):
    """What the modules of each role have for an option."""
    return {row.role: row.options[option] for row in describe_attention(model) if row.plugin}


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_s_sinks_are_the_tokens_that_stand_first(name):
    number, make = ENCODERS[name]
    model = swap_attention(make(), "local")
    assert told(model) == {"encoder": number}
    assert model.config.attn_plugin[0]["num_sink_tokens"] == number
    swap_attention(model, "longformer")
    assert told(model, "num_global_tokens") == {"encoder": max(1, number)}


@pytest.mark.parametrize("name", SMALLEST)
@torch.no_grad()
def test_a_causal_model_has_four_sinks_by_the_bare_name(name):
    torch.manual_seed(0)
    option, small = SMALLEST[name]
    model = swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval(), name)
    assert told(model, option) == {"decoder": 4}
    ids = torch.randint(1, 97, (2, 40))
    bare = swap_attention(model, name, **small)(ids).logits
    assert torch.equal(bare, swap_attention(model, name, **small, **{option: 4})(ids).logits)
    assert not torch.allclose(bare, swap_attention(model, name, **small, **{option: 0})(ids).logits, atol=1e-4)


def test_a_model_with_both_has_each_and_so_has_what_it_saved(tmp_path):
    model = swap_attention(tf.BartForConditionalGeneration(tf.BartConfig(**HALVES)), "local")
    assert told(model) == {"encoder": 1, "decoder": 4}
    model.save_pretrained(tmp_path)
    assert told(tf.BartForConditionalGeneration.from_pretrained(tmp_path)) == {"encoder": 1, "decoder": 4}
    assert told(tf.BartModel.from_pretrained(tmp_path)) == {"encoder": 1, "decoder": 4}
    held = model.model.encoder.layers[0].self_attn.attn_plugin
    assert swap_attention(model, "local").model.encoder.layers[0].self_attn.attn_plugin is held


def test_both_towers_of_a_model_have_their_own():
    text, pictures = {**SMALL, "bos_token_id": 1, "eos_token_id": 2}, PICTURES
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=pictures))
    assert told(swap_attention(model, "local", roles=["encoder", "decoder"])) == {"encoder": 1, "decoder": 4}


def test_saved_rules_say_the_number_and_mean_it_wherever_they_are_loaded(tmp_path):
    model = swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), "local")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved["attn_plugin"][0]["num_sink_tokens"] == 4
    saved["attn_plugin"][0]["num_sink_tokens"] = 0  # as rules were saved by the bare name before there was a default
    path.write_text(json.dumps(saved))
    assert told(tf.LlamaForCausalLM.from_pretrained(tmp_path)) == {"decoder": 0}
    assert told(tf.LlamaForCausalLM.from_pretrained(tmp_path, attn_plugin="local")) == {"decoder": 4}


BEFORE = {"block_topk": "init_blocks", "block_local": "num_sink_tokens", "strided": "num_sink_tokens"}
"""Attentions that have got an option, whose default is not what they did without it."""


@pytest.mark.parametrize("name", BEFORE)
def test_rules_that_were_saved_before_an_option_was_there_mean_what_they_did(name, tmp_path):
    option = BEFORE[name]
    model = swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)), name)
    assert told(model, option)["decoder"] > 0
    model.save_pretrained(tmp_path)
    assert told(tf.LlamaForCausalLM.from_pretrained(tmp_path), option) == told(model, option)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["attn_plugin"][0][option]
    path.write_text(json.dumps(saved))
    loaded = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert told(loaded, option) == {"decoder": 0}
    assert loaded.config.attn_plugin[0][option] == 0
    assert told(tf.LlamaForCausalLM.from_pretrained(tmp_path, attn_plugin=name), option)["decoder"] > 0


@torch.no_grad()
def test_sinks_by_default_are_kept_when_text_is_generated():
    torch.manual_seed(0)
    model = swap_attention(tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)).eval(), "local", window_size=8)
    ids = torch.randint(1, 97, (1, 30))
    cache = model(ids, use_cache=True).past_key_values
    grown = model(ids[:, :20], use_cache=True).past_key_values
    spelled = swap_attention(model, "local", window_size=8, num_sink_tokens=4)(ids, use_cache=True).past_key_values
    without = swap_attention(model, "local", window_size=8, num_sink_tokens=0)(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == cache_bytes(grown) == cache_bytes(spelled)
    # In 3 layers 4 keys and 4 values, of 2 heads of 8 in float32, and whether they are no padding.
    assert cache_bytes(cache) - cache_bytes(without) == 3 * 4 * (2 * 2 * 8 * 4 + 1)
