import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, TrainerCallback

from attn_plugins.data.text import IGNORED, check_length, cut_texts, token_blocks
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task


class Masking(TrainerCallback):
    """Batches with masked tokens, as transformers' DataCollatorForLanguageModeling masks them.

    What is masked follows from the seed, the epoch and the row, not from what else was drawn: it is the same in a run
    that goes on after it was killed, with other batch sizes, and in any number of processes.
    """

    def __init__(self, tokenizer: Any, probability: float, seed: int):
        self.seed, self.epoch = seed, 0
        self.masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=probability, seed=seed)
        self.padded = DataCollatorForTokenClassification(tokenizer)

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.padded([self.row(row) for row in rows])

    def row(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with masked tokens, and "labels": the tokens that stood there, and -100 elsewhere."""
        spelled = f"{self.seed} {self.epoch} {row['input_ids']}".encode()
        self.masked.generator = torch.Generator().manual_seed(
            int.from_bytes(hashlib.blake2b(spelled, digest_size=4).digest(), "big")
        )
        (ids,), (labels,) = self.masked.torch_mask_tokens(torch.tensor([row["input_ids"]]))
        return {**row, "input_ids": ids.tolist(), "labels": labels.tolist()}


@register_task("masked-lm")
class MaskedLM(TrainableTask):
    """exp of the mean negative log-likelihood of masked tokens given the rest of their text, and how many are named.

    Tokens are masked as in BERT: of those chosen, 8 of 10 become the mask, one a random token, one stays. Those of the
    held-out text are chosen by ``seed`` and the text alone, so that models with one tokenizer are asked the same.
    """

    metric, better, model = "perplexity", "lower", "masked-lm"
    pipeline_tag, row = "fill-mask", "text"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Rows measured at once, padded to the longest of them."""
        max_length: int = 512
        """Longer texts are cut to so many tokens; where they are packed, tokens in a block."""
        packed: bool = False
        """Lay texts end to end, each between its special tokens, and cut that into blocks of ``max_length`` tokens."""
        mlm_probability: float = 0.15
        """Share of the tokens, special ones aside, that is chosen."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""
        seed: int = 0
        """Of which tokens are chosen; in training, of those of each epoch."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 3, "max_length", "at least 3")
            self.require(0 < self.mlm_probability < 1, "mlm_probability", "between 0 and 1")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def examples(self, data, tokenizer, model):
        if tokenizer.mask_token is None:
            raise ValueError("the model's tokenizer has no mask token, with which it was trained to fill gaps")
        check_length(self.config.max_length, "max_length", tokenizer, model)
        if self.config.packed:
            return token_blocks(data, tokenizer, self.config.max_length, special_tokens=True)
        return cut_texts(data, tokenizer, self.config.max_length)

    def collator(self, tokenizer, model):
        return Masking(tokenizer, self.config.mlm_probability, self.config.seed)

    def limits(self):
        return {} if self.config.packed else {"input_ids": "max_length"}

    def row_of(self):
        return f"block of {self.config.max_length} tokens" if self.config.packed else self.row

    def prepare(self, data, tokenizer, model):
        rows = self.examples(data, tokenizer, model)
        if self.config.max_rows is not None:
            rows = rows.select(range(min(len(rows), self.config.max_rows)))
        collate = self.collator(tokenizer, model)
        size = self.config.batch_size
        batches = [
            dict(collate([rows[at] for at in range(start, min(start + size, len(rows)))]))
            for start in range(0, len(rows), size)
        ]
        if not any((batch["labels"] != IGNORED).any() for batch in batches):
            raise ValueError(
                f"no token of {len(rows)} rows is masked at mlm_probability={self.config.mlm_probability}; allowed: a "
                "larger one, more text"
            )
        return batches

    def score(self, model, batch):
        labels = batch.pop("labels")
        masked = labels != IGNORED
        logits, truth = model(**batch).logits[masked].float(), labels[masked]
        return {
            "loss": cross_entropy(logits, truth, reduction="sum"),
            "right": (logits.argmax(-1) == truth).sum(),
            "tokens": masked.sum(),
        }

    def finish(self, sums):
        mean = sums["loss"] / sums["tokens"]
        return {
            "perplexity": float(mean.exp()),
            "accuracy": float(sums["right"] / sums["tokens"]),
            "loss": float(mean),
            "tokens": int(sums["tokens"]),
        }
