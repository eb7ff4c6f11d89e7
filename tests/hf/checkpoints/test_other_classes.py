"""A swapped checkpoint in another class: rules match by the paths that they were written for, or are left out aloud."""

import json

import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import attn_plugins as ap

LEARNED = {"type": "linear", "feature_map": "hedgehog"}
LOCAL = {"type": "local", "window_size": 3}


def plugins(model):
    return [row.plugin for row in ap.describe_attention(model)]


def fill(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_plugin" in name:
                parameter.fill_(0.25)
    return model


def learned(model):
    found = [p for name, p in model.named_parameters() if "attn_plugin" in name]
    return bool(found) and all(bool((p == 0.25).all()) for p in found)


@pytest.mark.parametrize(
    "modules", ["bert.encoder.layer.0.*", "*.encoder.layer.0.*", ["bert.encoder.layer.0.attention.self"]]
)
def test_rules_of_a_head_match_in_its_base_model(tmp_path, modules):
    model = ap.swap_attention(BertForMaskedLM(BertConfig(**tiny.SMALL)), {**LEARNED, "modules": modules})
    fill(model).save_pretrained(tmp_path / "head")
    for other in (BertModel, BertForSequenceClassification, AutoModel):
        back = other.from_pretrained(tmp_path / "head")
        assert plugins(back) == ["linear", None, None]
        assert learned(back)
        back.save_pretrained(tmp_path / "back")  # and from there to where it came from
        for again in (type(back), BertForMaskedLM, BertModel):
            assert plugins(again.from_pretrained(tmp_path / "back")) == ["linear", None, None]
            assert learned(again.from_pretrained(tmp_path / "back"))
        ap.swap_attention(back, back.config.attn_plugin)
        assert learned(back)
    assert plugins(BertModel(model.config)) == ["linear", None, None]
    assert plugins(model) == ["linear", None, None]


@pytest.mark.parametrize("modules", ["layers.1.*", "layers.1.self_attn", "*.1.*"])
def test_rules_of_a_base_model_match_in_a_head(tmp_path, modules):
    model = ap.swap_attention(tiny.build("llama").model, {**LEARNED, "modules": modules})
    fill(model).save_pretrained(tmp_path)
    for other in (LlamaForCausalLM, LlamaModel):
        back = other.from_pretrained(tmp_path)
        assert plugins(back) == [None, "linear", None]
        assert learned(back)


@pytest.mark.parametrize("implementation", [None, "eager"])
@torch.no_grad()
def test_rules_for_a_part_that_is_missing_are_left_out_aloud(tmp_path, transformers_log, implementation):
    beside = {} if implementation is None else {"attn_implementation": implementation}
    rules = [{"type": "softmax", "roles": "decoder"}, {**LOCAL, "roles": "encoder", "layers": 0}]
    plain = tiny.build("t5")
    plain.save_pretrained(tmp_path / "plain")
    stock = T5EncoderModel.from_pretrained(tmp_path / "plain")
    given = {k: v for k, v in tiny.inputs("t5").items() if not k.startswith("decoder")}
    for chosen, expected in ((rules[:1], [None, None]), (rules, ["local", None])):
        ap.swap_attention(plain, chosen).save_pretrained(tmp_path / "t5")
        transformers_log.clear()
        back = T5EncoderModel.from_pretrained(tmp_path / "t5", **beside)
        message = "T5EncoderModel leaves out a rule of the saved model: rule 0 ('softmax') matches nothing: no module"
        assert transformers_log.text.count(message) == 1
        assert plugins(back) == expected
        assert {row.implementation for row in ap.describe_attention(back)} - {"auto", "torch"} == {
            beside.get("attn_implementation", "sdpa")
        }
        if expected == [None, None]:
            assert torch.equal(tiny.output(back, given), tiny.output(stock, given)) or implementation
            assert back.config.attn_plugin is None
        back.save_pretrained(tmp_path / "encoder")
        transformers_log.clear()
        again = T5EncoderModel.from_pretrained(tmp_path / "encoder")
        assert "leaves out" not in transformers_log.text
        assert plugins(again) == expected
        saved = json.loads((tmp_path / "encoder/config.json").read_text())
        assert ("attn_implementation" in saved) == (expected != [None, None])


def test_rules_that_users_give_have_to_match_in_any_class(tmp_path):
    BertForMaskedLM(BertConfig(**tiny.SMALL)).save_pretrained(tmp_path / "plain")
    rule = {**LOCAL, "modules": "bert.encoder.layer.0.*"}
    ap.swap_attention(BertForMaskedLM(BertConfig(**tiny.SMALL)), rule).save_pretrained(tmp_path / "swapped")
    flagged = AutoConfig.from_pretrained(tmp_path / "swapped")
    flagged.attn_plugin = rule
    message = r"no attention module's path matches modules=\['bert.encoder.layer.0.\*'\]"
    for make in (
        lambda: BertModel.from_pretrained(tmp_path / "plain", attn_plugin=rule),
        lambda: BertModel.from_pretrained(tmp_path / "swapped", attn_plugin=rule),
        lambda: BertModel.from_pretrained(tmp_path / "swapped", config=flagged),
        lambda: BertModel(flagged),
        lambda: BertModel(BertConfig(**tiny.SMALL, attn_plugin=rule)),
        lambda: ap.swap_attention(BertModel.from_pretrained(tmp_path / "plain"), rule),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    tiny.build("t5").save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="matches nothing: no module fits roles"):
        T5EncoderModel.from_pretrained(tmp_path / "t5", attn_plugin={**LOCAL, "roles": "decoder"})


def test_saved_rules_have_to_match_in_the_class_that_saved_them(tmp_path):
    ap.swap_attention(tiny.build("llama"), {**LOCAL, "modules": "layers.2.*"}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no attention module's path matches modules=\['layers.2.\*'\]"):
        LlamaForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)


def test_layers_that_were_cut_off_are_no_missing_part(tmp_path):
    ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": "0-2"}).save_pretrained(tmp_path)
    for cls in (LlamaForCausalLM, LlamaModel):
        with pytest.raises(ValueError, match="layers='0-2' is out of range; there are layers 0 to 1"):
            cls.from_pretrained(tmp_path, num_hidden_layers=2)


@torch.no_grad()
def test_a_part_saved_alone_has_rules_in_its_own_paths(tmp_path):
    rules = [
        {**LEARNED, "modules": "model.language_model.layers.*", "layers": [0, 2]},
        {**LOCAL, "modules": "*vision*", "layers": 1},
        {"type": "softmax", "modules": "*vision*"},
    ]
    model = fill(ap.swap_attention(tiny.build("llava"), rules))
    expected = plugins(model)
    text, vision = model.model.language_model, model.model.vision_tower
    text.save_pretrained(tmp_path / "text")
    vision.save_pretrained(tmp_path / "vision")
    for cls in (LlamaModel, LlamaForCausalLM):
        alone = cls.from_pretrained(tmp_path / "text")
        assert plugins(alone) == ["linear", None, "linear"]
        assert learned(alone)
    assert plugins(type(vision).from_pretrained(tmp_path / "vision")) == plugins(vision) == ["softmax", "local"]
    model.save_pretrained(tmp_path / "whole")
    for cls in (type(model), AutoModel):
        back = cls.from_pretrained(tmp_path / "whole")
        assert plugins(back) == expected
        assert learned(back)


def test_an_encoder_that_was_saved_swapped_in_the_whole_model(tmp_path):
    encoder = ap.swap_attention(T5EncoderModel(tiny.config_of("t5")), {**LOCAL, "modules": "encoder.block.1.*"})
    encoder.save_pretrained(tmp_path)
    back = T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert [row.path for row in ap.describe_attention(back) if row.plugin] == ["encoder.block.1.layer.0.SelfAttention"]
