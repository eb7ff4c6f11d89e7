"""Attentions that want hidden states get those of their queries, and keep to the contract with them."""

import copy
import dataclasses

import pytest
import test_contract
import test_states
import torch
from cases import EXACT, HIDDEN_SIZE, SCALE, Case, head_shape, inputs, left_padding
from hidden_attentions import GatedOutput, GatedSum, Pairs

from attn_plugins.core.registry import get_attention

CASES = [Case(GatedOutput, {}, True), Case(GatedOutput, {}, False), Case(GatedSum, {}, True)]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_state = pytest.mark.parametrize("case", CASES[2:], ids=str)

CONTRACT = [
    test_contract.test_future_tokens_do_not_matter_when_causal,
    test_contract.test_left_padding_does_not_matter,
    test_contract.test_right_padding_does_not_matter,
    test_contract.test_rows_of_a_batch_do_not_matter_to_each_other,
    test_contract.test_packed_segments_do_not_leak,
    test_contract.test_packed_segments_do_not_leak_through_gradients,
    test_contract.test_cached_decoding_equals_one_pass,
    test_contract.test_prefill_in_chunks_equals_one_pass,
    test_contract.test_queries_may_be_the_last_of_more_keys,
    test_contract.test_every_weight_gets_a_gradient.of_case,
    test_contract.test_gradients_equal_finite_differences,
    test_contract.test_mixed_dtypes_of_autocast_are_taken,
    test_contract.test_a_compiled_model_gives_the_same,
]
CAUSAL = {
    test_contract.test_future_tokens_do_not_matter_when_causal,
    test_contract.test_cached_decoding_equals_one_pass,
    test_contract.test_prefill_in_chunks_equals_one_pass,
}
BIDIRECTIONAL = {test_contract.test_queries_may_be_the_last_of_more_keys}
STATES = {
    test_states.test_every_split_of_a_text_gives_what_one_pass_gives: {"split": "pieces"},
    test_states.test_rows_can_be_reordered_and_repeated: {},
    test_states.test_tokens_can_be_taken_back_where_the_past_is_recorded: {"lengths": test_states.LENGTHS},
    test_states.test_static_states_keep_their_shapes_and_addresses: {},
    test_states.test_gradients_go_through_a_state: {},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # as in test_contract
@every_case
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__.removeprefix("test_"))
def test_the_contract_holds(case, test):
    if test in (BIDIRECTIONAL if case.causal else CAUSAL):
        return
    test(case=case)


@every_state
@pytest.mark.parametrize("test", STATES, ids=lambda test: test.__name__.removeprefix("test_"))
def test_the_contract_of_states_holds(case, test):
    test(case=case, **STATES[test])


@every_case
def test_hidden_states_matter_and_get_a_gradient(case):
    given, other, module, mask = inputs(2, 9), inputs(2, 9, seed=5), case.module(), case.mask(2, 9, 9)
    given.hidden.requires_grad_()
    out = given.run(module, mask)
    (gradient,) = torch.autograd.grad(out.sum(), given.hidden)
    assert gradient.any()
    given.hidden = other.hidden
    assert not torch.allclose(out, given.run(module, mask))


@every_case
def test_what_is_no_hidden_state_of_these_queries_is_refused(case):
    given, module, mask = inputs(2, 9), case.module(), case.mask(2, 9, 9)
    call = {"mask": mask, "scale": SCALE}
    with pytest.raises(ValueError, match=rf"^{case.cls.name}\(.*\) needs the hidden states .*, got none$"):
        module(given.q, given.k, given.v, **call)
    wanted = rf"\(batch, queries, size\) = \(2, 9, {HIDDEN_SIZE}\), got "
    for hidden in (torch.zeros(2, 8, 12), torch.zeros(1, 9, 12), torch.zeros(2, 9, 11), torch.zeros(18, 12)):
        with pytest.raises(ValueError, match=wanted):
            module(given.q, given.k, given.v, hidden=hidden, **call)


@every_state
@torch.no_grad()
def test_tokens_that_wait_keep_their_hidden_states(case):
    """Taken back after a call, they come again with the next one, as keys, values and hidden states, also in a copy."""
    module, given, padding = case.module(), inputs(2, 12), left_padding([12, 7], 12)
    want = given.run(module, case.mask(2, 12, 12, padding_BK=padding))
    state = module.new_state()
    state.recording = True
    for low, high in ((0, 5), (5, 9)):
        mask = case.mask(2, high - low, high, padding_BK=padding[:, :high])
        given.tokens(slice(low, high)).run(module, mask, state=state)
    state.crop(2)
    assert state.num_pending == 2
    state = copy.deepcopy(state)
    state.apply(lambda tensor: tensor.flip(0))
    given, padding = given.rows([1, 0]), padding.flip(0)
    got = given.tokens(slice(7, 12)).run(module, case.mask(2, 5, 12, padding_BK=padding), state=state)
    torch.testing.assert_close(got, want.flip(0)[:, 7:], atol=EXACT, rtol=EXACT)


def test_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'pairs' needs a number of query heads that is a multiple of 2, got 3"):
        Pairs(Pairs.Config(), head_shape(num_heads=3, num_key_value_heads=3))
    given, case = inputs(1, 5, num_heads=3, num_key_value_heads=1), Case(Pairs, {}, True)
    with pytest.raises(ValueError, match="'pairs' needs a number of query heads that is a multiple of 2, got 3"):
        given.run(Pairs(Pairs.Config()), case.mask(1, 5, 5))
    shape = {"num_heads": 6, "num_key_value_heads": 2}
    assert inputs(1, 5, **shape).run(case.module(**shape), case.mask(1, 5, 5)).isfinite().all()


@pytest.mark.parametrize("name", ["gated_linear", "gated_delta", "kimi_delta", "delta", "native_sparse"])
def test_gates_of_hidden_states_need_their_size(name):
    cls = get_attention(name)
    config, heads = cls.Config(gate_input="hidden"), head_shape()
    assert cls(config, heads).wants_hidden
    assert not cls(cls.Config(), heads).wants_hidden
    unknown = dataclasses.replace(heads, hidden_size=None)
    assert cls(cls.Config(), unknown)
    with pytest.raises(ValueError, match=f"'{name}' has weights of the size of hidden states, which is not known here"):
        cls(config, unknown)
