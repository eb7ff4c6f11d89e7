from dataclasses import dataclass

from attn_plugins.data.halves import MATCHING, paired_halves
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task
from attn_plugins.tasks.accuracy import Accuracy


@register_task("matching-halves")
class MatchingHalves(TrainableTask):
    """Whether two texts are halves of one piece of a document, or of two documents: share that is right.

    Retrieval as in the Long Range Arena (Tay et al. 2020, arXiv:2011.04006), made of any texts, and without two towers:
    the model reads both in one row. ``majority`` is one half.
    """

    metric, better, model, columns = "accuracy", "higher", "classification", ("text",)
    pipeline_tag, row = "text-classification", "pair of halves"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Rows measured at once, padded to the longest of them."""
        half: int = 256
        """Characters of a half."""
        gap: int = 64
        """Characters between the halves that are left out, so that no word goes on from one to the other."""
        max_length: int = 1024
        """Longer rows are cut to so many tokens, from the end of the longer half."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""
        seed: int = 0
        """Of which halves are put together."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.half >= 1, "half", "at least 1")
            self.require(self.gap >= 0, "gap", "at least 0")
            self.require(self.max_length >= 1, "max_length", "at least 1")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def labels(self, data):
        return list(MATCHING)

    def examples(self, data, tokenizer, model):
        return self._classes().examples(self._pairs(data), tokenizer, model)

    def collator(self, tokenizer, model):
        return self._classes().collator(tokenizer, model)

    def limits(self):
        return {"input_ids": "max_length"}

    def training_metrics(self, tokenizer):
        return self._classes().training_metrics(tokenizer)

    def prepare(self, data, tokenizer, model):
        return self._classes().prepare(self._pairs(data), tokenizer, model)

    def score(self, model, batch):
        return self._classes().score(model, batch)

    def finish(self, sums):
        return self._classes().finish(sums)

    def _pairs(self, data):
        return paired_halves(data, self.config.half, self.config.gap, self.config.seed)

    def _classes(self) -> Accuracy:
        own = self.config
        return Accuracy(Accuracy.Config(batch_size=own.batch_size, max_length=own.max_length, max_rows=own.max_rows))
