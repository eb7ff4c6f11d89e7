"""Families that compute attention inline: what their adapters do is what their own classes do, and only where asked."""

import copy
import importlib.util
import inspect
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any

import programs
import pytest
import tiny
import torch
import transformers as tf
from adapter_cases import CASES, deberta, states
from torch import nn

import attn_plugins as ap
from attn_plugins.hf import adapters
from attn_plugins.hf.discovery import modules as discovery

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # DeBERTa in transformers 5.17
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),  # WavLM's own attention
]


every = pytest.mark.parametrize("name", CASES)
families = pytest.mark.parametrize("name", ["mpnet", "gptj", "bloom", "falcon-groups", "blip-captions", "deberta_v2"])
weighing = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.weighs])
generating = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.generates])


WHOLE = {"topk": {"type": "topk", "topk": 1024}}
"""The limit case of attentions that narrow one is, where a window serves none."""


def build(name: str, seed: int = 0, attn_implementation: str | None = None, **flag: Any) -> Any:
    """A model with random weights large enough that attention matters, in eval mode."""
    cls, config = CASES[name].made()
    for key, value in flag.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "attn_plugin" not in path and "norm" not in path.lower():
                nn.init.normal_(parameter, std=0.15)
        for module in model.modules():  # deep in convolutions a signal would vanish
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight is not None:
                nn.init.ones_(module.weight)
    return model.eval()


def modules(model: Any, role: str | None = None) -> list[nn.Module]:
    rows = ap.describe_attention(model)
    return [model.get_submodule(row.path) for row in rows if role in (None, row.role)]


def tensors_of(made: Any) -> Iterator[torch.Tensor]:
    """Those in what a module returns, which may be tuples within tuples, or a dict."""
    if isinstance(made, torch.Tensor):
        yield made
    elif made is not None:
        for part in made.values() if isinstance(made, dict) else made:
            yield from tensors_of(part)


def numbers(name: str, model: Any, **changes: Any) -> torch.Tensor:
    torch.manual_seed(0)  # ViLT puts its patches into a random order
    given = {**CASES[name].given(), **changes}
    return CASES[name].read(model(**given), given)


@every
@torch.no_grad()
def test_limit_case_equals_the_models_own_output(name):
    """Of a rule without roles, and of an attention that makes tiles; softmax, of every role, is below."""
    model = build(name)
    own = numbers(name, model)
    flag = WHOLE.get(CASES[name].narrow["type"], {"type": "local", "window_size": 64})
    rows = ap.describe_attention(ap.swap_attention(model, flag))
    assert {row.plugin for row in rows if row.role == CASES[name].role} == {flag["type"]}
    torch.testing.assert_close(numbers(name, model), own, atol=1e-5, rtol=1e-5)


@every
@torch.no_grad()
def test_a_window_is_not_the_whole(name):
    model = build(name)
    own = numbers(name, model)
    narrow = numbers(name, ap.swap_attention(model, CASES[name].narrow))
    assert narrow.shape != own.shape or (narrow - own).abs().max() > 1e-3  # speech may be of another length


@every
@torch.no_grad()
def test_modules_that_no_rule_matches_compute_exactly_what_they_did(name):
    model = build(name)
    calls: list[tuple[nn.Module, torch.Tensor]] = []
    for module in modules(model):
        module.register_forward_hook(lambda module, args, out: calls.append((module, next(tensors_of(out)))))
    numbers(name, model)
    before, last = calls.copy(), modules(model, CASES[name].role)[-1]
    path = [row.path for row in ap.describe_attention(model) if row.role == CASES[name].role][-1]
    numbers(name, ap.swap_attention(model, "softmax", modules=path))
    assert sum(row.plugin is not None for row in ap.describe_attention(model)) == 1
    own = [module for module, _ in before].index(last)
    assert own >= 1
    for (module, one), (again, other) in zip(before[:own], calls[len(before) :], strict=False):
        assert module is again
        assert torch.equal(one, other)


@every
@torch.no_grad()
def test_every_role_equals_the_models_own_in_the_limit(name):
    model = build(name)
    own = numbers(name, model)
    rows = ap.describe_attention(ap.swap_attention(model, "softmax", roles=["encoder", "decoder", "cross"]))
    assert {row.plugin for row in rows} == {"softmax"}
    torch.testing.assert_close(numbers(name, model), own, atol=1e-5, rtol=1e-5)


