"""swap, restore and describe on live models of every way of calling attention."""

import copy
import dataclasses
import pickle
import threading
import types
import warnings

import accelerate
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attn_plugins as ap
from attn_plugins.hf.discovery.heads import grid_size


def plugins(model):
    return [row.plugin for row in ap.describe_attention(model)]


def roles(model):
    return sorted({row.role for row in ap.describe_attention(model)})


def faithful(name):
    """A model whose own attention is exact: in 5.17 Gemma 2 drops its softcap under sdpa, in silence."""
    return tiny.build(name, _attn_implementation="eager") if name in ("gemma2", "gpt_oss") else tiny.build(name)


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_softmax_through_the_slot_is_the_models_own(name):
    model, given = faithful(name), tiny.inputs(name, length=20 if name == "llava" else 13)
    own = tiny.output(model, given)
    ap.swap_attention(model, {"type": "softmax", "roles": roles(model)})
    assert None not in plugins(model)
    torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_unmatched_layers_keep_the_implementation_asked_for(name):
    for implementation in ("eager", "sdpa"):
        if implementation == "sdpa" and name in ("gemma2", "gpt_oss"):
            continue
        model = tiny.build(name, _attn_implementation=implementation)
        given = tiny.inputs(name, length=20 if name == "llava" else 13)
        own = tiny.output(model, given)
        ap.swap_attention(model, {"type": "softmax", "roles": roles(model), "layers": -1})
        kept = [row for row in ap.describe_attention(model) if row.plugin is None]
        assert kept
        assert {row.implementation for row in kept} == {implementation}
        torch.testing.assert_close(tiny.output(model, given), own, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", tiny.MODELS)
@torch.no_grad()
def test_restore_is_bit_for_bit_also_after_several_swaps(name):
    model, given = tiny.build(name), tiny.inputs(name, length=20 if name == "llava" else 13)
    before = tiny.output(model, given)
    settings, weights = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    for layers in ("all", 0, "every:2"):
        ap.swap_attention(model, {"type": "softmax", "roles": roles(model), "layers": layers})
        tiny.output(model, given)
    assert ap.restore_attention(model) is model
    assert torch.equal(tiny.output(model, given), before)
    assert model.config.to_dict() == settings
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(hasattr(module, "attn_plugin") for module in model.modules())
    assert torch.equal(tiny.output(ap.restore_attention(model), given), before)


def test_describe_numbers_layers_within_their_stack():
    rows = ap.describe_attention(tiny.build("bart"))
    found = [(row.path, row.role, row.layer) for row in rows]
    assert found == [
        ("model.encoder.layers.0.self_attn", "encoder", 0),
        ("model.encoder.layers.1.self_attn", "encoder", 1),
        ("model.decoder.layers.0.self_attn", "decoder", 0),
        ("model.decoder.layers.0.encoder_attn", "cross", 0),
        ("model.decoder.layers.1.self_attn", "decoder", 1),
        ("model.decoder.layers.1.encoder_attn", "cross", 1),
    ]


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("bart", {}, ["encoder", "decoder"]),
        ("t5", {"roles": "cross"}, ["cross"]),
        ("whisper", {"roles": ["encoder", "cross"]}, ["encoder", "cross"]),
        ("whisper", {"modules": "decoder.layers.*"}, ["decoder"]),
        ("llava", {}, ["decoder"]),
        ("llava", {"roles": "encoder"}, ["encoder"]),
        ("llava", {"modules": "*vision*"}, ["encoder"]),
    ],
)
def test_roles_and_globs_choose(name, rule, expected):
    model = ap.swap_attention(tiny.build(name), {"type": "softmax", **rule})
    assert sorted({row.role for row in ap.describe_attention(model) if row.plugin}) == sorted(expected)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", [0, 1, 2]),
        (1, [1]),
        (-1, [2]),
        ([0, -1], [0, 2]),
        ("1-2", [1, 2]),
        ("-2--1", [1, 2]),
        ("every:2", [0, 2]),
        ("every:2+1", [1]),
        ([0, "1-2"], [0, 1, 2]),
        ("0--2", [0, 1]),
    ],
)
def test_layers_choose(layers, expected):
    model = ap.swap_attention(tiny.build("llama"), "softmax", layers=layers)
    assert [row.layer for row in ap.describe_attention(model) if row.plugin] == expected


