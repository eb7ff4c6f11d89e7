"""Caches of modules whose heads several attentions share: right as any other, and no larger than what each needs."""

import copy
import io

import pytest
import tiny
import torch
from test_caches import LOCAL, prompt, uncached
from test_generation import GREEDY
from test_rollback import TOKEN, filled, goes_on, lengths
from test_static_caches import compiled, graphs_of
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import attn_plugins as ap
from attn_plugins.core.attention import Attention
from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.hf.caches.state_layer import StateLayer

SOFTMAX = {"type": "softmax", "kv_heads": [1]}
SPLITS = {
    "local, own": [{**LOCAL, "kv_heads": [0]}],
    "softmax, local": [SOFTMAX, LOCAL],
    "linear, own": [{"type": "linear", "kv_heads": [1]}],
    "local, linear": [{**LOCAL, "kv_heads": [1]}, "linear"],
    "gates of hidden states, own": [{"type": "gated_delta", "gate_input": "hidden", "kv_heads": [0]}],
    "topk, local": [{"type": "topk", "topk": 3, "kv_heads": [0]}, LOCAL],
}
"""Rules by which the two key/value heads of a Llama are served."""
THREE = [
    {**LOCAL, "kv_heads": [2]},
    {"type": "linear", "kv_heads": [0], "roles": "decoder"},
    {"type": "softmax", "kv_heads": [-1]},
]
"""Of four key/value heads, one is left to the model's own attention."""
COMPILED = [
    ("softmax, local", False),
    *(
        pytest.param(name, padded, marks=pytest.mark.slow)
        for name in ("softmax, local", "local, own", "local, linear")
        for padded in (True, False)
        if (name, padded) != ("softmax, local", False)
    ),
]
ANY_MASK = ["local, own", "softmax, local"]

every_split = pytest.mark.parametrize("name", SPLITS)


def swapped(rules, model_name="llama", **config):
    rules = [{"type": rule} if isinstance(rule, str) else rule for rule in rules]
    return ap.swap_attention(tiny.build(model_name, **config), [{**rule, "roles": "decoder"} for rule in rules])


MODELS = [
    *((SPLITS[name], "llama") for name in SPLITS),
    *((SPLITS[name], "gemma3") for name in ANY_MASK),
    ([{**LOCAL, "positions": "cache", "kv_heads": [1]}], "llama"),
    (SPLITS["local, linear"], "gpt_neox"),
    (THREE, "bart"),
    (THREE, "gpt2"),
]


@pytest.mark.parametrize(("rules", "model_name"), MODELS)
@torch.no_grad()
def test_cached_equals_uncached(rules, model_name):
    model, given = swapped(rules, model_name), tiny.inputs(model_name)
    given.pop("decoder_input_ids", None)
    for how in ({}, {"num_beams": 3}):
        how = {**GREEDY, **how, "output_logits": True, "return_dict_in_generate": True}
        want = model.generate(**given, **how, use_cache=False)
        for kind in ({}, {"cache_implementation": "static"}):
            made = model.generate(**given, **how, **kind)
            assert torch.equal(made.sequences, want.sequences)
            for got, logits in zip(made.logits, want.logits, strict=True):
                torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)


@every_split
@torch.no_grad()
def test_token_by_token_and_in_pieces(name):
    for model_name in ("llama", *(["gemma3"] if name in ANY_MASK else [])):
        model, ids = swapped(SPLITS[name], model_name), prompt(length=17)["input_ids"]
        want = model(ids, use_cache=False).logits
        for sizes in ((1,) * 17, (5, 4, 1, 1, 6), (1, 16)):
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=24)):
                got = [model(part, past_key_values=cache).logits for part in ids.split(sizes, dim=1)]
                torch.testing.assert_close(torch.cat(got, dim=1), want, atol=1e-4, rtol=1e-4)
                assert lengths(cache) == [17, 17, 17]


@every_split
@torch.no_grad()
def test_long_prompts_drafts_and_left_padding(name):
    model, given = swapped(SPLITS[name]), prompt(batch=2)
    assert torch.equal(model.generate(**given, **GREEDY, prefill_chunk_size=4), uncached(model, given))
    how = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
    for repeats in (1, 3):
        alone = {key: value.repeat(1, repeats) for key, value in prompt().items()}
        got = model.generate(**alone, **how, prompt_lookup_num_tokens=3)
        assert torch.equal(got, uncached(model, alone, **how))


@torch.no_grad()
def test_drafts_of_another_model():
    model, given = swapped(SPLITS["local, own"]), prompt()
    assistant = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(1)
    assistant.lm_head.weight.add_(0.08 * torch.randn(assistant.lm_head.weight.shape, generator=draw))
    assistant.generation_config.num_assistant_tokens = 4
    how = {**GREEDY, "max_new_tokens": 12, "min_new_tokens": 12}
    got = model.generate(**given, **how, assistant_model=assistant)
    assert torch.equal(got, uncached(model, given, **how))


