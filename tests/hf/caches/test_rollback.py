"""What is refused leaves a cache as it was, in all of its layers."""

import copy

import pytest
import tiny
import torch
from test_generation import CAUSAL, GREEDY, swapped
from transformers import DynamicCache, StaticCache

import attn_plugins as ap

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 2}
TOKEN = torch.tensor([[5]])


def filled(model, model_name="llama", length=20, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    given = tiny.inputs(model_name, batch=1, length=length, padded=False)["input_ids"]
    model(given, past_key_values=cache)
    return given, cache


def goes_on(model, given, cache):
    """The cache gives what the whole text gives."""
    text = torch.cat([given, TOKEN], dim=1)
    want = model(text, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(TOKEN, past_key_values=cache).logits, want, atol=1e-4, rtol=1e-4)


def lengths(cache):
    return [int(layer.get_seq_length()) for layer in cache.layers]


@pytest.mark.parametrize("layers", [[0], [1], [2], [0, 2]])
@torch.no_grad()
def test_a_refused_crop_leaves_every_layer_as_it_was(layers):
    model = ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": layers})
    given, cache = filled(model)
    with pytest.raises(ValueError, match="cannot go back 4 tokens"):
        cache.crop(-4)
    assert lengths(cache) == [20, 20, 20]
    goes_on(model, given, cache)


@torch.no_grad()
def test_a_crop_that_the_models_own_layers_refuse_leaves_states_as_they_were():
    model = ap.swap_attention(tiny.build("gemma3"), {**LOCAL, "window_size": 64, "layers": [0, 2]})
    given, cache = filled(model, "gemma3")
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-4)
    assert lengths(cache) == [20, 20, 20]
    goes_on(model, given, cache)


@torch.no_grad()
def test_a_crop_within_reach_crops_every_layer():
    for layers in ([0], [1], [0, 1, 2]):
        model = ap.swap_attention(tiny.build("llama"), {**LOCAL, "window_size": 64, "layers": layers})
        given, cache = filled(model)
        cache.crop(-4)
        assert lengths(cache) == [16, 16, 16]
        goes_on(model, given[:, :16], cache)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_everything_can_be_forgotten(name):
    model = swapped(name, "llama")
    given, cache = filled(model)
    cache.crop(-20)
    assert lengths(cache) == [0, 0, 0]
    model(given, past_key_values=cache)
    goes_on(model, given, cache)


def too_many(model, cache):
    with pytest.raises(ValueError, match="room for 22 tokens, 20 are in it and 3 more came"):
        model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="room for 22 tokens, 20 are in it and 3 more came"):
        model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[5, 6, 7]])), past_key_values=cache)


def other_rows(model, cache):
    with pytest.raises(
        (ValueError, RuntimeError), match=r"belongs to another model or batch|Sizes of tensors must match"
    ):
        model(TOKEN.repeat(3, 1), past_key_values=cache)


def fail_in_the_last_layer(model, ids, cache):
    def fail(*_):
        raise ValueError("on purpose")

    hook = model.model.layers[-1].mlp.register_forward_pre_hook(fail)
    try:
        model(ids, past_key_values=cache)
    finally:
        hook.remove()


REFUSED = [
    ("llama", [1], "static", too_many),
    ("llama", [1, 2], "static", too_many),
    ("llama", [0, 1, 2], "static", too_many),
    ("llama", [1], "dynamic", other_rows),
    ("llama", [0], "dynamic", other_rows),
    ("gemma3", [1], "dynamic", other_rows),
]


@pytest.mark.parametrize(("model_name", "layers", "kind", "refuse"), REFUSED)
@torch.no_grad()
def test_a_refused_call_leaves_every_layer_as_it_was(model_name, layers, kind, refuse):
    model = ap.swap_attention(tiny.build(model_name), {**LOCAL, "layers": layers})
    cache = StaticCache(config=model.config, max_cache_len=22) if kind == "static" else None
    given, cache = filled(model, model_name, cache=cache)
    refuse(model, cache)
    assert lengths(cache) == [20, 20, 20]
    goes_on(model, given, cache)


@pytest.mark.parametrize(("model_name", "kind"), [("llama", "dynamic"), ("llama", "static"), ("gemma3", "dynamic")])
@torch.no_grad()
def test_an_error_anywhere_in_a_model_leaves_every_layer_as_it_was(model_name, kind):
    model = ap.swap_attention(tiny.build(model_name), {**LOCAL, "window_size": 64, "layers": [1]})
    cache = StaticCache(config=model.config, max_cache_len=22) if kind == "static" else None
    given, cache = filled(model, model_name, cache=cache)
    with pytest.raises(ValueError, match="on purpose"):
        fail_in_the_last_layer(model, TOKEN, cache)
    assert lengths(cache) == [20, 20, 20]
    goes_on(model, given, cache)


@torch.no_grad()
def test_a_state_that_cannot_go_back_is_found_out_by_the_next_call():
    model = ap.swap_attention(tiny.build("llama"), {**LOCAL, "layers": [1]})
    _, cache = filled(model)
    with pytest.raises(ValueError, match="on purpose"):
        fail_in_the_last_layer(model, TOKEN, cache)
    assert lengths(cache) == [20, 21, 20]
    with pytest.raises(ValueError, match="broken by an error in an earlier call"):
        model(TOKEN, past_key_values=cache)


@torch.no_grad()
def test_a_first_call_that_fails_leaves_the_cache_as_new():
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    cache = DynamicCache(config=model.config)
    kinds = [type(layer) for layer in cache.layers]
    with pytest.raises(ValueError, match="on purpose"):
        fail_in_the_last_layer(model, tiny.inputs("llama")["input_ids"], cache)
    assert [type(layer) for layer in cache.layers] == kinds
    ap.swap_attention(model, "linear")
    goes_on(model, *filled(model, cache=cache))


@torch.no_grad()
def test_models_whose_layers_were_cut_off():
    for keep in ([0, 1], [0, 2]):
        for cache_implementation in ("dynamic", "static"):
            model = ap.swap_attention(tiny.build("llama"), [{**LOCAL, "layers": [1]}, {"type": "linear"}])
            copied = copy.deepcopy(model)
            for each in (model, copied):
                each.model.layers = torch.nn.ModuleList(each.model.layers[n] for n in keep)
                each.config.num_hidden_layers = 2
                for number, layer in enumerate(each.model.layers):
                    layer.self_attn.layer_idx = number
                given = tiny.inputs("llama")
                want = each.generate(**given, **GREEDY, use_cache=False)
                got = each.generate(**given, **GREEDY, cache_implementation=cache_implementation)
                assert torch.equal(got, want)
