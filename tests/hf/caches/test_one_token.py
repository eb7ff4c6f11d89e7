"""What a token costs in calls of Python, and that what was found for one token does not outlive it."""

import copy
import dataclasses
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache

import attn_plugins as ap
from attn_plugins.hf.caches.cache_layers import swapped_modules
from attn_plugins.hf.observe import swapped_attention

LOCAL = {"type": "local", "window_size": 4, "num_sink_tokens": 2}
ELU = {"type": "linear", "feature_map": "elu"}
HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}
PACKAGE = str(Path(ap.__file__).parent)


def ids(number, seed=3):
    return torch.randint(3, tiny.VOCABULARY - 1, (1, number), generator=torch.Generator().manual_seed(seed))


def begun(model, number=12):
    """A cache with that many tokens in it, by ones and more."""
    cache = DynamicCache(config=model.config)
    for piece in ids(number).split([number - 3, 1, 1, 1], dim=1):
        model(piece, past_key_values=cache)
    return cache


def step(model, cache, **given):
    return model(torch.tensor([[7]]), past_key_values=cache, **given)


def calls_of_a_token(rule, num_layers):
    """Python functions of the package that one more token calls."""
    model = tiny.build("llama", num_hidden_layers=num_layers)
    ap.swap_attention(model, rule)
    cache, found = begun(model), []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        step(model, cache)
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize(("rule", "most"), [("softmax", 14), (LOCAL, 39), (ELU, 48), (HEDGEHOG, 51)], ids=str)
@torch.no_grad()
def test_a_token_takes_few_calls_a_layer(rule, most):
    """A call costs most where the processor's caches hold the layers' weights and not the interpreter's objects."""
    two, four = (calls_of_a_token(rule, number) for number in (2, 4))
    assert 0 < len(four) - len(two) <= 2 * most, sorted(four)