@weighing
@torch.no_grad()
def test_attention_weights_are_the_models_own(name):
    def weights(model):
        torch.manual_seed(0)
        out = model(**CASES[name].given(), output_attentions=True)
        return {key: value for key, value in out.items() if "attentions" in key and value}

    want = weights(build(name, attn_implementation="eager"))
    assert want or name == "big_bird"  # where it exchanges the modules that it records
    for rule, served in (("softmax", None), ({"type": "softmax", "layers": 1}, "eager")):
        got = weights(ap.swap_attention(build(name, attn_implementation=served), rule))
        assert got.keys() == want.keys()
        for key, expected in want.items():
            for one, other in zip(tensors_of(got[key]), tensors_of(expected), strict=True):
                if name == "canine":  # which gives those of its first chunk alone
                    one = one[..., : other.shape[-2], : other.shape[-1]]
                assert one.shape == other.shape
                keys = 1 if name.startswith("xlnet") else -1
                same = (one - other).abs().amax(dim=keys) < 1e-4
                assert same.float().mean() > 0.8 or CASES[name].scores  # rows of padding may differ


@families
@torch.no_grad()
def test_restored_is_as_it_was(name):
    model = build(name)
    own, held = numbers(name, model), [(module, type(module)) for module in modules(model)]
    settings = model.config.to_dict()
    ap.swap_attention(model, CASES[name].learned)
    assert any(type(module) is not cls for module, cls in held)
    assert all(isinstance(module, cls) and type(module).__name__ == cls.__name__ for module, cls in held)
    ap.restore_attention(model)
    assert all(type(module) is cls for module, cls in held)
    assert torch.equal(numbers(name, model), own)
    assert model.config.to_dict() == settings


@families
@torch.no_grad()
def test_a_wrong_rule_changes_nothing(name):
    model = build(name)
    own, held = numbers(name, model), [(module, type(module)) for module in modules(model)]
    for wrong in ({"type": "local", "layers": 9}, {"type": "local", "roles": "cross", "modules": "nothing"}):
        with pytest.raises(ValueError, match=r"out of range|matches nothing"):
            ap.swap_attention(model, [{"type": "softmax", "layers": 0}, wrong])
        assert all(type(module) is cls for module, cls in held)
        assert torch.equal(numbers(name, model), own)


@every
@torch.no_grad()
def test_described_as_reached_by_an_adapter(name):
    model = build(name)
    before = ap.describe_attention(model)
    assert {row.reached for row in before} == {"adapter"}
    assert CASES[name].role in {row.role for row in before}
    assert {row.implementation for row in before} == {model.config._attn_implementation}
    after = ap.describe_attention(ap.swap_attention(model, "softmax", layers=0))
    assert [(row.path, row.role, row.reached) for row in after] == [(row.path, row.role, row.reached) for row in before]
    assert "adapter  softmax" in str(after)


@families
@torch.no_grad()
def test_saved_and_loaded_bit_equal(name, tmp_path):
    model = build(name, attn_plugin=CASES[name].learned)
    own = numbers(name, model)
    model.save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path).eval()
    assert ap.describe_attention(back) == ap.describe_attention(model)
    assert torch.equal(numbers(name, back), own)
    plain = type(model).from_pretrained(tmp_path, attn_plugin=None).eval()
    assert torch.equal(numbers(name, plain), numbers(name, ap.restore_attention(model)))
    assert all(adapters.adapter_of(type(module)) is not type(module) for module in modules(plain))


@families
@torch.no_grad()
def test_a_plain_checkpoint_loads_with_the_flag(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_plugin={"type": "local", "window_size": 3}).eval()
    assert torch.equal(numbers(name, loaded), numbers(name, ap.swap_attention(model, "local", window_size=3)))


