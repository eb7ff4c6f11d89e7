import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from attn_plugins.data.text import position_limit, token_blocks, token_documents
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task
from attn_plugins.tasks.logits import last_logits


def collate_blocks(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Blocks of one length, without a padding mask: there is no padding. The model shifts the labels itself."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def collate_documents(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Texts one after the other in one row, with positions that start anew at each.

    Without a cache: where there is one, transformers does not look for packed texts, and a model's own attention would
    see all of them.
    """
    return {**DataCollatorWithFlattening()(rows), "use_cache": False}


@register_task("perplexity")
class Perplexity(TrainableTask):
    """exp of the mean negative log-likelihood of a token given those before it in its block, overall and by position.

    The text is laid end to end and cut into blocks that do not overlap, so a token has between 1 and length - 1 tokens
    before it, and the first of a block is not scored. ``by_position`` tells early tokens (little context) from late
    ones (the full context): an attention that forgets shows in the last of them. Figures at different lengths or with
    different tokenizers are not comparable, but those of ``by_length``: with ``lengths``, the same last tokens of each
    block are scored with so much of the block before them, and the task's own figures are those of the longest.
    """

    metric, better, model = "perplexity", "lower", "causal-lm"
    trained_as, pipeline_tag, row = "causal-lm", "text-generation", "block"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        length: int = 1024
        """Tokens in a block."""
        max_tokens: int | None = None
        """Measure only the first so many tokens (whole blocks); null for all."""
        packing: Literal["blocks", "documents"] = "blocks"
        """What a row to train on is. blocks: ``length`` tokens of texts that are laid end to end. documents: one text,
        cut to ``length`` tokens; the rows of a batch are one row of the model, without padding, with positions that
        start anew at each, which keeps them apart. Measured are blocks, whatever this says."""
        buckets: int = 4
        """Ranges of positions, equal in size, that are also reported alone."""
        lengths: list[int] | None = None
        """Measure at these lengths instead, with blocks of the longest: the last ``scored`` tokens of each block, at
        the end of so many of its tokens. A curve over what more context brings."""
        scored: int = 512
        """Tokens of a block that are scored at each of ``lengths``."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.length >= 2, "length", "at least 2")
            self.require(1 <= self.buckets < self.length, "buckets", "1 to length - 1")
            if self.lengths is not None:
                apart = len(set(self.lengths)) == len(self.lengths) > 0
                self.require(apart and min(self.lengths) >= 2, "lengths", "at least one, from 2, each once, or null")
                self.require(1 <= self.scored < min(self.lengths), "scored", "1 to the shortest of lengths - 1")
            least = f"at least one block, length={self.block}, or null"
            self.require(self.max_tokens is None or self.max_tokens >= self.block, "max_tokens", least)

        @property
        def block(self) -> int:
            """Tokens of a block that is measured."""
            return self.length if self.lengths is None else max(self.lengths)

    def prepare(self, data, tokenizer, model):
        option = "length" if self.config.lengths is None else "lengths"
        blocks = self._blocks(data, tokenizer, model, option, self.config.block)
        if self.config.max_tokens is not None:
            blocks = blocks.select(range(min(len(blocks), self.config.max_tokens // self.config.block)))
        rows = torch.tensor(blocks["input_ids"][:])
        return [{"input_ids": batch} for batch in rows.split(self.config.batch_size)]

    def examples(self, data, tokenizer, model):
        if self.config.packing == "blocks":
            return self._blocks(data, tokenizer, model, "block_size", self.config.length)
        if "position_ids" not in inspect.signature(model.forward).parameters:
            raise ValueError(
                f"packing='documents' tells texts apart by positions, which {type(model).__name__} does not take; "
                "allowed here: packing='blocks'"
            )
        self._check_length(model, "block_size", self.config.length)
        return token_documents(data, tokenizer, self.config.length)

    def limits(self):
        return {"input_ids": "length"} if self.config.packing == "documents" else {}

    def _blocks(self, data, tokenizer, model, option, length):
        self._check_length(model, option, length)
        return token_blocks(data, tokenizer, length)

    def _check_length(self, model, option, length):
        limit = position_limit(model)
        if limit is not None and length > limit:
            raise ValueError(f"{option}={length}; allowed: at most {limit}, the model's max_position_embeddings")

    def collator(self, tokenizer, model):
        return collate_blocks if self.config.packing == "blocks" else collate_documents

    def blank(self, number, model):
        if self.config.packing != "blocks":
            return None
        self._check_length(model, "block_size", self.config.length)
        ids = torch.zeros(number, self.config.length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    def row_of(self):
        if self.config.packing == "documents":
            return f"text of at most {self.config.length} tokens"
        return f"block of {self.config.length} tokens"

    def score(self, model, batch):
        ids = batch["input_ids"]
        if self.config.lengths is not None:
            return self._score_lengths(model, ids)
        logits = model(input_ids=ids, use_cache=False).logits
        # Row by row: a float32 copy of all logits would be the largest tensor of the whole measurement.
        losses = [
            cross_entropy(row[:-1].float(), target[1:], reduction="none")
            for row, target in zip(logits, ids, strict=True)
        ]
        return {"loss": torch.stack(losses).double().sum(0), "tokens": torch.full_like(losses[0], ids.shape[0])}

    def _score_lengths(self, model, ids):
        """The loss of the same tokens at each length."""
        number, sums = self.config.scored, []
        for length in self.config.lengths:
            logits = last_logits(model, ids[:, -length:], number)
            losses = [
                cross_entropy(row.float(), target[-number:], reduction="sum")
                for row, target in zip(logits, ids, strict=True)
            ]
            sums.append(torch.stack(losses).double().sum())
        return {"loss": torch.stack(sums), "tokens": torch.tensor(number * len(ids))}

    def finish(self, sums):
        loss, tokens = sums["loss"], sums["tokens"]
        if self.config.lengths is not None:
            by_length = [
                {"length": length, "perplexity": float(mean.exp()), "loss": float(mean)}
                for length, mean in zip(self.config.lengths, loss / tokens, strict=True)
            ]
            longest = max(by_length, key=lambda part: part["length"])
            figures = {name: longest[name] for name in ("perplexity", "loss")}
            return {**figures, "tokens": int(tokens), "length": self.config.block, "by_length": by_length}
        by_position = []
        for part in torch.arange(1, self.config.length).tensor_split(self.config.buckets):
            mean = loss[part - 1].sum() / tokens[part - 1].sum()
            by_position.append({"from": int(part[0]), "to": int(part[-1]), "perplexity": float(mean.exp())})
        mean = loss.sum() / tokens.sum()
        return {
            "perplexity": float(mean.exp()),
            "loss": float(mean),
            "tokens": int(tokens.sum()),
            "length": self.config.length,
            "by_position": by_position,
        }
