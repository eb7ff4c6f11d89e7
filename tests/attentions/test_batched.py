"""The form for devices that are not a CPU, run on one: it equals ``reference`` whatever is declared and asked."""

import contextlib
import dataclasses

import pytest
import torch
from cases import (
    CASES,
    Inputs,
    assert_forms_agree,
    assert_same,
    every_case,
    inputs,
    left_padding,
    one_direction,
    outcome,
    rounds,
    seeded,
)
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_capabilities import RULES
from test_contract import assert_forms_agree_on_any_shape

from attn_plugins.ops import sizes

BATCHED = {"backend": "batched"}


@every_case(batched=True)
def test_equals_reference_in_float32(case):
    assert_forms_agree(case, inputs(2, 150), case.mask(2, 150, 150), dtype=torch.float32, tolerance=2e-5, **BATCHED)


@every_case(batched=True, options={})
def test_equals_reference_beyond_the_default_sizes(case):
    given = inputs(1, 331, num_heads=2, num_key_value_heads=1)
    mask = case.mask(1, 331, 331, padding_BK=left_padding([320], 331))
    shape = {"num_heads": 2, "num_key_value_heads": 1}
    assert_forms_agree(case, given, mask, dtype=torch.float32, tolerance=2e-5, **shape, **BATCHED)


@every_case(batched=True)
@rounds("size, padded", [(1, True), (900, False)])
def test_pieces_of_any_size_equal_reference(case, size, padded, monkeypatch):
    """What is beyond one piece is done in several; the smallest is one query, tile or chunk."""
    monkeypatch.setattr(sizes, "SCORES_AT_ONCE_ELSEWHERE", size)
    padding = left_padding([37, 25], 37) if padded else None
    assert_forms_agree(case, inputs(2, 37), case.mask(2, 37, 37, padding_BK=padding), **BATCHED)


@every_case(batched=True)
@rounds("length, dtype, tolerance", [(1, torch.bfloat16, 1e-2), (65, torch.bfloat16, 1e-2), (65, torch.float16, 2e-3)])
def test_equals_reference_in_half_precision(case, length, dtype, tolerance):
    given = inputs(2, length).to(dtype).to(torch.float64)
    mask = case.mask(2, length, length, padding_BK=left_padding([length, length // 2 + 1], length))
    assert_forms_agree(case, given, mask, dtype=dtype, tolerance=tolerance, **BATCHED)


@every_case(batched=True)
@settings(max_examples=8, deadline=None, derandomize=True)
@drawn(data=st.data())
def test_equals_reference_for_any_shape(case, data):
    """Left padding, rows without a real token, packed segments, fewer queries than keys, heads that share keys."""
    assert_forms_agree_on_any_shape(case, data, **BATCHED)


@every_case(batched=True)
def test_equals_reference_with_right_padding(case):
    given = inputs(2, 37)
    mask = case.mask(2, 37, 37, padding_BK=left_padding([37, 19], 37).flip(1))
    assert_forms_agree(case, given, mask, **BATCHED)


@every_case(batched=True, segments=True)
@rounds(
    "lengths, padded",
    [([9, 20, 8], False), ([9, 20, 8], True), ([37], True), ([1, 1, 35], False), ([12, 12, 13], True)],
)
def test_equals_reference_for_packed_rows(case, lengths, padded):
    """The rows are cut at places of their own; the last segment of one of them is padding."""
    own = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)])
    segments = torch.stack([own, own.flip(0).neg()])
    padding = left_padding([37, 30], 37).flip(1) if padded else None
    mask = case.mask(2, 37, 37, segments_BK=segments, padding_BK=padding)
    assert_forms_agree(case, inputs(2, 37), mask, **BATCHED)


@pytest.mark.parametrize(
    ("case", "extra"),
    [
        pytest.param(case, extra, id=f"{case} {extra}")
        for case in CASES
        for extra in ("position_bias", "softcap", "sinks")
        if case.batched and getattr(case.cls, extra)
    ],
)
def test_extras_that_are_declared_equal_the_reference(case, extra):
    generator = seeded(2)
    fewer = case.causal and not case.module().wants_hidden_of_keys
    for queries, rows in ((20, 1), (3, 1), (20, 2)) if fewer else ((20, 1), (20, 2)):
        given = inputs(2, queries, 20)
        bias = torch.randn(rows, 4 if rows == 2 else 1, queries, 20, generator=generator, dtype=torch.float64)
        given.extras = {
            "position_bias": {"position_bias": bias},
            "softcap": {"softcap": 0.5},
            "sinks": {"sinks": torch.randn(4, generator=generator, dtype=torch.float64)},
        }[extra]
        mask = case.mask(2, queries, 20, padding_BK=left_padding([20, 13], 20))
        assert_forms_agree(case, given, mask, **BATCHED)


@every_case(batched=True, any_mask=True)
@rounds("rule", RULES)
@rounds("queries", [26, 4])
def test_masks_beyond_plain_equal_the_reference(case, rule, queries):
    causal, rule = RULES[rule]
    if causal != case.causal or (queries < 26 and case.module().wants_hidden_of_keys):
        return
    mask = case.mask(2, queries, 26, plain=False, rule=rule, padding_BK=left_padding([26, 17], 26))
    assert_forms_agree(case, inputs(2, queries, 26), mask, **BATCHED)


