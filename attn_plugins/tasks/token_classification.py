from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForTokenClassification

from attn_plugins.data.tags import tag_names, tagged_examples
from attn_plugins.data.text import IGNORED, check_length
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word after the last) of each span that tags such as B-PER, I-PER and O tell.

    As conlleval reads them: an I- of another kind than the word before, or after an O, begins a span too. E- ends one,
    and S- is one of a single word.
    """
    found, kind, start, before = set(), "", 0, "O"
    for at, tag in enumerate([*tags, "O"]):
        place, _, its = tag.partition("-")
        goes_on = place in ("I", "E") and before in ("B", "I") and its == kind
        if not goes_on:
            if kind:
                found.add((kind, start, at))
            kind, start = its, at
        before = place
    return found


def tell_spans(names: Sequence[str]) -> bool:
    """Whether the names of all classes are tags of spans: O, and B-, I-, E- or S- with a kind."""
    kinds = [name for name in names if name != "O"]
    return bool(kinds) and all(name[:2] in ("B-", "I-", "E-", "S-") and name[2:] for name in kinds)


@register_task("token-classification")
class TokenClassification(TrainableTask):
    """F1 of the spans that a model finds, where its classes are tags such as B-PER and I-PER; else of the classes.

    A span is right where its kind and both of its ends are; ``f1`` is over all spans, as conlleval and seqeval count
    them. Of classes that tell no spans, such as parts of speech, it is the mean of each class's F1, as scikit-learn's
    macro average. ``accuracy`` is the share of words whose class is right, and ``majority`` what a model gets that
    always answers the most frequent one. A word's class is read at its first token.
    """

    metric, better, model, columns = "f1", "higher", "token-classification", ("words", "tags")
    pipeline_tag, row = "token-classification", "text"

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Rows measured at once, padded to the longest of them."""
        max_length: int = 512
        """Longer texts are cut to so many tokens; words beyond are neither trained on nor measured, but counted."""
        max_rows: int | None = None
        """Measure only the first so many rows; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 3, "max_length", "at least 3")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def labels(self, data):
        return tag_names(data)

    def limits(self):
        return {"input_ids": "max_length"}

    def examples(self, data, tokenizer, model):
        check_length(self.config.max_length, "max_length", tokenizer, model)
        return tagged_examples(data, tokenizer, model.config.label2id, self.config.max_length)

    def collator(self, tokenizer, model):
        return DataCollatorForTokenClassification(tokenizer)

    def prepare(self, data, tokenizer, model):
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        rows = self.examples(data, tokenizer, model)
        names = [model.config.id2label[number] for number in range(len(model.config.id2label))]
        words = [len(row) for row in data["words"]]
        batches = []
        for start in range(0, len(rows), self.config.batch_size):
            part = [rows[at] for at in range(start, min(start + self.config.batch_size, len(rows)))]
            its = torch.tensor(sum(words[start : start + len(part)]))
            batches.append({**self.collator(tokenizer, model)(part), "names": names, "words": its})
        if not any((batch["labels"] != IGNORED).any() for batch in batches):
            raise ValueError(f"none of the {len(rows)} rows to measure has a word that is within max_length tokens")
        return batches

    def score(self, model, batch):
        labels, names, words = (batch.pop(name) for name in ("labels", "names", "words"))
        logits = model(**batch).logits.float()
        asked = labels != IGNORED
        chosen = logits.argmax(-1)
        both = labels[asked] * len(names) + chosen[asked]
        counts = {
            "confusion": torch.bincount(both, minlength=len(names) ** 2).view(len(names), -1),
            "loss": cross_entropy(logits[asked], labels[asked], reduction="sum"),
            "cut": words - asked.sum(),
        }
        if tell_spans(names):
            right = found = true = 0
            for row, its in enumerate(asked):
                said, truth = ({*spans([names[n] for n in of[row][its].tolist()])} for of in (chosen, labels))
                right, found, true = right + len(said & truth), found + len(said), true + len(truth)
            counts["spans"] = torch.tensor([right, found, true])
        return counts

    def finish(self, sums):
        confusion = sums["confusion"]
        words, right = confusion.sum(), confusion.diagonal()
        figures = {
            "accuracy": float(right.sum() / words),
            "majority": float(confusion.sum(1).max() / words),
            "loss": float(sums["loss"] / words),
            "words": int(words),
            "words_cut": int(sums["cut"]),
        }
        if "spans" in sums:
            hits, found, true = sums["spans"].tolist()
            return {
                "f1": 2 * hits / (found + true) if found + true else 0.0,
                "precision": hits / found if found else 0.0,
                "recall": hits / true if true else 0.0,
                "spans": int(true),
                **figures,
            }
        either = confusion.sum(0) + confusion.sum(1)
        return {"f1": float((2 * right / either)[either > 0].mean()), **figures}
