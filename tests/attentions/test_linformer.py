"""Linformer: the formula, its start at averages, and the contract, at the lengths that it has weights for."""

import pytest
import test_capabilities
import test_contract
import test_dropping
import test_every_weight
import torch
from cases import SCALE, Case, assert_forms_agree, assert_same, inputs, left_padding

from attn_plugins.attentions.linformer import LinformerAttention
from attn_plugins.core.attention import HeadShape
from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import dense_attention


def linformer(**options):
    return Case(LinformerAttention, options, False)


SHORT = {"max_length": 40, "projected_length": 7}

CONTRACT = {
    test_contract.test_config_survives_json.of_case: {},
    test_contract.test_output_is_laid_out_as_transformers_expects.of_case: {},
    test_contract.test_values_may_differ_in_size_from_keys_or_are_refused: {},
    test_contract.test_gradients_equal_finite_differences: {},
    test_contract.test_left_padding_does_not_matter: {},
    test_contract.test_right_padding_does_not_matter: {},
    test_contract.test_rows_of_a_batch_do_not_matter_to_each_other: {},
    test_contract.test_effective_weights_give_the_output: {},
    test_contract.test_every_weight_gets_a_gradient.of_case: {},
    test_every_weight.test_every_weight_gets_a_gradient_whatever_the_length.of_case: {},
    test_contract.test_reset_parameters_initialises_everything.of_case: {},
    test_contract.test_state_dict_carries_everything.of_case: {},
    test_contract.test_rows_without_a_real_token_stay_finite: {},
    test_contract.test_large_scores_stay_finite: {},
    test_contract.test_dropout_is_drawn_from_the_global_generator: {},
    test_dropping.test_dropout_keeps_the_mean_or_is_left_out_with_a_warning: {"form": ["torch", "reference"]},
    test_contract.test_mixed_dtypes_of_autocast_are_taken: {},
    test_contract.test_a_compiled_model_gives_the_same: {},
    test_contract.test_fast_form_equals_reference_in_half_precision: {
        "length": [1, 40, 40],
        "dtype": [torch.bfloat16, torch.bfloat16, torch.float16],
        "tolerance": [1e-2, 1e-2, 2e-3],
    },
    test_contract.test_fast_form_equals_reference_in_float32: {"length": [1, 2, 7, 40]},
    test_capabilities.test_weights_refuse_heads_that_they_were_not_built_for: {},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("test", CONTRACT, ids=lambda test: test.__name__)
def test_keeps_the_contract(test, share_heads):
    case = linformer(**SHORT, share_heads=share_heads)
    if test is test_contract.test_gradients_equal_finite_differences:  # one weight after the other
        case = linformer(max_length=6, projected_length=4, share_heads=share_heads)
    if test is test_contract.test_a_compiled_model_gives_the_same:
        case = linformer(max_length=70, projected_length=9, share_heads=share_heads)
    if test is test_contract.test_every_weight_gets_a_gradient.of_case:
        case = linformer(max_length=150, projected_length=9, share_heads=share_heads)
    options = CONTRACT[test]
    for values in zip(*options.values(), strict=True) if options else [()]:
        test(case, **dict(zip(options, values, strict=True)))


@pytest.mark.parametrize("capability", test_capabilities.NEEDS)
def test_honours_what_it_declares(capability):
    extras, options, need = test_capabilities.NEEDS[capability]
    given, mask = inputs(2, 10), AttentionMask(2, 10, 10, **{"causal": False, **options})
    given.extras = extras
    if getattr(LinformerAttention, capability):
        assert given.run(linformer(**SHORT).module(), mask).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"this call needs {need}.*, which attention 'linformer' cannot honour"):
        given.run(linformer(**SHORT).module(), mask)


