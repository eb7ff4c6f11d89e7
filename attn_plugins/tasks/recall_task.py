"""What the tasks of recall share: their rows, how they are scored in one pass or generated, figures by distance."""

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessor, LogitsProcessorList

from attn_plugins.data.recall import RecallRow, recall_rows
from attn_plugins.data.text import position_limit
from attn_plugins.tasks import Task, TaskConfig
from attn_plugins.tasks.logits import last_logits

SURPLUS = 4
"""Times the tokens of the rows that are read of the text, at most."""


@dataclass(frozen=True, kw_only=True)
class RecallConfig(TaskConfig):
    distances: list[int] = field(default_factory=lambda: [256, 1024])
    """Tokens from what is told to what is asked: the length of a row."""
    rows: int = 8
    """Rows at each distance."""
    passage: int = 64
    """Tokens of a passage that is to be copied, the first 8 of which are given."""
    by: Literal["forward", "generate"] = "forward"
    """forward: one pass over the row, each token of an answer given those before it. generate: token by token
    through the cache, each given those that the model has chosen itself, ``loss`` too: ``exact`` says most."""
    seed: int = 0
    """Of the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        apart = len(set(self.distances)) == len(self.distances) > 0
        self.require(apart and min(self.distances) >= 1, "distances", "at least one, from 1, each once")
        self.require(self.rows >= 1, "rows", "at least 1")


class RecallTask(Task):
    """Whether a model still finds what stood so many tokens ago: the share of the answers' tokens that it names right.

    Rows are made of the held-out text (:func:`attn_plugins.data.recall.recall_rows`, unless ``maker`` says otherwise).
    ``exact`` is the share of rows
    with the whole answer right, ``loss`` the mean negative log-likelihood of an answer's token; ``by_distance`` has
    them for each distance. A subclass says in ``parts`` what a row asks for; where it asks for several things,
    ``by_part`` has the figures of each, and the task's own are their means.
    """

    metric, better, model, recalls = "accuracy", "higher", "causal-lm", True

    Config: ClassVar[type[TaskConfig]] = RecallConfig

    @abc.abstractmethod
    def parts(self) -> tuple[str, ...]:
        """What rows ask for: of ``recall_rows`` keys of its ``PARTS``."""

    def maker(self, data: Any, tokenizer: Any) -> Callable[[int], list[RecallRow]]:
        """What makes rows of a number of tokens, all of exactly so many; ValueError where they cannot be made."""
        documents = [ids for _, ids in self.texts(data["text"], tokenizer)]
        return lambda length: recall_rows(
            documents,
            tokenizer,
            length=length,
            count=self.config.rows,
            seed=self.config.seed,
            parts=self.parts(),
            passage=self.config.passage,
        )

    def texts(self, texts: Iterable[str], tokenizer: Any) -> list[tuple[str, list[int]]]:
        """As many texts as the rows need, each with its tokens."""
        found: list[tuple[str, list[int]]] = []
        tokens, enough = 0, SURPLUS * self.config.rows * max(self.config.distances)
        for text in texts:
            if tokens > enough:
                break
            found.append((text, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
            tokens += len(found[-1][1])
        return found

    def prepare(self, data, tokenizer, model):
        longest, limit = max(self.config.distances), position_limit(model)
        if limit is not None and longest > limit:
            raise ValueError(f"distances={longest}; allowed: at most {limit}, the model's max_position_embeddings")
        make = self.maker(data, tokenizer)
        batches = []
        for number, distance in enumerate(self.config.distances):
            rows = make(distance)
            asked_RN = torch.zeros(len(rows), distance, dtype=torch.long)
            for row, asked_N in zip(rows, asked_RN, strict=True):
                for part, name in enumerate(self.parts(), 1):
                    for start, stop in row.spans(name):
                        asked_N[start:stop] = part
            ids_RN = torch.stack([row.input_ids_N for row in rows])
            for ids_BN, asked_BN in zip(
                *(rows.split(self.config.batch_size) for rows in (ids_RN, asked_RN)), strict=True
            ):
                batches.append({"input_ids": ids_BN, "asked": asked_BN, "distance": torch.tensor(number)})
        return batches

    def score(self, model, batch):
        ids_BN, asked_BN = batch["input_ids"], batch["asked"]
        first = int((asked_BN > 0).any(0).nonzero()[0])
        answer = generated if self.config.by == "generate" else predicted
        chosen_BK, logits_BKV = answer(model, ids_BN, asked_BN, first)
        asked_BK, right_BK = asked_BN[:, first:], chosen_BK == ids_BN[:, first:]
        sums: dict[str, list[torch.Tensor]] = {name: [] for name in ("right", "loss", "tokens", "exact", "rows")}
        for part in range(1, len(self.parts()) + 1):
            its_BK = asked_BK == part
            losses = cross_entropy(logits_BKV[its_BK].float(), ids_BN[:, first:][its_BK], reduction="none")
            sums["right"].append(right_BK[its_BK].double().sum())
            sums["loss"].append(losses.double().sum())
            sums["tokens"].append(its_BK.double().sum())
            sums["exact"].append(((right_BK | ~its_BK).all(1) & its_BK.any(1)).double().sum())
            sums["rows"].append(its_BK.any(1).double().sum())
        place_D = torch.arange(len(self.config.distances), device=ids_BN.device) == batch["distance"]
        return {name: torch.outer(torch.stack(values), place_D.double()) for name, values in sums.items()}

    def finish(self, sums):
        by_part = {part: self._figures(sums, number) for number, part in enumerate(self.parts())}
        if len(by_part) == 1:
            return next(iter(by_part.values()))
        figures = _mean(list(by_part.values()))
        by_distance = [_mean(list(parts)) for parts in zip(*(f["by_distance"] for f in by_part.values()), strict=True)]
        return {**figures, "by_distance": by_distance, "by_part": by_part}

    def _figures(self, sums: dict[str, torch.Tensor], part: int) -> dict[str, Any]:
        """Of one part: over all distances, and for each."""

        def of(at: slice) -> dict[str, Any]:
            right, loss, tokens, exact, rows = (
                float(sums[name][part, at].sum()) for name in ("right", "loss", "tokens", "exact", "rows")
            )
            return {"accuracy": right / tokens, "exact": exact / rows, "loss": loss / tokens, "rows": round(rows)}

        by_distance = [
            {"distance": distance, **of(slice(number, number + 1))}
            for number, distance in enumerate(self.config.distances)
        ]
        return {**of(slice(None)), "by_distance": by_distance}


def _mean(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a task from those of its parts, each of which has as many rows."""
    means = {name: sum(one[name] for one in parts) / len(parts) for name in ("accuracy", "exact", "loss")}
    return {name: means.get(name, value) for name, value in parts[0].items()}


