"""Tables of attentions within pages that are otherwise written by hand: README.md and docs/generation.md.

Each stands between two comments, which name it and who writes it.
"""

import functools
from collections.abc import Callable, Mapping

from attn_plugins.core.attention import Attention, HeadShape


def families(attentions: list[type[Attention]]) -> list[str]:
    """The lines of a table: the attentions of each family."""
    by_family: dict[str, list[str]] = {}
    for attention in attentions:
        variants = f" ({attention.variants})" if attention.variants else ""
        by_family.setdefault(attention.family, []).append(f"`{attention.name}`{variants}")
    rows = [f"| {family.replace('_', ' ')} | {', '.join(names)} |" for family, names in sorted(by_family.items())]
    return ["| family | attentions |", "|---|---|", *rows]


def caches(attentions: list[type[Attention]]) -> list[str]:
    """The lines of a table: what a cache holds for each causal attention, and whether that has a limit."""
    by_kept: dict[tuple[bool, str], list[str]] = {}
    for attention in attentions:
        if attention.causal:
            by_kept.setdefault(_kept(attention), []).append(f"`{attention.name}`")
    rows = [
        f"| {', '.join(names)} | {kept} | {'yes' if stays else 'no'} |"
        for (stays, kept), names in sorted(by_kept.items(), key=lambda one: (not one[0][0], one[1]))
    ]
    return ["| attention | keeps of the text, for a key/value head | the size stays |", "|---|---|---|", *rows]


def _kept(attention: type[Attention]) -> tuple[bool, str]:
    pair = attention.heads_multiple_of
    heads = HeadShape(num_heads=pair, num_key_value_heads=1, head_dim=8, value_dim=8, hidden_size=8, layer=0)
    state = attention(attention.Config(), heads).new_state()
    return state is not None and not state.grows, attention.keeps + ("" if state else ", in an ordinary layer")


TABLES: Mapping[str, Callable[[list[type[Attention]]], list[str]]] = {"families": families, "caches": caches}
"""By the name in the comments around them."""


def with_tables(text: str, attentions: list[type[Attention]]) -> str:
    """A page with each of its tables written anew.

    Raises:
        ValueError: it has none, or one without its end.
    """
    found = False
    for name, table in TABLES.items():
        written = between_comments(text, name, functools.partial(table, attentions))
        found, text = (found, text) if written is None else (True, written)
    if not found:
        raise ValueError(f"the page has none of the tables {', '.join(TABLES)} between its comments")
    return text


def between_comments(text: str, name: str, lines: Callable[[], list[str]], by: str = "`make docs`") -> str | None:
    """A page with a table written anew; None where it has none of this name.

    Args:
        by: what writes it, as the comment before the table says.

    Raises:
        ValueError: it has one without its end.
    """
    begin, end = f"<!-- {name}: written by {by} -->\n", f"<!-- {name}: end -->\n"
    before, begun, rest = text.partition(begin)
    if not begun:
        return None
    _, ended, after = rest.partition(end)
    if not ended:
        raise ValueError(f"the table {name!r} has no end: {end.strip()}")
    return f"{before}{begin}{chr(10).join(lines())}\n{end}{after}"
