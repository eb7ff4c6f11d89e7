"""Modules whose heads have several attentions, through files: rules, weights, parts of models, adapters and cards."""

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, LlamaModel

import attn_plugins as ap

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}
RULES = [{**HEDGEHOG, "kv_heads": {"0": [1], "1": [0]}}, {"type": "retention", "kv_heads": [0], "layers": "0-1"}]


def moved(model):
    """The model with other new weights than it starts with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "attn_plugin" in name or "lora_B" in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def assert_same(found, model, given):
    assert str(ap.describe_attention(found)) == str(ap.describe_attention(model))
    with torch.no_grad():
        assert torch.equal(tiny.output(found.eval(), given), tiny.output(model, given))


@pytest.fixture
def base(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_learned_weights_of_every_part_come_back(tmp_path):
    model, given = moved(ap.swap_attention(tiny.build("llama"), RULES)), tiny.inputs("llama")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert_same(loaded, model, given)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert sum("attn_plugin.parts." in name for name in model.state_dict()) == sum(
        "attn_plugin" in n for n in model.state_dict()
    )
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["attn-plugins", "attention-linear", "attention-retention"]
    assert "linear in 2, retention in 1, own (sdpa) in 2" in card
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])[0]["kv_heads"] == {"0": [1], "1": [0]}


def test_weights_that_a_checkpoint_lacks_start_as_in_a_swap(base):
    loaded = LlamaForCausalLM.from_pretrained(base, attn_plugin=RULES)
    assert_same(loaded, ap.swap_attention(LlamaForCausalLM.from_pretrained(base).eval(), RULES), tiny.inputs("llama"))


def test_its_base_model_is_split_as_it_is(tmp_path):
    model = moved(ap.swap_attention(tiny.build("llama"), [{**RULES[0], "modules": "model.layers.*"}, RULES[1]]))
    model.save_pretrained(tmp_path / "whole")
    inner, given = LlamaModel.from_pretrained(tmp_path / "whole").eval(), tiny.inputs("llama")
    rows = [(row.layer, row.plugin, row.kv_heads) for row in ap.describe_attention(inner)]
    assert rows == [(row.layer, row.plugin, row.kv_heads) for row in ap.describe_attention(model)]
    with torch.no_grad():
        assert torch.equal(inner(**given).last_hidden_state, model.model(**given).last_hidden_state)
    inner.save_pretrained(tmp_path / "inner")
    assert_same(LlamaModel.from_pretrained(tmp_path / "inner"), inner, given)


@pytest.mark.parametrize("modules", [{}, {"modules": "*language_model*"}])
def test_a_part_that_is_saved_alone_is_split_as_it_was(tmp_path, modules):
    rules = [{**rule, **modules} for rule in RULES]
    whole = moved(ap.swap_attention(tiny.build("llava"), rules))
    part, given = whole.model.language_model, tiny.inputs("llama")
    part.save_pretrained(tmp_path / "part")
    loaded = LlamaModel.from_pretrained(tmp_path / "part").eval()
    with torch.no_grad():
        assert torch.equal(tiny.output(loaded, given), tiny.output(part, given))
    whole.save_pretrained(tmp_path / "whole")
    assert_same(type(whole).from_pretrained(tmp_path / "whole"), whole, tiny.inputs("llava", length=20))


def test_the_original_attention_of_a_split_checkpoint(tmp_path, base):
    moved(ap.swap_attention(LlamaForCausalLM.from_pretrained(base), RULES)).save_pretrained(tmp_path / "split")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "split", attn_plugin=None)
    assert_same(loaded, LlamaForCausalLM.from_pretrained(base).eval(), tiny.inputs("llama"))


@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_brings_the_split_and_its_weights(tmp_path, base, whole):
    saved = {"modules_to_save": ["attn_plugin"]} if whole else {}
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **saved)
    swapped, given = ap.swap_attention(LlamaForCausalLM.from_pretrained(base), RULES), tiny.inputs("llama")
    if whole:
        model = get_peft_model(swapped, settings)
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad and "attn_plugin" in name}
        assert len(trained) == 6
        assert all(".modules_to_save.default.parts." in name for name in trained)
        model(**given, labels=given["input_ids"]).loss.backward()
        assert all(weight.grad.norm() > 0 for name, weight in model.named_parameters() if name in trained)
    else:
        with pytest.warns(UserWarning, match=r"weights of 2 attentions \(linear, retention\) frozen"):
            model = get_peft_model(swapped, settings)
    moved(model).save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert_same(back, model, given)
    onto = LlamaForCausalLM.from_pretrained(base, attn_plugin=RULES)
    assert_same(PeftModel.from_pretrained(onto, tmp_path / "adapter"), model, given)
    other = LlamaForCausalLM.from_pretrained(base, attn_plugin=[{**RULES[0], "kv_heads": [1]}, RULES[1]])
    with pytest.raises(ValueError, match="this adapter was trained with attn_plugin="):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    if whole:
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        assert_same(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), merged, given)


def test_rules_of_a_split_part_go_with_the_adapter(tmp_path):
    given = tiny.inputs("llava", length=20)
    whole = tiny.build("llava")
    ap.swap_attention(whole.model.language_model, RULES)
    assert whole.config.attn_plugin is None
    model = moved(get_peft_model(whole, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["attn_plugin"])))
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(tiny.build("llava"), tmp_path), model, given)
