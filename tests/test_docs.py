"""docs/attentions.md is what `make docs` writes, and every option in it is explained."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from attn_plugins import docs, list_attentions
from attn_plugins.attention import Attention, AttentionConfig
from attn_plugins.registry import get_attention

PAGE = Path(__file__).parent.parent / "docs" / "attentions.md"
OWN = [name for name in list_attentions() if get_attention(name).__module__.startswith(docs.OWN)]


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf8") == docs.page(), "a docstring or an option changed: run `make docs`"


@pytest.mark.parametrize("name", OWN)
def test_every_option_is_explained(name):
    assert [option.name for option in docs.options(get_attention(name)) if not option.doc] == []


@pytest.mark.parametrize("name", OWN)
def test_every_docstring_tells_its_limit_case(name):
    assert "Limit case: " in get_attention(name).__doc__


@dataclass(frozen=True, kw_only=True)
class SampleConfig(AttentionConfig):
    needed: int
    """No default."""
    window_size: int | None = 256
    """Keys seen,
    itself included."""
    kind: Literal["a", "b"] = "a"
    many: tuple[int, ...] = field(default_factory=lambda: (1, 2))
    """A few."""


class Sample(Attention):
    Config = SampleConfig


def test_options_come_from_the_source():
    assert docs.options(Sample) == [
        docs.Option(name="needed", type="int", default="", doc="No default."),
        docs.Option(name="window_size", type="int | None", default="256", doc="Keys seen, itself included."),
        docs.Option(name="kind", type="Literal['a', 'b']", default="'a'", doc=""),
        docs.Option(name="many", type="tuple[int, ...]", default="(1, 2)", doc="A few."),
    ]


def test_a_plug_in_is_not_in_our_page(monkeypatch):
    sample = type("Elsewhere", (get_attention("softmax"),), {"__module__": "someone.else"})
    monkeypatch.setattr(docs, "list_attentions", lambda: ["softmax", "elsewhere"])
    monkeypatch.setattr(docs, "get_attention", {"softmax": get_attention("softmax"), "elsewhere": sample}.get)
    assert docs.page().count("\n## ") == 1
