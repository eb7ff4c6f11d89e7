"""How rules name layers and heads: "all", 3, -1, "0-15", "every:4", "every:4+3", or a list of these."""

import re
from typing import Any

from attn_plugins.core.options import shown

ALLOWED = '"all", 3, -1, "0-15", "every:4", "every:4+3", or a list of these'

_SPAN = r"(-?\d{1,10})(?:-(-?\d{1,10}))?"


def is_form(item: Any) -> bool:
    """Whether it names numbers in one of the forms, lists aside."""
    if isinstance(item, str):
        return item == "all" or bool(re.fullmatch(rf"{_SPAN}|every:[1-9]\d{{0,8}}(\+\d{{1,9}})?", item))
    return isinstance(item, int) and not isinstance(item, bool)


def check_numbers(value: Any, key: str, one: str, name: str) -> Any:
    """Numbers as a rule may name them: an int, a string or a list of these.

    Args:
        key: of the rule, for messages.
        one: what one of them is, for messages.
        name: of the rule, for messages.

    Raises:
        ValueError: another form, or none of them.
    """
    items = list(value) if isinstance(value, (list, tuple, range)) else [value]
    for item in items:
        if not is_form(item):
            raise ValueError(f"{name}: {key}={shown(value)}; allowed: {ALLOWED}")
    if not items:
        raise ValueError(f"{name}: {key}={shown(value)} names no {one}; allowed: {ALLOWED}")
    return value if isinstance(value, (int, str)) else items


def numbers_of(item: int | str, count: int) -> list[int] | None:
    """Numbers that ``item`` means among 0 to ``count`` - 1, or None if it leaves that range."""
    if item == "all":
        return list(range(count))
    if isinstance(item, str) and item.startswith("every:"):
        step, _, offset = item.removeprefix("every:").partition("+")
        return list(range(int(offset or 0), count, int(step))) or None
    if isinstance(item, int):
        bounds = [item]
    else:
        match = re.fullmatch(_SPAN, item)
        assert match is not None
        bounds = [int(bound) for bound in match.groups() if bound is not None]
    bounds = [n + count if n < 0 else n for n in bounds]
    if not all(0 <= n < count for n in bounds) or bounds[-1] < bounds[0]:
        return None
    return list(range(bounds[0], bounds[-1] + 1))
