"""Any flag at all: it is understood and survives JSON, or it is refused in one line and nothing has changed."""

import copy
import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from rounds import a_round, junk, one_clear_line, scalars

import attn_plugins as ap
from attn_plugins.core.backend import FORMS
from attn_plugins.core.rules import RULE_KEYS, parse_rules

pytestmark = pytest.mark.fuzz

NAMES = ap.list_attentions()
LAYERS = st.one_of(
    st.sampled_from(["all", 0, -1, 99, "0-1", "1-0", "every:2", "every:0", "every:2+1", [0, "1-2"], []]), junk
)
HEADS = st.one_of(
    st.sampled_from(["all", 0, -1, 99, "0-1", "every:2", [0, 1], [], {"0": [1]}, {"-1": 0, "1": "all"}, {"0": 9}, {}]),
    junk,
)
CHOICES = {
    "layers": LAYERS,
    "heads": HEADS,
    "kv_heads": HEADS,
    "roles": st.one_of(st.sampled_from(["decoder", "encoder", "cross", ["decoder", "encoder"]]), junk),
    "modules": st.one_of(st.sampled_from(["*", "layers.0.*", "nothing", ["*attn*"]]), junk),
    "backend": st.one_of(st.sampled_from(FORMS), junk),
}


@st.composite
def rules(draw, odd):
    """One rule: a real or nearly real name, values of its examples, of options of its own and, now and then, junk."""
    name = draw(st.sampled_from(NAMES))
    cls = ap.get_attention(name)
    rule = {"type": name}
    for option in cls.Config.__dataclass_fields__:
        known = [example[option] for example in cls.examples if option in example]
        values = [*map(st.just, known), *([scalars, junk] if odd else [st.integers(0, 12), st.booleans()])]
        if draw(st.booleans()):
            rule[option] = draw(st.one_of(values))
    for key, values in CHOICES.items():
        if draw(st.integers(0, 4)) == 0:
            rule[key] = draw(values)
    if odd and draw(st.integers(0, 9)) == 0:
        rule[draw(st.one_of(st.text(max_size=8), st.sampled_from(RULE_KEYS), st.integers(0, 3)))] = draw(junk)
    return rule


def flags(odd):
    one = rules(odd)
    listed = st.lists(st.one_of(one, st.sampled_from(NAMES)), min_size=1, max_size=4)
    return st.one_of(st.sampled_from([*NAMES, "locl"]), one, listed, *([junk] if odd else []))


@a_round
@given(flag=flags(odd=True))
def test_a_flag_is_understood_or_refused_in_one_line(flag):
    with one_clear_line([]):
        found = parse_rules(copy.deepcopy(flag))
        spelled = [rule.to_dict() for rule in found]
        assert parse_rules(json.loads(json.dumps(spelled, allow_nan=False))) == found


def held(model):
    return (
        str(ap.describe_attention(model)),
        model.config.to_dict(),
        {name: weight.clone() for name, weight in model.state_dict().items()},
        {path: type(module) for path, module in model.named_modules()},
    )


def assert_same(now, before):
    assert now[0] == before[0]
    assert now[1] == before[1]
    assert now[3] == before[3]
    assert now[2].keys() == before[2].keys()
    assert all(torch.equal(now[2][name], before[2][name]) for name in before[2])


@a_round
@given(name=st.sampled_from(["llama", "bert", "t5", "gemma3", "vit"]), first=flags(odd=False), second=flags(odd=False))
@torch.no_grad()
def test_a_swap_runs_or_changes_nothing_and_is_taken_back_whole(name, first, second):
    model, inputs = tiny.build(name), tiny.inputs(name)
    want, own = tiny.output(model, inputs), held(model)
    for flag in (first, second):
        before, refused = held(model), []
        with one_clear_line(refused):
            ap.swap_attention(model, copy.deepcopy(flag))
        if refused:
            assert_same(held(model), before)
            continue
        assert any(row.plugin for row in ap.describe_attention(model))
        with one_clear_line([]):  # some lengths and values show only in a call
            assert tiny.output(model, inputs).isfinite().all()
    ap.restore_attention(model)
    assert_same(held(model), own)
    assert torch.equal(tiny.output(model, inputs), want)
