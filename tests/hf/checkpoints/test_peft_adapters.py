"""Adapters of swapped models: wherever they are loaded, they run with the attention that they were trained under."""

import json
import warnings

import peft
import programs
import pytest
import tiny
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM

import attn_plugins as ap

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog", "layers": [0, 1]}
FAVOR = {"type": "linear", "feature_map": "favor", "num_features": 16}
WHOLE = ["attn_plugin"]


@pytest.fixture
def base(tmp_path):
    tiny.build("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


OLD = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 18)
"""transformers itself loads no modules_to_save."""


def plain(base, **flag):
    return AutoModelForCausalLM.from_pretrained(base, **flag)


def lora(model, whole=None, **options):
    options = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": whole, "task_type": "CAUSAL_LM", **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="this adapter leaves the weights")
        return get_peft_model(model, LoraConfig(**options)).eval()


@torch.no_grad()
def stirred(model, seed=0):
    """The model with other adapters, and with other weights and buffers of slots than they are made with."""
    for name, value in model.state_dict().items():
        if ("lora_" in name or "attn_plugin" in name) and value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.2)
    return model


@torch.no_grad()
def logits(model):
    return tiny.output(model.eval(), tiny.inputs("llama"))


def saved(base, folder, flag, **options):
    """(logits, folder) of an adapter that was made on a swapped model and saved."""
    model = stirred(lora(plain(base, attn_plugin=flag), **options))
    model.save_pretrained(folder)
    return logits(model), folder


LOADS = {
    "AutoPeftModel": lambda base, adapter: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "PeftModel": lambda base, adapter: PeftModel.from_pretrained(plain(base), adapter),
    "low_cpu_mem_usage": lambda base, adapter: PeftModel.from_pretrained(plain(base), adapter, low_cpu_mem_usage=True),
    "AutoModel": lambda base, adapter: AutoModelForCausalLM.from_pretrained(adapter),
    "load_adapter": lambda base, adapter: (model := plain(base), model.load_adapter(adapter))[0],
}


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(("flag", "whole"), [("local", None), (HEDGEHOG, WHOLE), (HEDGEHOG, None), (FAVOR, None)])
def test_an_adapter_swaps_the_base_model_that_it_is_loaded_onto(tmp_path, base, flag, whole, load):
    expected, folder = saved(base, tmp_path / "adapter", flag, whole=whole)
    if OLD and whole and load in ("AutoModel", "load_adapter"):
        with pytest.raises(ValueError, match=r"this version of transformers .* load it with peft.PeftModel.from_pret"):
            LOADS[load](base, folder)
        return
    back = LOADS[load](base, folder)
    assert {row.plugin for row in ap.describe_attention(back)} >= {flag["type"] if isinstance(flag, dict) else flag}
    assert torch.equal(logits(back), expected)


@pytest.mark.parametrize("name", [n for n in ap.list_attentions() if ap.get_attention(n).causal])
def test_an_adapter_holds_all_that_its_base_model_lacks(tmp_path, base, name):
    expected, folder = saved(base, tmp_path / "adapter", name)
    assert torch.equal(logits(PeftModel.from_pretrained(plain(base), folder)), expected)


