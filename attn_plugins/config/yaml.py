"""Typed settings: YAML and overrides -> dataclasses, with errors that name the key, the value and what is allowed."""

import dataclasses
import json
import math
import re
import sys
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from attn_plugins.core.registry import did_you_mean

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML without two traps of PyYAML: ``1e-4`` read as a string, and a repeated key that wins in silence."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


MERGE = "tag:yaml.org,2002:merge"

MOST_CHARACTERS, MOST_VALUES, MOST_DIGITS, DEEPEST = 200_000, 100_000, 400, 64
"""What YAML may hold: values are counted with every alias written out, and so is how deep they are nested."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    own: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = "<<" if key_node.tag == MERGE else loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise ValueError(f"a {type(key).__name__} is a key in line {line}; allowed: strings, numbers")
        if key in own or (key == "<<" and merged):
            raise ValueError(f"key {key!r} is given twice (second time in line {line})")
        value = loader.construct_object(value_node, deep=True)
        if key_node.tag != MERGE:
            own[key] = value
        else:
            sources = value if isinstance(value, list) else [value]
            if not all(isinstance(source, dict) for source in sources):
                raise ValueError(f"<< in line {line} merges {value!r}; allowed: a mapping, or a list of mappings")
            for source in reversed(sources):  # of several, the first that has a key counts
                merged |= source
    return {**merged, **own}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def parse_yaml(text: str) -> Any:
    """The value that a piece of YAML says, such as the right side of ``--set key=value``.

    Raises:
        ValueError: it is not YAML, or with its aliases written out too large, too deep or a ring; one line says which.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS:,} characters; settings are smaller")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError(f"nested too deeply; allowed: {DEEPEST} levels") from None
    except Exception as error:  # the constructors raise many kinds where a value is not what its tag says
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _count(node: yaml.Node, counted: dict[yaml.Node, tuple[int, int] | None], depth: int) -> tuple[int, int]:
    """How many values a node stands for and how many levels, with its aliases written out: they make much of little."""
    line = node.start_mark.line + 1
    found = counted.get(node, (0, 0))
    if found is None:
        raise ValueError(f"an alias leads back to where it stands (line {line})")
    if not found[0]:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits in line {line}; allowed: {MOST_DIGITS}")
        if depth > DEEPEST:
            raise ValueError(f"nested too deeply in line {line}; allowed: {DEEPEST} levels")
        counted[node] = None
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for child in inner for part in (child if isinstance(child, tuple) else (child,))]
        sizes = [_count(part, counted, depth + 1) for part in parts]
        levels = 1 + max((levels for _, levels in sizes), default=0) if isinstance(node, yaml.CollectionNode) else 0
        found = 1 + sum(size for size, _ in sizes), levels
        counted[node] = found
    if found[0] > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values in line {line}, aliases written out")
    if depth + found[1] > DEEPEST:
        raise ValueError(f"nested too deeply in line {line}; allowed: {DEEPEST} levels")
    return found


def read_yaml_file(path: str | Path, what: str = "") -> Any:
    """The value that a YAML file says; ``what`` stands before its name in messages.

    Raises:
        ValueError: the file cannot be read, or is not YAML; the message is one line and names the file.
    """
    path = Path(path).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            return parse_yaml(file.read(MOST_CHARACTERS + 1))
    except OSError as error:
        raise ValueError(f"cannot read {what}{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: the file is missing, is not YAML, or is not a mapping.
    """
    tree = read_yaml_file(path)
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; a mapping of settings is needed")
    return tree


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file cannot be read, is not JSON, or is not an object; the message is one line.
    """
    try:
        tree = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}; an object is needed")
    return tree


