"""Tables and picture of docs/recurrent.md, from docs/benchmarks/recurrent: python docs/recurrent/figure.py.

`results.jsonl` there is of configs/compare/recurrent_translation.yaml and recurrent_translation_none.yaml,
`summaries/results.jsonl` of recurrent_summaries.yaml and recurrent_summaries_none.yaml, merged by `attn-plugins results
merge`; `captions.jsonl` and `panels.jsonl` are what examples/training/show_attend_tell.py wrote.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from attn_plugins.benchmark.pages.attention_tables import between_comments

DOCS = Path(__file__).parent.parent
RESULTS = DOCS / "benchmarks" / "recurrent"
PAGE = DOCS / "recurrent.md"
ORDER = ("none", "additive", "scaled dot", "softmax", "luong_local", "linear")

Rows = dict[str, list[dict[str, Any]]]
"""Attention -> the figures of each seed, in the order of the tables."""


def compared(file: Path) -> Rows:
    """What `attn-plugins compare` measured."""
    records = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    return _ordered((one["attention"], one["result"]["figures"]) for one in records if one["status"] == "ok")


def captioned(file: Path) -> Rows:
    """What the example of captions wrote, with the share of names that are right in their place."""
    records = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    return _ordered((one["attention"], {**one["figures"], "in place": in_place(one["written"])}) for one in records)


def in_place(rows: list[dict[str, str]]) -> float:
    """Of the words between the commas of each caption, the share that is written at its place, in percent."""
    wanted = [row["caption"].split(", ") for row in rows]
    pairs = [
        zip(names, [*row["written"].split(", "), *[""] * len(names)], strict=False)
        for names, row in zip(wanted, rows, strict=True)
    ]
    return 100 * sum(name == said for row in pairs for name, said in row) / sum(map(len, wanted))


def _ordered(named: Any) -> Rows:
    found: Rows = {}
    for name, figures in named:
        found.setdefault(name, []).append(figures)
    return {name: found[name] for name in ORDER if name in found}


def spelled(values: list[float], digits: int = 1) -> str:
    """The mean, and of several seeds the least and the most."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def by_length(figures: list[dict[str, Any]], metric: str) -> dict[str, list[float]]:
    """Words of a source -> the metric of each seed."""
    found: dict[str, list[float]] = {}
    for one in figures:
        for part in one["by_length"]:
            found.setdefault(part["length"], []).append(part[metric])
    return found


def table(found: Rows, figures: dict[str, tuple[str, int]], lengths: str | None = None) -> str:
    """Markdown: a row for each attention.

    Args:
        figures: a column's name -> (the figure in it, its digits).
        lengths: the figure to have a column for each length of source.
    """
    parts = list(by_length(next(iter(found.values())), lengths)) if lengths else []
    names = ["attention", *figures, *(f"{part} words" for part in parts), "seeds"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, seeds in found.items():
        cells = [spelled([one[figure] for one in seeds], digits) for figure, digits in figures.values()]
        if lengths:
            digits = next(digits for figure, digits in figures.values() if figure == lengths)
            cells += [spelled(values, digits) for values in by_length(seeds, lengths).values()]
        lines.append(f"| {' | '.join([name, *cells, str(len(seeds))])} |")
    return "\n".join(lines) + "\n"


def translation() -> str:
    figures = {"BLEU": ("sacrebleu", 1), "chrF": ("chrf", 1), "loss": ("loss", 2)}
    return table(compared(RESULTS / "results.jsonl"), figures, "sacrebleu")


def summaries() -> str:
    figures = {"ROUGE-L": ("rougeL", 3), "ROUGE-1": ("rouge1", 3), "loss": ("loss", 2)}
    return table(compared(RESULTS / "summaries" / "results.jsonl"), figures, "rougeL")


def panels() -> str:
    figures = {"names in place, %": ("in place", 1), "BLEU": ("sacrebleu", 1), "loss": ("loss", 2)}
    return table(captioned(RESULTS / "panels.jsonl"), figures)


def captions() -> str:
    figures = {"loss": ("loss", 2), "chrF": ("chrf", 1), "BLEU": ("sacrebleu", 1), "ROUGE-L": ("rougeL", 2)}
    return table(captioned(RESULTS / "captions.jsonl"), figures)


TABLES: dict[str, Callable[[], str]] = {
    "translation by length": translation,
    "summaries": summaries,
    "panels": panels,
    "captions": captions,
}
"""Name of a table in the page -> what makes it."""


def with_tables(page: str) -> str:
    """The page with its tables written anew."""
    for name, make in TABLES.items():
        written = between_comments(page, name, lambda make=make: make().splitlines(), by="docs/recurrent/figure.py")
        if written is None:
            raise ValueError(f"{PAGE} has no place for the table {name!r}")
        page = written
    return page


def draw(target: Path, found: Rows) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, figures in found.items():
        parts = by_length(figures, "sacrebleu")
        means = [sum(values) / len(values) for values in parts.values()]
        axes.plot(list(parts), means, marker="o", label=name, linestyle="--" if name == "none" else "-")
        if len(figures) > 1:
            axes.fill_between(
                list(parts), [min(v) for v in parts.values()], [max(v) for v in parts.values()], alpha=0.15
            )
    axes.set_xlabel("words of the source")
    axes.set_ylabel("BLEU")
    axes.set_ylim(bottom=0)
    axes.legend(title="attention", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf8")), encoding="utf8")
    draw(Path(__file__).parent / "figure.png", compared(RESULTS / "results.jsonl"))


if __name__ == "__main__":
    main()
