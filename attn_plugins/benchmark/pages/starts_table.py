"""Where each attention starts in a pretrained model that is swapped and not trained: what is measured, and its tables.

examples/transfer/starts.py measures decoders, encoder_starts.py beside it encoders. Each attention is measured at its
defaults, and beside that without the first tokens or blocks that it keeps by default.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.results.store import Results
from attn_plugins.benchmark.results.tables import brief_number
from attn_plugins.config.versions import spelled_own
from attn_plugins.core.registry import get_attention, list_attentions

COLUMNS = {
    "perplexity": "perplexity",
    "recall passkey": "pass key",
    "recall copy": "passage copied",
    "error": "error of layers",
    "worst layer": "worst layer",
    "cosine": "cosine",
    "lowest cosine": "lowest cosine",
    "error of CLS": "error of CLS",
    "error of the others": "error of the others",
}
"""Figure -> its column, in their order."""


def at_start(capability: str) -> dict[str, dict[str, Any]]:
    """Label -> rule: each attention of the registry that has a capability, at its defaults and without first tokens."""
    found: dict[str, dict[str, Any]] = {}
    for name in list_attentions():
        attention = get_attention(name)
        if not getattr(attention, capability):
            continue
        found[name] = {"type": name}
        for option in dataclasses.fields(attention.Config):
            if "settled" in option.metadata or "before" in option.metadata:
                found[f"{name}, {option.name}: 0"] = {"type": name, option.name: 0}
    return found


def starts(*files: Path) -> list[str]:
    """Lines of Markdown: a table for each model that was measured, nothing where none was."""
    lines: list[str] = []
    for file in files:
        subjects: dict[str, list[dict[str, Any]]] = {}
        for record in Results(file).records.values():
            told = {key: value for key, value in record["settings"].items() if key not in NOT_THE_SUBJECT}
            subjects.setdefault(", ".join(f"{key} {value}" for key, value in told.items()), []).append(record)
        for subject, records in subjects.items():
            lines += ["", *_table(subject, records)]
    return lines


NOT_THE_SUBJECT = ("attention", "rules", "options")
"""Settings that are of the attention."""


def _table(subject: str, records: list[dict[str, Any]]) -> Iterator[str]:
    measured = {r["settings"]["attention"]: _flat(r["result"]) for r in records if r["status"] == "ok"}
    columns = [name for name in COLUMNS if any(name in figures for figures in measured.values())]
    made = records[0]["versions"]
    yield f"{subject}; torch {made['torch']}, {spelled_own(made)}."
    yield ""
    yield f"| attention | {' | '.join(COLUMNS[name] for name in columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for label, figures in measured.items():
        cells = [brief_number(figures[name]) if name in figures else "" for name in columns]
        yield f"| {label} | {' | '.join(cells)} |"
    refused = sorted(r["settings"]["attention"] for r in records if r["status"] != "ok")
    if refused:
        yield ""
        yield f"Refused, since they cannot serve this model: {', '.join(refused)}."


def _flat(result: dict[str, Any]) -> dict[str, float]:
    parts = {f"recall {name}": value for name, value in result.get("recall", {}).items()}
    return {**{name: value for name, value in result.items() if name != "recall"}, **parts}
