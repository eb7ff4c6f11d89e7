"""Seeing a model's own attention beside what its slots would have made of the same call."""

from concurrent.futures import ThreadPoolExecutor

import adapter_cases
import pytest
import tiny
import torch

import attn_plugins as ap
from attn_plugins.hf.observe import own_attention

HEDGEHOG = {"type": "linear", "feature_map": "hedgehog"}


def made(kind, flag=HEDGEHOG, **changes):
    return ap.swap_attention(tiny.build(kind, **changes), flag)


def observed(model, **given):
    seen = []
    with torch.no_grad(), own_attention(model, seen.append):
        output = model(**given)
    return seen, output


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3", "mistral", "bert"])
def test_the_model_goes_on_with_its_own_attention(kind):
    flag = {"type": "local", "window_size": 3} if kind in tiny.OWN_PATTERN else HEDGEHOG
    model, given = made(kind, flag), tiny.inputs(kind)
    seen, output = observed(model, **given)
    with torch.no_grad():
        swapped = model(**given).logits
        with own_attention(model):
            bypassed = model(**given).logits
        own = ap.restore_attention(model)(**given).logits
    assert torch.equal(output.logits, own)
    assert torch.equal(bypassed, own)
    assert not torch.allclose(swapped, own)
    assert len(seen) == 3


@pytest.mark.parametrize("need_weights", [False, True])
def test_the_slot_attends_to_the_same_call(need_weights):
    model, given = made("llama"), tiny.inputs("llama")
    slots = []
    for layer in model.model.layers:
        layer.self_attn.attn_plugin.register_forward_hook(lambda slot, args, out: slots.append((slot, out)))
    seen, _ = observed(model, **given)
    assert not slots
    for one in seen:
        out, weights = one.attend(need_weights=need_weights)
        slot, (expected, _) = slots.pop()
        assert slot is one.slot
        assert torch.equal(out, expected)
        assert out.shape == one.own_BQHV.shape
        assert (weights is not None) == need_weights
        own = one.own_weights()
        repeated = one.value_BGKV.repeat_interleave(2, dim=1)
        real = one.own_BQHV if one.real_BQ is None else one.own_BQHV[one.real_BQ.expand(len(own), -1)]
        again = (own @ repeated).transpose(1, 2)
        torch.testing.assert_close(again if one.real_BQ is None else again[one.real_BQ.expand(len(own), -1)], real)


def test_gradients_reach_new_weights_alone_and_only_when_asked_for():
    model = made("llama")
    seen, _ = observed(model, **tiny.inputs("llama"))
    assert not seen[0].attend()[0].requires_grad
    out, _ = seen[0].attend(grad=True)
    out.square().sum().backward()
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given
    assert all(name.startswith("model.layers.0.self_attn.attn_plugin.") for name in given)


def test_queries_that_are_padding_are_known():
    model, ids = made("llama"), torch.randint(3, tiny.VOCABULARY, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seen, _ = observed(model, input_ids=ids, attention_mask=mask)
    assert torch.equal(seen[0].real_BQ.expand(2, -1), mask.bool())
    seen, _ = observed(model, input_ids=ids)
    assert seen[0].real_BQ is None


def test_dropout_is_off_on_both_sides():
    model = made("llama", {"type": "local", "window_size": 64}, attention_dropout=0.5).train()
    seen, _ = observed(model, **tiny.inputs("llama"))
    torch.testing.assert_close(seen[0].attend()[0], seen[0].own_BQHV)


@torch.no_grad()
def logits(model, given):
    return model(**given).logits


def test_others_and_other_threads_are_not_seen_and_the_inner_one_holds():
    one, other, given = made("llama"), made("llama"), tiny.inputs("llama")
    with torch.no_grad():
        expected = other(**given).logits
        outer, inner = [], []
        with own_attention(one, outer.append):
            assert torch.equal(other(**given).logits, expected)
            with own_attention(one, inner.append):
                one(**given)
            with ThreadPoolExecutor(1) as pool:
                elsewhere = pool.submit(logits, one, given).result()
        assert (len(outer), len(inner)) == (0, 3)
        assert torch.equal(elsewhere, expected)
        assert torch.equal(one(**given).logits, expected)


def test_an_error_inside_leaves_the_model_swapped():
    model, given = made("llama"), tiny.inputs("llama")
    expected = model(**given).logits

    def see(one):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), own_attention(model, see):
        model(**given)
    assert torch.equal(model(**given).logits, expected)


def test_a_cache_with_states_is_refused():
    model, given = made("llama"), tiny.inputs("llama")
    cache = model(**given).past_key_values
    with own_attention(model), pytest.raises(ValueError, match="use a new cache, or none"):
        model(given["input_ids"][:, :1], past_key_values=cache)


def test_a_new_cache_serves_the_models_own_attention():
    model, given = made("llama"), tiny.inputs("llama", padded=False)
    ids = given["input_ids"]
    with torch.no_grad(), own_attention(model):
        cache = model(ids[:, :9]).past_key_values
        rest = model(ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 9:])


def test_cross_attention_is_seen():
    model = made("bart", {"type": "softmax", "roles": ["encoder", "decoder", "cross"]})
    seen, _ = observed(model, **tiny.inputs("bart"), use_cache=False)
    assert [one.mask.cross for one in seen].count(True) == 2
    for one in seen:
        real_BQ = torch.ones(1, 1, dtype=torch.bool) if one.real_BQ is None else one.real_BQ
        real_BQ = real_BQ.expand(*one.own_BQHV.shape[:2])
        torch.testing.assert_close(one.attend()[0][real_BQ], one.own_BQHV[real_BQ])


@pytest.mark.parametrize("name", ["mpnet", "gptj", "xglm", "falcon-groups", "blip-captions", "deberta_v2", "swinv2"])
@torch.no_grad()
def test_families_with_an_adapter_attend_by_their_own_too(name):
    case = adapter_cases.CASES[name]
    cls, config = case.made()
    torch.manual_seed(0)
    model, given = cls._from_config(config).eval(), case.given()
    own, seen = tiny.output(model, given), []
    ap.swap_attention(model, {"type": "softmax", "roles": sorted({row.role for row in ap.describe_attention(model)})})
    for see in (None, seen.append):
        with own_attention(model, see):
            torch.testing.assert_close(tiny.output(model, given), own, atol=2e-5, rtol=1e-4)
    assert len(seen) == len(ap.describe_attention(model))
    for observed in seen:
        out, weights = observed.attend(need_weights=True)
        torch.testing.assert_close(out, observed.own_BQHV, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(observed.own_weights(), weights)


def test_gates_on_hidden_states_compute_in_the_dtype_that_is_asked_for():
    model = made("llama", {"type": "gated_delta", "gate_input": "hidden"}).bfloat16()
    for layer in model.model.layers:
        layer.self_attn.attn_plugin.float()
    seen, _ = observed(model, **tiny.inputs("llama"))
    for one in seen:
        out, _ = one.attend(dtype=torch.float32, grad=True)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        out.square().sum().backward()
