"""Rows of passages, in one of which a question's answer stands, made of questions, contexts and answers as in SQuAD."""

import contextlib
import random
from typing import Any

from attn_plugins.data.prompts import NoRoomError, Prompt, prompt_row
from attn_plugins.data.recall import RecallRow, encode

TOLD = "Answer the question based on the given passages. Only give me the answer and do not output any other words."


def question_rows(
    data: Any, tokenizer: Any, *, length: int, count: int, seed: int = 0, chat: bool = False
) -> list[RecallRow]:
    """Rows of exactly ``length`` tokens: passages, and a question that one of them answers (part "context-qa").

    The passage with the answer is whole, and stands first in one row, further on in the next ones, last in the last
    one. The others are contexts of other questions without the words of the answer, the last of them cut to fit.
    Several lengths have the same questions, where these fit into the shortest.

    Args:
        data: rows with "question", "context" and "answer", which holds ``{"text": [...], ...}``, the first of which is
            asked for. Rows without an answer are passed over.
        chat: as the tokenizer's chat template has it (:func:`~attn_plugins.data.prompts.prompt_row`).

    Raises:
        ValueError: fewer questions than rows fit into so many tokens, or there are too few other passages to fill a
            row.
    """
    asked = [row for row in data if row["answer"]["text"]]
    passages = list(dict.fromkeys(row["context"] for row in asked))
    order = list(range(len(asked)))
    random.Random(seed).shuffle(order)
    rows: list[RecallRow] = []
    for at in order:
        if len(rows) == count:
            break
        chance = random.Random(f"{seed} {length} {at}")
        prompt = _prompt(chance, asked[at], passages, tokenizer, (len(rows) + 0.5) / count)
        with contextlib.suppress(NoRoomError):
            rows.append(prompt_row(prompt, "context-qa", tokenizer, length, chat=chat))
    if len(rows) < count:
        raise ValueError(
            f"length={length}; {len(rows)} of {len(asked)} questions with an answer fit into it with their context; "
            f"allowed: a greater length, or at most {len(rows)} rows"
        )
    return rows


def _prompt(chance: random.Random, asked: dict[str, Any], passages: list[str], tokenizer: Any, share: float) -> Prompt:
    """One question among passages, the right one after this share of the others."""
    answer = asked["answer"]["text"][0]
    right, end = _passage(tokenizer, asked["context"]), encode(tokenizer, "\n\n")

    def body(room: int) -> list[int]:
        others, left = [], room - len(right)
        for passage in chance.sample(passages, len(passages)):
            if left == 0:
                break
            if passage != asked["context"] and answer.lower() not in passage.lower():
                tokens = _passage(tokenizer, passage)
                if len(tokens) > left:
                    tokens = (tokens[: max(0, left - len(end))] + end)[:left]
                others.append(tokens)
                left -= len(tokens)
        if left:
            raise ValueError(
                f"the passages without the answer {answer!r} have {room - len(right) - left:,} tokens, and {left:,} "
                "more are needed; allowed: more rows, a smaller length"
            )
        others.insert(round(share * len(others)), right)
        return [token for tokens in others for token in tokens]

    return Prompt(
        instruction=f"{TOLD}\n\nThe following are given passages.\n\n",
        body=body,
        least=len(right) + 2,
        question=f"{TOLD}\n\nQuestion: {asked['question'].strip()}",
        answers=[(" Answer:", f" {answer}")],
    )


def _passage(tokenizer: Any, context: str) -> list[int]:
    return encode(tokenizer, f"Passage:\n{context.strip()}\n\n")
