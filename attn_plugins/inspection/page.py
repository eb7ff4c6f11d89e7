"""One self-contained page of HTML: a token is pointed at, and where it looks is shaded, beside the model's own.

Weights are kept in it as whole numbers from -127 to 127 of the largest of their row.
"""

import base64
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from attn_plugins.inspection.figures import HeadFigures
from attn_plugins.inspection.inspect import LayerWeights

TEMPLATE = Path(__file__).parent / "templates" / "page.html"

MOST = 6_000_000
"""Weights in a page, about a byte and a third each: what a browser opens at once."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What can be chosen in the page: weights of some heads."""

    title: str
    told: str
    """A line on it."""
    heads: list[str]
    captions: list[str]
    """Figures of each head, in words."""
    queries: list[int]
    query_texts: list[str]
    """Of all tokens that are queries here; empty for numbers."""
    key_texts: list[str]
    weights_hqK: torch.Tensor
    own_hqK: torch.Tensor | None
    """None where there is nothing beside it."""
    mean: bool = True
    """Whether the mean of all heads can be chosen too."""

    @property
    def size(self) -> int:
        return self.weights_hqK.numel() * (1 if self.own_hqK is None else 2)


def entry_of(layer: LayerWeights, query_texts: Sequence[str], key_texts: Sequence[str]) -> Entry:
    """The weights of a module, of the first row."""
    return Entry(
        title=f"{layer.role} layer {layer.layer}  ({layer.path})",
        told=layer.attention + ("" if layer.exact else ": its output is no sum of values by these weights"),
        heads=[f"{one.head} ({one.attention})" for one in layer.figures],
        captions=[caption(one) for one in layer.figures],
        queries=layer.queries,
        query_texts=list(query_texts),
        key_texts=list(key_texts),
        weights_hqK=layer.weights_BhqK[0],
        own_hqK=layer.own_BhqK[0],
    )


def caption(one: HeadFigures) -> str:
    """Figures of a head, in a line."""

    def told(name: str) -> str:
        sides = [getattr(side, name) for side in (one.weights, one.own)]
        return "" if None in sides else f"{name} {sides[0]:.3g} (own {sides[1]:.3g})"

    both = [f"{name} {x:.3g}" for name in ("error", "overlap") if (x := getattr(one, name)) is not None]
    parts = [told(name) for name in ("entropy", "distance", "density", "sinks", "outside")]
    return ", ".join(part for part in (*parts, *both) if part)


def fitting(entries: Sequence[Entry], most: int = MOST) -> list[Entry]:
    """As many of the entries, spread evenly, as a page holds; at least one."""
    kept = list(entries)
    while len(kept) > 1 and sum(entry.size for entry in kept) > most:
        number = max(1, min(len(kept) - 1, int(len(kept) * most / sum(entry.size for entry in kept))))
        kept = [kept[round(place * (len(kept) - 1) / max(1, number - 1))] for place in range(number)]
    return kept


def page(entries: Sequence[Entry], *, title: str, told: str) -> str:
    """The page.

    Args:
        told: a line below the title.
    """
    texts: list[list[str]] = []

    def number_of(some: list[str]) -> int:
        if some not in texts:
            texts.append(some)
        return texts.index(some)

    data = {
        "texts": texts,
        "entries": [
            {
                "title": entry.title,
                "told": entry.told,
                "heads": entry.heads,
                "captions": entry.captions,
                "queries": entry.queries,
                "queryTexts": number_of(entry.query_texts),
                "keyTexts": number_of(entry.key_texts),
                "keys": entry.weights_hqK.shape[2],
                "mean": entry.mean,
                "weights": packed(entry.weights_hqK),
                "own": None if entry.own_hqK is None else packed(entry.own_hqK),
            }
            for entry in entries
        ],
    }
    held = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    values = {"TITLE": escape(title), "TOLD": escape(told), "DATA": held}
    return re.sub("@@([A-Z]+)@@", lambda place: values[place[1]], TEMPLATE.read_text(encoding="utf8"))


def packed(weights_hqK: torch.Tensor) -> dict[str, Any]:
    """Weights for the page, and of each row the sum of their sizes beside its largest, which makes shares of them.

    What is no finite number, for which JSON has no word, counts as no weight.
    """
    weights_hqK = weights_hqK.nan_to_num(0.0, 0.0, 0.0)
    size = weights_hqK.abs()
    most = size.amax(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    numbers = (weights_hqK / most * 127).round().to(torch.int8).contiguous()
    sums = (size / most).sum(-1)
    return {
        "bytes": base64.b64encode(numbers.numpy().tobytes()).decode(),
        "sums": [[round(x, 3) for x in row] for row in sums.tolist()],
    }