def test_one_rule_may_mean_other_options_in_each_half_of_a_base_model(tmp_path):
    tiny.build("bart").save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForSeq2SeqLM.from_pretrained
    model = stirred(lora(load(tmp_path / "base", attn_plugin="local"), task_type="SEQ_2_SEQ_LM"))
    model.save_pretrained(tmp_path / "adapter")
    rows = [row.options for row in ap.describe_attention(model)]
    assert {options.get("num_sink_tokens") for options in rows} == {1, 4, None}
    for flag in ({}, {"attn_plugin": "local"}):
        back = PeftModel.from_pretrained(load(tmp_path / "base", **flag), tmp_path / "adapter")
        assert [row.options for row in ap.describe_attention(back)] == rows
    other = load(tmp_path / "base", attn_plugin={"type": "local", "num_sink_tokens": 4})
    with pytest.raises(ValueError, match="load the base model with the adapter's rules, or without any"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_an_adapter_that_transformers_made_and_saved_carries_its_rules(tmp_path, base):
    model = plain(base, attn_plugin=HEDGEHOG)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=WHOLE, task_type="CAUSAL_LM"))
    stirred(model).save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(plain(base), tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("how", ["peft", "transformers"])
def test_an_adapter_in_the_place_of_another_is_of_the_same_attention(tmp_path, base, how):
    _, first = saved(base, tmp_path / "first", "local")
    model = plain(base, attn_plugin={"type": "local", "window_size": 2})
    stirred(lora(model), seed=1).save_pretrained(tmp_path / "second")
    lora(plain(base)).save_pretrained(tmp_path / "dense")

    def exchange(model, folder):
        if how == "peft":
            hotswap_adapter(model, folder, "default", torch_device="cpu")
        else:
            model.load_adapter(folder, "default", hotswap=True)

    model = LOADS["PeftModel" if how == "peft" else "AutoModel"](base, first)
    before = logits(model)
    with pytest.raises(ValueError, match=r"trained with attn_plugin=.*'window_size': 2.*, and the model has"):
        exchange(model, tmp_path / "second")
    with pytest.raises(ValueError, match="trained with the model's own attention, and the model has adapter 'default'"):
        exchange(model, tmp_path / "dense")
    assert torch.equal(logits(model), before)
    stirred(model, seed=2)
    exchange(model, first)
    assert torch.equal(logits(model), before)


def test_rules_of_a_part_of_a_composite_model_go_with_the_adapter(tmp_path):
    given = tiny.inputs("llava", length=20)
    whole = tiny.build("llava")
    ap.swap_attention(whole.model.language_model, "local", window_size=3)
    assert whole.config.attn_plugin is None
    model = stirred(get_peft_model(whole, LoraConfig(r=4, target_modules=["q_proj"])).eval())
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny.build("llava"), tmp_path)
    with torch.no_grad():
        assert torch.equal(tiny.output(back, given), tiny.output(model, given))


