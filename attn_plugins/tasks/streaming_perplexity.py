from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from attn_plugins.hf.caches.cache_layers import cache_bytes
from attn_plugins.tasks import Task, TaskConfig, register_task


@register_task("streaming_perplexity")
class StreamingPerplexity(Task):
    """Perplexity of long documents, read piece by piece through one cache as in generation, overall and by stretch.

    Each row of the data is a document of its own; its first ``length`` tokens are measured, each given those before it
    as far as the cache holds them, and shorter documents are left out. The first token is not scored. ``by_position``
    tells whether a model lasts: with a bounded cache a long text has to cost no more than its beginning, also beyond
    the length that the model was pretrained with, which is no limit here. ``cache_bytes`` is what the cache of one
    document holds at its end.
    """

    metric, better, model = "perplexity", "lower", "causal-lm"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        length: int = 16384
        """Tokens of a document that are measured."""
        piece: int = 512
        """Tokens that the model is given at a time."""
        stretch: int = 2048
        """Tokens in each part of a document that is also reported alone; the last may be shorter."""
        max_documents: int | None = None
        """Measure only the first so many documents that are long enough; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.length >= 2, "length", "at least 2")
            self.require(self.piece >= 1, "piece", "at least 1")
            self.require(self.stretch >= 2, "stretch", "at least 2")
            self.require(self.max_documents is None or self.max_documents >= 1, "max_documents", "at least 1, or null")

    def prepare(self, data, tokenizer, model):
        rows: list[list[int]] = []
        longest = 0
        for text in data["text"]:
            if len(rows) == self.config.max_documents:
                break
            # Measured from the first character on, so no model's special tokens; verbose: the length is on purpose.
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            longest = max(longest, len(ids))
            if len(ids) >= self.config.length:
                rows.append(ids[: self.config.length])
        if not rows:
            raise ValueError(
                f"length={self.config.length}, and the longest of {len(data)} documents has {longest} tokens; "
                "allowed: a smaller length, longer documents"
            )
        return [{"input_ids": batch} for batch in torch.tensor(rows).split(self.config.batch_size)]

    def score(self, model, batch):
        ids = batch["input_ids"]
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        loss = torch.zeros(ids.shape[1] - 1, dtype=torch.float64, device=ids.device)
        for start in range(0, ids.shape[1], self.config.piece):
            piece = ids[:, start : start + self.config.piece]
            logits = model(input_ids=piece, past_key_values=cache, use_cache=True).logits
            target = ids[:, start + 1 : start + 1 + piece.shape[1]]
            for row, wanted in zip(logits, target, strict=True):
                losses = cross_entropy(row[: len(wanted)].float(), wanted, reduction="none")
                loss[start : start + len(wanted)] += losses.double()
        documents = torch.tensor(len(ids))
        return {"loss": loss, "documents": documents, "cache_bytes": torch.tensor(cache_bytes(cache))}

    def finish(self, sums):
        loss, documents = sums["loss"], int(sums["documents"])
        by_position = []
        for start in range(0, self.config.length, self.config.stretch):
            part = slice(max(start, 1), min(start + self.config.stretch, self.config.length))
            mean = loss[part.start - 1 : part.stop - 1].mean() / documents  # the first is the loss of position 1
            by_position.append({"from": part.start, "to": part.stop - 1, "perplexity": float(mean.exp())})
        mean = loss.mean() / documents
        return {
            "perplexity": float(mean.exp()),
            "loss": float(mean),
            "tokens": len(loss) * documents,
            "length": self.config.length,
            "documents": documents,
            "cache_bytes": round(float(sums["cache_bytes"]) / documents),
            "by_position": by_position,
        }
