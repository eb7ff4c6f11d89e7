"""What an attention declares to honour it honours exactly, and it refuses the rest."""

import pytest
import torch
from cases import CASES, assert_forms_agree, every_case, every_class, inputs, left_padding, rounds, seeded

from attn_plugins.core.attention import Attention
from attn_plugins.core.capabilities import CAPABILITIES
from attn_plugins.core.mask import AttentionMask

NEEDS = {
    "causal": ({}, {"causal": True}, "causal attention"),
    "bidirectional": ({}, {"causal": False}, "bidirectional attention"),
    "cross": ({}, {"causal": False, "cross": True}, "keys of another sequence"),
    "any_mask": ({}, {"causal": True, "plain": False, "rule": lambda b, h, q, k: k <= q}, "a mask beyond causal"),
    "segments": ({}, {"segments_BK": torch.arange(10).expand(2, -1) // 4}, "packed sequences"),
    "position_bias": ({"position_bias": torch.zeros(1, 4, 10, 10, dtype=torch.float64)}, {}, "a position bias"),
    "softcap": ({"softcap": 5.0}, {}, "a softcap"),
    "sinks": ({"sinks": torch.zeros(4, dtype=torch.float64)}, {}, "learned sink logits"),
}


def test_all_capabilities_are_asked_for():
    """Dropout, the one that is left out instead of refused, has a test of its own in the contract."""
    assert [*NEEDS, "dropout"] == list(CAPABILITIES)


@every_class()
@rounds("capability", NEEDS)
def test_honours_what_it_declares_and_refuses_the_rest(cls, capability):
    extras, options, need = NEEDS[capability]
    case = next(case for case in CASES if case.cls is cls)
    mask = AttentionMask(2, 10, 10, **{"causal": case.causal, **options})
    given = inputs(2, 10)
    given.extras = extras
    if getattr(cls, capability):
        assert given.run(case.module(), mask).isfinite().all()
        return
    message = f"this call needs {need}.*, which attention '{cls.name}' cannot honour; it can honour: "
    with pytest.raises(ValueError, match=message):
        given.run(case.module(), mask)


class CausalOnly(Attention):
    """An attention that can do the least."""

    name = "causal_only"
    causal = True

    def attend(self, q, k, v, **options):
        return q


@pytest.mark.parametrize("capability", [capability for capability in NEEDS if capability != "causal"])
def test_every_need_is_refused_where_it_is_not_declared(capability):
    extras, options, need = NEEDS[capability]
    given = inputs(2, 10)
    given.run(CausalOnly(CausalOnly.Config()), AttentionMask(2, 10, 10, causal=True))
    given.extras = extras
    message = f"this call needs {need}.*, which attention 'causal_only' cannot honour; it can honour: causal$"
    with pytest.raises(ValueError, match=message):
        given.run(CausalOnly(CausalOnly.Config()), AttentionMask(2, 10, 10, **{"causal": True, **options}))


@every_case(options={})
def test_weights_refuse_heads_that_they_were_not_built_for(case):
    module, mask = case.module(), case.mask(2, 10, 10)
    if not list(module.parameters()):
        return
    with pytest.raises(ValueError, match=r"was built for .* = \(4, 2, 8\), got \(6, 2, 8\)"):
        inputs(2, 10, num_heads=6).run(module, mask)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        pytest.param(case, extra, id=f"{case} {extra}")
        for case in CASES
        for extra in ("position_bias", "softcap", "sinks")
        if getattr(case.cls, extra)
    ],
)
def test_extras_that_are_declared_equal_the_reference(case, extra):
    generator = seeded(2)
    fewer = case.causal and not case.module().wants_hidden_of_keys
    for queries in (20, 3) if fewer else (20,):
        given = inputs(2, queries, 20)
        given.extras = {
            "position_bias": {
                "position_bias": torch.randn(1, 4, queries, 20, generator=generator, dtype=torch.float64)
            },
            "softcap": {"softcap": 0.5},
            "sinks": {"sinks": torch.randn(4, generator=generator, dtype=torch.float64)},
        }[extra]
        mask = case.mask(2, queries, 20, padding_BK=left_padding([20, 13], 20))
        assert_forms_agree(case, given, mask)
        if not case.options:  # a window of 1 is deaf to a softcap, the defaults are not
            plain = inputs(2, queries, 20).run(case.module(), mask)
            assert not torch.allclose(given.run(case.module(), mask), plain), "it has no effect"


RULES = {
    "sliding": (True, lambda b, h, q, k: (k <= q) & (k > q - 6)),
    "prefix": (False, lambda b, h, q, k: (k <= q) | (k < 9)),
    "of the row": (True, lambda b, h, q, k: (k <= q) & (k % 3 != b)),
}


@every_case(any_mask=True)
@rounds("rule", RULES)
@rounds("queries", [26, 4])
def test_masks_beyond_plain_equal_the_reference(case, rule, queries):
    causal, rule = RULES[rule]
    if causal != case.causal or (queries < 26 and case.module().wants_hidden_of_keys):
        return
    shape = {"plain": False, "causal": causal, "padding_BK": left_padding([26, 17], 26)}
    lazy = AttentionMask(2, queries, 26, rule=rule, **shape)
    assert_forms_agree(case, inputs(2, queries, 26), lazy)
    dense = AttentionMask(2, queries, 26, dense_BQK=lazy.dense()[:, 0], **shape)
    assert_forms_agree(case, inputs(2, queries, 26), dense)


@every_case(cross=True, causal=False)
@rounds("queries, keys", [(9, 14), (14, 9), (1, 5), (70, 130)])
def test_cross_attention_equals_the_reference(case, queries, keys):
    mask = case.mask(2, queries, keys, cross=True, padding_BK=left_padding([keys, keys - 3], keys))
    assert_forms_agree(case, inputs(2, queries, keys), mask)
