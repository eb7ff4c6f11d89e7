from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding, EvalPrediction

from attn_plugins.data.text import check_classes, label_names, labelled_examples
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task


def accuracy_of(found: EvalPrediction) -> dict[str, float]:
    """The figure of Trainer's own evaluation of a model whose output is one row of logits an example."""
    logits = found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions
    return {"accuracy": float((logits.argmax(-1) == found.label_ids).mean())}


@register_task("accuracy")
class Accuracy(TrainableTask):
    """Share of texts whose class the model names right, and the mean cross-entropy.

    ``majority`` is what a model gets that always answers the most frequent class: accuracy says nothing without it.
    """

    metric, better, model, columns = "accuracy", "higher", "classification", ("text", "label")
    trained_as, pipeline_tag, row = "classification", "text-classification", "text"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Rows measured at once, padded to the longest of them."""
        max_length: int = 512
        """Longer texts are cut to so many tokens."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 1, "max_length", "at least 1")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def labels(self, data):
        check_classes(data)
        return label_names(data)

    def examples(self, data, tokenizer, model):
        return labelled_examples(data, tokenizer, model.config.label2id, self.config.max_length)

    def collator(self, tokenizer, model):
        return DataCollatorWithPadding(tokenizer)

    def limits(self):
        return {"input_ids": "max_length"}

    def training_metrics(self, tokenizer):
        return accuracy_of

    def prepare(self, data, tokenizer, model):
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        rows = self.examples(data, tokenizer, model)
        batches = []
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            labels = torch.tensor(part.pop("labels"))
            batches.append({**tokenizer.pad(part, return_tensors="pt"), "labels": labels})
        return batches

    def score(self, model, batch):
        labels = batch.pop("labels")
        return count_right(model(**batch).logits.float(), labels)

    def finish(self, sums):
        return shares_right(sums)


def count_right(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is counted of a batch: rows (B, classes) of logits beside the numbers (B) of the right classes."""
    return {
        "right": (logits.argmax(-1) == labels).sum(),
        "loss": cross_entropy(logits, labels, reduction="sum"),
        "by_class": torch.bincount(labels, minlength=logits.shape[-1]),
    }


def shares_right(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    """The figures of what :func:`count_right` has counted."""
    rows = sums["by_class"].sum()
    return {
        "accuracy": float(sums["right"] / rows),
        "majority": float(sums["by_class"].max() / rows),
        "loss": float(sums["loss"] / rows),
        "rows": int(rows),
    }
