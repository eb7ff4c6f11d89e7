"""Typed settings: YAML and overrides -> dataclasses, with errors that name the key, the value and what is allowed."""

import json
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from attn_plugins.config.shipped import found

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

    A path that begins with ``configs/`` and leads nowhere is that of a file of the package.

    Raises:
        ValueError: the file cannot be read, or is not YAML; the message is one line and names the file.
    """
    path = found(path)
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
