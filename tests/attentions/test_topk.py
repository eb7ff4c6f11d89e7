"""Exact top-k against a loop over queries, its ties, and its tiles; the contract is in test_contract.py."""

import pytest
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding

from attn_plugins.attentions.topk import TopkAttention
from attn_plugins.benchmark.cost.timing import Workload, peak_bytes
from attn_plugins.ops.softmax import tile_engine
from attn_plugins.ops.softmax import topk as ops


def topk(causal=True, **options):
    return Case(TopkAttention, options, causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("extras", [{}, {"position_bias": 2.0}, {"softcap": 0.7}])
def test_each_head_of_each_query_sees_its_highest_scores(causal, extras):
    given, case, mask = inputs(2, 13), topk(causal, topk=4), None
    mask = case.mask(2, 13, 13, padding_BK=left_padding([13, 9], 13))
    if "position_bias" in extras:
        extras = {"position_bias": 2 * torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(1)).double()}
    given.extras = extras
    out = given.run(case.module(), mask)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(13)).tolist():
        if b and i < 4:
            continue
        scores = {}
        for j in range(4 * b, i + 1 if causal else 13):
            score = SCALE * (given.q[b, h, i] @ given.k[b, h // 2, j])
            if "softcap" in extras:
                score = extras["softcap"] * torch.tanh(score / extras["softcap"])
            if "position_bias" in extras:
                score = score + extras["position_bias"][0, h, i, j]
            scores[j] = score
        best = sorted(scores, key=scores.get)[-4:]
        weights = torch.stack([scores[j] for j in best]).softmax(0)
        want = sum(weight * given.v[b, h // 2, j] for weight, j in zip(weights, best, strict=True))
        torch.testing.assert_close(out[b, i, h], want)


@pytest.mark.parametrize("form", ["torch", "batched", "reference"])
def test_of_equal_scores_the_earlier_ones_are_chosen(form):
    case, length = topk(topk=3), 11
    given = inputs(1, length)
    given.k[:] = given.k[:, :, :1]
    given.k[:, :, 6] = 0.0  # above the others where q . k < 0, below them elsewhere
    given.v = torch.eye(length, dtype=torch.float64).expand(1, 2, -1, -1)
    seen = given.run(case.module(value_dim=length, backend=form), case.mask(1, length, length)) > 0
    level = torch.einsum("hqd,hd->qh", given.q[0], given.k[0, :, 0].repeat_interleave(2, dim=0))
    for i in range(length):
        for h in range(4):
            want = {0, 1, 2} & set(range(i + 1)) if i < 6 or level[i, h] > 0 else {0, 1, 6}
            assert set(seen[0, i, h].nonzero().flatten().tolist()) == want, f"query {i}, head {h}"


@pytest.mark.parametrize("budget", [1, 60, 500, 9000])  # the last: a head at a time, with all queries
@pytest.mark.parametrize("bias", [(1, 1, 30, 30), (2, 4, 30, 30), (2, 1, 1, 30)])
def test_tiles_of_any_size_give_the_same(budget, bias, monkeypatch):
    case, given = topk(topk=5), inputs(2, 30)
    given.extras = {"sinks": torch.randn(4).double(), "position_bias": torch.randn(bias).double(), "softcap": 2.0}
    mask = case.mask(2, 30, 30, padding_BK=left_padding([30, 21], 30))
    out = given.run(case.module(), mask)
    monkeypatch.setattr(ops, "SCORES_AT_ONCE", budget)
    assert_same({"out": given.run(case.module(), mask)}, {"out": out}, 1e-12)
    assert_forms_agree(case, given, mask)


def test_the_choice_is_made_once_and_one_number_a_query_of_it_kept(monkeypatch):
    case, given, choices = topk(topk=5), inputs(1, 40), []

    def spy(scores, topk):
        choices.append(least(scores, topk))
        return choices[-1]

    least = tile_engine.topk_threshold
    monkeypatch.setattr(tile_engine, "topk_threshold", spy)
    given.q.requires_grad_()
    given.run(case.module(), case.mask(1, 40, 40)).sum().backward()
    assert [x.shape for x in choices] == [(2, 2 * 40, 1)]  # key/value heads, query heads that share one times queries


def test_nothing_of_queries_times_keys_is_kept(monkeypatch):
    case, length = topk(topk=5), 1024
    given = inputs(1, length, dtype=torch.float32)
    module = case.module(dtype=torch.float32)
    monkeypatch.setattr(ops, "SCORES_AT_ONCE", 2**14)
    for x in given.tensors():
        x.requires_grad_()
    run = Workload(run=lambda: given.run(module, case.mask(1, length, length)).sum().backward(), count=1)
    assert peak_bytes([run], torch.device("cpu")) < length * length


def test_dropout_is_the_same_again_in_the_backward():
    shape = {"num_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "value_dim": 4}
    case, small = topk(topk=3), inputs(1, 8, **shape)
    module = case.module(**shape)

    def attend(q, k, v):
        torch.manual_seed(5)
        return module(q, k, v, mask=case.mask(1, 8, 8), scale=SCALE, dropout=0.3)[0]

    torch.autograd.gradcheck(attend, [x.requires_grad_() for x in (small.q, small.k, small.v)])


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="topk=0; allowed: an integer from 1 on"):
        TopkAttention.Config(topk=0)