@pytest.mark.parametrize("share_heads", [False, True])
def test_equals_the_formula_token_by_token(share_heads):
    """Positions counted from the first real token, runs of 5 and 6 positions, one of them filled in part."""
    runs, given = [range(6), range(6, 11), range(11, 16)], inputs(1, 15)
    padding = left_padding([11], 15)
    padding[0, -2:] = False
    module = linformer(max_length=16, projected_length=3, share_heads=share_heads).module()
    got = given.run(module, AttentionMask(1, 15, 15, causal=False, padding_BK=padding))
    for h in range(4):
        mixed = []
        for weight, x in ((module.key_weight, given.k), (module.value_weight, given.v)):
            for run in runs[:2]:  # the third has no token
                total = 0
                for position in range(9):
                    entry = weight[0 if share_heads else h // 2, runs.index(run), position]
                    entry = entry + (1 / len(run) if position in run else 0)
                    total = total + entry * x[0, h // 2, 4 + position]
                mixed.append(total * len(run) / len([position for position in run if position < 9]))
        keys, values = torch.stack(mixed[:2]), torch.stack(mixed[2:])
        for i in range(4, 13):
            want = torch.softmax(keys @ given.q[0, h, i] * SCALE, dim=0) @ values
            torch.testing.assert_close(got[0, i, h], want)


def test_starts_from_averages_over_the_tokens_that_there_are():
    given, module = inputs(1, 10), linformer(max_length=24, projected_length=6).module()
    module.reset_parameters()
    k, v = (torch.stack([part.mean(dim=2) for part in x.split(4, dim=2)], dim=2) for x in (given.k, given.v))
    want, _ = dense_attention(given.q, k, v, torch.ones(1, 1, 10, 3, dtype=torch.bool), scale=SCALE)
    got = given.run(module, AttentionMask(1, 10, 10, causal=False))
    assert_same({"out": got.transpose(1, 2)}, {"out": want}, 1e-12)


def test_limit_case_is_softmax_attention():
    heads = HeadShape(num_heads=4, num_key_value_heads=2, head_dim=8, value_dim=8)
    module = LinformerAttention(LinformerAttention.Config(**LinformerAttention.limit), heads).double()
    given, mask = inputs(2, 50), AttentionMask(2, 50, 50, causal=False, padding_BK=left_padding([50, 33], 50))
    want, _ = dense_attention(given.q, given.k, given.v, mask.dense(), scale=SCALE)
    assert_same({"out": given.run(module, mask)}, {"out": want.transpose(1, 2)}, 1e-12)


@pytest.mark.parametrize("queries", [1, 9, 60])
def test_forms_agree_with_keys_of_another_sequence(queries):
    mask = AttentionMask(2, queries, 38, causal=False, cross=True, padding_BK=left_padding([38, 21], 38))
    assert_forms_agree(linformer(**SHORT), inputs(2, queries, 38), mask)


def test_one_row_of_padding_serves_every_row():
    given, module = inputs(2, 12), linformer(**SHORT).module()
    padding = left_padding([7], 12)
    one, two = (AttentionMask(2, 12, 12, causal=False, padding_BK=padding.expand(rows, -1)) for rows in (1, 2))
    for form in ("torch", "reference"):
        module.backend = form
        assert torch.equal(given.run(module, one), given.run(module, two))


def test_padding_beyond_the_longest_text_is_served_and_text_is_refused():
    given, module = inputs(2, 50), linformer(**SHORT).module()
    padding = left_padding([40, 13], 50)
    out = given.run(module, AttentionMask(2, 50, 50, causal=False, padding_BK=padding))
    alone = given.tokens(slice(10, 50)).run(module, AttentionMask(2, 40, 40, causal=False, padding_BK=padding[:, 10:]))
    real = padding[:, 10:, None, None]
    assert_same({"out": out[:, 10:] * real}, {"out": alone * real}, 1e-12)
    padding[1, 5] = True
    message = "weights for 40 positions, got a sequence of 45 tokens; allowed: up to max_length=40"
    with pytest.raises(ValueError, match=message):
        given.run(module, AttentionMask(2, 50, 50, causal=False, padding_BK=padding))
    with pytest.raises(ValueError, match="got a sequence of 50 tokens; allowed: up to max_length=40"):
        given.run(module, AttentionMask(2, 50, 50, causal=False))


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_of_length_squared_is_allocated(padded):
    given = inputs(1, 2048, num_heads=1, num_key_value_heads=1).to(torch.float32)
    module = linformer(max_length=2048, projected_length=64).module(1, 1, dtype=torch.float32)
    padding = left_padding([2000], 2048) if padded else None
    with test_contract.Largest() as largest:
        given.run(module, AttentionMask(1, 2048, 2048, causal=False, padding_BK=padding)).sum().backward()
    assert 0 < largest.elements <= 2048 * 64


def test_dropout_keeps_the_mean():
    given, module, mask = inputs(1, 20), linformer(**SHORT).module(), AttentionMask(1, 20, 20, causal=False)
    expected = given.run(module, mask).detach()
    for form in ("torch", "reference"):
        module.backend = form
        torch.manual_seed(0)
        mean = torch.stack([given.run(module, mask, dropout=0.3) for _ in range(400)]).mean(dim=0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0.1 * expected.abs().max().item())


def test_shared_heads_share_what_is_learned():
    assert linformer(**SHORT).module().key_weight.shape == (2, 7, 40)
    shared = linformer(**SHORT, share_heads=True).module()
    assert shared.key_weight.shape == shared.value_weight.shape == (1, 7, 40)
    given, mask = inputs(1, 20), AttentionMask(1, 20, 20, causal=False)
    apart = linformer(**SHORT).module()
    with torch.no_grad():
        apart.key_weight.copy_(shared.key_weight)
        apart.value_weight.copy_(shared.value_weight)
    assert_same({"out": given.run(shared, mask)}, {"out": given.run(apart, mask)}, 1e-12)


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="max_length=0; allowed: an integer from 1 on"):
        LinformerAttention.Config(max_length=0)
    for size in (0, 9):
        with pytest.raises(ValueError, match=f"projected_length={size}; allowed: an integer from 1 to max_length=8"):
            LinformerAttention.Config(max_length=8, projected_length=size)
    with pytest.raises(ValueError, match="needs the sizes of the heads, got None"):
        LinformerAttention(LinformerAttention.Config())
