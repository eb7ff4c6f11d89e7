"""Which heads of which modules the rules of a flag serve, and what is refused."""

import json
import re

import pytest

from attn_plugins.core.assignment import Target, assign, by_own_paths, for_paths, served_by
from attn_plugins.core.rules import parse_rules


def target(layer, heads=9, groups=3, **changes):
    given = {"path": f"layers.{layer}.attn", "role": "decoder", "stack": "layers", "layer": layer}
    return Target(**(given | {"num_heads": heads, "num_key_value_heads": groups} | changes))


LAYERS = [target(layer) for layer in range(4)]


def shares(flag, targets=LAYERS):
    """layer -> (type, key/value heads) of each share."""
    found = assign(parse_rules(flag), targets)
    layers = {one.path: one.layer for one in targets}
    return {layers[path]: [(one.rule.type, one.kv_heads) for one in held] for path, held in found.items()}


LOCAL = {"type": "local", "window_size": 4}


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        ({"kv_heads": [0, 2]}, (0, 2)),
        ({"kv_heads": 1}, (1,)),
        ({"kv_heads": -1}, (2,)),
        ({"kv_heads": "0-1"}, (0, 1)),
        ({"kv_heads": "every:2"}, (0, 2)),
        ({"kv_heads": ["every:2+1", -3]}, (0, 1)),
        ({"kv_heads": "all"}, None),
        ({"heads": "3-5"}, (1,)),
        ({"heads": [8, 7, -3]}, (2,)),
        ({"heads": ["0-2", "-3--1"]}, (0, 2)),
        ({"heads": "all"}, None),
    ],
)
def test_heads_are_named_as_layers_are(heads, expected):
    assert shares({**LOCAL, "layers": [2], **heads}) == {2: [("local", expected)]}


def test_the_first_rule_that_names_a_group_serves_it():
    rules = [
        {"type": "softmax", "kv_heads": [1], "layers": "0-1"},
        {"type": "topk", "kv_heads": [1, 2], "layers": [1, 2]},
        LOCAL,
    ]
    assert shares(rules) == {
        0: [("softmax", (1,)), ("local", (0, 2))],
        1: [("softmax", (1,)), ("topk", (2,)), ("local", (0,))],
        2: [("topk", (1, 2)), ("local", (0,))],
        3: [("local", None)],
    }


def test_a_mapping_names_the_heads_of_each_layer():
    rules = [{"type": "softmax", "kv_heads": {"1": [1, 2], "-1": 0, "2-3": [2]}}, LOCAL]
    assert shares(rules) == {
        0: [("local", None)],
        1: [("softmax", (1, 2)), ("local", (0,))],
        2: [("softmax", (2,)), ("local", (0, 1))],
        3: [("softmax", (0, 2)), ("local", (1,))],
    }


@pytest.mark.parametrize(
    "flag",
    [
        {"type": "softmax", "kv_heads": {1: [1, 2], -1: 0}},
        {"type": "softmax", "heads": {"1": "0-2"}},
        {"type": "softmax", "heads": [0, "1-2"], "layers": [1]},
    ],
)
def test_rules_with_heads_survive_json(flag):
    rules = parse_rules(flag)
    again = parse_rules(json.loads(json.dumps([rule.to_dict() for rule in rules])))
    assert again == rules
    assert assign(again, LAYERS) == assign(rules, LAYERS)


