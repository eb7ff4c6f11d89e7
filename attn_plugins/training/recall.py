"""Whether a model still recalls after a fine-tune: a few rows of its own text, before and after, in seconds."""

from typing import Any

from attn_plugins.hf.checkpoints.card import kinds_of
from attn_plugins.tasks import figure
from attn_plugins.training.config import FinetuneConfig, evaluation_tasks
from attn_plugins.training.evaluate import Measurement, prepare_measurements
from attn_plugins.training.models import Loaded

ROWS = 4
MARGIN = 0.1
"""A fall by more than this share of an answer's tokens is told of. In 4 rows a pass key of a model that knows it mostly
is one digit (0.04) off, and a copy has a standard error of 0.03."""


def prepare_recall(config: FinetuneConfig, loaded: Loaded, held_out: Any) -> Measurement | str | None:
    """Rows of ``config.block_size`` tokens of the held-out text; the reason, where there can be none.

    Returns:
        None where nothing is to be measured: it was not asked for, or the model is no swapped language model.
    """
    if not swapped(loaded.model) or not config.recall or config.task != "causal-lm":
        return None
    length = config.block_size
    options = {"task": "recall", "distances": [length], "rows": ROWS, "passage": min(64, max(16, length // 8))}
    try:
        return prepare_measurements(evaluation_tasks(options), held_out, loaded)[0]
    except ValueError as error:
        return str(error)


def swapped(model: Any) -> bool:
    """Whether any attention module of a model is served by another attention than its own."""
    return any(not kind.startswith("own (") for kind in kinds_of(model))


def report(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Recall of a fine-tuned model beside that of the model that it began from, as metrics.json holds it.

    Args:
        before, after: what the task found.

    Returns:
        the figures of each part at both times, and in "warning" a line where one fell by more than MARGIN, else None.
    """
    parts = {part: {"before": its, "after": after["by_part"][part]} for part, its in before["by_part"].items()}
    fell = [
        f"{part} {figure(its['before']['accuracy'])} before, {figure(its['after']['accuracy'])} after"
        for part, its in parts.items()
        if its["after"]["accuracy"] < its["before"]["accuracy"] - MARGIN
    ]
    (place,) = before["by_distance"]
    distance, rows = place["distance"], place["rows"]
    warning = None
    if fell:
        warning = f"training took recall from the model ({rows} rows of {distance} tokens): {'; '.join(fell)}"
    return {"distance": distance, "rows": rows, "margin": MARGIN, "parts": parts, "warning": warning}