def test_first_rule_that_matches_wins():
    rules = [{"type": "softmax", "layers": 1, "backend": "reference"}, {"type": "softmax", "layers": "0-1"}]
    model = ap.swap_attention(tiny.build("llama"), rules)
    found = [(row.plugin, row.implementation) for row in ap.describe_attention(model)]
    assert found == [("softmax", "torch"), ("softmax", "reference"), (None, "sdpa")]


def test_printed_description_is_a_table():
    table = str(ap.describe_attention(ap.swap_attention(tiny.build("llama"), "softmax", layers=0)))
    assert table.splitlines()[0].split() == ["path", "layer", "role", "reached", "plugin", "options", "new", "params"]
    assert "model.layers.1.self_attn  1      decoder  interface  (sdpa)" in table


@torch.no_grad()
def test_two_models_with_different_flags_in_one_process():
    given = tiny.inputs("llama")
    plain, swapped = tiny.build("llama"), ap.swap_attention(tiny.build("llama"), "local", window_size=3)
    alone = tiny.output(swapped, given)
    own = tiny.output(plain, given)
    assert torch.equal(tiny.output(swapped, given), alone)
    assert torch.equal(tiny.output(tiny.build("llama"), given), own)
    assert not torch.allclose(alone, own, atol=1e-3)


@torch.no_grad()
def test_deepcopy_and_pickle_keep_the_swap():
    given, model = tiny.inputs("llama"), ap.swap_attention(tiny.build("llama"), "local", window_size=3)
    expected = tiny.output(model, given)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    ap.restore_attention(model)
    assert torch.equal(tiny.output(copied, given), expected)
    assert torch.equal(tiny.output(pickled, given), expected)
    assert plugins(copied) == plugins(pickled) == ["local"] * 3


