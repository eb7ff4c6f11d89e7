"""Static caches: what they give is what the default cache gives, eager and compiled."""

import pytest
import tiny
import torch
from test_caches import BOUNDED, LOCAL, prompt, uncached
from test_generation import CAUSAL, GREEDY, flag, serves, swapped
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    StaticCache,
)
from transformers.cache_utils import StaticLayer

import attn_plugins as ap
from attn_plugins.hf.caches.state_layer import StateLayer

HEADS = ap.HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8, hidden_size=32, layer=0)


def state_of(name):
    """What the attention keeps beside a static cache of 99 tokens."""
    cls, options = ap.get_attention(name), flag(name)
    del options["type"]
    return cls(cls.Config(**options), HEADS).new_state(99)


STATIC = [name for name in BOUNDED if state_of(name).supports_fixed_length]
"""Those whose state has room for as many tokens as a static cache, made once."""
SOME = {("local", 1), ("linear", "all"), ("softmax", "all")}
"""What is compiled in the default run: a hybrid, and a state; the others are slow."""


SERVED = [
    (name, model_name)
    for name in CAUSAL
    for model_name in (["llama", "gpt2", "gemma3", "bart"] if name in STATIC else ["llama", "gemma3"])
    if serves(name, model_name)
]


@pytest.mark.parametrize(("name", "model_name"), SERVED)
@torch.no_grad()
def test_static_caches(name, model_name):
    model, given = swapped(name, model_name), tiny.inputs(model_name)
    given.pop("decoder_input_ids", None)
    for how in ({}, {"num_beams": 3}):
        made = model.generate(**given, **GREEDY, **how, cache_implementation="static", return_dict_in_generate=True)
        assert torch.equal(made.sequences, uncached(model, given, **how))
        cache = made.past_key_values
        cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        assert isinstance(cache, StaticCache)
        for layer in cache.layers:
            keeps_more = layer.is_sliding and name in STATIC and state_of(name).grows
            assert isinstance(layer, StateLayer if name in STATIC and not keeps_more else StaticLayer)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_pieces_through_static_caches(name):
    for layers in ("all", [1]):
        model, given = ap.swap_attention(tiny.build("llama"), {**flag(name), "layers": layers}), prompt(length=17)
        want = model(given["input_ids"], use_cache=False).logits
        for sizes in ((17,), (1, 16), (5, 4, 1, 1, 6)):
            cache = StaticCache(config=model.config, max_cache_len=24)
            parts = [model(part, past_key_values=cache).logits for part in given["input_ids"].split(sizes, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), want, atol=1e-4, rtol=1e-4)
            assert int(cache.get_seq_length()) == 17


@pytest.mark.parametrize("name", ["local", "strided", "softmax", "sigmoid"])
@torch.no_grad()
def test_biases_that_grow_with_the_text_and_static_caches(name):
    config = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **tiny.SPECIAL)
    torch.manual_seed(0)
    model, given = ap.swap_attention(BloomForCausalLM(config).eval(), flag(name)), prompt(batch=2)
    assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), uncached(model, given))


@torch.no_grad()
def test_static_caches_of_models_that_bring_their_own_mask():
    given = tiny.inputs("t5")
    given.pop("decoder_input_ids")
    model = swapped("softmax", "t5")
    assert torch.equal(model.generate(**given, **GREEDY, cache_implementation="static"), uncached(model, given))
    touched = lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"] & True})  # noqa: E731
    for prepend in (True, False):  # made before the bridge sees a mask, and of the bridge's mask
        model, given = ap.swap_attention(tiny.build("llama"), {"type": "strided", "layers": [1]}), prompt()
        module = model.model.layers[1].self_attn
        module.register_forward_pre_hook(touched, with_kwargs=True, prepend=prepend)
        with pytest.raises(
            ValueError, match=r"LlamaAttention attends with a mask of its own .* attention 'strided' cannot"
        ):
            model.generate(**given, **GREEDY, cache_implementation="static")