@every_case(batched=True, dropout=True)
def test_dropout_is_drawn_anew_and_seen_by_gradients(case):
    """The same seed gives the same, another one another; a gradient equals the finite difference under one seed."""
    given, mask, module = inputs(1, 30), case.mask(1, 30, 30), case.module(**BATCHED)

    def run(seed, v):
        torch.manual_seed(seed)
        return dataclasses.replace(given, v=v).run(module, mask, dropout=0.4)

    v = given.v.clone().requires_grad_()
    out = run(0, v)
    assert torch.equal(out, run(0, v))
    assert not torch.allclose(out, run(1, v))
    along = torch.randn(v.shape, generator=seeded(3), dtype=v.dtype)
    (gradient,) = torch.autograd.grad(out.square().sum(), v)
    with torch.no_grad():
        high, low = (run(0, v + sign * 1e-5 * along).square().sum() for sign in (1, -1))
    torch.testing.assert_close((gradient * along).sum(), (high - low) / 2e-5, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        kept = given.rows([0] * 100).run(module, case.mask(100, 30, 30), dropout=0.4).mean(0)
        plain = given.run(module, mask)[0]
    assert (kept - plain).abs().mean() < 0.15 * plain.abs().mean() + 0.02, (
        "what is kept does not make up for what is dropped"
    )


@every_case(batched=True)
def test_rows_without_a_real_token_stay_finite(case):
    mask = case.mask(2, 12, 12, padding_BK=left_padding([12, 0], 12))
    given = inputs(2, 12)
    got = outcome(case.module(**BATCHED), given, mask, torch.ones(2, 12, 4, 8, dtype=torch.float64))
    assert all(x is None or x.isfinite().all() for x in got.values())


not_a_leaf = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
"""Dynamo looks at all inputs."""


def assert_compiles(case, backend):
    """torch.compile takes all of it, forward and backward, and gives the same."""
    given, module = inputs(2, 40).to(torch.float32), case.module(**BATCHED, dtype=torch.float32)
    cotangent = torch.randn(2, 40, 4, 8, generator=seeded(5))
    mask = case.mask(2, 40, 40, padding_BK=left_padding([40, 31], 40))
    want = outcome(module, given, mask, cotangent)
    module.compile(backend=backend, fullgraph=True)
    assert_same(outcome(module, given, mask, cotangent), want, 1e-4)


@every_case(options={})
def test_a_device_without_values_is_enough(case, monkeypatch):
    """What auto takes on a device that is not a CPU reads no value on the host, of tables of the mask neither.

    The device "meta" has none. It has no autocast either, which forms of linear cost switch off."""
    autocast = torch.autocast
    without = {"meta": lambda: contextlib.nullcontext()}
    monkeypatch.setattr(torch, "autocast", lambda type, **how: without.get(type, lambda: autocast(type, **how))())
    module, length = case.module(backend="auto", dtype=torch.float32).to("meta"), 200
    padding, segments = torch.ones(2, length, dtype=torch.bool), torch.zeros(2, length, dtype=torch.long)
    for tables in ({}, {"padding_BK": padding}, {"segments_BK": segments} if case.cls.segments else {}):
        mask = case.mask(2, length, length, **{name: x.to("meta") for name, x in tables.items()}, device="meta")
        leaves = [x.detach().float().to("meta").requires_grad_() for x in inputs(2, length).of_tokens()]
        out = Inputs(*leaves).run(module, mask)
        assert out.is_meta
        out.sum().backward()


@not_a_leaf
@one_direction(batched=True, options={}, causal=True)
def test_is_part_of_a_graph(case):
    assert_compiles(case, "aot_eager")


@pytest.mark.slow
@not_a_leaf
@every_case(batched=True)
def test_is_part_of_a_graph_whatever_its_options(case):
    assert_compiles(case, "aot_eager")


@pytest.mark.slow
@not_a_leaf
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's imports
@every_case(batched=True, options={})
def test_is_compiled_by_inductor(case):
    assert_compiles(case, "inductor")


class Masked(torch.nn.Module):
    """An attention that makes its mask of padding that it is given, as a model does."""

    def __init__(self, case):
        super().__init__()
        self.case, self.slot = case, case.module(**BATCHED, dtype=torch.float32)

    def forward(self, q, k, v, hidden, padding_BK):
        mask = self.case.mask(2, 40, 40, padding_BK=padding_BK, device="cpu")
        return Inputs(q, k, v, hidden).run(self.slot, mask)


@pytest.mark.slow
@every_case(batched=True, options={})
def test_is_exported(case):
    """Nothing of the values that the graph was recorded with stays in it."""
    model = Masked(case)
    first, second = (inputs(2, 40, seed=seed).to(torch.float32).of_tokens() for seed in (0, 1))
    paddings = left_padding([40, 31], 40), left_padding([17, 40], 40)
    graph = torch.export.export(model, (*first, paddings[0]), strict=False).module()
    got, want = (run(*second, paddings[1]) * paddings[1][:, :, None, None] for run in (graph, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
