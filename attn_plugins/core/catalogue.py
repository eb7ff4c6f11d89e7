"""What attentions and tasks declare, read from their sources where that is enough: a list of them needs no torch."""

import ast
import functools
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

ENTRY_POINT_GROUP = "attn_plugins"
"""Of packages that bring attentions of their own."""
PACKAGE = Path(__file__).parent.parent
COMPUTED = object()
"""In place of a value that is no literal."""
FOREIGN = ("nn.Module", "abc.ABC")
"""Bases of others that declare nothing."""


def declared(attributes: Sequence[str]) -> list[dict[str, Any]]:
    """Class attributes of every attention that is installed, and its ``name``; sorted by name.

    They are read from the sources of this package. Where another package brings attentions, or a class computes one of
    the attributes, the registry imports all of them.
    """
    found = None if metadata.entry_points(group=ENTRY_POINT_GROUP) else from_sources(attributes)
    if found is None:
        from attn_plugins.core.registry import get_attention, list_attentions

        names = ("name", *attributes)
        found = [{one: getattr(get_attention(name), one) for one in names} for name in list_attentions()]
    return found


def from_sources(attributes: Sequence[str]) -> list[dict[str, Any]] | None:
    """The same of this package's own attentions without importing them; None where sources do not tell."""
    found = []
    for path in (PACKAGE / "attentions").glob("*.py"):
        for node, name in _registered(path):
            values: dict[str, Any] = {"name": name}
            for cls in _lineage(path, node.name):
                if cls is None:
                    return None
                values = _assigned(cls) | values
            if any(values.get(one, COMPUTED) is COMPUTED for one in attributes):
                return None
            found.append({one: values[one] for one in ("name", *attributes)})
    return sorted(found, key=lambda one: one["name"])


@functools.cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf8"))


def task_names(*, trained: bool = False) -> list[str]:
    """Names of all tasks, read from their sources; sorted.

    Args:
        trained: those that models are fine-tuned for alone, as ``finetune`` calls them.
    """
    found = []
    for path in (PACKAGE / "tasks").glob("*.py"):
        for node, name in _registered(path, "register_task"):
            values: dict[str, Any] = {}
            for cls in _lineage(path, node.name):
                values = ({} if cls is None else _assigned(cls)) | values
            if not trained:
                found.append(name)
            elif "pipeline_tag" in values:
                found.append(values.get("trained_as") or name)
    return sorted(found)


def _registered(path: Path, decorated: str = "register_attention") -> Iterator[tuple[ast.ClassDef, str]]:
    """The classes of a file that are registered, with their names there."""
    for node in _parsed(path).body:
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == decorated:
                yield node, ast.literal_eval(decorator.args[0])  # type: ignore[misc]


def _lineage(path: Path, name: str) -> Iterator[ast.ClassDef | None]:
    """The class that a file knows by a name, then its bases, through the imports of this package.

    None for one that is found nowhere.
    """
    for node in _parsed(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            yield node
            for base in map(ast.unparse, node.bases):
                if base not in FOREIGN:
                    yield from _lineage(path, base)
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("attn_plugins."):
            file = PACKAGE.joinpath(*(node.module or "").split(".")[1:]).with_suffix(".py")
            if file.is_file() and name in [alias.name for alias in node.names if alias.asname is None]:
                yield from _lineage(file, name)
                return
    yield None


@functools.cache
def _assigned(node: ast.ClassDef) -> dict[str, Any]:
    """Attributes that the body of a class sets, with their values where these are literals."""
    values: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                values |= _unpacked(target, statement.value)
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            values |= _unpacked(statement.target, statement.value)
        elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            values[statement.name] = COMPUTED
    return values


def _unpacked(target: ast.expr, value: ast.expr) -> dict[str, Any]:
    if not isinstance(target, ast.Tuple):
        try:
            return {ast.unparse(target): ast.literal_eval(value)}
        except ValueError:
            return {ast.unparse(target): COMPUTED}
    if not isinstance(value, ast.Tuple):
        return dict.fromkeys(map(ast.unparse, target.elts), COMPUTED)
    values: dict[str, Any] = {}
    for name, part in zip(target.elts, value.elts, strict=True):
        values |= _unpacked(name, part)
    return values
