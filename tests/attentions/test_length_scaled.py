"""Scores that grow with the position: the factor, positions taken off in a model, what is refused."""

import math

import pytest
import tiny
import torch
from cases import SCALE, Case, inputs, left_padding

import attn_plugins as ap
from attn_plugins.attentions.length_scaled import LengthScaledAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import expand_heads


@torch.no_grad()
def test_scores_are_scaled_by_the_place_of_the_query_in_its_row():
    case, padding = Case(LengthScaledAttention, {"log_base": 3.0}, True), left_padding([9, 6], 9)
    given, mask = inputs(2, 9), case.mask(2, 9, 9, padding_BK=padding)
    _, weights = given.call(case.module(), mask, need_weights=True)
    k = expand_heads(given.k, 4)
    for row, start in ((0, 0), (1, 3)):
        for i in range(start, 9):
            factor = math.log(i - start + 3) / math.log(3)
            scores = SCALE * factor * torch.einsum("hd,hkd->hk", given.q[row, :, i], k[row, :, start : i + 1])
            torch.testing.assert_close(weights[row, :, i, start : i + 1], scores.softmax(dim=-1))


def without_rotation(model):
    """The same model with positions that rotate by nothing."""
    rotary = model.model.rotary_emb
    rotary.forward = lambda x, position_ids: (torch.ones(*position_ids.shape, 8), torch.zeros(*position_ids.shape, 8))
    return model


@torch.no_grad()
def test_rotary_positions_are_taken_off_in_a_model():
    """As one that never rotated, in one pass and in generated text."""
    given, how = tiny.inputs("llama"), {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    rule = {"type": "length_scaled", "log_base": 5.0}
    model = ap.swap_attention(tiny.build("llama"), {**rule, "positions": "none"})
    plain = ap.swap_attention(without_rotation(tiny.build("llama")), rule)
    rotated = ap.swap_attention(tiny.build("llama"), rule)
    real = given["attention_mask"].bool()
    got, want, other = (one(**given, use_cache=False).logits[real] for one in (model, plain, rotated))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (got - other).abs().max() > 1e-3
    texts = [model.generate(**given, **how, use_cache=cache) for cache in (True, False)]
    static = model.generate(**given, **how, cache_implementation="static")
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], static)
    assert torch.equal(texts[0], plain.generate(**given, **how, use_cache=False))


def test_what_has_no_rotary_positions_and_what_hides_them_is_refused():
    with pytest.raises(ValueError, match=r"needs rotary positions, and .* has none that attn_plugins can find"):
        ap.swap_attention(tiny.build("gpt2"), "length_scaled", positions="none")
    model, given = tiny.build("mistral"), tiny.inputs("mistral")
    ap.swap_attention(model, "length_scaled", positions="none")
    with pytest.raises(
        ValueError, match=r"positions='none' got 1 queries and .* keys; allowed: as many keys as queries"
    ):
        model.generate(**given, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"^log_base=1.0; allowed: a number above 1$"):
        LengthScaledAttention.Config(log_base=1.0)


def test_it_grows_with_the_text():
    module = Case(LengthScaledAttention, {}, True).module()
    q = module._placed(*inputs(1, 12).of_tokens()[:2], AttentionMask(1, 12, 12, causal=True), None)[0]
    factor = (q / inputs(1, 12).q)[0, 0, :, 0]
    assert factor[0] == 1
    assert (factor.diff() > 0).all()
