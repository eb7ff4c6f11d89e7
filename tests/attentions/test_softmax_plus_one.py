"""Softmax attention with one more in the denominator: the formula, and the zero key that stands for it."""

import math

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding

from attn_plugins.attentions.softmax_plus_one import SoftmaxPlusOneAttention
from attn_plugins.core.mask import AttentionMask

CASE = Case(SoftmaxPlusOneAttention, {}, True)


def by_hand(given, mask, *, position_bias=None, softcap=None, sinks=None):
    """One weight after the other: (out_BQHV, sum of each query's weights (B, Q, H))."""
    (batch, heads, queries, _), keys = given.q.shape, given.k.shape[2]
    visible = mask.dense().expand(batch, 1, queries, keys)
    out, total = torch.zeros(batch, queries, heads, given.v.shape[3], dtype=torch.float64), {}
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                exps = {}
                for j in range(keys):
                    if visible[b, 0, i, j]:
                        s = float(given.q[b, h, i] @ given.k[b, h // 2, j]) * SCALE
                        s = s if softcap is None else softcap * math.tanh(s / softcap)
                        exps[j] = math.exp(s if position_bias is None else s + float(position_bias[0, h, i, j]))
                below = 1 + sum(exps.values()) + (0 if sinks is None else math.exp(sinks[h]))
                total[b, i, h] = sum(exps.values()) / below
                for j, e in exps.items():
                    out[b, i, h] += e / below * given.v[b, h // 2, j]
    return out, total


EXTRAS = {
    "nothing": {},
    "bias": {"position_bias": torch.randn(1, 4, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))},
    "softcap": {"softcap": 0.5},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 2.0, 5.0], dtype=torch.float64)},
}
MASKS = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "padded": {"causal": True, "padding_BK": left_padding([7, 4], 7)},
    "a rule": {"causal": False, "plain": False, "rule": lambda b, h, q, k: (q + k + b) % 3 > 0},
}


@pytest.mark.parametrize("form", ["torch", "reference"])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_formula_pair_by_pair(kind, extra, form):
    given, mask = inputs(2, 7), AttentionMask(2, 7, 7, **MASKS[kind])
    given.extras = EXTRAS[extra]
    want, total = by_hand(given, mask, **EXTRAS[extra])
    assert all(0 <= t < 1 for t in total.values())
    assert any(total.values())
    assert_same({"out": given.run(CASE.module(backend=form), mask)}, {"out": want}, 1e-12)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("queries", [1, 5, 14])
@pytest.mark.parametrize("biased", [False, True])
def test_every_path_of_torch_equals_the_reference(kind, queries, biased):
    options = MASKS[kind] | ({"padding_BK": left_padding([14, 9], 14)} if kind == "padded" else {})
    given = inputs(2, queries, 14)
    if biased:
        given.extras = {"position_bias": torch.randn(1, 4, queries, 14, dtype=torch.float64)}
    assert_forms_agree(CASE, given, AttentionMask(2, queries, 14, **options))


def test_a_query_that_likes_no_key_attends_to_nothing():
    given, mask = inputs(1, 6), AttentionMask(1, 6, 6, causal=False)
    given.q = 100 * torch.ones_like(given.q)
    given.k = -torch.ones_like(given.k)
    assert given.run(CASE.module(), mask).abs().max() < 1e-12


def test_nothing_dense_is_built_where_nothing_is_padded(monkeypatch):
    monkeypatch.setattr(AttentionMask, "dense", lambda mask: pytest.fail("the N x N mask is built"))
    for mask in (CASE.mask(2, 9, 9), AttentionMask(2, 9, 9, causal=False), CASE.mask(2, 1, 9)):
        inputs(2, mask.q_length, 9).run(CASE.module(), mask)
