"""Any attention on any shape, mask and extra: its fast form equals the dense one, or both refuse the call."""

import copy

import pytest
import torch
from cases import EXACT, Inputs, assert_same, cotangent_for, head_shape, inputs, outcome, seeded
from hypothesis import assume, given
from hypothesis import strategies as st
from rounds import a_round, one_clear_line

import attn_plugins as ap
from attn_plugins.core.mask import AttentionMask

pytestmark = pytest.mark.fuzz


@st.composite
def attentions(draw):
    """An attention with options of its examples and small numbers for its integers."""
    cls = ap.get_attention(draw(st.sampled_from(ap.list_attentions())))
    options = {}
    for name, field in cls.Config.__dataclass_fields__.items():
        known = [example[name] for example in cls.examples if name in example]
        values = [*map(st.just, known), *([st.integers(0, 20)] if field.type in (int, "int") else [])]
        if values and draw(st.booleans()):
            options[name] = draw(st.one_of(values))
    try:
        config = cls.Config(**options)
    except ValueError:
        assume(False)
    return cls, config


def rule_of(kind, width):
    if kind == "window":
        return lambda b, h, q, k: (k <= q) & (k > q - width)
    return lambda b, h, q, k: (k <= q) | (k < width)  # a prefix that everyone sees


@st.composite
def calls(draw, cls):
    """(inputs, mask, shape) of one call that the attention says it can honour."""
    shared, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    shape = {"num_heads": groups * shared, "num_key_value_heads": groups}
    shape |= {"head_dim": 2 * draw(st.integers(1, 5)), "value_dim": 0}
    shape["value_dim"] = shape["head_dim"]
    batch, keys = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    kind = draw(st.sampled_from([name for name in ("causal", "bidirectional", "cross") if getattr(cls, name)]))
    queries = keys if kind == "bidirectional" else draw(st.integers(1, 70 if kind == "cross" else keys))
    called = {"causal": kind == "causal", "cross": kind == "cross"}
    if draw(st.booleans()):  # left, right, or with holes
        gap = draw(st.sampled_from(["left", "right", "holes"]))
        index = torch.arange(keys)
        cut = torch.tensor([draw(st.integers(0, keys)) for _ in range(batch)])[:, None]
        holes = torch.rand(batch, keys, generator=seeded(draw(st.integers(0, 99)))) < 0.7
        called["padding_BK"] = {"left": index >= cut, "right": index < cut, "holes": holes}[gap]
    if cls.segments and kind != "cross" and draw(st.booleans()):
        starts = torch.rand(batch, keys, generator=seeded(draw(st.integers(0, 99)))) < 0.1
        called["segments_BK"] = starts.long().cumsum(dim=1)
    elif cls.any_mask and kind == "causal" and draw(st.booleans()):
        pattern = draw(st.sampled_from(["window", "prefix"]))
        called |= {"plain": False, "rule": rule_of(pattern, draw(st.integers(1, 30)))}
        called["causal"] = pattern == "window"
    tensors = inputs(batch, queries, keys, **shape, seed=draw(st.integers(0, 99)))
    extras = {}
    if cls.position_bias and draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        extras["position_bias"] = torch.randn(
            rows, shape["num_heads"], queries, keys, generator=seeded(1), dtype=torch.float64
        )
    if cls.softcap and draw(st.booleans()):
        extras["softcap"] = 3.0
    if cls.sinks and draw(st.booleans()):
        extras["sinks"] = torch.randn(shape["num_heads"], generator=seeded(2), dtype=torch.float64)
    mask = AttentionMask(batch, queries, keys, **called)
    return Inputs(*tensors.of_tokens(), extras), mask, shape


@a_round
@given(chosen=attentions(), data=st.data())
def test_the_fast_form_equals_the_dense_one_or_both_refuse(chosen, data):
    cls, config = chosen
    tensors, mask, shape = data.draw(calls(cls))
    refused = []
    with one_clear_line(refused):
        module = cls(config, head_shape(**shape))
    assume(not refused)
    torch.manual_seed(1)
    module.reset_parameters()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
    module.double()
    oracle = copy.deepcopy(module)
    oracle.backend = "reference"
    cotangent, found = cotangent_for(tensors, mask), []
    for form in (module, oracle):
        with one_clear_line(refused):
            found.append(outcome(form, tensors, mask, cotangent))
    assert len(found) in (0, 2), f"only one form serves this call: {refused}"
    assume(found)
    real = cotangent.any(dim=-1, keepdim=True)
    for form in found:
        form["out"] = form["out"] * real
    assert_same(*found, EXACT)