@families
@torch.no_grad()
def test_copies_and_pickles(name):
    model = ap.swap_attention(build(name), {**CASES[name].learned, "layers": 0})
    own = numbers(name, model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(numbers(name, again), own)
        assert ap.describe_attention(ap.restore_attention(again))[0].plugin is None
    assert torch.equal(numbers(name, model), own)


@every
def test_gradients_reach_the_new_weights_and_the_models_own(name):
    def reached(model: Any) -> set[str]:
        numbers(name, model).square().sum().backward()
        return {path for path, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}

    own, model = reached(build(name)), ap.swap_attention(build(name), CASES[name].learned)
    found = reached(model)
    swapped = [module for module in modules(model, CASES[name].role) if hasattr(module, "attn_plugin")]
    assert swapped
    for module in swapped:
        weights = list(module.attn_plugin.parameters())
        new = {path for path, weight in model.named_parameters() if any(weight is one for one in weights)}
        assert new
        assert new <= found
    assert own <= found


@generating
@pytest.mark.parametrize(
    "flag", ["softmax", {"type": "local", "window_size": 4}, "linear", {"type": "local", "layers": 1}]
)
@torch.no_grad()
def test_cached_equals_uncached(name, flag):
    """Padded on the left, greedy, from states of the attention where the module adds no bias."""
    model, given = build(name), CASES[name].given()
    for unasked in ("decoder_input_ids", "use_cache"):
        given.pop(unasked, None)
    if flag == "linear":
        flag = CASES[name].learned["type"]
    ap.swap_attention(model, flag)
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    how |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**given, **how, use_cache=use) for use in (True, not CASES[name].uncached))
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    kept = {
        type(layer).__name__
        for layer in getattr(cached.past_key_values, "self_attention_cache", cached.past_key_values).layers
    }
    biased = any(discovery.biased(module) for module in modules(model, "decoder"))
    holds = CASES[name].states and flag not in ("softmax", "additive") and not biased
    assert ("StateLayer" in kept) == holds


@generating
@torch.no_grad()
def test_own_and_swapped_generate_the_same_in_the_limit(name):
    model, given = build(name), CASES[name].given()
    own = model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    ap.swap_attention(model, "local", window_size=64)
    assert torch.equal(model.generate(**given, max_new_tokens=8, min_new_tokens=8, do_sample=False), own)


@torch.no_grad()
def test_cross_attention_computes_its_keys_once():
    model, given = build("blip-decoder"), CASES["blip-decoder"].given()
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    own = model.generate(**given, **how)
    ap.swap_attention(model, "softmax", roles=["decoder", "cross"])
    made = model.generate(**given, **how)
    assert torch.equal(made.sequences, own.sequences)
    assert made.past_key_values.cross_attention_cache.get_seq_length() == states().shape[1]