@pytest.mark.parametrize(
    "settings",
    [
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=lambda settings: settings.peft_type.value,
)
def test_other_kinds_of_adapters_swap_the_base_model(tmp_path, base, settings):
    model = stirred(get_peft_model(plain(base, attn_plugin=FAVOR), settings))
    model.save_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(plain(base), tmp_path / "adapter")
    assert {row.plugin for row in ap.describe_attention(back)} == {"linear"}
    assert torch.equal(logits(back), logits(model))


def test_merged_it_is_a_plain_swapped_model(tmp_path, base):
    expected, folder = saved(base, tmp_path / "adapter", HEDGEHOG, whole=WHOLE)
    AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_model_restored_before_saving_has_an_adapter_without_rules(tmp_path, base):
    model = lora(plain(base, attn_plugin="local"))
    model.save_pretrained(tmp_path)
    ap.restore_attention(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert ap.describe_attention(AutoPeftModelForCausalLM.from_pretrained(tmp_path))[0].plugin is None


def test_an_adapter_of_a_dense_model_is_saved_as_peft_saves_it(tmp_path, base):
    lora(plain(base)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert "attn_plugin" not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("load", ["PeftModel", "load_adapter"])
def test_a_base_model_that_is_swapped_otherwise_is_refused(tmp_path, base, load):
    _, folder = saved(base, tmp_path / "adapter", HEDGEHOG)
    model = plain(base, attn_plugin="local")
    before = logits(model)
    with pytest.raises(ValueError, match=r"trained with attn_plugin=\[.*'linear'.*, and the model has .*'local'"):
        PeftModel.from_pretrained(model, folder) if load == "PeftModel" else model.load_adapter(folder)
    assert torch.equal(logits(model), before)
    same = plain(base, attn_plugin={**HEDGEHOG, "layers": "0-1", "backend": "reference"})
    PeftModel.from_pretrained(same, folder)  # the same attentions in the same places, in other words


def test_adapters_of_one_model_are_of_one_attention(tmp_path, base):
    expected, swapped = saved(base, tmp_path / "swapped", "local")
    lora(plain(base)).save_pretrained(tmp_path / "dense")
    model = PeftModel.from_pretrained(plain(base), swapped)
    with pytest.raises(
        ValueError, match=r"model's own attention, and the model has adapter 'default' with attn_plugin"
    ):
        model.load_adapter(tmp_path / "dense", "second")
    model.load_adapter(swapped, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)
    model = PeftModel.from_pretrained(plain(base), tmp_path / "dense")
    with pytest.raises(ValueError, match=r"has its own attention and adapters \['default'\]; load them onto separate"):
        model.load_adapter(swapped, "second")
    PeftModel.from_pretrained(plain(base, attn_plugin="local"), tmp_path / "dense")  # asked for


def test_adapters_of_one_model_share_what_none_of_them_trains(tmp_path, base):
    _, first = saved(base, tmp_path / "first", FAVOR)
    stirred(lora(plain(base, attn_plugin=FAVOR)), seed=1).save_pretrained(tmp_path / "second")
    model = PeftModel.from_pretrained(plain(base), first)
    with pytest.raises(
        ValueError, match=r"adapter 'second' was trained beside another .*projection than the one in the"
    ):
        model.load_adapter(tmp_path / "second", "second")


def test_the_models_own_attention_may_be_asked_for(tmp_path, base, transformers_log):
    _, folder = saved(base, tmp_path / "adapter", HEDGEHOG, whole=WHOLE)
    back = PeftModel.from_pretrained(plain(base, attn_plugin=None), folder)
    assert (
        "attn_plugin=None leaves out 4 weights of attentions: base_model.model.model.layers.0.self_attn"
        in transformers_log.text
    )
    assert {row.plugin for row in ap.describe_attention(back)} == {None}


def test_an_adapter_of_a_swapped_checkpoints_own_attention_says_so(tmp_path, base):
    plain(base, attn_plugin="local").save_pretrained(tmp_path / "swapped")
    model = stirred(lora(plain(tmp_path / "swapped", attn_plugin=None)))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match=r"and the model has attn_plugin=\[.*'local'.*\]; load the base .* attn_plugin=None"
    ):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    back = PeftModel.from_pretrained(plain(tmp_path / "swapped", attn_plugin=None), tmp_path / "adapter")
    assert torch.equal(logits(back), logits(model))


def test_a_base_model_stays_as_it_was_where_the_adapter_does_not_fit(tmp_path, base):
    _, folder = saved(base, tmp_path / "adapter", "local")
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"q_proj"', '"nothing"'))
    model = plain(base)
    with pytest.raises(ValueError, match="nothing"):
        PeftModel.from_pretrained(model, folder)
    assert {row.plugin for row in ap.describe_attention(model)} == {None}


def test_slots_to_save_in_a_model_without_slots_are_refused(base):
    with pytest.raises(ValueError, match="modules_to_save names 'attn_plugin', and LlamaForCausalLM has its own att"):
        lora(plain(base), whole=WHOLE)


def test_new_adapters_say_which_weights_they_leave_frozen(base):
    settings = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match=r"frozen; .* pass modules_to_save=\['attn_plugin'\] to LoraConfig") as told:
        get_peft_model(plain(base, attn_plugin=HEDGEHOG), settings)
    assert len([w for w in told if "frozen" in str(w.message)]) == 1
    assert "2 attentions (linear)" in str(told[0].message)
    for flag, whole in [("local", None), (HEDGEHOG, WHOLE), (FAVOR, None)]:
        settings = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM")
        get_peft_model(plain(base, attn_plugin=flag), settings)  # warnings are errors here


WITHOUT = """
import sys, warnings
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM, PeftModel
base, adapter = sys.argv[1:]
for load in (
    lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
    lambda: AutoModelForCausalLM.from_pretrained(adapter),
):
    try:
        load()
    except ValueError as error:
        print(str(error).partition("Must be")[0])
import attn_plugins
assert {row.plugin for row in attn_plugins.describe_attention(load())} == {"local"}
assert {row.plugin for row in attn_plugins.describe_attention(PeftModel.from_pretrained(load(), adapter))} == {"local"}
"""


def test_a_process_without_the_package_is_told_what_it_lacks(tmp_path, base):
    """And one that imports it after PEFT gets the attention."""
    _, folder = saved(base, tmp_path / "adapter", "local")
    done = programs.run("-c", WITHOUT, base, folder)
    assert done.returncode == 0, done.stderr
    told = "Invalid task type: 'CAUSAL_LM under attn_plugins (pip install attn-plugins, then import attn_plugins before"
    assert [line.startswith(told) for line in done.stdout.splitlines()] == [True] * 3


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_slots_are_not_dropped_by_a_model_that_has_none(strict):
    swapped, model = ap.swap_attention(tiny.build("llama"), HEDGEHOG), tiny.build("llama", seed=1)
    before = logits(model)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no slots for: .*0.self_attn.attn_plugin.*, ...; swap"):
        model.load_state_dict(swapped.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="LlamaModel has no slots for"):
        model.model.load_state_dict(swapped.model.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no slots for"):
        torch.nn.DataParallel(model).load_state_dict(torch.nn.DataParallel(swapped).state_dict(), strict=strict)
    assert torch.equal(logits(model), before)
    ap.swap_attention(model, HEDGEHOG).load_state_dict(swapped.state_dict(), strict=strict)
    assert torch.equal(logits(model), logits(swapped))
    ap.swap_attention(model, "local")
    with pytest.raises(ValueError, match="has no slots for"):
        model.load_state_dict(swapped.state_dict(), strict=strict)
