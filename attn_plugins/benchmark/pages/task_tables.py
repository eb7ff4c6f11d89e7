"""Tables of docs/tasks.md: each task with the model's own attention and with others, trained alike.

``attn-plugins compare --config configs/compare/tasks/NAME.yaml`` measures; its results.jsonl is kept as
docs/benchmarks/tasks/NAME.jsonl, and each table stands between two comments, as those of
:mod:`attn_plugins.benchmark.pages.attention_tables`.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_plugins.benchmark.compare.report import STAGES
from attn_plugins.benchmark.pages.attention_tables import between_comments
from attn_plugins.benchmark.pages.seed_tables import Figures, Record, by, made, table
from attn_plugins.benchmark.results.store import Results

FIGURES: Mapping[str, Figures] = {
    "perplexity": {"perplexity": "perplexity"},
    "accuracy": {"accuracy": "accuracy"},
    "translation": {"sacrebleu": "BLEU", "chrf": "chrF", "loss": "loss"},
    "summarization": {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "loss": "loss"},
    "image-classification": {"accuracy": "accuracy"},
    "captioning": {"chrf": "chrF", "sacrebleu": "BLEU", "rougeL": "ROUGE-L"},
    "speech-recognition": {"wer": "word error rate", "loss": "loss"},
    "masked-lm": {"perplexity": "perplexity", "accuracy": "accuracy"},
    "token-classification": {"f1": "F1", "accuracy": "accuracy"},
    "question-answering": {"f1": "F1", "exact": "exact match"},
    "sentence-embedding": {"mrr": "MRR", "recall_at_1": "recall at 1", "recall_at_10": "recall at 10"},
    "preference": {"reward_accuracy": "reward accuracy", "margin": "margin"},
}
"""Task that is measured -> its figures, and the headings of their columns."""


def task_table(records: Sequence[Record]) -> list[str]:
    """A row for each attention and stage of a comparison, with the figures of its task."""
    found = by(records, lambda one: f"{one['attention']}, {STAGES[one['measure']]}")
    (task,) = {task for one in records if (task := task_of(one["settings"]))}
    figures = FIGURES[task]
    rows = [(label, [one["result"]["figures"] for one in ones]) for label, ones in found.items()]
    return [*table("attention", rows, figures), "", made(records)]


def task_of(settings: dict[str, Any]) -> str | None:
    """What is measured, as far as a cell says it: one without training leaves it to the others."""
    evaluation = settings["evaluation"]
    first = evaluation[0] if isinstance(evaluation, list) else evaluation
    return first.get("task") or settings.get("finetune", {}).get("task")


def with_tasks(text: str, folder: Path) -> str:
    """A page with the table of each comparison in a folder written anew.

    Raises:
        ValueError: it has one without its end.
    """
    for file in sorted(folder.glob("*.jsonl")):
        records = list(Results(file).records.values())
        written = between_comments(text, file.stem, functools.partial(task_table, records))
        text = text if written is None else written
    return text
