"""A test that an attention fails says which class attribute to set, where it is one that the attention need not pass.

What an attention declares is what it is tested for. The attribute is the last line of the failure.
"""

import pytest

ASKED = {
    "test_future_tokens_do_not_matter_when_causal": "causal = False",
    "test_half_of_the_heads_is_attended_to_alone_alike_or_refused": "heads_alike = False",
    "test_what_it_declares_of_its_weights_leaves_it_the_heads_of_one_process": "head_weights = None",
    "test_packed_segments_do_not_leak": "segments = False",
    "test_packed_segments_do_not_leak_through_gradients": "segments = False",
    "test_cached_decoding_equals_one_pass": "causal = False, or wants_hidden_of_keys = True",
    "test_prefill_in_chunks_equals_one_pass": "causal = False, or wants_hidden_of_keys = True",
    "test_dropout_is_drawn_from_the_global_generator": "dropout = False",
    "test_dropout_keeps_the_mean_or_is_left_out_with_a_warning": "dropout = False (it is left out then)",
    "test_nothing_of_length_squared_is_allocated": "subquadratic = False",
    "test_what_padding_holds_reaches_nobody": "clean_padding = False",
    "test_honours_what_it_declares_and_refuses_the_rest": "{capability} = False",
    "test_extras_that_are_declared_equal_the_reference": "{extra} = False",
    "test_masks_beyond_plain_equal_the_reference": "any_mask = False",
    "test_cross_attention_equals_the_reference": "cross = False",
    "test_rows_of_weights_give_the_output": "linear_in_values = False",
    "test_rows_of_weights_give_the_output_of_cross_attention": "linear_in_values = False",
    "test_a_trace_of_texts_without_padding_serves_padding": "symbolic_length = False",
    "test_one_graph_without_a_break_serves_every_decode_step": "unwritten_keys = False",
}
"""Test -> what to set if the attention is meant to be as it is; a parameter of the test in braces."""

REFUSED = "heads_multiple_of (a number of heads), or any_length = False (it is tested at lengths of its own, then)"
"""What to set where an attention refuses the sizes of a call."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    outcome = yield
    if outcome.excinfo is None or not issubclass(outcome.excinfo[0], Exception):
        return
    name, error = getattr(item, "originalname", item.name), outcome.excinfo[1]
    refused = name.startswith("test_fast_form") and "ValueError" in f"{type(error).__name__}: {error}"
    asked = REFUSED if refused else ASKED.get(name)
    if asked is None:
        return
    asked = asked.format_map(getattr(getattr(item, "callspec", None), "params", {}))
    error.args = (f"{error}\nIf the attention is meant to do this, set in its class: {asked}",)
