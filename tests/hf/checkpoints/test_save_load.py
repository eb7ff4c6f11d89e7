"""Save and load: the variant, its options and its learned weights come back; a process without the package fails."""

import json

import programs
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration

import attn_plugins as ap

HEDGEHOG = [{"type": "linear", "feature_map": "hedgehog", "layers": "0-1"}, {"type": "local", "window_size": 4}]


def trained(name="llama", flag=None):
    """A swapped model whose new weights are not those of their initialisation."""
    model = ap.swap_attention(tiny.build(name), flag or HEDGEHOG)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "attn_plugin" in path:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)), alpha=0.2)
    return model


def slot_weights(model):
    return {name: p for name, p in model.state_dict().items() if "attn_plugin" in name}


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_saved_swapped_comes_back_swapped(tmp_path, dtype, max_shard_size):
    trained().save_pretrained(tmp_path / "float32")
    model, given = AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype), tiny.inputs("llama")
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert ap.describe_attention(back) == ap.describe_attention(model)
    assert len(slot_weights(model)) > 0
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in back.state_dict().items())
    assert torch.equal(tiny.output(back, given), tiny.output(model, given))
    back.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_config_json_spells_every_option_out(tmp_path):
    ap.swap_attention(tiny.build("llama"), "local", layers=-1).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["attn_implementation"] == "attn_plugins"
    settled = ap.get_attention("local").Config().settled(None)
    options = {field: getattr(settled, field) for field in ("window_size", "num_sink_tokens")}
    assert options == {"window_size": 256, "num_sink_tokens": 4}
    assert options.items() <= saved["attn_plugin"][0].items()
    assert saved["attn_plugin"][0]["layers"] == -1


@torch.no_grad()
def test_flag_at_load_initialises_new_weights_and_keeps_the_others(tmp_path):
    plain = tiny.build("llama")
    plain.save_pretrained(tmp_path)
    flagged = AutoModelForCausalLM.from_pretrained(tmp_path, attn_plugin=HEDGEHOG)
    live = ap.swap_attention(tiny.build("llama"), HEDGEHOG)
    assert flagged.state_dict().keys() == live.state_dict().keys()
    for name, weight in live.state_dict().items():
        assert torch.equal(flagged.state_dict()[name], weight), name
    given = tiny.inputs("llama")
    assert torch.equal(tiny.output(flagged.eval(), given), tiny.output(live, given))


@torch.no_grad()
def test_flag_none_loads_a_swapped_checkpoint_with_its_own_attention(tmp_path, transformers_log):
    plain, given = tiny.build("llama"), tiny.inputs("llama")
    own = tiny.output(plain, given)
    ap.swap_attention(plain, HEDGEHOG).save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, attn_plugin=None)
    assert torch.equal(tiny.output(back, given), own)
    assert "attn_plugin" in transformers_log.text  # transformers' load report names the weights that are left out
    assert all(row.plugin is None and row.implementation == "sdpa" for row in ap.describe_attention(back))
    back.save_pretrained(tmp_path / "plain")
    assert not json.loads((tmp_path / "plain/config.json").read_text()).get("attn_plugin")
    assert torch.equal(tiny.output(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"), given), own)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_implementation_beside_the_flag_serves_unmatched_layers(tmp_path, implementation):
    tiny.build("llama").save_pretrained(tmp_path)
    flag = {"type": "local", "layers": 0}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_plugin=flag, attn_implementation=implementation)
    rows = ap.describe_attention(model)
    assert [(row.plugin, row.implementation) for row in rows[:2]] == [("local", "torch"), (None, implementation)]
    model.save_pretrained(tmp_path / "swapped")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped", attn_implementation=implementation)
    assert ap.describe_attention(again) == rows


def test_restored_model_is_saved_without_the_flag(tmp_path):
    ap.restore_attention(trained()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "attn_plugin" not in saved
    assert "attn_implementation" not in saved
    assert not AutoConfig.from_pretrained(tmp_path).attn_plugin


@torch.no_grad()
def test_composite_model_and_its_parts(tmp_path):
    model, given = trained("llava"), tiny.inputs("llava", length=20)
    assert [row.plugin for row in ap.describe_attention(model)] == [None, None, "linear", "linear", "local"]
    expected = tiny.output(model, given)
    model.save_pretrained(tmp_path / "whole")
    back = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    assert ap.describe_attention(back) == ap.describe_attention(model)
    assert torch.equal(tiny.output(back, given), expected)
    none = LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole", attn_plugin=None)
    assert all(row.plugin is None for row in ap.describe_attention(none))
    assert tiny.output(none, given).isfinite().all()

    text = model.model.language_model
    text.save_pretrained(tmp_path / "text")
    alone = AutoModel.from_pretrained(tmp_path / "text")
    assert [row.plugin for row in ap.describe_attention(alone)] == ["linear", "linear", "local"]
    embeds = torch.randn(1, 9, 32)
    assert torch.equal(alone(inputs_embeds=embeds).last_hidden_state, text(inputs_embeds=embeds).last_hidden_state)


@torch.no_grad()
def test_roles_of_an_encoder_decoder_come_back(tmp_path):
    flag = [
        {"type": "local", "roles": "encoder", "window_size": 3},
        {"type": "softmax", "roles": ["cross"], "layers": 0},
    ]
    model, given = ap.swap_attention(tiny.build("t5"), flag[1:]), tiny.inputs("t5")
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert ap.describe_attention(back) == ap.describe_attention(model)
    assert torch.equal(tiny.output(back, given), tiny.output(model, given))
    bart = ap.swap_attention(tiny.build("bart"), flag)
    bart.save_pretrained(tmp_path / "bart")
    back = type(bart).from_pretrained(tmp_path / "bart")
    assert [row.plugin for row in ap.describe_attention(back)] == ["local", "local", None, "softmax", None, None]


@pytest.mark.parametrize("name", ["bart", "t5", "whisper", "llava"])
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_half_a_model_is_swapped(tmp_path, name, role):
    model = ap.swap_attention(tiny.build(name), {"type": "softmax", "roles": role})
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    assert ap.describe_attention(back) == ap.describe_attention(model)
    assert {row.role for row in ap.describe_attention(back) if row.plugin} == {role}


@pytest.mark.parametrize("name", ["llama", "llava", "t5"])
def test_a_process_without_the_package_fails_loudly(tmp_path, name):
    ap.swap_attention(tiny.build(name), "softmax").save_pretrained(tmp_path)
    load = (
        "AutoModelForImageTextToText" if name == "llava" else "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModel"
    )
    code = f"from transformers import {load} as m; m.from_pretrained({str(tmp_path)!r})"
    done = programs.run("-c", code)
    assert done.returncode != 0
    assert 'attn_implementation="attn_plugins"` is not supported' in done.stderr
    done = programs.run("-c", "import attn_plugins; " + code)
    assert done.returncode == 0, done.stderr


ASKED = """
from transformers import LlamaForCausalLM, pipeline
try:
    pipeline("text-generation", {folder!r})
except ValueError as error:
    print(error)
print(LlamaForCausalLM.from_pretrained({folder!r}, attn_implementation="sdpa").config._attn_implementation)
"""


def test_without_the_package_a_pipeline_fails_too_and_another_name_is_a_choice(tmp_path):
    ap.swap_attention(tiny.build("llama"), "linear").save_pretrained(tmp_path)
    done = programs.run("-c", ASKED.format(folder=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert 'attn_implementation="attn_plugins"` is not supported' in done.stdout
    assert done.stdout.endswith("\nsdpa\n")
    assert "UNEXPECTED" in done.stderr
