"""Options of attentions: their types, and numbers that tensors can hold, are checked here, in one place."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

LARGEST_INT = 2**31 - 1
"""Of sizes, so that the product of two fits into the integers of a tensor."""
LARGEST_SEED = 2**63 - 1
LARGEST_FLOAT, LEAST_FLOAT = 1e30, 1e-30
"""Of numbers, and of those that are not 0: float32 holds them, and what comes of them."""
LONGEST = 200
"""Characters of a value that a message shows."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Base of every attention's ``Config``: types are checked here, ranges in the subclass's ``__post_init__``.

    Whole numbers are limited to 2**31 - 1, or to the field's ``metadata={"largest": ...}``; others have to be 0 or of a
    size that float32 can compute with, 1e-30 to 1e30.

    Raises:
        ValueError: a value is not of the annotated type; the message names the option, the value and what is allowed.
    """

    _attn_implementation: ClassVar[str] = "attn_plugins"
    """What attention modules of transformers dispatch to, as configs tell code that walks modules named so."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            if not _fits(value, hint):
                kind = "" if typing.get_origin(hint) is Literal else f" is of type {type(value).__name__}"
                raise ValueError(f"{field.name}={shown(value)}{kind}; allowed: {_spell(hint)}")
            largest = field.metadata.get("largest", LARGEST_INT)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and number and not LEAST_FLOAT <= abs(number) <= LARGEST_FLOAT:
                    allowed = f"0, or a number of the size {LEAST_FLOAT:g} to {LARGEST_FLOAT:g}"
                    raise ValueError(f"{field.name}={number!r}; allowed: {allowed}")
                if isinstance(number, int) and abs(number) > largest:
                    raise ValueError(f"{field.name}={shown(number)}; allowed: at most {largest}")

    def require(self, condition: bool, option: str, allowed: str) -> None:
        """Raise a ValueError that names ``option``, its value and ``allowed`` unless ``condition`` holds."""
        if not condition:
            raise ValueError(f"{option}={shown(getattr(self, option))}; allowed: {allowed}")


def shown(value: Any) -> str:
    """A value for a message: ``repr``, cut where it is long, in words where Python refuses to print so many digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"<{type(value).__name__} with a number of thousands of digits>"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_fits(item, element) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _spell(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spell(option) for option in typing.get_args(hint))
    if origin is Literal:
        return ", ".join(repr(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return getattr(hint, "__name__", str(hint))
