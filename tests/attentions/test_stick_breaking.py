"""Stick-breaking attention: weights against a loop, both ends of its gate, queries that do not see their own key."""

import pytest
import test_contract
import torch
from cases import EXACT, SCALE, Case, inputs, left_padding

from attn_plugins.attentions.softmax_plus_one import SoftmaxPlusOneAttention
from attn_plugins.attentions.stick_breaking import StickBreakingAttention

PAPER = Case(StickBreakingAttention, {"initial_gate": 1.0, "attend_current": False, "chunk_size": 4}, True)
EITHER = [PAPER, Case(StickBreakingAttention, {"initial_gate": 1.0, "chunk_size": 4}, True)]


def fresh(case):
    """The attention as it starts."""
    module = case.module()
    module.reset_parameters()
    return module


@pytest.mark.parametrize("case", EITHER, ids=str)
def test_each_key_takes_its_share_of_what_nearer_ones_left(case):
    given, mask = inputs(1, 9), case.mask(1, 9, 9)
    out, weights = given.call(fresh(case), mask, need_weights=True)
    for h in range(4):
        for i in range(9):
            left, want = 1.0, torch.zeros(9, dtype=torch.float64)
            for j in range(i - 1 if case is PAPER else i, -1, -1):
                share = torch.sigmoid(SCALE * given.q[0, h, i] @ given.k[0, h // 2, j])
                want[j], left = share * left, left * (1 - share)
            torch.testing.assert_close(weights[0, h, i], want)
    torch.testing.assert_close(given.run(fresh(case), mask), out)


def test_at_its_start_it_is_softmax_with_one_more_in_the_denominator():
    case, other = Case(StickBreakingAttention, {}, True), Case(SoftmaxPlusOneAttention, {}, True)
    given, mask = inputs(2, 40), case.mask(2, 40, 40, padding_BK=left_padding([40, 17], 40))
    real = mask.padding_BK
    torch.testing.assert_close(
        given.run(fresh(case), mask)[real], given.run(other.module(), mask)[real], atol=EXACT, rtol=EXACT
    )


def test_a_query_that_does_not_see_its_own_key_gets_nothing_at_first():
    given = inputs(1, 5)
    out = given.run(PAPER.module(), PAPER.mask(1, 5, 5))
    assert not out[0, 0].any()
    assert out[0, 1].any()


CONTRACT = [
    test_contract.test_future_tokens_do_not_matter_when_causal,
    test_contract.test_left_padding_does_not_matter,
    test_contract.test_packed_segments_do_not_leak,
    test_contract.test_cached_decoding_equals_one_pass,
    test_contract.test_prefill_in_chunks_equals_one_pass,
    test_contract.test_fast_form_equals_reference_in_float32,
    test_contract.test_fast_form_equals_reference_in_half_precision,
    test_contract.test_rows_without_a_real_token_stay_finite,
    test_contract.test_large_scores_stay_finite,
]


@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_the_papers_own_keeps_the_contract(test):
    test(case=PAPER)