def predicted(
    model: nn.Module, ids_BN: torch.Tensor, asked_BN: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest token at each position from ``first`` on, given the row before it, and the logits there.

    Returns:
        (chosen_BK, logits_BKV) of the K = N - first positions.
    """
    logits_BKV = last_logits(model, ids_BN, ids_BN.shape[1] - first)
    return logits_BKV.argmax(-1), logits_BKV


def generated(
    model: Any, ids_BN: torch.Tensor, asked_BN: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``predicted``, by ``generate``: what is asked for is the model's own choice, all between is as in the row."""
    model = getattr(model, "module", model)
    number = ids_BN.shape[1] - first
    out = model.generate(
        input_ids=ids_BN[:, :first],
        attention_mask=torch.ones_like(ids_BN[:, :first]),
        logits_processor=LogitsProcessorList([_AsInTheRow(ids_BN, asked_BN > 0)]),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=number,
        eos_token_id=2**31 - 1,  # no token: nothing ends a text early
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, first:], torch.stack(out.logits, 1)


class _AsInTheRow(LogitsProcessor):
    """Has generate() take the row's own token wherever nothing is asked."""

    def __init__(self, ids_BN: torch.Tensor, free_BN: torch.Tensor):
        self.ids_BN, self.free_BN = ids_BN, free_BN

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1]
        given_BV = torch.full_like(scores, -torch.inf).scatter(1, self.ids_BN[:, at, None], 0.0)
        return torch.where(self.free_BN[:, at, None], scores, given_BV)
