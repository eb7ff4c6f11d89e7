"""Tables of what transfer and chosen heads do to a pretrained model, in pages that are otherwise written by hand.

The scripts in examples/transfer measure, and append to the files in docs/benchmarks/transfer. Each table stands between
two comments, as those of :mod:`attn_plugins.benchmark.pages.attention_tables`.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from attn_plugins.benchmark.pages.attention_tables import between_comments
from attn_plugins.benchmark.pages.seed_tables import Record, by, made, number, spread, table
from attn_plugins.benchmark.results.store import Results

CHOICES = {
    "dense": "all: the model's own attention",
    "window 64": "none: window 64 + 4 sinks alone",
    "window 64, every fourth layer": "every fourth layer, 21 of 90 heads; window 64",
    "window 64, layers by contribution": "7 layers by `contribution`; window 64",
    "window 64, layers by recall": "7 layers by `recall`; window 64",
    "window 64, layers by kl": "7 layers by `kl`; window 64",
    "window 64, few heads": "12 of 90 heads by `contribution`; window 64",
    "window 64, heads": "21 of 90 heads by `contribution`; window 64",
    "window 256": "none: window 256 + 4 sinks alone",
    "window 256, every fourth layer": "every fourth layer, 21 of 90 heads; window 256",
    "window 256, heads": "21 of 90 heads by `contribution`; window 256",
}
"""Case of examples/transfer/choice.py -> what keeps full attention."""
FIRST_PAGE = ("dense", "window 256", "window 256, every fourth layer", "window 256, heads")
RECALLED = {"perplexity": "perplexity", "passkey": "pass key", "copy": "passage", "names": "names"}
TAUGHT = {"perplexity": "perplexity", "passkey": "pass key", "copy": "passage"}
TRAINED = {"perplexity": "perplexity", "passkey": "pass key", "copy": "passage", "recall loss": "loss of recalled"}


def choices(records: Sequence[Record], cases: Sequence[str] = tuple(CHOICES)) -> list[str]:
    """What is recalled, by what keeps full attention."""
    found = by(records, lambda one: one["settings"]["case"])
    rows = [(CHOICES[case], [one["result"] for one in found[case]]) for case in cases if case in found]
    return [*table("full attention in", rows, RECALLED), "", made(records)]


def stages(records: Sequence[Record]) -> list[str]:
    """What each stage brings, from one attention to the next."""
    found = by(records, lambda one: one["stage"])
    rows = [(stage, [one["result"] for one in ones]) for stage, ones in found.items()]
    return [*table("attention and what was done", rows, TAUGHT), "", made(records)]


TAUGHT_PARTS = {
    "decoder": {
        "error before": "error of outputs, untrained",
        "error": "error of outputs",
        "error of the worst layer": "error of outputs, worst layer",
        "error at twice the length": "error of outputs at twice the length",
        "step over forward": "time of a step, in forward passes",
    },
    "encoder": {
        "error before": "error of outputs, untrained",
        "error": "error of outputs",
        "cosine before": "cosine of embeddings to the model's own, untrained",
        "cosine": "cosine of embeddings to the model's own",
    },
}
"""Part of examples/transfer/attention_transfer.py -> its figures, and what they are."""


def taught(records: Sequence[Record]) -> list[str]:
    """What attention transfer brings to a decoder and to an encoder."""
    found = by(records, lambda one: one["settings"]["part"])
    lines = ["| model | figure | |", "|---|---|---|"]
    for part, figures in TAUGHT_PARTS.items():
        for name, what in figures.items():
            if part in found:
                lines.append(f"| {part} | {what} | {spread(name, [one['result'][name] for one in found[part]])} |")
    return [*lines, "", made(records)]


def lengths(records: Sequence[Record]) -> list[str]:
    """Perplexity at some lengths, by the length that new weights were taught at."""
    found = by(records, lambda one: one["settings"]["case"])
    columns = list(dict.fromkeys(length for ones in found.values() for one in ones for length in one["result"]))
    rows = [(case, [one["result"] for one in ones]) for case, ones in found.items()]
    headings = {length: f"{int(length):,} tokens" for length in columns}
    return [*table("attention", rows, headings), "", made(records)]


def trained(records: Sequence[Record]) -> list[str]:
    """What fine-tuning does to recall, by what is trained: before, after."""
    found = by(records, lambda one: f"{one['attention']} | {one['targets']}")
    lines = [f"| attention | trained | {' | '.join(TRAINED.values())} |", "|---" * (2 + len(TRAINED)) + "|"]
    for what, ones in found.items():
        cells = []
        for name in TRAINED:
            before, after = ([one["result"][when][name] for one in ones] for when in ("before", "after"))
            cells.append(f"{number(name, before)} to {spread(name, after)}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return [*lines, "", made(records)]


def with_measured(text: str, folder: Path) -> str:
    """A page with each of its tables written anew from the files in a folder.

    Raises:
        ValueError: it has one without its end.
    """
    tables: dict[str, tuple[str, Callable[[Sequence[Record]], list[str]]]] = {
        "choices": ("choice.jsonl", choices),
        "choices, in short": ("choice.jsonl", functools.partial(choices, cases=FIRST_PAGE)),
        "stages": ("stages.jsonl", stages),
        "fine-tuning": ("finetune_recall.jsonl", trained),
        "fine-tuning, longer": ("finetune_recall_64.jsonl", trained),
        "taught": ("attention_transfer.jsonl", taught),
        "lengths": ("lengths.jsonl", lengths),
    }
    for name, (file, lines_of) in tables.items():
        if (folder / file).exists():
            records = list(Results(folder / file).records.values())
            written = between_comments(text, name, functools.partial(lines_of, records))
            text = text if written is None else written
    return text
