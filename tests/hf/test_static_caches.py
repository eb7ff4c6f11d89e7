"""Static caches: what they give is what the default cache gives, eager and compiled."""

import pytest
import tiny
import torch
from test_caches import BOUNDED, LOCAL, prompt, uncached
from test_generation import GREEDY, flag, serves, swapped
from transformers import CompileConfig, DynamicCache, EncoderDecoderCache, StaticCache

import attn_plugins as ap
from attn_plugins.hf.dispatch import slot_of
from attn_plugins.hf.state_layer import StateLayer

STATIC = [
    name
    for name in BOUNDED
    if slot_of(swapped(name, "llama").model.layers[0].self_attn).new_state(99).serves_fixed_length
]
SOME = {("local", 1), ("linear", "all")}
"""What is compiled in the default run: a hybrid, and a state; the others are slow."""


@pytest.mark.parametrize("model_name", ["llama", "gpt2", "gemma3", "bart"])
@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_static_caches(name, model_name):
    if not serves(name, model_name):
        pytest.skip(f"{name} does not serve {model_name}")
    model, given = swapped(name, model_name), tiny.inputs(model_name)
    given.pop("decoder_input_ids", None)
    for how in ({}, {"num_beams": 3}):
        made = model.generate(**given, **GREEDY, **how, cache_implementation="static", return_dict_in_generate=True)
        assert torch.equal(made.sequences, uncached(model, given, **how))
        cache = made.past_key_values
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        assert isinstance(cache, StaticCache)
        assert all(isinstance(layer, StateLayer) for layer in cache.layers)


@torch.no_grad()
def test_static_caches_with_the_models_own_layers_between():
    model, given = ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": [1]}), prompt(batch=2)
    assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), uncached(model, given))


HYBRIDS = [
    ("llama", [1]),
    ("llama", [1, 2]),
    ("gemma3", [0]),
    ("gemma3", [1]),
    ("gemma3", [0, 1]),
    ("gemma3", [2]),
    ("gemma2", [1]),
    ("gemma2", [0, 2]),
    ("gpt_oss", [0]),
]
"""Models and swapped layers: the first stays the model's own, or a sliding one is swapped and a full one is not."""


@pytest.mark.parametrize(("model_name", "layers"), HYBRIDS)
@torch.no_grad()
def test_hybrids_attend_from_static_caches_as_from_none(model_name, layers):
    model, given = ap.swap_attention(tiny.build(model_name), {**LOCAL, "layers": layers}), prompt(length=17)
    want = model(given["input_ids"], use_cache=False).logits
    for sizes in ((17,), (1, 16), (5, 4, 7, 1), (9, 1, 1, 1, 5)):
        for cache in (StaticCache(config=model.config, max_cache_len=24), DynamicCache(config=model.config)):
            parts = [model(part, past_key_values=cache).logits for part in given["input_ids"].split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)
    given = prompt(batch=2)
    for how in ({}, {"prefill_chunk_size": 4}):
        got = model.generate(**given, **GREEDY, **how, cache_implementation="static")
        assert torch.equal(got, uncached(model, given))


@torch.no_grad()
def test_a_static_cache_that_is_too_short_is_refused_before_it_changes():
    model, given = ap.swap_attention(tiny.build("llama"), LOCAL), prompt()
    cache = StaticCache(config=model.config, max_cache_len=15)
    model(**given, past_key_values=cache)
    with pytest.raises(ValueError, match="room for 15 tokens, 13 are in it and 3 more came"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    ids = torch.cat([given["input_ids"], torch.tensor([[5, 6]])], dim=1)
    got = model(ids[:, 13:], past_key_values=cache).logits
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, 13:], atol=1e-5, rtol=1e-4)


def compiled(backend):
    how = CompileConfig(backend=backend, fullgraph=True)
    how._compile_all_devices = True
    return how


COMPILED = [
    pytest.param(name, layers, marks=() if (name, layers) in SOME else pytest.mark.slow)
    for name in STATIC
    for layers in ("all", 1)
]


@pytest.mark.parametrize(("name", "layers"), COMPILED)
@torch.no_grad()
def test_a_compiled_decode_step_gives_the_tokens_of_an_eager_one_without_a_graph_break(name, layers):
    torch.compiler.reset()
    model, given = ap.swap_attention(tiny.build("llama"), {**flag(name), "layers": layers}), prompt(batch=2)
    how = {"cache_implementation": "static", "compile_config": compiled("eager")}
    assert torch.equal(model.generate(**given, **GREEDY, **how), uncached(model, given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by parts of torch that inductor imports
@pytest.mark.parametrize("name", STATIC)
@torch.no_grad()
def test_a_decode_step_compiled_by_inductor(name):
    torch.compiler.reset()
    model, given = swapped(name, "llama"), prompt(batch=2)
    how = {"cache_implementation": "static", "compile_config": compiled("inductor")}
    assert torch.equal(model.generate(**given, **GREEDY, **how), uncached(model, given))
