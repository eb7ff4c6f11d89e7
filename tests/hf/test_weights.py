"""Attention weights: delivered where a model records them, whole or hybrid, whatever it hands down to its modules."""

from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from torch import nn

import attn_plugins as ap
from attn_plugins.hf import attention_function as dispatch

EVERY = ["encoder", "decoder", "cross"]
LENGTH = {"llava": 20}


def vision() -> dict[str, Any]:
    return {**tiny.VISION, "num_attention_heads": 4, "intermediate_size": 48}


def siglip() -> Any:
    return tf.SiglipVisionModel._from_config(tf.SiglipVisionConfig(**vision())).eval()


def given_to(name: str) -> dict[str, torch.Tensor]:
    return tiny.inputs("vit" if name == "siglip" else name, length=LENGTH.get(name, 13))


def build(name: str, implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    model = siglip() if name == "siglip" else tiny.build(name)
    if implementation:
        model.set_attn_implementation(implementation)
    return model


def weights_of(out: Any) -> dict[str, tuple[torch.Tensor, ...]]:
    return {key: value for key, value in out.items() if "attentions" in key}


@pytest.mark.parametrize("layers", ["all", 1])
@pytest.mark.parametrize("name", [*tiny.MODELS, "siglip"])
@torch.no_grad()
def test_weights_are_those_of_the_eager_model(name, layers):
    given = given_to(name)
    want = weights_of(build(name, "eager")(**given, output_attentions=True))
    model = ap.swap_attention(build(name), "softmax", roles=EVERY, layers=layers)
    got = weights_of(model(**given, output_attentions=True))
    assert got.keys() == want.keys()
    real = given.get("attention_mask", torch.ones(2, 1)).bool()
    for key, expected in ((key, expected) for key, expected in want.items() if expected):
        assert len(got[key]) == len(expected)
        for one, other in zip(got[key], expected, strict=True):
            assert one.shape == other.shape
            if real.shape[1] == one.shape[2]:  # what padding attends to is no one's business
                one, other = (x.transpose(1, 2)[real] for x in (one, other))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not any(map(len, weights_of(model(**given)).values()))


@pytest.mark.parametrize("name", ap.list_attentions())
@torch.no_grad()
def test_every_attention_gives_its_effective_weights(name):
    attention = ap.get_attention(name)
    model_name = "llama" if attention.causal else "bert"
    options = dict(attention.examples[-1])
    if attention.wants_grid is not False:
        model_name, options = "vit", dict(attention.examples[0])
    model, given = tiny.build(model_name), tiny.inputs(model_name, padded=False)
    if model_name == "bert":
        model = model.bert
    ap.swap_attention(model, {"type": name, **options})
    held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def keep(slot: nn.Module, args: Any, out: Any) -> None:
        held.append((args[2], *out))

    for module in model.modules():
        if isinstance(module, ap.Attention):
            module.register_forward_hook(keep)
    out = model(**given, output_attentions=True)
    assert len(out.attentions) == len(held) == model.config.num_hidden_layers
    for weights, (value, attended, own) in zip(out.attentions, held, strict=True):
        assert weights is own
        assert weights.shape == (2, 4, value.shape[2], value.shape[2])
        if attention.convex:
            shared = value.repeat_interleave(4 // value.shape[1], dim=1)
            torch.testing.assert_close((weights @ shared).transpose(1, 2), attended, atol=1e-4, rtol=1e-3)
            assert (weights >= -1e-6).all()
            assert (weights.sum(dim=-1) <= 1 + 1e-4).all()
    torch.testing.assert_close(tiny.output(model, given), tiny.output(lambda **_: out, given), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("flag", [{"type": "linear", "feature_map": "hedgehog"}, {"type": "local", "window_size": 4}])
@torch.no_grad()
def test_generating_with_weights_is_generating(flag):
    """Calls that want weights keep all keys: weights are over them."""
    model, given = ap.swap_attention(tiny.build("llama"), {**flag, "layers": [0, 2]}), tiny.inputs("llama")
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    made = model.generate(**given, **how, output_attentions=True)
    assert torch.equal(made.sequences, model.generate(**given, **how).sequences)
    shapes = [[tuple(x.shape) for x in step] for step in made.attentions]
    assert shapes == [[(2, 4, 13, 13)] * 3, *([(2, 4, 1, 13 + n)] * 3 for n in (1, 2, 3))]
    whole = model(
        made.sequences[:, :-1],
        output_attentions=True,
        attention_mask=nn.functional.pad(given["attention_mask"], (0, 3), value=1),
    )
    for one, layer in zip(made.attentions[-1], whole.attentions, strict=True):
        torch.testing.assert_close(one[1, :, 0], layer[1, :, -1], atol=1e-4, rtol=1e-3)
    kept = whole.past_key_values  # goes on without weights as the ordinary cache that it is
    logits = model(made.sequences[:, -1:], past_key_values=kept).logits[1]
    torch.testing.assert_close(logits[-1], model(made.sequences[1:]).logits[0, -1], atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_weights_of_tokens_that_are_gone_are_refused():
    model, given = ap.swap_attention(tiny.build("llama"), "linear", feature_map="elu"), tiny.inputs("llama")
    cache = model(**given).past_key_values
    with pytest.raises(ValueError, match=r"no longer holds cannot be returned; ask for them from the first token on"):
        model(given["input_ids"][:, :1], past_key_values=cache, output_attentions=True)


@torch.no_grad()
def test_a_config_that_asks_for_weights_is_set_saved_and_loaded(tmp_path):
    given = tiny.inputs("llama")
    model = ap.swap_attention(tiny.build("llama"), "local", window_size=4)
    model.config.output_attentions = True
    want = model(**given).attentions
    assert len(want) == 3
    model.save_pretrained(tmp_path)
    for again in (
        tf.AutoModelForCausalLM.from_pretrained(tmp_path),
        tf.AutoModelForCausalLM.from_pretrained(tmp_path, output_attentions=True),
    ):
        assert all(torch.equal(one, other) for one, other in zip(again(**given).attentions, want, strict=True))
    model.config.output_attentions = False
    assert not model(**given).attentions


def test_other_implementations_are_refused_as_before(tmp_path):
    for config in (tiny.build("llama").config, tf.LlamaConfig(**tiny.GROUPED, attn_implementation="sdpa")):
        assert config._attn_implementation == "sdpa"
        with pytest.raises(ValueError, match="`output_attentions` attribute is not supported when using"):
            config.output_attentions = True
        config._output_attentions = True
        with pytest.raises(Exception, match="`output_attentions` attribute is not supported when using"):
            config.save_pretrained(tmp_path)


def test_layers_computed_again_in_the_backward_give_the_same_gradients():
    def gradients(model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        out = model(**tiny.inputs("llama"), output_attentions=True, use_cache=False)
        (out.logits.square().mean() + sum(w.square().sum() for w in out.attentions)).backward()
        return [p.grad.clone() for p in model.parameters()]

    model = ap.swap_attention(tiny.build("llama"), "local", window_size=4, layers=[0, 1]).train()
    want = gradients(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for got, expected in zip(gradients(model), want, strict=True):
        torch.testing.assert_close(got, expected)
    model(**tiny.inputs("llama"), use_cache=False).logits.sum().backward()  # and without weights again


@torch.no_grad()
def test_a_layer_without_a_slot_and_without_a_mask_stays_causal():
    model = ap.swap_attention(tiny.build("llama"), "softmax", layers=0)
    module, q, k = model.model.layers[1].self_attn, torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    want, _ = dispatch.attention_forward(module, q, k, k, None, scaling=0.3)
    got, weights = dispatch.attention_forward(module, q, k, k, None, scaling=0.3, output_attentions=True)
    torch.testing.assert_close(got, want)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    both, _ = dispatch.attention_forward(module, q, k, k, None, scaling=0.3, output_attentions=True, is_causal=False)
    assert not torch.allclose(both, got)
