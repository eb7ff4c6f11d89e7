"""Options: dataclasses whose annotations are checked, with errors that name the option, its value and its type."""

import ast
import dataclasses
import difflib
import inspect
import math
import sys
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

T = TypeVar("T")

LARGEST_INT = 2**31 - 1
"""Of sizes, so that the product of two fits into the integers of a tensor."""
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT, LEAST_FLOAT = 1e30, 1e-30
"""Of numbers, and of those that are not 0: float32 holds them, and what comes of them."""
LONGEST = 200
"""Characters of a value that a message shows."""


def require(options: Any, condition: bool, option: str, allowed: str) -> None:
    """Raise a ValueError that names ``option``, its value and ``allowed`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{option}={shown(getattr(options, option))}; allowed: {allowed}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Base of every attention's ``Config``: types are checked here, ranges in the subclass's ``__post_init__``.

    Whole numbers are limited to 2**31 - 1, or to the field's ``metadata={"largest": ...}``; others have to be 0 or of a
    size that float32 can compute with, 1e-30 to 1e30.

    A field's metadata may hold ``"settled"``, a function of a module's ``HeadShape.prefix_tokens`` that says what None
    stands for there unless the model's own attention has that option, and ``"before"``, what rules meant that were
    saved when there was no such option.

    Raises:
        ValueError: a value is not of the annotated type; the message names the option, the value and what is allowed.
    """

    _attn_implementation: ClassVar[str] = "attn_plugins"
    """What attention modules of transformers dispatch to, as configs tell code that walks modules named so."""
    since: ClassVar[Mapping[str, str]] = {}
    """Options without which a saved rule, complete but for them, meant another attention, and what to do with it."""

    require = require

    def settled(self, prefix_tokens: int | None, own: Mapping[str, Any] | None = None) -> "AttentionConfig":
        """The same, with what None stands for in a module.

        Args:
            prefix_tokens: as in ``HeadShape``.
            own: options of the module's own attention, where it is one with the same options.
        """
        asked = {field.name: field.metadata.get("settled") for field in dataclasses.fields(self)}
        found = {
            name: own[name] if own and name in own else of(prefix_tokens)
            for name, of in asked.items()
            if of is not None and getattr(self, name) is None
        }
        return dataclasses.replace(self, **found) if found else self

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if isinstance(number, float) and number and not LEAST_FLOAT <= abs(number) <= LARGEST_FLOAT:
                    allowed = f"0, or a number of the size {LEAST_FLOAT:g} to {LARGEST_FLOAT:g}"
                    raise ValueError(f"{field.name}={number!r}; allowed: {allowed}")
            if convert(value, hint, field.name) != value:  # a list, which a frozen dataclass shall not hold
                raise ValueError(mismatch(value, hint, field.name))
            largest = field.metadata.get("largest", LARGEST_INT)
            for number in numbers:
                if isinstance(number, int) and abs(number) > largest:
                    raise ValueError(f"{field.name}={shown(number)}; allowed: at most {largest}")


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
        raise ValueError(mismatch(value, hint, where))
    return result


def mismatch(value: Any, hint: Any, where: str) -> str:
    """The message that ``value`` is not of the annotated type."""
    kind = "" if typing.get_origin(hint) is Literal else f" is of type {type(value).__name__}"
    return f"{where}={shown(value)}{kind}; allowed: {spell(hint)}"


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


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known name, or '' where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5) if isinstance(got, str) else []
    return f" (did you mean {near[0]}?)" if near else ""


def shown(value: Any) -> str:
    """A value for a message: ``repr``, cut where it is long, in words where Python refuses to print so many digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"<{type(value).__name__} with a number of thousands of digits>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option, as a ``Config`` declares it."""

    name: str
    type: str
    """As annotated, such as ``int | None``."""
    default: str
    """As Python writes it; empty where the option is required."""
    doc: str
    """The docstring under the field."""


def describe_options(config: type) -> list[Option]:
    """The options of a ``Config`` with their types, defaults and docstrings, in the order of the fields."""
    found = []
    written = _written_fields(config)
    for field in dataclasses.fields(config):
        annotation, doc = written[field.name]
        default = "" if field.default is dataclasses.MISSING else repr(field.default)
        if field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        found.append(Option(name=field.name, type=annotation, default=default, doc=doc))
    return found


def _written_fields(config: type) -> dict[str, tuple[str, str]]:
    """field -> (annotation, docstring) from the source, since Python keeps no docstrings of fields."""
    written: dict[str, tuple[str, str]] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, following in zip(tree.body, [*tree.body[1:], None], strict=True):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            doc = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                doc = " ".join(str(following.value.value).split())
            written[statement.target.id] = (ast.unparse(statement.annotation), doc)
    return written
