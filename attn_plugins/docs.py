"""docs/attentions.md, written from the classes in the registry.

python -m attn_plugins.docs FILE        writes the page
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from attn_plugins.attention import CAPABILITIES, Attention, capabilities
from attn_plugins.registry import get_attention, list_attentions

OWN = "attn_plugins.attentions."
"""Where the package's own attentions live: an installed plug-in has its own documentation."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of an attention, as its ``Config`` declares it."""

    name: str
    type: str
    """As annotated, such as ``int | None``."""
    default: str
    """As Python writes it; empty where the option is required."""
    doc: str
    """The docstring under the field."""


def options(attention: type[Attention]) -> list[Option]:
    """The options of an attention with their types, defaults and docstrings, in the order of the fields."""
    found = []
    written = _written_fields(attention.Config)
    for field in dataclasses.fields(attention.Config):
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


def page() -> str:
    """The text of docs/attentions.md."""
    attentions = [get_attention(name) for name in list_attentions()]
    own = sorted((a for a in attentions if a.__module__.startswith(OWN)), key=lambda a: (a.family, a.name))
    lines = [
        "# Attentions",
        "",
        "Written by `make docs` from the classes in the registry: change a docstring there, not this file.",
        "",
        "| name | family | cost of a head | " + " | ".join(name.replace("_", " ") for name in CAPABILITIES) + " |",
        "|---" * (3 + len(CAPABILITIES)) + "|",
    ]
    for attention in own:
        honoured = ["yes" if name in capabilities(attention) else "" for name in CAPABILITIES]
        first = f"[{attention.name}](#{attention.name})"
        lines.append(f"| {first} | {attention.family} | {attention.cost} | " + " | ".join(honoured) + " |")
    lines += [
        "",
        "A column says what an attention can honour. What it cannot, it refuses with an error and never drops. N is",
        "the length, D the size of a head. `any mask` means masks beyond causal, padding and packed segments: a",
        "model's own sliding window, prefixes, image blocks.",
    ]
    for attention in own:
        lines += ["", *_section(attention)]
    return "\n".join(lines) + "\n"


def _section(attention: type[Attention]) -> list[str]:
    source = attention.__module__.replace(".", "/") + ".py"
    lines = [f"## {attention.name}", "", inspect.getdoc(attention) or "", ""]
    lines += [f"- Cost: {attention.cost}", f"- Paper: {attention.paper}"]
    lines += [f"- Honours: {', '.join(capabilities(attention))}", f"- Source: [{source}](../{source})"]
    tested = ", ".join(f"`{example}`" if example else "the defaults" for example in attention.examples)
    lines += [f"- Tested on a few dozen tokens with: {tested}"]
    declared = options(attention)
    if declared:
        lines += ["", "Options:", ""]
        lines += [f"- `{o.name}: {o.type}{f' = {o.default}' if o.default else ''}` {o.doc}".rstrip() for o in declared]
    else:
        lines += ["- Options: none"]
    return lines


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m attn_plugins.docs FILE")
    Path(sys.argv[1]).write_text(page(), encoding="utf8")