@pytest.mark.parametrize(("name", "flash"), [("gptj", "GPTJFlashAttention2"), ("falcon", "FalconFlashAttention2")])
@torch.no_grad()
def test_the_classes_for_flash_attention_are_served(name, flash, monkeypatch):
    model = build(name)
    own = numbers(name, model)
    for module in modules(model):
        module.__class__ = cls = getattr(sys.modules[type(module).__module__], flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    ap.swap_attention(model, "softmax")
    torch.testing.assert_close(numbers(name, model), own, atol=1e-5, rtol=1e-5)
    ap.swap_attention(model, "softmax", layers="0-1")
    masks = []

    def note(self: nn.Module, *args: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        masks.append(given["attention_mask"])
        return (*args, *given.values())[0], None

    monkeypatch.setattr(cls, "forward", note)
    numbers(name, model)
    assert torch.equal(masks[0], CASES[name].given()["attention_mask"])  # as flash attention wants it: the padding
    assert {type(module).__name__ for module in modules(ap.restore_attention(model))} == {flash}
    assert model.config._attn_implementation == "flash_attention_2"


@torch.no_grad()
def test_lora_and_new_weights_come_back_on_a_flagged_base(tmp_path):
    peft = pytest.importorskip("peft")
    flag = {**CASES["gptj"].learned, "layers": [0, 1]}
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["attn_plugin"], task_type="CAUSAL_LM")
    build("gptj").save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(build("gptj", attn_plugin=flag), settings).eval()
    for path, parameter in model.named_parameters():
        if "lora_B" in path or "modules_to_save" in path:
            nn.init.normal_(parameter, std=0.2)
    assert [row.plugin for row in ap.describe_attention(model)] == ["linear", "linear", None]
    model.save_pretrained(tmp_path / "lora")
    base = tf.GPTJForCausalLM.from_pretrained(tmp_path / "base", attn_plugin=flag)
    back = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert torch.equal(numbers("gptj", back), numbers("gptj", model))
    assert {type(module).__module__ for module in modules(ap.restore_attention(back))} == {tf.GPTJModel.__module__}


def test_a_forward_that_a_hook_has_bound_is_exchanged_too():
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("mpnet")
    with torch.no_grad():
        own = numbers("mpnet", model)
        for module in modules(model):
            hooks.add_hook_to_module(module, hooks.ModelHook())
        narrow = numbers("mpnet", ap.swap_attention(model, "local", window_size=2))
        assert (narrow - own).abs().max() > 1e-3
        assert torch.equal(numbers("mpnet", ap.restore_attention(model)), own)


CANNOT = {
    "it mixes the scores of its heads": lambda: tf.DebertaModel(deberta(tf.DebertaConfig, talking_head=True)),
    "it computes softmax with whole numbers": lambda: tf.IBertModel(tf.IBertConfig(**tiny.SMALL, quant_mode=True)),
}


@pytest.mark.parametrize("why", CANNOT)
def test_what_an_adapter_cannot_serve_is_refused_before_anything_changes(why):
    model = CANNOT[why]()
    with pytest.raises(ValueError, match=rf"encoder.layer.0.attention.self cannot be swapped: {why}"):
        ap.swap_attention(model, "softmax")
    assert not any(hasattr(module, "attn_plugin") for module in model.modules())
    assert all(adapters.adapter_of(type(module)) is not type(module) for module in modules(model))


def test_importing_the_package_imports_no_modeling_file():
    told = "import sys, attn_plugins; print([m for m in sys.modules if '.modeling_' in m and '.models.' in m])"
    ran = programs.run("-c", told)
    assert ran.stdout.strip() == "[]", ran.stderr


def test_a_model_of_another_class_is_refused_with_the_families():
    model = tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(ValueError, match=rf"family with an adapter \({', '.join(adapters.families())}\)"):
        ap.swap_attention(model, "local")


def test_a_family_without_an_adapter_is_refused_with_the_reason_where_it_is_known():
    sizes = {"hidden_size": 32, "attention_hidden_size": 32, "num_hidden_layers": 2}
    model = tf.RwkvModel(tf.RwkvConfig(vocab_size=tiny.VOCABULARY, **sizes))
    with pytest.raises(ValueError, match=r"RwkvSelfAttention: a recurrence with a decay for each channel"):
        ap.swap_attention(model, "local")


@torch.no_grad()
def test_a_stream_that_predicts_tokens_does_not_show_them_to_gates():
    model = ap.swap_attention(build("xlnet-predicting"), "gated_softmax")
    with pytest.raises(ValueError, match=r"the stream that predicts tokens must not have it; leave out target_mapping"):
        numbers("xlnet-predicting", model)


@torch.no_grad()
def test_overlapping_chunks_of_characters_are_refused():
    model = build("canine")
    model.initial_char_encoder.layer[0].attention.attend_to_chunk_width = 6
    with pytest.raises(
        ValueError, match=r"initial_char_encoder.layer.0.attention cannot be swapped: its chunks overlap"
    ):
        ap.swap_attention(model, "softmax")


def test_adapters_are_of_the_families_that_their_files_name():
    here = {family for family in adapters.families() if importlib.util.find_spec(f"transformers.models.{family}")}
    assert here == {name.split("-")[0] for name in CASES}
    for name in CASES:
        found = [(type(module), adapters.adapter_of(type(module))) for module in modules(build(name))]
        assert found
        for own, adapter in found:
            assert adapter.__base__ is own
            assert adapter.__name__ == own.__name__
            assert calls_the_interface(inspect.unwrap(adapter.forward))


def calls_the_interface(function: Any) -> bool:
    """Itself, or through what it calls of the adapters' own files."""
    names = list(names_in(function.__code__))
    called = [one for one in map(function.__globals__.get, names) if inspect.isfunction(one)]
    shared = [one for one in called if one.__module__.startswith(adapters.__name__)]
    return "ALL_ATTENTION_FUNCTIONS" in names or any(map(calls_the_interface, shared))


def names_in(code: types.CodeType) -> Iterator[str]:
    """What code names, and functions within it."""
    yield from code.co_names
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            yield from names_in(held)
