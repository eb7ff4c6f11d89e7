"""New parameters under LoRA: trained, saved with the adapter, loaded on a flagged base."""

import copy

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoModelForCausalLM

import attn_plugins as ap
from attn_plugins.hf.discovery import modules as discovery

FLAG = {"type": "linear", "feature_map": "hedgehog", "layers": [0, 1]}


def lora(model):
    settings = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["attn_plugin"], task_type="CAUSAL_LM"
    )
    return get_peft_model(model, settings)


def test_adapter_with_new_weights_comes_back_on_a_flagged_base(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    given = tiny.inputs("llama")
    model = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_plugin=FLAG))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("attn_plugin.modules_to_save" in name for name in trainable)
    assert all("lora_" in name or "attn_plugin.modules_to_save" in name for name in trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if name in trainable}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(**given, labels=given["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if name in trainable and not torch.equal(p, before[name])}
    assert moved == trainable

    model.eval().save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_plugin=FLAG)
    back = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(tiny.output(back, given), tiny.output(model, given))
    rows = ap.describe_attention(back)
    assert [row.plugin for row in rows] == ["linear", "linear", None]


@torch.no_grad()
def test_merged_adapter_is_a_plain_swapped_model(tmp_path):
    given = tiny.inputs("llama")
    model = lora(ap.swap_attention(tiny.build("llama"), FLAG)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    expected = tiny.output(model, given)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.output(merged, given), expected, atol=1e-5, rtol=1e-4)
    merged.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny.output(back, given), tiny.output(merged, given))


@pytest.mark.parametrize(
    "settings",
    [
        peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], modules_to_save=["attn_plugin"]),
        peft.VeraConfig(target_modules=["v_proj"], modules_to_save=["attn_plugin"]),
        peft.OFTConfig(target_modules=["v_proj"], oft_block_size=4, modules_to_save=["attn_plugin"]),
        peft.LoHaConfig(target_modules=["v_proj"], modules_to_save=["attn_plugin"]),
        peft.LoKrConfig(target_modules=["v_proj"], modules_to_save=["attn_plugin"]),
        peft.HRAConfig(target_modules=["v_proj"], modules_to_save=["attn_plugin"]),
    ],
    ids=lambda settings: settings.peft_type.value,
)
@torch.no_grad()
def test_every_kind_of_adapter_is_merged_beside_slots(settings):
    given = tiny.inputs("llama")
    model = get_peft_model(ap.swap_attention(tiny.build("llama"), FLAG), copy.deepcopy(settings)).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    expected = tiny.output(model, given)
    merged = model.merge_and_unload()
    torch.testing.assert_close(tiny.output(merged, given), expected, atol=1e-5, rtol=1e-4)
    assert merged.state_dict().keys() == ap.swap_attention(tiny.build("llama"), FLAG).state_dict().keys()


@pytest.mark.parametrize("flag", ["local", "softmax"])
@torch.no_grad()
def test_swap_and_restore_under_peft(flag):
    given = tiny.inputs("llama")
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.build("llama"), settings).eval()
    before = tiny.output(model, given)
    ap.swap_attention(model, flag)
    assert {row.plugin for row in ap.describe_attention(model)} == {flag}
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), before)


@torch.no_grad()
def test_attention_modules_that_peft_keeps_twice_are_one_layer():
    settings = LoraConfig(target_modules=["gate_proj"], modules_to_save=["self_attn"])
    model = ap.swap_attention(get_peft_model(tiny.build("llama"), settings), "local", window_size=4, layers=[0, -2])
    rows = ap.describe_attention(model)
    assert [(row.layer, row.plugin) for row in rows] == [
        (i, p) for i, p in enumerate(["local", "local", None]) for _ in "12"
    ]
    settings = LoraConfig(target_modules=["wi"], modules_to_save=["EncDecAttention"])
    rows = ap.describe_attention(get_peft_model(tiny.build("t5"), settings))
    assert [row.role for row in rows if "EncDecAttention" in row.path] == ["cross"] * 4


def test_layers_that_fsdp_computes_again_are_saved_and_loaded_under_their_names():
    """accelerate puts a module around each, which stands in no state dict."""
    model = ap.swap_attention(tiny.build("llama"), [{"type": "linear", "layers": 0}, {"type": "local", "layers": 1}])
    adapted = lora(model)
    expected = get_peft_model_state_dict(adapted)
    rows = ap.describe_attention(adapted)
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layers[number] = checkpoint_wrapper(layer)
    found = get_peft_model_state_dict(adapted)
    assert found.keys() == expected.keys()
    changed = {name: weight + 1 for name, weight in expected.items()}
    assert not set_peft_model_state_dict(adapted, changed).unexpected_keys
    for name, weight in get_peft_model_state_dict(adapted).items():
        assert torch.equal(weight, changed[name])
    assert type(layers[0]).__name__ == "CheckpointWrapper"
    around = ap.describe_attention(adapted)
    inside = [discovery.place_of(path) for path, _ in discovery.attention_modules(model)]
    assert inside == [f"model.layers.{number}.self_attn" for number in range(len(layers))]
    assert [(row.layer, row.role, row.plugin) for row in around] == [(row.layer, row.role, row.plugin) for row in rows]
