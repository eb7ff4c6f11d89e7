"""What is read from the code of a model's classes."""

import pytest
import tiny
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import attn_plugins as ap
from attn_plugins.hf import arguments
from attn_plugins.hf import attention_function as dispatch
from attn_plugins.hf.discovery import by_code as sources
from attn_plugins.hf.discovery import modules as discovery


class Once(nn.Module):
    def forward(self, x, mask, **kwargs):
        interface = self.interface()
        if self.training:
            out, _ = interface(self, x, x, x, mask, dropout=0.1, scaling=self.scaling, tilt=x, **kwargs)
        else:
            out, _ = interface(self, x, x, x, mask, scaling=self.scaling, s_aux=x)
        return out


class Twice(Once):
    def forward(self, x, mask):
        interface = self.interface()
        first, _ = interface(self, x, x, x, mask, scaling=self.scaling)
        second, _ = interface(self, x, x, x, mask, scaling=self.scaling)
        return first - second


class Inherits(Twice):
    pass


class TwiceByAMethod(Once):
    def attend(self, x, mask):
        return self.interface()(self, x, x, x, mask, scaling=self.scaling)[0]

    def forward(self, x, mask):
        return self.attend(x, mask) - self.attend(2 * x, mask)


class OnceByASuper(Once):
    def forward(self, x, mask):
        return super().forward(x, mask)


class WithTextAtTheMargin(Once):
    def forward(self, x, mask):
        said = """
A string that begins at the margin.
"""
        out, _ = self.interface()(self, x, x, x, mask, scaling=self.scaling, said=said)
        return self.interface()(self, out, x, x, mask, scaling=self.scaling)[0]


class InALoop(Once):
    def forward(self, x, mask):
        return sum(self.interface()(self, part, x, x, mask, scaling=self.scaling)[0] for part in x)


class ByAMethod(Once):
    def attend(self, x, mask):
        return self.interface()(self, x, x, x, mask, scaling=self.scaling, bend=2.0)

    def forward(self, x, mask):
        return self.attend(x, mask)[0]


class MakesMasks:
    def forward(self, config):
        return create_causal_mask(config)  # noqa: F821


class MakesEither(MakesMasks):
    def masks(self, config):
        return create_bidirectional_mask(config)  # noqa: F821


def test_keywords_given_to_the_attention_function_are_those_written_in_its_calls():
    assert sources.keyword_arguments(Once) == {"dropout", "scaling", "tilt", "s_aux"}
    assert sources.keyword_arguments(Twice) == {"scaling"}
    assert sources.keyword_arguments(ByAMethod) == {"scaling", "bend"}


def test_calls_that_follow_each_other_are_told_from_calls_in_branches():
    for cls in (Once, ByAMethod, OnceByASuper):
        assert not sources.attends_repeatedly(cls)
    for cls in (Twice, Inherits, TwiceByAMethod, InALoop, WithTextAtTheMargin):
        assert sources.attends_repeatedly(cls)


@torch.no_grad()
def test_attending_twice_from_one_state_is_refused_where_the_code_did_not_tell(monkeypatch):
    def attend_twice(module, *args, **kwargs):
        dispatch.attention_forward(module, *args, **kwargs)
        return dispatch.attention_forward(module, *args, **kwargs)

    model, given = ap.swap_attention(tiny.build("llama"), "local"), tiny.inputs("llama")
    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend_twice)
    model(**given, use_cache=False)
    with pytest.raises(ValueError, match=r"LlamaAttention calls its attention more than once .*; allowed: once"):
        model(**given, use_cache=True)


def test_masks_are_those_that_any_method_makes():
    assert sources.makes_masks([MakesMasks]) == {"causal"}
    assert sources.makes_masks([MakesEither]) == {"causal", "bidirectional"}
    assert sources.makes_masks([nn.Module]) == set()


def test_a_class_without_source_tells_nothing():
    scope = {"nn": nn}
    exec("class Unseen(nn.Module):\n    def forward(self, x):\n        return self.f(self, x, scaling=1)", scope)
    assert sources.keyword_arguments(scope["Unseen"]) == frozenset()
    assert not sources.attends_repeatedly(scope["Unseen"])


@pytest.mark.parametrize("value", [torch.zeros(1), 0.5])
def test_an_argument_of_which_nothing_is_known_is_refused_where_it_has_a_value(value, monkeypatch):
    monkeypatch.setattr(arguments, "keyword_arguments", lambda cls: frozenset({"scaling", "tilt"}))
    model = ap.swap_attention(tiny.build("llama"), "local", layers=1)
    module = model.model.layers[1].self_attn
    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    assert dispatch.attention_forward(module, q, k, k, None, tilt=None)[0].shape == (1, 5, 4, 8)
    with pytest.raises(ValueError, match=r"LlamaAttention gives tilt= to its attention"):
        dispatch.attention_forward(module, q, k, k, None, tilt=value)
    unswapped = model.model.layers[0].self_attn  # its own implementation knows what to do with it
    assert dispatch.attention_forward(unswapped, q, k, k, None, tilt=value)[0].shape == (1, 5, 4, 8)


def test_bidirectional_self_attention_with_other_keys_than_queries_is_cross_attention():
    model = ap.swap_attention(tiny.build("bert"), "local", window_size=2)
    module = next(module for _, module in discovery.attention_modules(model))
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match="keys of another sequence, which attention 'local' cannot honour"):
        dispatch.attention_forward(module, q, k, k, None)
    ap.swap_attention(model, "softmax")
    got, _ = dispatch.attention_forward(module, q, k, k, None)
    torch.testing.assert_close(got, nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2))


def test_keys_that_a_model_has_chosen_for_each_query_are_those_attended():
    model = ap.swap_attention(tiny.build("llama"), "softmax", layers=0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    both = k.repeat_interleave(2, dim=1)
    indices = torch.randint(0, 6, (2, 6, 2), generator=torch.Generator().manual_seed(0))
    indices[:, :, 0] = torch.arange(6)  # itself
    chosen = torch.zeros(2, 6, 6, dtype=torch.bool).scatter(-1, indices, True).tril().unsqueeze(1)
    wanted = nn.functional.scaled_dot_product_attention(q, both, both, attn_mask=chosen).transpose(1, 2)
    for layer in model.model.layers:  # one with a slot, one without
        got, _ = dispatch.attention_forward(layer.self_attn, q, k, k, None, indices=indices)
        torch.testing.assert_close(got, wanted)
        causal = torch.full((6, 6), torch.finfo(torch.float32).min).triu(1).expand(2, 1, 6, 6)
        got, _ = dispatch.attention_forward(layer.self_attn, q, k, k, causal, indices=indices)
        torch.testing.assert_close(got, wanted)