def test_what_is_written_for_paths_serves_the_same():
    rules = parse_rules(
        [{"type": "softmax", "kv_heads": {"1": [1, 2], "2": [2], "3": "all"}, "modules": "*.attn"}, LOCAL]
    )
    found = assign(rules, LAYERS)
    written = [own for rule in rules for own in for_paths(rule, served_by(rule, found))]
    assert [rule.kv_heads for rule in written] == [[1, 2], [2], None, None]
    again = assign(written, LAYERS)
    strip = {path: sorted((one.rule.type, one.kv_heads or ()) for one in held) for path, held in found.items()}
    assert strip == {path: sorted((one.rule.type, one.kv_heads or ()) for one in held) for path, held in again.items()}
    assert by_own_paths(rules[0], served_by(rules[0], found)) == [rules[0]]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({**LOCAL, "kv_heads": [3]}, r"kv_heads=3 is out of range; layers.0.attn has key/value heads 0 to 2"),
        ({**LOCAL, "kv_heads": "every:4+3"}, r"kv_heads='every:4\+3' is out of range"),
        ({**LOCAL, "heads": [9]}, r"heads=9 is out of range; layers.0.attn has query heads 0 to 8"),
        (
            {**LOCAL, "heads": [0, 2]},
            r"heads=\[0, 2\] names a part of the query heads 0 to 2 that share key/value head 0 of layers.0.attn, "
            r"without 1; allowed: all of them, such as kv_heads=\[0\]",
        ),
        ({**LOCAL, "kv_heads": {"4": [0]}}, "a layer of kv_heads='4' is out of range; there are layers 0 to 3"),
        (
            [{"type": "softmax", "kv_heads": [0]}, {**LOCAL, "kv_heads": [0]}],
            r"rule 1 \('local'\) matches nothing: earlier rules take all of its heads \(layers.0.attn, ...\)",
        ),
        (
            [{"type": "softmax", "kv_heads": [0]}, LOCAL, {"type": "topk", "kv_heads": [1]}],
            r"rule 2 \('topk'\) matches nothing: earlier rules take all of its heads",
        ),
        ([LOCAL, {"type": "topk"}], "matches nothing: earlier rules take all of its modules"),
        ({**LOCAL, "kv_heads": [0], "heads": [0]}, r"rule has heads=\[0\] and kv_heads=\[0\]; allowed: one"),
        ({**LOCAL, "kv_heads": []}, r"rule: kv_heads=\[\] names no head; allowed: \"all\", 3"),
        ({**LOCAL, "kv_heads": "first"}, r"rule: kv_heads='first'; allowed: \"all\", 3, -1"),
        ({**LOCAL, "kv_heads": {}}, r"rule: kv_heads=\{\} names no layer"),
        ({**LOCAL, "kv_heads": {"seven": [1]}}, r"rule: kv_heads names layer 'seven'; allowed: \"all\", 3, -1"),
        ({**LOCAL, "kv_heads": {"1": []}}, r"rule: kv_heads=\[\] names no head"),
        ({**LOCAL, "kv_heads": {True: [1]}}, r"kv_heads names layer True"),
        ({**LOCAL, "kv_heads": {10**12: [1]}}, r"kv_heads names layer 1000000000000; allowed: \"all\", 3, -1"),
        ({**LOCAL, "kv_heads": {10**9: [1]}}, r"a layer of kv_heads='1000000000' is out of range"),
        ({**LOCAL, "kv_heads": {"1": [1]}, "layers": 1}, r"kv_heads=.* and layers=1 both name layers; allowed: one"),
        ({**LOCAL, "kv_head": [1]}, "unknown option 'kv_head'.*did you mean kv_heads"),
    ],
)
def test_what_cannot_be_is_one_clear_error(rules, message):
    with pytest.raises(ValueError, match=message):
        assign(parse_rules(rules), LAYERS)


def test_heads_that_cannot_be_counted_are_refused_only_where_a_rule_names_them():
    unknown = target(0, heads=None, groups=None)
    assert shares([LOCAL], [unknown]) == {0: [("local", None)]}
    message = "kv_heads=[0] cannot name heads of layers.0.attn, whose number attn_plugins cannot tell"
    with pytest.raises(ValueError, match=re.escape(message)):
        shares({**LOCAL, "kv_heads": [0]}, [unknown])


def test_what_a_saved_rule_finds_no_heads_for_is_passed_over():
    missing = {}
    rules = parse_rules([{"type": "softmax", "kv_heads": [0]}, {"type": "topk", "kv_heads": [0]}, LOCAL])
    assert len(assign(rules, LAYERS, missing=missing)) == 4
    assert list(missing) == [1]
