"""Numbers in options and calls: what no tensor can hold is refused in one line, what can be large runs."""

import dataclasses
import re
import typing

import pytest
import torch
from cases import SCALE, Case, cases_together, every_case, every_class, inputs, rounds

from attn_plugins.core.assignment import assign
from attn_plugins.core.attention import AttentionConfig
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.options import LARGEST_INT, shown
from attn_plugins.core.rules import parse_rules


def options_of(cls, kind):
    for option, hint in typing.get_type_hints(cls.Config).items():
        if typing.get_origin(hint) is not typing.ClassVar and kind in (hint, *typing.get_args(hint)):
            yield option


@every_class()
@rounds("value", [10**30, -(10**30), 10**5000])
def test_huge_whole_numbers_are_refused(cls, value):
    for option in options_of(cls, int):
        given = (value, value) if option == "grid_size" else value
        with pytest.raises(ValueError, match=rf"^rule \('{cls.name}'\): {option}=.*; allowed: at most \d+$"):
            parse_rules({"type": cls.name, option: given})


@every_class()
@rounds("value", [float("nan"), float("inf"), -float("inf"), 1e300, -1e31, 1e-31])
def test_numbers_that_float32_cannot_compute_with_are_refused(cls, value):
    for option in options_of(cls, float):
        with pytest.raises(ValueError, match=re.escape(f"{option}={value}; allowed: 0, or a number of the size ")):
            parse_rules({"type": cls.name, option: value})


def outcome_of(case, given):
    """Output of a short text in float32, or None where the option is refused by its own range or sizes weights."""
    try:
        case.cls.Config(**case.options)
    except ValueError:
        return None
    with torch.device("meta"):
        weights = sum(held.numel() for held in case.module().state_dict().values())
    if weights > 10**5:
        return None
    return given.run(case.module(dtype=torch.float32), case.mask(2, 12, 12))


@cases_together()
def test_the_largest_sizes_run(case):
    given = inputs(2, 12).to(torch.float32)
    for option in options_of(case.cls, int):
        out = outcome_of(Case(case.cls, {**case.options, option: LARGEST_INT}, case.causal), given)
        assert out is None or out.isfinite().all(), option


@cases_together()
@rounds("value", [1e-30, 1e-7, 1e7, 1e30, -1e30])
def test_extreme_numbers_run_or_are_refused(case, value):
    given = inputs(2, 12).to(torch.float32)
    for option in options_of(case.cls, float):
        out = outcome_of(Case(case.cls, {**case.options, option: value}, case.causal), given)
        assert out is None or out.isfinite().all(), option


@every_case(options={})
@rounds(
    "number, value, allowed",
    [
        ("scale", -0.5, "a finite number above 0"),
        ("scale", 0.0, "a finite number above 0"),
        ("scale", float("nan"), "a finite number above 0"),
        ("scale", float("inf"), "a finite number above 0"),
        ("softcap", 0.0, "a finite number above 0"),
        ("softcap", float("nan"), "a finite number above 0"),
        ("dropout", -0.1, "a probability from 0 to below 1"),
        ("dropout", 1.0, "a probability from 0 to below 1"),
        ("dropout", float("nan"), "a probability from 0 to below 1"),
    ],
)
def test_numbers_of_a_call_are_checked(case, number, value, allowed):
    given, options = inputs(2, 5), {"scale": SCALE, number: value}
    if number == "softcap" and not case.cls.softcap:
        return
    with pytest.raises(ValueError, match=f"^{number}={value}; allowed: {allowed}$"):
        given.call(case.module(), AttentionMask(2, 5, 5, causal=case.causal), **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs(AttentionConfig):
    sides: tuple[float, float] = (1.0, 1.0)
    seed: int = dataclasses.field(default=0, metadata={"largest": 10**12})


def test_numbers_within_tuples_and_fields_of_their_own_limit():
    assert Pairs(seed=10**12).seed == 10**12
    with pytest.raises(ValueError, match=r"^seed=1000000000001; allowed: at most 1000000000000$"):
        Pairs(seed=10**12 + 1)
    with pytest.raises(ValueError, match=r"^sides=nan; allowed: 0, or a number of the size"):
        Pairs(sides=(1.0, float("nan")))


RULES = [
    ({1: 2, "window_size": 3}, r"rule has no 'type', only \[1, 'window_size'\]; it names the attention"),
    ({}, r"rule has no 'type', only \[\]"),
    ({"type": "local", 1: 2, "x": 3}, "has unknown option 1; options: window_size"),
    ({"type": "local", None: 2}, "has unknown option None; options"),
    ({"type": 10**5000}, "unknown attention <int with a number of thousands of digits>; known: "),
    ({"type": "local", "layers": "9" * 5000}, r"rule: layers='9{199}\.\.\.; allowed: \"all\""),
    ({"type": "local", "layers": f"every:{'9' * 5000}"}, "rule: layers='every:9+.*; allowed"),
    ({"type": "local", "layers": [10**5000, "x"]}, "rule: layers=<list with a number of .*; allowed"),
    ({"type": "local", "roles": 10**5000}, "rule: roles=<int with a number of .*; allowed: a name or a list"),
    ({"type": "local", "backend": 10**5000}, "rule: backend=<int with a number of .*; allowed: auto"),
    ({"type": "local", "window_size": [10**5000]}, "window_size=<tuple with .* is of type tuple; allowed: int"),
    (10**5000, "rule is <int with a number of thousands of digits> of type int; allowed: a name or a mapping"),
]


@pytest.mark.parametrize(("rule", "message"), RULES, ids=range(len(RULES)))
def test_rules_of_mixed_keys_and_thousands_of_digits_are_refused_in_one_line(rule, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_rules(rule)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_layer_of_thousands_of_digits_is_out_of_range():
    from attn_plugins.core.assignment import Target

    targets = [Target(path="layers.0.attn", role="decoder", stack="layers", layer=0)]
    with pytest.raises(ValueError, match="layers=<int with a number of thousands of digits> is out of range"):
        assign(parse_rules({"type": "local", "layers": 10**5000}), targets)


def test_long_values_are_cut():
    assert shown("x" * 1000) == "'" + "x" * 199 + "..."
    assert shown([1, "a"]) == "[1, 'a']"
