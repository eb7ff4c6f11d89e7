"""What tasks on pairs of texts share: sentence-transformers' trainer, and embeddings of all texts to measure."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import normalize

from attn_plugins.config.extras import need
from attn_plugins.tasks import TaskConfig


class SentencePairs(abc.ABC):
    """Embeddings of whole texts by a SentenceTransformer, whose pooling is the checkpoint's own, or the mean.

    A task built on it says what it trains with in ``loss``, and makes figures of :func:`embeddings` in ``finish``.
    """

    model, better, pipeline_tag, row, distils = "embedding", "higher", "sentence-similarity", "pair of texts", False
    targets: ClassVar[tuple[str, ...]] = ()  # so that Trainer's evaluation asks for the loss
    columns: ClassVar[tuple[str, ...]]
    config: Any

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 32
        """Pairs measured at once, padded to the longest text of them."""
        max_length: int | None = None
        """Longer texts are cut to so many tokens, which is saved with the model; null for what it says itself."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length is None or self.max_length >= 1, "max_length", "at least 1, or null")
            self.require(self.max_rows is None or self.max_rows >= 2, "max_rows", "at least 2, or null")

    @abc.abstractmethod
    def loss(self, losses: Any, model: nn.Module) -> nn.Module:
        """What it is trained with.

        Args:
            losses: the module of sentence-transformers' losses.
        """

    def arguments(self):
        return need("sentence_transformers", "embedding").SentenceTransformerTrainingArguments

    def make_trainer(self, **parts):
        library = need("sentence_transformers", "embedding")
        losses = need("sentence_transformers.sentence_transformer.losses", "embedding")
        return library.SentenceTransformerTrainer(**parts, loss=self.loss(losses, parts["model"]))

    def examples(self, data, processing, model):
        self._cut(model)
        return data.select_columns(list(self.columns))

    def collator(self, processing, model):
        return None  # the trainer's own, which knows of prompts

    def _cut(self, model: Any) -> None:
        limit, length = getattr(model.config, "max_position_embeddings", None), self.config.max_length
        if length is None:
            return
        if limit is not None and length > limit:
            raise ValueError(f"max_length={length}; allowed: at most {limit}, the model's max_position_embeddings")
        model.max_seq_length = length

    def prepare(self, data, processing, model):
        self._cut(model)
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        numbers: dict[str, int] = {}
        sides = [[numbers.setdefault(text, len(numbers)) for text in data[side]] for side in self.columns[:2]]
        rows = list(zip(*sides, *(data[role] for role in self.columns[2:]), strict=True))
        texts = list(numbers)
        rows.sort(key=lambda row: len(texts[row[0]]) + len(texts[row[1]]))  # so that few are padded far
        batches = []
        for start in range(0, len(rows), self.config.batch_size):
            part = rows[start : start + self.config.batch_size]
            wanted = [number for side in range(2) for number in dict.fromkeys(row[side] for row in part)]
            inputs = model.preprocess([texts[number] for number in wanted])
            batches.append({"inputs": inputs, "numbers": wanted, "rows": part})
        return batches

    def score(self, model, batch):
        device = next(model.parameters()).device
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in batch["inputs"].items()}
        vectors = model(inputs)["sentence_embedding"].float().cpu().numpy()
        return {"vectors": list(vectors), "numbers": batch["numbers"], "rows": batch["rows"]}


def embeddings(sums: dict[str, Any]) -> tuple[torch.Tensor, list[tuple[Any, ...]]]:
    """(of length 1, one a text: (texts, features); the rows: number of a text, of the other, what else a row has)."""
    places = {number: place for place, number in enumerate(sums["numbers"])}
    rows = [(places[one], places[other], *rest) for one, other, *rest in sums["rows"]]
    return normalize(torch.stack([*map(torch.from_numpy, sums["vectors"])]), dim=-1), rows