@every_split
@torch.no_grad()
def test_tokens_are_taken_back_in_all_parts_or_in_none(name):
    model = swapped(SPLITS[name])
    given, cache = filled(model)
    with pytest.raises(ValueError, match=r"cannot go back 4 tokens.*activate_past_recording"):
        cache.crop(-4)
    assert lengths(cache) == [20, 20, 20]
    goes_on(model, given, copy.deepcopy(cache))
    cache.activate_past_recording()
    model(torch.tensor([[5, 6, 7, 8]]), past_key_values=cache)
    cache.crop(-3)
    text = torch.cat([given, TOKEN], dim=1)
    assert lengths(cache) == [21, 21, 21]
    goes_on(model, text, cache)
    cache.crop(-cache.get_seq_length())
    assert lengths(cache) == [0, 0, 0]
    model(given, past_key_values=cache)
    goes_on(model, given, cache)


@every_split
@torch.no_grad()
def test_rows_copies_files_and_devices(name):
    model, given = swapped(SPLITS[name]), prompt(length=20)
    cache = DynamicCache(config=model.config)
    model(**given, past_key_values=cache)
    file = io.BytesIO()
    torch.save(cache, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(3)
    repeated.batch_select_indices(torch.tensor([2, 0]))
    repeated.reorder_cache(torch.tensor([1, 0]))
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    want = model(torch.cat([given["input_ids"], TOKEN], dim=1), use_cache=False).logits[:, -1:]
    for each, rows in ((cache, 1), (saved, 1), (repeated, 2)):
        got = model(TOKEN.expand(rows, 1), past_key_values=each).logits
        torch.testing.assert_close(got, want.expand(rows, -1, -1), atol=1e-5, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    again = model(**given, past_key_values=cache).logits
    torch.testing.assert_close(again, model(**given, use_cache=False).logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_chosen_heads_keep_all_tokens_and_the_others_their_window():
    token = 2 * 8 * 4  # a key and a value of 8 float32
    window = 6 * (token + 1) + 8  # of 4 + 2 sinks, beside a flag each, and where the text starts
    for rules in (SPLITS["local, own"], SPLITS["softmax, local"]):
        model = swapped(rules)
        for length in (70, 200):
            cache = DynamicCache(config=model.config)
            given = {name: x[:, :length] for name, x in prompt(length=length).items()}
            model(**{name: x[:, :-1] for name, x in given.items()}, past_key_values=cache)
            model(given["input_ids"][:, -1:], past_key_values=cache)
            assert cache_bytes(cache) == 3 * (length * token + window)
    hybrid = ap.swap_attention(tiny.build("llama"), [{**LOCAL, "kv_heads": {"0": [0], "2": "all"}}])
    _, cache = filled(hybrid, length=70)
    assert [type(layer) for layer in cache.layers] == [StateLayer, DynamicLayer, StateLayer]
    assert cache_bytes(cache) == (70 * token + window) + 2 * 70 * token + (window + 6 * token)
    bare = {"type": "local", "num_sink_tokens": 0}
    two = [{**bare, "window_size": 4, "kv_heads": [0]}, {**bare, "window_size": 9}]
    _, cache = filled(swapped(two), length=70)
    assert cache_bytes(cache) == 3 * ((4 + 9) * (token + 1) + 2 * 8)


@torch.no_grad()
def test_static_caches_have_room_for_the_chosen_heads_alone():
    model, token = swapped(SPLITS["local, own"]), 2 * 8 * 4
    _, cache = filled(model, cache=StaticCache(config=model.config, max_cache_len=24))
    assert cache_bytes(cache) == 3 * (24 * token + 6 * (token + 1) + 8)
    held = [[tensor.data_ptr() for tensor in layer.state._held()] for layer in cache.layers]
    for _ in range(4):
        model(TOKEN, past_key_values=cache)
    assert held == [[tensor.data_ptr() for tensor in layer.state._held()] for layer in cache.layers]
    with pytest.raises(ValueError, match="room for 24 tokens, 24 are in it and 1 more came"):
        model(TOKEN, past_key_values=cache)
    assert lengths(cache) == [24, 24, 24]


@torch.no_grad()
def test_parts_that_all_need_all_keys_leave_the_cache_as_it_is():
    _, cache = filled(swapped([SOFTMAX]))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 3


@torch.no_grad()
def test_layers_with_a_window_of_the_model_s_own_keep_no_more_than_that():
    model = swapped(SPLITS["local, own"], "gemma3")
    given, cache = filled(model, "gemma3")
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2 + [StateLayer]
    goes_on(model, given, cache)
    windows = [{"type": "local", "window_size": 3, "kv_heads": [0]}, {"type": "local", "window_size": 4}]
    model = swapped(windows, "gemma3")
    given, cache = filled(model, "gemma3")
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)
    goes_on(model, given, cache)


@torch.no_grad()
def test_decoders_of_encoder_decoder_models():
    for model_name in ("bart", "whisper"):
        model, given = swapped(THREE, model_name), tiny.inputs(model_name)
        given.pop("decoder_input_ids")
        model.generation_config.pad_token_id = 0
        for how in ({}, {"num_beams": 3}):
            how = {**GREEDY, **how, "return_dict_in_generate": True}
            made, want = (model.generate(**given, **how, use_cache=use) for use in (True, False))
            assert torch.equal(made.sequences, want.sequences)
            assert isinstance(made.past_key_values, EncoderDecoderCache)
            cache = made.past_key_values.self_attention_cache
            # Whisper takes it apart, row by row, and puts what it finds together again.
            assert model_name == "whisper" or all(isinstance(layer, StateLayer) for layer in cache.layers)


@pytest.mark.parametrize(("name", "padded"), COMPILED)
@torch.no_grad()
def test_one_graph_serves_every_decode_step(name, padded):
    model, given = swapped(SPLITS[name], num_hidden_layers=1), tiny.inputs("llama", length=8, padded=padded)
    how = {"output_logits": True, "return_dict_in_generate": True}
    made, graphs = graphs_of(model, given, **how)
    want = uncached(model, given, **how)
    assert torch.equal(made.sequences, want.sequences)
    for got, logits in zip(made.logits, want.logits, strict=True):  # which show what tokens may not
        torch.testing.assert_close(got, logits, atol=1e-5, rtol=1e-4)
    assert graphs == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_step_goes_on_eagerly_after_compiled_ones():
    model, given = swapped(SPLITS["local, own"], num_hidden_layers=1), prompt()
    cache = StaticCache(config=model.config, max_cache_len=30)
    first = model.generate(**given, **GREEDY, past_key_values=cache, compile_config=compiled("eager"))
    asked = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    again = {"input_ids": asked, "attention_mask": torch.ones_like(asked)}
    assert torch.equal(model.generate(**again, **GREEDY, past_key_values=cache), uncached(model, again))


@torch.no_grad()
def test_weights_are_those_of_all_keys():
    model, given = swapped(SPLITS["local, own"]), prompt()
    how = {**GREEDY, "return_dict_in_generate": True, "output_attentions": True}
    made, want = (model.generate(**given, **how, use_cache=use) for use in (True, False))
    assert torch.equal(made.sequences, want.sequences)
    assert not any(isinstance(layer, StateLayer) for layer in made.past_key_values.layers)
    for got, whole in zip(made.attentions, want.attentions, strict=True):
        for a, b in zip(got, whole, strict=True):
            torch.testing.assert_close(a, b[:, :, -a.shape[2] :], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_caches_of_other_heads_and_batches_are_refused_and_stay_as_they_are():
    model = swapped(SPLITS["local, own"])
    _, cache = filled(model)
    other = swapped([{**LOCAL, "kv_heads": [1]}])
    with pytest.raises(ValueError, match=r"holds the state of .*kv_heads \[0\]: local.*not of .*kv_heads \[1\]: local"):
        other(TOKEN, past_key_values=cache)
    with pytest.raises(ValueError, match=r"holds the state of .*local.*does not have"):
        tiny.build("llama")(TOKEN, past_key_values=copy.deepcopy(cache))
    assert "kv_heads [0]: local(window_size=4" in repr(cache)
    for name in ("local, own", "softmax, local"):  # whichever part is first
        model = swapped(SPLITS[name])
        _, cache = filled(model)
        held = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="belongs to another model or batch"):
            model(TOKEN.repeat(3, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="weights of tokens that a cache no longer holds"):
            model(TOKEN, past_key_values=cache, output_attentions=True)
        assert lengths(cache) == [20, 20, 20]
        assert torch.equal(model(TOKEN, past_key_values=cache).logits, model(TOKEN, past_key_values=held).logits)


def parts_of(model, layer):
    slot = model.model.layers[layer].self_attn.attn_plugin
    return [part for part in slot.modules() if isinstance(part, Attention) and part is not slot]


@torch.no_grad()
def test_an_error_between_two_parts_leaves_a_cache_as_it_was(monkeypatch):
    model = swapped([{"type": "local", "window_size": 64, "kv_heads": [0]}, "linear"])
    given, cache = filled(model)

    def fail(*args, **kwargs):
        raise RuntimeError("interrupted")

    linear = next(part for part in parts_of(model, 1) if part.name == "linear")
    with monkeypatch.context() as patch:
        patch.setattr(linear, "attend_from", fail)
        cache.activate_past_recording()
        with pytest.raises(RuntimeError, match="interrupted"):
            model(TOKEN, past_key_values=cache)
    assert lengths(cache) == [20, 20, 20]
    assert [part.seen for layer in cache.layers for part in layer.state.parts] == [20] * 6
    goes_on(model, given, cache)


def test_gradients_go_through_a_cache():
    model, ids = swapped(SPLITS["local, own"]), prompt(length=9)["input_ids"]
    wanted = [model.model.layers[layer].self_attn.k_proj.weight for layer in range(3)]
    want = torch.autograd.grad(model(ids, use_cache=False).logits[:, 5:].sum(), wanted)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    got = torch.autograd.grad(model(ids[:, 5:], past_key_values=cache).logits.sum(), wanted)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