@torch.no_grad()
def test_threads_share_a_model():
    given, model = tiny.inputs("llama"), ap.swap_attention(tiny.build("llama"), "local", window_size=3)
    expected, found = tiny.output(model, given), []
    threads = [threading.Thread(target=lambda: found.append(tiny.output(model, given))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("flag", ["softmax", "local", "linear"])
@torch.no_grad()
def test_compiled_model_equals_eager(flag):
    given, model = tiny.inputs("llama"), ap.swap_attention(tiny.build("llama", num_hidden_layers=1), flag)
    expected = tiny.output(model, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own, about this machine
        compiled = torch.compile(model)
        torch.testing.assert_close(tiny.output(compiled, given), expected, atol=1e-5, rtol=1e-4)
    assert plugins(compiled) == [flag]


def test_the_same_attention_keeps_its_weights_when_rules_change():
    model = ap.swap_attention(tiny.build("llama"), "linear", feature_map="hedgehog")
    weight = next(p for n, p in model.named_parameters() if "layers.0.self_attn.attn_plugin" in n)
    with torch.no_grad():
        weight.fill_(0.5)
    rules = [{"type": "linear", "feature_map": "hedgehog", "layers": 0}, {"type": "local", "layers": 1}]
    ap.swap_attention(model, rules)
    assert plugins(model) == ["linear", "local", None]
    assert torch.equal(next(p for n, p in model.named_parameters() if "attn_plugin" in n), torch.full_like(weight, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_take_the_modules_dtype_and_mode(dtype):
    model = tiny.build("llama").to(dtype).train()
    ap.swap_attention(model, "linear", feature_map="hedgehog")
    slots = [module.attn_plugin for module in model.modules() if hasattr(module, "attn_plugin")]
    assert len(slots) == 3
    assert all(slot.training and p.dtype == dtype for slot in slots for p in slot.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_models_own_attention(checkpointing):
    given = tiny.inputs("llama")
    found = []
    for swap in (False, True):
        model = tiny.build("llama").train()
        if swap:
            ap.swap_attention(model, "softmax")
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**given, labels=given["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_weights_come_back_where_the_model_hands_the_request_through():
    model = ap.swap_attention(tiny.build("llama"), "local", window_size=2, num_sink_tokens=0)
    seen = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda _, __, out: seen.append(out[1]))
    given = tiny.inputs("llama", padded=False)
    layer, hidden = model.model.layers[0].self_attn, torch.randn(2, 13, 32)
    cos_sin = model.model.rotary_emb(hidden, torch.arange(13).unsqueeze(0))
    layer(hidden, position_embeddings=cos_sin, attention_mask=None, output_attentions=True)
    hook.remove()
    weights = seen[0]
    assert weights.shape == (2, 4, 13, 13)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 13))
    assert weights.tril(-2).abs().max() == 0
    assert model(**given).attentions is None


def test_a_part_of_a_swapped_model_that_nothing_was_attached_to_fails_loudly():
    model = LlamaForCausalLM(LlamaConfig(**tiny.GROUPED))
    model.config._attn_implementation = "attn_plugins"
    with pytest.raises(ValueError, match="no attention has been put into its model"):
        model(**tiny.inputs("llama"))


@pytest.mark.parametrize("name", ap.list_attentions())
def test_configs_of_attentions_say_what_serves_them(name):
    config = ap.get_attention(name).Config()
    assert config._attn_implementation == "attn_plugins"
    assert "_attn_implementation" not in dataclasses.asdict(config)


def test_code_that_walks_modules_named_attention_finds_what_serves_them():
    model = ap.swap_attention(tiny.build("llama"), "local")
    walked = [m for m in model.modules() if type(m).__name__.endswith("Attention")]
    assert len(walked) == 6
    assert {m.config._attn_implementation for m in walked} == {"attn_plugins"}


def test_set_attn_implementation_does_not_bypass_the_slots():
    model = ap.swap_attention(tiny.build("llama"), "softmax")
    said = r"would bypass this model's attn_plugin; call attn_plugins\.restore_attention"
    with pytest.raises(ValueError, match=rf"set_attn_implementation\('eager'\) {said}"):
        model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"\(attn_implementation='eager'\) would bypass"):
        model.set_attn_implementation(attn_implementation="eager")
    ap.restore_attention(model).set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_config_is_enough():
    config = LlamaConfig(**tiny.GROUPED)
    config.attn_plugin = {"type": "local", "window_size": 4, "layers": [0, 2]}
    assert plugins(AutoModelForCausalLM.from_config(config)) == ["local", None, "local"]
    assert plugins(LlamaForCausalLM(config)) == ["local", None, "local"]


@torch.no_grad()
def test_accelerates_device_hooks_pass_the_mask_on():
    """Its hooks call ``.to`` on whatever has it, between any two modules."""
    given, model = tiny.inputs("llama"), ap.swap_attention(tiny.build("llama"), "local", window_size=3)
    expected = tiny.output(model, given)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(tiny.output(model, given), expected)


@pytest.mark.parametrize(
    ("settings", "grid"),
    [
        ({"image_size": 224, "patch_size": 16}, (14, 14)),
        ({"image_size": [32, 48], "patch_size": (8, 16)}, (4, 3)),
        ({"image_size": 30, "patch_size": 8}, (3, 3)),  # as a convolution without padding cuts it
        ({"image_size": 224}, None),
        ({"image_size": {"height": 2}, "patch_size": 2}, None),
        ({}, None),
    ],
)
def test_the_grid_of_patches_comes_from_the_config(settings, grid):
    assert grid_size(types.SimpleNamespace(**settings)) == grid


def test_attentions_of_an_image_model_know_its_grid():
    model = ap.swap_attention(tiny.build("vit"), "softmax")
    size, patch = model.config.image_size, model.config.patch_size
    grids = {module.attn_plugin.heads.grid_size for module in model.modules() if hasattr(module, "attn_plugin")}
    assert grids == {(size // patch, size // patch)}


@torch.no_grad()
def test_a_part_whose_config_names_no_implementation_stays_with_what_serves_it():
    """transformers serves it with eager attention, and says so in a warning."""
    model, given = tiny.build("llama"), tiny.inputs("llama")
    module = model.model.layers[0].self_attn
    module.config = copy.deepcopy(module.config)
    module.config._attn_implementation_internal = None
    own = tiny.output(model, given)
    assert ap.describe_attention(ap.swap_attention(model, "softmax", layers=1))[0].implementation == "eager"
    ap.swap_attention(model, "softmax")
    ap.restore_attention(model)
    assert torch.equal(tiny.output(model, given), own)
