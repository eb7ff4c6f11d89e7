"""Table and picture of docs/recurrent.md, from docs/benchmarks/recurrent: python docs/recurrent/figure.py.

The results are those of configs/compare/recurrent_translation.yaml and recurrent_translation_none.yaml, in one file:
attn-plugins results merge docs/benchmarks/recurrent runs/recurrent_translation runs/recurrent_translation_none
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent
RESULTS = DOCS / "benchmarks" / "recurrent" / "results.jsonl"
PAGE = DOCS / "recurrent.md"
BEGIN, END = (
    "<!-- translation by length: written by docs/recurrent/figure.py -->\n",
    "<!-- translation by length: end -->",
)
ORDER = ("none", "additive", "scaled dot", "luong_local", "linear")


def rows(file: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """Attention -> the figures of each seed, in the order of the table."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text(encoding="utf8").splitlines():
        one = json.loads(line)
        if one["status"] == "ok":
            found.setdefault(one["attention"], []).append(one["result"]["figures"])
    return {name: found[name] for name in ORDER if name in found}


def spelled(values: list[float]) -> str:
    """The mean, and of several seeds the least and the most."""
    mean = f"{sum(values) / len(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def by_length(figures: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Words of a source -> BLEU of each seed."""
    found: dict[str, list[float]] = {}
    for one in figures:
        for part in one["by_length"]:
            found.setdefault(part["length"], []).append(part["sacrebleu"])
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a row for each attention."""
    lengths = list(by_length(next(iter(found.values()))))
    lines = [f"| attention | BLEU | {' | '.join(f'{length} words' for length in lengths)} | chrF | loss | seeds |"]
    lines.append("|---" * (len(lengths) + 5) + "|")
    for name, figures in found.items():
        parts = [spelled(values) for values in by_length(figures).values()]
        whole, chrf = (spelled([one[figure] for one in figures]) for figure in ("sacrebleu", "chrf"))
        loss = sum(one["loss"] for one in figures) / len(figures)
        lines.append(f"| {name} | {whole} | {' | '.join(parts)} | {chrf} | {loss:.2f} | {len(figures)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """The page with its table written anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(found)}{END}{after}"


def draw(target: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for name, figures in found.items():
        parts = by_length(figures)
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
    measured = rows()
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf8"), measured), encoding="utf8")
    draw(Path(__file__).parent / "figure.png", measured)


if __name__ == "__main__":
    main()
