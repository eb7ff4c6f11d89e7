from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.data.answers import answer_tokens, best, check_questions, exact, overlap, windows
from attn_plugins.data.text import check_length
from attn_plugins.tasks import TaskConfig, TrainableTask, register_task

TARGETS = ("start_positions", "end_positions")


class Windows:
    """Batches of windows, padded at their ends whatever the tokenizer's side is, so that positions hold."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        inputs = [{name: its for name, its in row.items() if name in self.tokenizer.model_input_names} for row in rows]
        batch = dict(self.tokenizer.pad(inputs, padding_side="right", return_tensors="pt"))
        given = [name for name in TARGETS if name in rows[0]]
        return {**batch, **{name: torch.tensor([row[name] for row in rows]) for name in given}}


@register_task("question-answering")
class QuestionAnswering(TrainableTask):
    """F1 and exact match of answers that a model marks in a text, as SQuAD defines them, as shares of 1.

    Question and text are one row; a longer text is read in windows that overlap, and the best span of all windows is
    the answer. Where some of the rows that are measured have no answer, as in SQuAD 2, a model may say so, by the
    score of a window's first token; those figures are also told apart.
    """

    metric, better, model = "f1", "higher", "question-answering"
    columns = ("question", "context", "answer")
    pipeline_tag, row = "question-answering", "window"
    targets = TARGETS

    @dataclass(frozen=True, kw_only=True)
    class Config(TaskConfig):
        batch_size: int = 16
        """Windows measured at once, padded to the longest of them."""
        max_length: int = 384
        """Tokens of question and text in a window."""
        stride: int = 128
        """Tokens of the text that a window has in common with the one before."""
        max_answer_length: int = 30
        """Tokens that an answer has at most, when it is measured."""
        null_threshold: float = 0.0
        """By how much having no answer has to score above the best span to be the answer."""
        max_rows: int | None = None
        """Measure only the first so many questions; null for all."""

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.max_length >= 8, "max_length", "at least 8")
            self.require(0 <= self.stride <= self.max_length // 2, "stride", "0 to half of max_length")
            self.require(self.max_answer_length >= 1, "max_answer_length", "at least 1")
            self.require(self.max_rows is None or self.max_rows >= 1, "max_rows", "at least 1, or null")

    def examples(self, data, tokenizer, model):
        self._check(data, tokenizer, model)

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows, of_rows, places = windows(tokenizer, batch, self.config.max_length, self.config.stride)
            starts, ends = [], []
            for row, its, ids in zip(of_rows, places, rows["input_ids"], strict=True):
                answers = batch["answer"][row]
                answer = None
                if answers["text"]:
                    first = answers["answer_start"][0]
                    answer = (first, first + len(answers["text"][0]))
                start, end = answer_tokens(its, answer) or (nothing(tokenizer, ids),) * 2
                starts.append(start)
                ends.append(end)
            return {**rows, "start_positions": starts, "end_positions": ends}

        return data.map(encode, batched=True, remove_columns=data.column_names, desc="tokenizing")

    def collator(self, tokenizer, model):
        return Windows(tokenizer)

    def prepare(self, data, tokenizer, model):
        if self.config.max_rows is not None:
            data = data.select(range(min(len(data), self.config.max_rows)))
        self._check(data, tokenizer, model)
        may_lack = any(not row["text"] for row in data["answer"])
        rows = data[:]
        encoded, of_rows, places = windows(tokenizer, rows, self.config.max_length, self.config.stride)
        batches = []
        for start in range(0, len(of_rows), self.config.batch_size):
            part = range(start, min(start + self.config.batch_size, len(of_rows)))
            inputs = Windows(tokenizer)([{name: its[at] for name, its in encoded.items()} for at in part])
            asked = [
                {
                    "row": of_rows[at],
                    "context": rows["context"][of_rows[at]],
                    "answers": rows["answer"][of_rows[at]]["text"],
                    "places": places[at],
                    "nothing": nothing(tokenizer, encoded["input_ids"][at]),
                    "may_lack": may_lack,
                }
                for at in part
            ]
            batches.append({**inputs, "asked": asked})
        return batches

    def score(self, model, batch):
        asked = batch.pop("asked")
        out = model(**batch)
        scores_BTT = out.start_logits.float()[:, :, None] + out.end_logits.float()[:, None, :]
        length = scores_BTT.shape[-1]
        allowed_TT = torch.ones(length, length, dtype=torch.bool, device=scores_BTT.device)
        allowed_TT = allowed_TT.triu() & ~allowed_TT.triu(self.config.max_answer_length)
        answers = []
        for scores_TT, one in zip(scores_BTT, asked, strict=True):
            inside = [place is not None and place[0] < place[1] for place in one["places"]]
            inside_T = torch.tensor([*inside, *[False] * (length - len(inside))], device=scores_TT.device)
            spans_TT = scores_TT.masked_fill(~(allowed_TT & inside_T[:, None] & inside_T), -torch.inf)
            first, last = divmod(int(spans_TT.argmax()), length)
            found = any(inside)
            answers.append(
                {
                    "row": one["row"],
                    "score": float(spans_TT[first, last]),
                    "text": one["context"][one["places"][first][0] : one["places"][last][1]] if found else "",
                    "null": float(scores_TT[one["nothing"], one["nothing"]]),
                    "truths": one["answers"],
                    "may_lack": one["may_lack"],
                }
            )
        return {"answers": answers}

    def finish(self, sums):
        of_rows: dict[int, list[dict[str, Any]]] = {}
        for one in sums["answers"]:
            of_rows.setdefault(one["row"], []).append(one)
        scores: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for its in of_rows.values():
            span = max(its, key=lambda one: one["score"])
            lacks = min(one["null"] for one in its) - span["score"] > self.config.null_threshold
            said = "" if span["may_lack"] and lacks else span["text"]
            pair = best(overlap, said, span["truths"]), best(exact, said, span["truths"])
            scores[bool(span["truths"])].append(pair)
        every = scores[True] + scores[False]
        figures = {**_means(every), "questions": len(every)}
        if scores[False]:
            for known, name in ((True, "answerable"), (False, "unanswerable")):
                figures |= {f"{figure}_{name}": value for figure, value in _means(scores[known]).items()}
            figures["unanswerable"] = len(scores[False])
        return figures

    def _check(self, data, tokenizer, model):
        check_length(self.config.max_length, "max_length", tokenizer, model)
        check_questions(data, tokenizer, self.config.max_length, self.config.stride)


def nothing(tokenizer: Any, ids: list[int]) -> int:
    """The token of a window that stands for no answer: the classifier's, the one that begins a text, or the first."""
    marks = [mark for mark in (tokenizer.cls_token_id, tokenizer.bos_token_id) if mark is not None]
    return next((ids.index(mark) for mark in marks if mark in ids), 0)


def _means(pairs: list[tuple[float, float]]) -> dict[str, float]:
    names = ("f1", "exact")
    return {name: sum(pair[at] for pair in pairs) / len(pairs) for at, name in enumerate(names)} if pairs else {}
