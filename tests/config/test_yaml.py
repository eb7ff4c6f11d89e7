"""YAML and overrides to dataclasses: what is accepted arrives typed, what is not is named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from attn_plugins.config.yaml import override, parse_yaml, read_yaml
from attn_plugins.core.options import build
from attn_plugins.training.models import read_adapter, read_attention


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float
    kind: Literal["fast", "slow"] = "fast"


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner
    other: Inner | None = None
    sizes: list[int] = field(default_factory=list)
    table: dict[str, list[int]] = field(default_factory=dict)
    source: str | list[str] = "here"
    steps: int = 1
    free: Any = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}; allowed: at least 1")


GOOD = {"name": "n", "inner": {"rate": 1}}


def test_nested_settings_arrive_typed():
    tree = {
        **GOOD,
        "other": {"rate": 0.5, "kind": "slow"},
        "sizes": [1, 2],
        "table": {"a": [3]},
        "source": ["x"],
        "free": {"a": 1},
    }
    made = build(Outer, tree)
    assert isinstance(made.inner.rate, float)
    assert build(Outer, {**GOOD, "other": None}).other is None
    assert made.other == Inner(rate=0.5, kind="slow")
    assert (made.sizes, made.table, made.source, made.free) == ([1, 2], {"a": [3]}, ["x"], {"a": 1})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 2}, r"unknown key 'stepz' \(did you mean steps\?\); allowed: name, inner"),
        (
            {"inner": {"rate": 1, "knd": "fast"}},
            r"unknown key 'knd' in inner \(did you mean kind\?\); allowed: rate, kind",
        ),
        ({"inner": {}}, r"inner.rate is missing; needed: rate"),
        ({"inner": {"rate": "much"}}, r"inner.rate='much' is of type str; allowed: float"),
        ({"inner": {"rate": 1, "kind": "quick"}}, r"inner.kind='quick'; allowed: 'fast', 'slow'"),
        ({"other": 3}, r"other=3 is of type int; allowed: Inner or null"),
        ({"inner": 3}, r"inner is 3; a mapping is needed with keys of Inner"),
        ({"sizes": [1, "two"]}, r"sizes\[1\]='two' is of type str; allowed: int"),
        ({"sizes": 3}, r"sizes=3 is of type int; allowed: list of int"),
        ({"table": {"a": 3}}, r"table.a=3 is of type int; allowed: list of int"),
        ({"table": {3: [1]}}, r"a key of table=3 is of type int; allowed: str"),
        ({"table": {None: [1]}}, r"a key of table=None is of type NoneType; allowed: str"),
        ({3: 1}, r"unknown key 3; allowed: name"),
        ({"inner": {"rate": float("nan")}}, "inner.rate=nan; allowed: numbers that a float holds, not NaN"),
        ({"inner": {"rate": 10**400}}, "inner.rate=1000.*; allowed: numbers that a float holds"),
        ({"steps": True}, r"steps=True is of type bool; allowed: int"),
        ({"steps": 0}, r"steps=0; allowed: at least 1"),
        ({"source": 3}, r"source=3 is of type int; allowed: str or list of str"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        build(Outer, {**GOOD, **change})


def test_yaml_reads_numbers_as_people_write_them():
    assert parse_yaml("[1e-4, 5E3, -2e+1, .5e1, 1.0, 7, 1e4x]") == [1e-4, 5e3, -20.0, 5.0, 1.0, 7, "1e4x"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{base: &b {x: 1, y: 2}, own: {<<: *b, y: 3}}", {"x": 1, "y": 3}),
        ("{base: &b {x: 1, y: 2}, own: {y: 3, <<: *b}}", {"x": 1, "y": 3}),
        ("{base: [&b {x: 1, y: 2}, &c {x: 9, z: 8}], own: {<<: [*b, *c], y: 3}}", {"x": 1, "z": 8, "y": 3}),
        ("{base: {a: &b {x: 1}, c: &c {<<: *b, y: 2}}, own: {<<: *c, x: 4}}", {"x": 4, "y": 2}),
        ("{base: &b {x: 1}, own: [*b, *b, {<<: *b}]}", [{"x": 1}] * 3),
        ("{own: {<<: {x: 1}}}", {"x": 1}),
        ("{own: {'<<': 1}}", {"<<": 1}),
    ],
)
def test_merge_keys_and_aliases(text, value):
    assert parse_yaml(text)["own"] == value


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 10)}]\n" for n in range(20)
)
CHAIN = "- &a0 x\n" + "".join(f"- &a{n + 1} [*a{n}]\n" for n in range(100))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", r"an alias leads back to where it stands \(line 1\)"),
        ("a: &a {b: {c: *a}}", "an alias leads back to where it stands"),
        ("a: &a {<<: *a}", "an alias leads back to where it stands"),
        (BOMB, "more than 100,000 values in line 5, aliases written out"),
        (CHAIN, "nested too deeply in line 64; allowed: 64 levels"),
        ("[" * 65 + "]" * 65, "nested too deeply in line 1; allowed: 64 levels"),
        ("[" * 50_000, "nested too deeply"),
        ("{a: " * 20_000, "nested too deeply"),
        ("x" * 200_001, "more than 200,000 characters"),
        ("[1, 2]: 3", "a list is a key in line 1; allowed: strings, numbers"),
        ("a: 1\n? {b: 1}\n: 2", "a dict is a key in line 2"),
        ("{a: {<<: 3}}", r"<< in line 1 merges 3; allowed: a mapping, or a list of mappings"),
        ("{a: {<<: [{x: 1}, 3]}}", "<< in line 1 merges"),
        ("{a: {<<: {x: 1}, <<: {y: 1}}}", "key '<<' is given twice"),
        ("9" * 5000, "a number of 5000 digits in line 1; allowed: 400"),
        ("0x" + "f" * 5000, "a number of 5002 digits"),
        ("!!int ''", "not valid YAML: "),
        ("!!bool x", "not valid YAML: "),
        ("!!timestamp x", "not valid YAML: "),
        ("2020-99-99", "not valid YAML: "),
        ("!!float x", "not valid YAML: "),
        ("!!python/object/apply:os.getcwd []", "not valid YAML: "),
        ("\x00", "not valid YAML: "),
    ],
    ids=lambda text: repr(text[:30]),
)
def test_hostile_yaml_is_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as refused:
        parse_yaml(text)
    assert "\n" not in str(refused.value)


def test_64_levels_are_read():
    assert parse_yaml("[" * 64 + "]" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: {c: 1, c: 2}\n", r"key 'c' is given twice \(second time in line 2\)"),
        ("a: [1\n", "not valid YAML: "),
        ("- 1\n", "holds a list; a mapping of settings is needed"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as refused:
        read_yaml(path)
    assert "settings.yaml" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"a: \xe9"])
def test_a_file_that_is_no_text_is_named(tmp_path, content):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings\.yaml: .*utf-8"):
        read_yaml(path)


def test_a_file_without_an_end_is_not_read_to_it():
    with pytest.raises(ValueError, match="/dev/zero: more than 200,000 characters"):
        read_yaml("/dev/zero")


def test_files_of_attentions_that_name_each_other_in_a_ring(tmp_path):
    one, two, three = (str(tmp_path / f"{name}.yaml") for name in ("one", "two", "three"))
    for path, content in ((one, two), (two, three), (three, "{type: local, window_size: 8}")):
        Path(path).write_text(content)
    assert read_attention(one) == {"type": "local", "window_size": 8}
    Path(three).write_text(one)
    with pytest.raises(
        ValueError, match=rf"{one}: files of attentions name each other in a ring: {one}, {two}, {three}, "
    ):
        read_attention(one)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "[" * 100_000, "adapter_config.json is not valid JSON: "),
        ("adapter_config.json", "[]", "adapter_config.json holds a list; an object is needed"),
        ("adapter_config.json", "{", "adapter_config.json is not valid JSON: "),
        ("adapter_config.json", "{}", "names no base model"),
        ("config.json", "7", "config.json holds a int; an object is needed"),
        ("config.json", '{"id2label": {"x": "y"}}', "id2label={'x': 'y'}; allowed: a name for each number from 0 on"),
        ("config.json", '{"id2label": ["x"]}', r"id2label=\['x'\]; allowed: a name for each number"),
    ],
)
def test_a_broken_adapter_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_adapter(str(tmp_path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read .*nothing\.yaml: No such file"):
        read_yaml(tmp_path / "nothing.yaml")


def test_overrides_reach_into_mappings_and_lists_and_leave_the_original():
    tree = {"a": {"b": 1}, "rules": [{"x": 1}, {"x": 2}], "none": None}
    changed = override(tree, ["a.b=1e-3", "a.c=[1, 2]", "rules.1.x=null", "none.d=yes", "new.deep.e=text=with=signs"])
    assert changed == {
        "a": {"b": 1e-3, "c": [1, 2]},
        "rules": [{"x": 1}, {"x": None}],
        "none": {"d": True},
        "new": {"deep": {"e": "text=with=signs"}},
    }
    assert tree == {"a": {"b": 1}, "rules": [{"x": 1}, {"x": 2}], "none": None}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("a", "--set 'a'; allowed: key=value"),
        ("a..b=1", "allowed: key=value"),
        ("a.b.c=1", "a.b is 1, which has no keys"),
        ("rules.5.x=1", "rules is a list of 1; allowed: an index below that"),
        ("rules.x=1", "rules is a list of 1"),
        (".".join(["a"] * 65) + "=1", r"--set 'a\.a\.a.*; allowed: key=value"),
        ("a.b=[1", r"--set 'a.b=\[1': not valid YAML"),
    ],
)
def test_a_bad_override_is_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        override({"a": {"b": 1}, "rules": [{}]}, [assignment])
