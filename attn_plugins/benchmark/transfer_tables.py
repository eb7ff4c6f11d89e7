"""Tables of what transfer and chosen heads do to a pretrained model, in pages that are otherwise written by hand.

The scripts in examples/transfer measure, and append to the files in docs/benchmarks/transfer. Each table stands between
two comments, as those of :mod:`attn_plugins.benchmark.attention_tables`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.attention_tables import between_comments
from attn_plugins.benchmark.store import Results
from attn_plugins.config.versions import spelled_own

Record = dict[str, Any]
Figures = Mapping[str, str]
"""Figure of a result -> the heading of its column."""

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
    found = _by(records, lambda one: one["settings"]["case"])
    rows = [(CHOICES[case], [one["result"] for one in found[case]]) for case in cases if case in found]
    return [*_table("full attention in", rows, RECALLED), "", _made(records)]


def stages(records: Sequence[Record]) -> list[str]:
    """What each stage brings, from one attention to the next."""
    found = _by(records, lambda one: one["stage"])
    rows = [(stage, [one["result"] for one in ones]) for stage, ones in found.items()]
    return [*_table("attention and what was done", rows, TAUGHT), "", _made(records)]


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
    found = _by(records, lambda one: one["settings"]["part"])
    lines = ["| model | figure | |", "|---|---|---|"]
    for part, figures in TAUGHT_PARTS.items():
        for name, what in figures.items():
            if part in found:
                lines.append(f"| {part} | {what} | {_spread(name, [one['result'][name] for one in found[part]])} |")
    return [*lines, "", _made(records)]


def lengths(records: Sequence[Record]) -> list[str]:
    """Perplexity at some lengths, by the length that new weights were taught at."""
    found = _by(records, lambda one: one["settings"]["case"])
    columns = list(dict.fromkeys(length for ones in found.values() for one in ones for length in one["result"]))
    rows = [(case, [one["result"] for one in ones]) for case, ones in found.items()]
    headings = {length: f"{int(length):,} tokens" for length in columns}
    return [*_table("attention", rows, headings), "", _made(records)]


def trained(records: Sequence[Record]) -> list[str]:
    """What fine-tuning does to recall, by what is trained: before, after."""
    found = _by(records, lambda one: f"{one['attention']} | {one['targets']}")
    lines = [f"| attention | trained | {' | '.join(TRAINED.values())} |", "|---" * (2 + len(TRAINED)) + "|"]
    for what, ones in found.items():
        cells = []
        for name in TRAINED:
            before, after = ([one["result"][when][name] for one in ones] for when in ("before", "after"))
            cells.append(f"{_number(name, before)} to {_spread(name, after)}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return [*lines, "", _made(records)]


def _by(records: Sequence[Record], of: Callable[[Record], str]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for one in records:
        if one["status"] == "ok":
            found.setdefault(of(one), []).append(one)
    return found


def _table(first: str, rows: Sequence[tuple[str, list[Mapping[str, float]]]], figures: Figures) -> list[str]:
    lines = [f"| {first} | {' | '.join(figures.values())} |", "|---" * (1 + len(figures)) + "|"]
    for label, results in rows:
        cells = [_spread(name, [one[name] for one in results]) for name in figures]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _spread(name: str, values: Sequence[float]) -> str:
    """The mean, and between which figures it lies where there are several."""
    mean = _number(name, values)
    least, most = (_number(name, [value]) for value in (min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def _number(name: str, values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.0f}" if name == "perplexity" and mean >= 100 else f"{mean:.2f}"


def _made(records: Sequence[Record]) -> str:
    """Seeds and versions of the records."""
    seeds = sorted({one["settings"]["seed"] for one in records})
    how = list(dict.fromkeys(f"torch {one['versions']['torch']}, {spelled_own(one['versions'])}" for one in records))
    numbers = ", ".join(map(str, seeds))
    told = "mean (least to most) of the seeds" if len(seeds) > 1 else "one seed"
    return f"Seeds {numbers}, {told}; {'; '.join(how)}." if len(seeds) > 1 else f"Seed {numbers}, {told}; {how[0]}."


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
        "taught": ("attention_transfer.jsonl", taught),
        "lengths": ("lengths.jsonl", lengths),
    }
    for name, (file, table) in tables.items():
        if (folder / file).exists():
            records = list(Results(folder / file).records.values())
            written = between_comments(text, name, functools.partial(table, records))
            text = text if written is None else written
    return text