@pytest.mark.parametrize("rule", ["softmax", LOCAL], ids=str)
def test_each_module_has_one_hook_before_it_and_one_after(rule):
    model = tiny.build("llama")

    def hooks(of):
        modules = [layer.self_attn for layer in of.model.layers]
        return {(len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules}

    for again in (rule, "softmax", LOCAL, rule):
        ap.swap_attention(model, again)
        assert hooks(model) == {(1, 1)}
    assert hooks(copy.deepcopy(model)) == {(1, 1)}
    ap.swap_attention(model, [{**LOCAL, "layers": [0]}])
    assert hooks(model) == {(1, 1), (0, 0)}
    assert hooks(ap.restore_attention(model)) == {(0, 0)}


@torch.no_grad()
def test_layers_that_are_cut_off_or_exchanged_between_tokens_are_served_no_more():
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    begun(model)
    modules = [layer.self_attn for layer in model.model.layers]
    assert list(swapped_modules(model.model)) == modules

    exchanged = copy.deepcopy(model)
    exchanged.model.layers[1].self_attn = tiny.build("llama").model.layers[1].self_attn
    left = [exchanged.model.layers[layer].self_attn for layer in (0, 2)]
    assert list(swapped_modules(exchanged.model)) == left
    assert not {id(module) for module in left} & {id(module) for module in modules}, "a copy serves its own modules"

    model.model.layers = nn.ModuleList(list(model.model.layers)[:2])
    model.config.num_hidden_layers = 2
    assert list(swapped_modules(model.model)) == modules[:2]
    cache = begun(model)
    want = model(torch.cat([ids(12), torch.tensor([[7]])], dim=1), use_cache=False).logits[:, -1]
    torch.testing.assert_close(step(model, cache).logits[:, -1], want)


@torch.no_grad()
def test_a_copy_goes_on_where_the_model_that_it_was_made_of_is_swapped_or_restored():
    model = ap.swap_attention(tiny.build("llama"), LOCAL)
    cache = begun(model)
    other, caches = copy.deepcopy(model), [copy.deepcopy(cache) for _ in range(3)]
    want = step(model, cache).logits
    ap.swap_attention(model, {**LOCAL, "window_size": 3})
    with pytest.raises(ValueError, match=r"not of local\(window_size=3.*use a new cache"):
        step(model, caches[0])
    ap.restore_attention(model)
    with pytest.raises(ValueError, match=r"holds the state of local.*use a new cache"):
        step(model, caches[1])
    assert torch.equal(step(other, caches[2]).logits, want)


@torch.no_grad()
def test_a_state_is_of_the_options_and_the_backend_that_it_began_with():
    model = ap.swap_attention(tiny.build("llama", num_hidden_layers=1), LOCAL)
    slot, cache = model.model.layers[0].self_attn.attn_plugin, begun(model)
    config = slot.config
    slot.backend = "batched"
    with pytest.raises(ValueError, match=r"holds the state of local\(.*, not of local\(.*backend='batched'.*new cache"):
        step(model, cache)
    slot.backend, slot.config = "auto", dataclasses.replace(config, window_size=3)
    with pytest.raises(ValueError, match=r"not of local\(window_size=3.*use a new cache"):
        step(model, cache)
    slot.config = copy.copy(config)  # equal, if not the same
    assert step(model, cache).logits.isfinite().all()


@pytest.mark.parametrize("feature_map", ["hedgehog", "t2r"])
@torch.no_grad()
def test_weights_that_change_between_tokens_are_those_of_the_next(feature_map):
    model = tiny.build("llama", num_hidden_layers=1)  # whose keys don't follow from the weights of queries
    ap.swap_attention(model, {"type": "linear", "feature_map": feature_map})
    other = copy.deepcopy(model)  # which is called with the later weights alone
    cache, before = begun(model), begun(model)
    for one in (model, other):
        for name, weight in one.model.layers[0].self_attn.attn_plugin.named_parameters():
            if name.startswith("query"):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    want = other(torch.cat([ids(12), torch.tensor([[7]])], dim=1), use_cache=False).logits[:, -1]
    got = step(model, cache).logits[:, -1]
    torch.testing.assert_close(got, want)
    # Exchanged, and not only written: as PEFT and quantisation do.
    slot = model.model.layers[0].self_attn.attn_plugin
    slot.query_weight = nn.Parameter(torch.zeros_like(slot.query_weight))
    assert not torch.allclose(step(model, before).logits[:, -1], want)


@torch.no_grad()
def test_what_is_asked_for_between_tokens_is_heard_for_as_long_as_it_is_asked():
    model = ap.swap_attention(tiny.build("llama"), "softmax")
    cache, seen = begun(model), []
    assert step(model, cache).attentions is None
    weighed = step(model, cache, output_attentions=True).attentions
    assert [weights.shape[-1] for weights in weighed] == [14] * 3
    with swapped_attention(model, seen.append):
        step(model, cache)
    assert [observed.key_BGKD.shape[2] for observed in seen] == [15] * 3
    assert step(model, cache).attentions is None
    assert len(seen) == 3
    with pytest.raises(ValueError, match="packed"):
        model(ids(4), past_key_values=cache, position_ids=torch.tensor([[0, 1, 0, 1]]))
    with pytest.raises(ValueError, match="begin a new text"):
        step(model, cache, position_ids=torch.tensor([[0]]))
    assert step(model, cache, position_ids=torch.tensor([[16]])).logits.isfinite().all()


@torch.no_grad()
def test_an_argument_of_which_nothing_is_known_is_refused_in_a_later_token_too():
    model = ap.swap_attention(tiny.build("llama"), "softmax")
    cache = begun(model)
    with pytest.raises(ValueError, match="paged caches"):
        model(torch.tensor([[7]]), past_key_values=cache, cache=object())
    assert step(model, cache, use_cache=True).logits.isfinite().all()


@torch.no_grad()
def test_training_and_eval_between_tokens():
    model = tiny.build("llama", attention_dropout=0.5)
    ap.swap_attention(model, "softmax")
    cache = begun(model)
    want = step(model, copy.deepcopy(cache)).logits
    torch.manual_seed(0)
    assert not torch.allclose(step(model.train(), copy.deepcopy(cache)).logits, want)
    assert torch.equal(step(model.eval(), copy.deepcopy(cache)).logits, want)


@torch.no_grad()
def test_a_ring_goes_on_growing_once_its_first_keys_are_in():
    model = tiny.build("llama", num_hidden_layers=1)
    ap.swap_attention(model, {**LOCAL, "window_size": 80})
    cache, text = DynamicCache(config=model.config), ids(95)
    want = model(text, use_cache=False).logits
    got = [model(piece, past_key_values=cache).logits for piece in text.split([66, *[1] * 29], dim=1)]
    torch.testing.assert_close(torch.cat(got, dim=1), want)