@torch.no_grad()
def test_a_cache_filled_before_the_swap_goes_on_static_too():
    model, given = tiny.build("llama"), prompt()
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(**given, past_key_values=cache)
    ap.swap_attention(model, "local", window_size=64)
    want = model(torch.cat([given["input_ids"], torch.tensor([[5]])], dim=1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(torch.tensor([[5]]), past_key_values=cache).logits, want, atol=1e-5, rtol=1e-4)


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


ONE_GRAPH = [*STATIC, *(name for name in CAUSAL if ap.get_attention(name).unwritten_keys)]
COMPILED = [
    pytest.param(name, layers, marks=() if (name, layers) in SOME else pytest.mark.slow)
    for name in ONE_GRAPH
    for layers in ("all", 1)
]


def graphs_of(model, given, backend="eager", **how):
    """What a model generates from a static cache, compiled, and the number of graphs that took."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    made = model.generate(**given, **GREEDY, **how, cache_implementation="static", compile_config=compiled(backend))
    return made, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "layers"), COMPILED)
@torch.no_grad()
def test_one_graph_without_a_break_serves_every_decode_step(name, layers):
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=2), {**flag(name), "layers": layers})
    for padded in (True, False):
        given = tiny.inputs("llama", length=8, padded=padded)
        made, graphs = graphs_of(model, given)
        assert torch.equal(made, uncached(model, given))
        assert graphs == 1


@torch.no_grad()
def test_a_decode_step_is_compiled_before_the_first_keys_of_all_rows_are_there():
    rules = {"type": "local", "window_size": 2, "num_sink_tokens": 6}
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), rules)
    given = tiny.inputs("llama", length=3, padded=False)
    given["attention_mask"][0, :2] = 0
    made, graphs = graphs_of(model, given)
    assert torch.equal(made, uncached(model, given))
    assert graphs == 1


@torch.no_grad()
def test_a_forward_that_a_user_compiles_takes_one_graph_and_no_token_too_many():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for rules in (LOCAL, "softmax"):
        model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), rules)
        ids = prompt(length=17)["input_ids"]
        cache, want = StaticCache(config=model.config, max_cache_len=17), model(ids, use_cache=False).logits
        model(ids[:, :10], past_key_values=cache)
        step = torch.compile(model, backend="eager", fullgraph=True)
        for at in range(10, 17):
            positions = torch.tensor([[at]])
            got = step(ids[:, at : at + 1], position_ids=positions, past_key_values=cache).logits
            torch.testing.assert_close(got, want[:, at : at + 1], atol=1e-4, rtol=1e-4)
        with pytest.raises((RuntimeError, IndexError), match=r"has no room for more tokens|out of bounds"):
            step(ids[:, -1:], position_ids=torch.tensor([[17]]), past_key_values=cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@torch.no_grad()
def test_attentions_that_need_the_written_keys_alone_are_right_in_a_compiled_step():
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), "strided")
    given, how = prompt(), compiled("eager")
    how.fullgraph = False
    torch.compiler.reset()
    made = model.generate(**given, **GREEDY, cache_implementation="static", compile_config=how)
    assert torch.equal(made, uncached(model, given))


@torch.no_grad()
def test_a_step_goes_on_eagerly_after_compiled_ones():
    model, given = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), LOCAL), prompt()
    cache = StaticCache(config=model.config, max_cache_len=30)
    first = model.generate(**given, **GREEDY, past_key_values=cache, compile_config=compiled("eager"))
    assert [int(layer.state.length) for layer in cache.layers] == [18]
    asked = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    again = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
    assert torch.equal(model.generate(**again, **GREEDY, past_key_values=cache), uncached(model, again))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by parts of torch that inductor imports
@pytest.mark.parametrize("name", ONE_GRAPH)
@torch.no_grad()
def test_a_decode_step_compiled_by_inductor(name):
    model, given = swapped(name, "llama"), prompt(batch=2)
    made, graphs = graphs_of(model, given, "inductor")
    assert torch.equal(made, uncached(model, given))
    assert graphs == 1
