"""docs/attentions.md is what `make docs` writes, and every option in it is explained."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from attn_plugins import list_attentions
from attn_plugins.benchmark.pages import attention_page
from attn_plugins.benchmark.pages.attention_tables import with_tables
from attn_plugins.benchmark.results.store import Results
from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.options import Option, describe_options
from attn_plugins.core.registry import get_attention

PAGE = Path(__file__).parents[2] / "docs" / "attentions.md"
FIGURES = PAGE.parent / "benchmarks" / "cpu" / "results.jsonl"
OWN = [name for name in list_attentions() if get_attention(name).__module__.startswith(attention_page.OWN)]


@pytest.mark.of_the_registry
def test_the_pages_are_up_to_date():
    for path, text in attention_page.pages(PAGE.parents[1]).items():
        assert path.read_text(encoding="utf8") == text, (
            f"{path.name} is not what the registry says now: run `make docs`"
        )


def test_tables_stand_between_comments():
    softmax, local = get_attention("softmax"), get_attention("local")
    page = "Before.\n<!-- families: written by `make docs` -->\nold\n<!-- families: end -->\nAfter.\n"
    written = with_tables(page, [local, softmax])
    assert written.splitlines() == [
        "Before.",
        "<!-- families: written by `make docs` -->",
        "| family | attentions |",
        "|---|---|",
        "| dense | `softmax` |",
        "| local | `local` (window, sinks, dilation) |",
        "<!-- families: end -->",
        "After.",
    ]
    assert with_tables(written, [local, softmax]) == written
    with pytest.raises(ValueError, match="'families' has no end: <!-- families: end -->"):
        with_tables(page.replace("families: end", "end"), [])
    with pytest.raises(ValueError, match="none of the tables families, caches between its comments"):
        with_tables("Nothing.\n", [])


@pytest.mark.parametrize("name", OWN)
def test_every_option_is_explained(name):
    bare = [option.name for option in describe_options(get_attention(name).Config) if not option.doc]
    assert bare == [], "each option needs a docstring under its field"


@pytest.mark.parametrize("name", OWN)
def test_every_attention_says_when_to_use_it(name):
    assert get_attention(name).when, "say in `when` when to pick it"


def test_figures_are_those_of_the_forward_and_backward_pass(tmp_path):
    def record(key, which, length, ratio, status="ok", **source):
        settings = {"source": source, "which": which, "length": length, "causal": True, "dtype": "float32"}
        settings |= {"batch_size": 1, "num_heads": 8, "head_dim": 64}
        made = {"device": "an abacus", "threads": "2", "torch": "9.9"}
        result = {"times_as_fast": ratio, "lowest": ratio - 0.1}
        names = ("key", "label", "status", "settings", "result", "versions")
        return dict(zip(names, (key, "l", status, settings, result, made), strict=True))

    results = Results(tmp_path / "results.jsonl")
    results.add(record("a", "forward", 64, 9.0, type="local"))
    results.add(record("b", "forward_backward", 8, 0.5, type="local"))
    results.add(record("c", "forward_backward", 16, 2.0, type="local"))
    results.add(record("d", "forward_backward", 32, 2.0, status="error", type="local"))
    results.add(record("e", "forward_backward", 8, 2.0, peer="local-attention"))
    assert attention_page.timed(results) == {
        "local": [attention_page.Timed(label="l", causal=True, ratios={8: 0.5, 16: 2.0}, lowest={8: 0.4, 16: 1.9})]
    }
    page = attention_page.page(results.path)
    assert "batch 1, 8 heads of 64, float32, on an abacus, 2 threads, torch 9.9." in page
    assert "- Measured, `l`, beside torch's causal attention: 0.500x at 8, 2.00x at 16" in page
    assert re.search(r"\| \[local\]\(#local\) \| local \| [^|]* \| 16 \|", page)


@pytest.mark.parametrize("name", OWN)
def test_every_docstring_tells_its_limit_case(name):
    assert "Limit case: " in get_attention(name).__doc__, "say 'Limit case: none.' in the docstring, or what it is"


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
    assert describe_options(SampleConfig) == [
        Option(name="needed", type="int", default="", doc="No default."),
        Option(name="window_size", type="int | None", default="256", doc="Keys seen, itself included."),
        Option(name="kind", type="Literal['a', 'b']", default="'a'", doc=""),
        Option(name="many", type="tuple[int, ...]", default="(1, 2)", doc="A few."),
    ]


def test_a_plug_in_is_not_in_our_page(monkeypatch):
    sample = type("Elsewhere", (get_attention("softmax"),), {"__module__": "someone.else"})
    monkeypatch.setattr(attention_page, "list_attentions", lambda: ["softmax", "elsewhere"])
    monkeypatch.setattr(attention_page, "get_attention", {"softmax": get_attention("softmax"), "elsewhere": sample}.get)
    assert attention_page.page(FIGURES).count("\n## ") == 1
