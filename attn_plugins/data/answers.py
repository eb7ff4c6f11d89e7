"""Questions, texts that answer them, and answers: what columns have to hold, windows over long texts, and scores."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attn_plugins.config.extras import need
from attn_plugins.core.options import shown

if TYPE_CHECKING:
    from datasets import Dataset


def read_answers(data: "Dataset", role: str, folder: Path | None) -> "Dataset":
    """Rows whose column ``role`` holds ``{"text": [...], "answer_start": [...]}`` as in SQuAD, of texts too.

    A text, or a list of texts, starts where it first stands in the row's context, at -1 where it does not; an empty one
    says that there is no answer.
    """
    datasets = need("datasets", "train")
    feature = data.features[role]
    of = getattr(feature, "feature", feature)
    if getattr(of, "dtype", None) not in ("string", "large_string", "string_view") or "context" not in data.features:
        return data

    def found(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        answers = []
        for value, context in zip(batch[role], batch["context"], strict=True):
            texts = [text for text in ([value] if isinstance(value, str) else value or []) if text != ""]
            starts = [-1 if text is None or context is None else context.find(text) for text in texts]
            answers.append(None if value is None else {"text": texts, "answer_start": starts})
        return {role: answers}

    squad = {"text": datasets.List(datasets.Value("string")), "answer_start": datasets.List(datasets.Value("int64"))}
    features = datasets.Features({**data.features, role: squad})
    return data.map(found, batched=True, features=features, desc="finding answers")


def check_answers(data: "Dataset", role: str, what: str) -> None:
    """Raise a ValueError where rows hold no answers, or one that does not stand in its context."""
    feature = data.features[role]
    if set(feature if isinstance(feature, dict) else ()) < {"text", "answer_start"}:
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise ValueError(
            f'{what} holds {kind}; allowed: texts, or {{"text": [...], "answer_start": [...]}} as in SQuAD'
        )
    wrong = []
    for number, row in enumerate(data, 1):
        answers = row[role]
        texts, starts = (answers or {}).get("text"), (answers or {}).get("answer_start")
        if texts is None or starts is None or len(texts) != len(starts) or None in texts or None in starts:
            wrong.append(f"has no answers in row {number} of {len(data)}, or not a start for each")
            continue
        context = row.get("context") or ""
        for text, start in zip(texts, starts, strict=True):
            if start < 0 or context[start : start + len(text)] != text:
                place = "nowhere in its context" if text not in context else f"not at {start} in its context"
                wrong.append(f"has {shown(text)} in row {number} of {len(data)}, which stands {place}")
                break
    if wrong:
        more = f"; so it is in {len(wrong) - 1} more rows" if len(wrong) > 1 else ""
        raise ValueError(f"{what} {wrong[0]}{more}. An answer is a part of its context; without one, leave it empty")


def windows(
    tokenizer: Any, rows: dict[str, list[Any]], max_length: int, stride: int
) -> tuple[dict[str, list[Any]], list[int], list[list[tuple[int, int] | None]]]:
    """Question and context as one row of at most ``max_length`` tokens, or as several where the context is longer.

    Args:
        rows: with "question" and "context".
        stride: tokens of the context that a window has in common with the one before.

    Returns:
        (what the tokenizer gives, number of the row of each window, characters [start, stop) of the context that each
        of its tokens stands for, None of one that stands for none)
    """
    encoded = tokenizer(
        [question.strip() for question in rows["question"]],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    of_rows, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    places = [
        [tuple(place) if part == 1 else None for place, part in zip(its, encoded.sequence_ids(at), strict=True)]
        for at, its in enumerate(offsets)
    ]
    return dict(encoded), of_rows, places


def check_questions(data: "Dataset", tokenizer: Any, max_length: int, stride: int) -> None:
    """Raise a ValueError where a question leaves no room for a window of its context, or tokens tell no place."""
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} does not tell where tokens stood; allowed: a fast tokenizer")
    room = max_length - stride - tokenizer.num_special_tokens_to_add(pair=True) - 1
    number = 0
    for batch in data.select_columns("question").iter(1000):
        for ids in tokenizer(batch["question"], add_special_tokens=False, verbose=False)["input_ids"]:
            number += 1
            if len(ids) > room:
                raise ValueError(
                    f"the question in row {number} of {len(data)} has {len(ids)} tokens; allowed: at most {room}, with "
                    f"max_length={max_length} and stride={stride}"
                )


def answer_tokens(places: Sequence[tuple[int, int] | None], answer: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token of an answer's characters [start, stop) in a window; None where it is not all in there."""
    its = [(at, place) for at, place in enumerate(places) if place is not None and place[0] < place[1]]
    if answer is None or not its or answer[0] < its[0][1][0] or answer[1] > its[-1][1][1]:
        return None
    first = max((at for at, place in its if place[0] <= answer[0]), default=None)
    last = min((at for at, place in its if place[1] >= answer[1]), default=None)
    return None if first is None or last is None or last < first else (first, last)


def normal(answer: str) -> list[str]:
    """Words of an answer as SQuAD compares them: lower case, without punctuation and articles."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact(answer: str, truth: str) -> float:
    """1 where two answers have the same words, else 0: SQuAD's exact match."""
    return float(normal(answer) == normal(truth))


def overlap(answer: str, truth: str) -> float:
    """SQuAD's F1 of the words of two answers; where one is empty, 1 if both are, else 0."""
    said, true = normal(answer), normal(truth)
    if not said or not true:
        return float(said == true)
    common = sum((Counter(said) & Counter(true)).values())
    return 2 * common / (len(said) + len(true))


def best(score: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """The score of an answer by the nearest of all right ones; with none, the right one is to say nothing."""
    return max(score(answer, truth) for truth in [text for text in truths if normal(text)] or [""])
