"""What tasks share that make rows of tokens with answers in them, for models trained from scratch."""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import cross_entropy

from attn_plugins.data.synthetic.rows import Drawn, TokenRows, batches
from attn_plugins.data.text import IGNORED
from attn_plugins.tasks import TaskConfig

TRAINED = ("input_ids", "labels")


class AnswersTask(abc.ABC):
    """The share of the answers in rows that the task makes which a causal model names right, and their mean loss.

    A model is trained, and measured, on the answers alone. ``exact`` is the share of rows with all of them right.
    Figures named ``by_...`` have what there is of some answers alone.
    """

    metric, better, model = "accuracy", "higher", "causal-tokens"
    columns: ClassVar[tuple[str, ...]] = ()
    pipeline_tag, row = "text-generation", "row of tokens"
    config: Any

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 64
        """Rows measured at once."""
        length: int = 64
        """Tokens in a row."""
        vocab_size: int = 128
        """Different tokens, of which a model has to know as many or more."""
        train_rows: int = 20_000
        """Rows to train on."""
        rows: int = 1000
        """Held-out rows that are measured."""
        seed: int = 0
        """Of the rows; a held-out one is never among those to train on, whatever the seeds."""

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("train_rows", "rows"):
                self.require(getattr(self, name) >= 1, name, "at least 1")
            self.require(0 <= self.seed < 2**62, "seed", "0 to 2**62 - 1")

    @abc.abstractmethod
    def made(self, number: int, held_out: bool) -> Drawn:
        """So many rows: "input_ids" (R, N); "labels" (R, N), each the answer that the token before it asks for, and
        -100 elsewhere; and for each of ``groups`` a column (R, N) or (R, 1) with the number of the answer's group."""

    def groups(self) -> dict[str, list[int]]:
        """Name of figures for some answers alone -> what each group, in the order of their numbers, has of it."""
        return {}

    def examples(self, data, processing, model):
        self._check_model(model)
        rows = self.made(self.config.train_rows, held_out=False)
        return TokenRows({name: rows[name] for name in TRAINED})

    def collator(self, processing, model):
        return stacked

    def blank(self, number, model):
        self._check_model(model)
        ids = torch.zeros(number, self.config.length, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}

    def row_of(self):
        return f"row of {self.config.length} tokens"

    def prepare(self, data, processing, model):
        self._check_model(model)
        return list(batches(self.made(self.config.rows, held_out=True), self.config.batch_size))

    def score(self, model, batch):
        ids_BN, labels_BK = batch["input_ids"], batch["labels"][:, 1:]
        asked_BK = labels_BK != IGNORED
        logits_BKV = model(input_ids=ids_BN, use_cache=False).logits[:, :-1]
        logits_AV, truth_A = logits_BKV[asked_BK].float(), labels_BK[asked_BK]
        right_A = logits_AV.argmax(-1) == truth_A
        wrong_B = torch.zeros_like(asked_BK).masked_scatter(asked_BK, ~right_A).any(1)
        counted = torch.stack(
            [right_A, cross_entropy(logits_AV, truth_A, reduction="none"), torch.ones_like(right_A)]
        ).double()
        sums = {"all": counted.sum(1), "rows": torch.stack([~wrong_B, torch.ones_like(wrong_B)]).double().sum(1)}
        for name, values in self.groups().items():
            group_A = batch[name].expand_as(ids_BN)[:, 1:][asked_BK]
            sums[name] = torch.zeros(3, len(values), dtype=torch.float64, device=ids_BN.device)
            sums[name].index_add_(1, group_A, counted)
        return sums

    def finish(self, sums):
        found = {**_figures(sums["all"]), "exact": float(sums["rows"][0] / sums["rows"][1])}
        for name, values in self.groups().items():
            parts = zip(values, sums[name].T, strict=True)
            found[f"by_{name}"] = [{name: value, **_figures(part)} for value, part in parts if part[2]]
        return found

    def _check_model(self, model: Any) -> None:
        config = model.config.get_text_config()
        limits = {"length": getattr(config, "max_position_embeddings", None), "vocab_size": config.vocab_size}
        for option, limit in limits.items():
            if limit is not None and getattr(self.config, option) > limit:
                named = "max_position_embeddings" if option == "length" else option
                raise ValueError(
                    f"{option}={getattr(self.config, option)}; allowed: at most {limit}, the model's {named}"
                )


def stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Rows of one length as a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def upper_bounds(largest: int) -> list[int]:
    """4, 8, 16 and on, up to the first that is not below ``largest``: bounds of ranges of distances."""
    bounds = [4]
    while bounds[-1] < largest:
        bounds.append(2 * bounds[-1])
    return bounds


def _figures(counted: torch.Tensor) -> dict[str, Any]:
    right, loss, answers = counted.tolist()
    return {"accuracy": right / answers, "loss": loss / answers, "answers": round(answers)}
