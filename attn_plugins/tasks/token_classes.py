"""What tasks share that make rows of tokens of their own, each of a class, for models trained from scratch."""

import abc
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.data.synthetic.rows import Drawn, TokenRows, batches
from attn_plugins.tasks import TaskConfig
from attn_plugins.tasks.accuracy import accuracy_of, count_right, shares_right


class TokenClasses(abc.ABC):
    """The share of rows whose class a model names right, beside that of always naming the most frequent one.

    A row begins with a token that is the same in all, where many a classifier reads the class. Rows that are shorter
    than others are filled up, and a mask tells what with.
    """

    metric, better, model = "accuracy", "higher", "token-classes"
    pipeline_tag, row = "text-classification", "row of tokens"
    config: Any

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Rows measured at once."""

    @abc.abstractmethod
    def made(self, data: Any, model: Any, held_out: bool) -> Drawn:
        """The rows to train on, or those that are measured: "input_ids" (R, N), "label" (R,), and where rows are filled
        up "length" (R,); of ``data``, where the task reads any."""

    @abc.abstractmethod
    def size(self) -> tuple[int, int]:
        """(tokens of a row at most, different tokens)."""

    def examples(self, data, processing, model):
        self._check_model(model)
        return TokenRows(self.made(data, model, False))

    def collator(self, processing, model):
        return as_batch

    def training_metrics(self, processing):
        return accuracy_of

    def row_of(self):
        return f"row of at most {self.size()[0]} tokens"

    def prepare(self, data, processing, model):
        self._check_model(model)
        return [masked(rows) for rows in batches(self.made(data, model, True), self.config.batch_size)]

    def score(self, model, batch):
        labels = batch.pop("labels")
        return count_right(model(**batch).logits.float(), labels)

    def finish(self, sums):
        return shares_right(sums)

    def _check_model(self, model: Any) -> None:
        config = model.config.get_text_config()
        length, tokens = self.size()
        for got, limit, named in (
            (length, getattr(config, "max_position_embeddings", None), "max_position_embeddings"),
            (tokens, config.vocab_size, "vocab_size"),
        ):
            if limit is not None and got > limit:
                raise ValueError(f"rows need {named}={got} or more, and the model has {limit}")


def as_batch(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows as a batch that a classifier is called with."""
    return masked({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def masked(rows: Drawn) -> dict[str, torch.Tensor]:
    """Columns of rows as a classifier takes them, cut to the longest."""
    ids_BN = rows["input_ids"]
    if "length" not in rows:
        return {"input_ids": ids_BN, "labels": rows["label"]}
    longest = int(rows["length"].max())
    mask_BN = torch.arange(longest) < rows["length"].unsqueeze(1)
    return {"input_ids": ids_BN[:, :longest], "attention_mask": mask_BN.long(), "labels": rows["label"]}
