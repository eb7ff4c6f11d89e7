"""Sigmoid attention: the formula, what b counts, and tiles that add up."""

import math

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, kept_for_backward, left_padding

from attn_plugins.attentions.sigmoid import SigmoidAttention
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax import sigmoid as ops

MASKS = {
    "causal": {"causal": True},
    "bidirectional": {"causal": False},
    "padded": {"causal": True, "padding_BK": left_padding([17, 11], 17)},
    "packed": {"causal": False, "segments_BK": torch.arange(17).expand(2, -1) // 4},
    "both": {
        "causal": True,
        "padding_BK": left_padding([17, 11], 17),
        "segments_BK": torch.arange(17).expand(2, -1) // 7,
    },
    "a rule": {"causal": False, "plain": False, "rule": lambda b, h, q, k: (q + k + b) % 3 > 0},
}


def sigmoid(causal=True, **options):
    return Case(SigmoidAttention, options, causal)


@pytest.mark.parametrize("form", ["torch", "reference"])
@pytest.mark.parametrize("bias", [None, -1.5, 0])
@pytest.mark.parametrize("kind", MASKS)
def test_equals_the_formula_pair_by_pair(kind, bias, form):
    given, mask = inputs(2, 17, num_heads=2), AttentionMask(2, 17, 17, **MASKS[kind])
    visible = mask.dense().expand(2, 1, 17, 17)
    want = torch.zeros(2, 17, 2, 8, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            for i in range(17):
                seen = [j for j in range(17) if visible[b, 0, i, j]]
                for j in seen:
                    s = float(given.q[b, h, i] @ given.k[b, h, j]) * SCALE
                    s += -math.log(len(seen)) if bias is None else bias
                    want[b, i, h] += given.v[b, h, j] / (1 + math.exp(-s))
    module = sigmoid(bias=bias).module(num_heads=2, backend=form)
    assert_same({"out": given.run(module, mask)}, {"out": want}, 1e-12)


@pytest.mark.parametrize("tile", [(4, 3), (5, 100), (1, 1)])
@pytest.mark.parametrize("extras", ["", "position_bias", "softcap", "position_bias softcap"])
@pytest.mark.parametrize("kind", MASKS)
def test_tiles_add_up(monkeypatch, kind, extras, tile):
    monkeypatch.setattr(ops, "TILE", tile)
    bias = torch.randn(1, 4, 17, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    given, every = inputs(2, 17, value_dim=6), {"position_bias": bias, "softcap": 0.7}
    given.extras = {name: every[name] for name in extras.split()}
    assert_forms_agree(sigmoid(), given, AttentionMask(2, 17, 17, **MASKS[kind]), value_dim=6)


def test_tiles_of_a_chunk_behind_a_cache_add_up(monkeypatch):
    monkeypatch.setattr(ops, "TILE", (4, 3))
    for kind in ("causal", "padded", "both"):
        for queries in (1, 6):
            assert_forms_agree(sigmoid(), inputs(2, queries, 17), AttentionMask(2, queries, 17, **MASKS[kind]))


def test_the_bias_of_a_position_may_have_fewer_dimensions(monkeypatch):
    monkeypatch.setattr(ops, "TILE", (4, 3))
    for shape in ((2, 4, 9, 9), (1, 1, 9, 9), (4, 9, 9), (9, 9), (2, 4, 1, 9)):
        given = inputs(2, 9)
        given.extras = {"position_bias": torch.randn(shape, dtype=torch.float64)}
        assert_forms_agree(sigmoid(), given, sigmoid().mask(2, 9, 9))


def test_tiles_in_which_nothing_is_visible_are_left_out(monkeypatch):
    monkeypatch.setattr(ops, "TILE", (4, 4))

    def count(**options):
        return len(list(ops.tiles_of(AttentionMask(1, 40, 40, **options))))

    assert count(causal=False) == 100
    assert count(causal=True) == 55
    assert count(causal=True, segments_BK=torch.arange(40).unsqueeze(0) // 8) == 15
    assert count(causal=True, plain=False, rule=lambda b, h, q, k: (k <= q) & (k > q - 4)) == 19


def test_where_scores_are_alike_it_is_nearly_softmax_attention():
    given, mask = inputs(1, 200), sigmoid().mask(1, 200, 200)
    given.q = torch.zeros_like(given.q)
    want = given.v.cumsum(dim=2) / torch.arange(1, 201).view(-1, 1)
    got = given.run(sigmoid().module(), mask).transpose(1, 2)
    # sigmoid(-log n) is 1 / (n + 1).
    shrunk = torch.arange(1, 201) / torch.arange(2, 202)
    torch.testing.assert_close(got, want.repeat_interleave(2, dim=1) * shrunk.view(-1, 1))


def test_layers_count_visible_keys_once():
    asked = []

    def rule(b, h, q, k):
        asked.append(q.shape)
        return k <= q

    mask = AttentionMask(1, 20, 20, causal=True, plain=False, rule=rule)
    for expected in (2, 3):  # counted and attended, then attended
        inputs(1, 20).run(sigmoid().module(), mask)
        assert len(asked) == expected


def test_nothing_but_inputs_is_kept_for_the_backward():
    given = inputs(1, 512)
    kept = kept_for_backward(sigmoid().module(), given, sigmoid().mask(1, 512, 512))
    assert 0 < kept <= given.q.numel() + given.k.numel() + given.v.numel() + 512


def test_dropout_keeps_the_mean_and_the_backward_draws_the_same(monkeypatch):
    monkeypatch.setattr(ops, "TILE", (4, 3))
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    given, mask, module = inputs(1, 20, **shape), sigmoid().mask(1, 20, 20), sigmoid().module(**shape)
    torch.manual_seed(0)
    mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(300)]).mean(dim=0)
    torch.testing.assert_close(mean, given.run(module, mask), rtol=0, atol=0.15)
    small = inputs(1, 7, **shape)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=sigmoid().mask(1, 7, 7), scale=SCALE, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (small.q, small.k, small.v)])