def override(tree: Mapping[str, Any], assignments: Iterable[str]) -> dict[str, Any]:
    """A copy of ``tree`` with each ``a.b=value`` set; the value is YAML, mappings on the way are made.

    A number on the way is an index into a list: ``attention.0.window_size=64``.

    Raises:
        ValueError: an assignment is not of that form, or its path runs through something that is not a mapping.
    """
    result = _copied(dict(tree))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys) or len(keys) > DEEPEST:
            raise ValueError(f"--set {assignment[:80]!r}; allowed: key=value or key.key=value")
        here: Any = result
        for depth, key in enumerate(keys[:-1]):
            here = _step(here, key, ".".join(keys[:depth]), assignment)
        try:
            value = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"--set {assignment!r}: {error}") from None
        if isinstance(here, list):
            _step(here, keys[-1], ".".join(keys[:-1]), assignment)
            here[int(keys[-1])] = value
        else:
            here[keys[-1]] = value
    return result


def _step(here: Any, key: str, path: str, assignment: str) -> Any:
    if isinstance(here, list):
        if not key.isdecimal() or int(key) >= len(here):
            raise ValueError(f"--set {assignment!r}: {path} is a list of {len(here)}; allowed: an index below that")
        return here[int(key)]
    if here.get(key) is None:
        here[key] = {}
    if not isinstance(here[key], (dict, list)):
        inner = f"{path}.{key}".lstrip(".")
        raise ValueError(f"--set {assignment!r}: {inner} is {here[key]!r}, which has no keys")
    return here[key]


def _copied(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree


def build(cls: type[T], tree: Any, where: str = "") -> T:
    """A dataclass from a mapping: unknown keys and wrong types are refused, nested dataclasses are built.

    Args:
        where: the path of ``tree`` in the settings, for messages.

    Raises:
        ValueError: names the key, what was got and what is allowed, with the nearest known key.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(tree, Mapping):
        raise ValueError(f"{where or 'settings'} is {tree!r}; a mapping is needed with keys of {cls.__name__}")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    check_keys(tree, fields, where)
    hints = typing.get_type_hints(cls)
    missing = [name for name, field in fields.items() if _required(field) and name not in tree]
    if missing:
        raise ValueError(
            f"{prefix}{missing[0]} is missing; needed: {', '.join(n for n in fields if _required(fields[n]))}"
        )
    values = {name: convert(value, hints[name], f"{prefix}{name}") for name, value in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from None


def check_keys(tree: Mapping[str, Any], allowed: Iterable[str], where: str) -> None:
    """Raise a ValueError for the first key of ``tree`` that is not allowed, with the nearest one that is."""
    allowed = list(allowed)
    for key in tree:
        if key not in allowed:
            place = f" in {where}" if where else ""
            raise ValueError(f"unknown key {key!r}{place}{did_you_mean(key, allowed)}; allowed: {', '.join(allowed)}")


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type: dataclasses are built, lists become tuples where asked, ints serve as floats."""
    matched, result = _convert(value, hint, where)
    if not matched:
        raise ValueError(f"{where}={value!r} is of type {type(value).__name__}; allowed: {spell(hint)}")
    return result


def _convert(value: Any, hint: Any, where: str) -> tuple[bool, Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True, value
    if origin in (typing.Union, types.UnionType):
        if isinstance(value, dict):
            for option in args:
                if dataclasses.is_dataclass(option):
                    return _convert(value, option, where)
        results = [_convert(value, option, where) for option in args if not dataclasses.is_dataclass(option)]
        return next((result for result in results if result[0]), (False, None))
    if origin is Literal:
        return value in args, value
    if dataclasses.is_dataclass(hint):
        return True, build(hint, value, where)  # type: ignore[arg-type]
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False, None
        return True, origin(convert(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            return False, None
        for key in value:
            convert(key, args[0], f"a key of {where}")
        return True, {key: convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if fits and (value != value or (abs(value) > sys.float_info.max and value not in (math.inf, -math.inf))):
            raise ValueError(f"{where}={value!r}; allowed: numbers that a float holds, not NaN")
        return fits, float(value) if fits else None
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if isinstance(hint, type):
        return isinstance(value, hint), value
    return True, value  # an annotation beyond these is the constructor's to check


def spell(hint: Any) -> str:
    """An annotation as a person would write it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(spell(option) for option in args)
    if origin is Literal:
        return ", ".join(repr(option) for option in args)
    if origin in (list, tuple):
        return f"list of {spell(args[0])}"
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint))


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
