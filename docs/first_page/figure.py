"""The picture on the first page, drawn from results in docs/benchmarks: python docs/first_page/figure.py."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).parent.parent

FAMILIES = {
    "window alone": ["window 256", "window 1024"],
    "window + 4 sink tokens": [f"window {size} + 4 sinks" for size in (128, 256, 512, 1024)],
    "best blocks of 64": [f"best {count} blocks of 64" for count in (4, 8, 16)],
}
"""What a line of the left panel is called -> its points, by their names in the results."""

LINES = {
    "dense: the model's own": "dense",
    "local: window 512 + 4 sinks": "local, 512 + 4 sinks",
    "linear: elu": "linear, elu",
    "block_topk: 4 blocks of 64": "block_topk",
}
"""What a line of the right panel is called -> its name in the results."""


def records(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DOCS / "benchmarks" / file).read_text(encoding="utf8").splitlines()]


def kept_quality() -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """Perplexity of SmolLM2-135M as it is, and for each family (share of pairs scored, perplexity), untrained."""
    found = {one["attention"]: one for one in records("untrained/untrained.jsonl") if one["model"] == "smollm2-135m"}
    points = {
        family: [(found[name]["pairs"], found[name]["figures"]["perplexity"]) for name in names]
        for family, names in FAMILIES.items()
    }
    return found["softmax"]["own"]["perplexity"], points


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
    own, families = kept_quality()
    for (family, points), marker in zip(families.items(), "osD", strict=True):
        left.plot(*zip(*points, strict=True), marker=marker, label=family)
    left.axhline(own, color="black", linestyle="--", linewidth=1, label="the model's own attention")
    left.set(
        title="SmolLM2-135M, swapped and not trained, 2048 tokens",
        xlabel="share of the pairs of tokens that are scored",
        ylabel="perplexity (lower is better)",
        xlim=(0, 1),
        ylim=(0, None),
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
