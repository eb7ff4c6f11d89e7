"""The picture on the first page, drawn from results in docs/benchmarks: python docs/first_page/figure.py."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent

CASES = {
    "dense": "all:\nthe model's own",
    "window 256": "none:\nwindow and sinks",
    "window 256, every fourth layer": "every\nfourth layer",
    "window 256, heads": "21 of 90 heads,\nchosen",
}
"""Cases of the left panel, by their names in the results -> what they are called."""

RECALLED = {"passkey": "pass key", "copy": "passage", "names": "names"}
"""Figures of the left panel -> what they are called."""

LINES = {
    "dense: the model's own": "dense",
    "local: window 512 + 4 sinks": "local, 512 + 4 sinks",
    "linear: elu": "linear, elu",
    "block_topk: 4 blocks of 64": "block_topk",
}
"""What a line of the right panel is called -> its name in the results."""


def records(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / "benchmarks" / file).read_text(encoding="utf8").splitlines()]


def recalled() -> dict[str, dict[str, float]]:
    """For each case the mean over seeds of its perplexity and of the shares that are recalled."""
    found: dict[str, list[dict[str, float]]] = {}
    for one in records("transfer/choice.jsonl"):
        found.setdefault(one["settings"]["case"], []).append(one["result"])
    return {
        case: {name: sum(one[name] for one in found[case]) / len(found[case]) for name in ("perplexity", *RECALLED)}
        for case in CASES
    }


def decode_times() -> dict[str, list[tuple[int, float]]]:
    """For each line (tokens in the cache, milliseconds of a token), median of the rounds."""
    found = records("decode/results.jsonl")
    return {
        line: sorted(
            (one["settings"]["context"], one["result"]["seconds"] * 1000) for one in found if one["label"] == name
        )
        for line, name in LINES.items()
    }


def draw(target: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=100)
    cases = recalled()
    for number, (figure_name, called) in enumerate(RECALLED.items()):
        places = [place + (number - 1) * 0.26 for place in range(len(cases))]
        left.bar(places, [one[figure_name] for one in cases.values()], width=0.24, label=called)
    names = [f"{CASES[case]}\nperplexity {one['perplexity']:.1f}" for case, one in cases.items()]
    left.set_xticks(range(len(cases)), names, fontsize=8)
    left.set(
        title="SmolLM2-135M, window of 256 + 4 sinks, not trained",
        xlabel="what keeps full attention",
        ylabel="share right of what stood 1,400 tokens ago",
        ylim=(0, 1.05),
    )
    for line, times in decode_times().items():
        right.plot(*zip(*times, strict=True), marker="o", label=line)
    right.set(
        title="generation, a small Llama on one CPU thread",
        xlabel="tokens in the cache",
        ylabel="milliseconds for the next token",
        xscale="log",
        yscale="log",
    )
    contexts = [context for context, _ in decode_times()["dense: the model's own"]]
    right.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
    right.minorticks_off()
    right.set_yticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
