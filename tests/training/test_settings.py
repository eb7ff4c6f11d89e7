"""YAML and overrides to dataclasses: what is accepted arrives typed, what is not is named."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from attn_plugins.settings import build, override, parse_yaml, read_yaml


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
        ({"inner": {"rate": 1, "kind": "quick"}}, r"inner.kind='quick' is of type str; allowed: 'fast', 'slow'"),
        ({"other": 3}, r"other=3 is of type int; allowed: Inner or null"),
        ({"inner": 3}, r"inner is 3; a mapping is needed with keys of Inner"),
        ({"sizes": [1, "two"]}, r"sizes\[1\]='two' is of type str; allowed: int"),
        ({"sizes": 3}, r"sizes=3 is of type int; allowed: list of int"),
        ({"table": {"a": 3}}, r"table.a=3 is of type int; allowed: list of int"),
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
        ("a.b=[1", r"--set 'a.b=\[1': not valid YAML"),
    ],
)
def test_a_bad_override_is_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        override({"a": {"b": 1}, "rules": [{}]}, [assignment])
