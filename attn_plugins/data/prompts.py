"""Prompts of a fixed number of tokens: an instruction, a body that fills the row, a question, and its answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.data.recall import RecallRow, encode, first_token, question_tokens

BODY = "\x01"
"""Stands for what a user says while a chat template is read."""


class NoRoomError(ValueError):
    """A row is too short for a prompt."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a row says, but for its length."""

    instruction: str
    body: Callable[[int], list[int]]
    """Number of tokens -> a body of exactly so many."""
    least: int
    """Tokens that a body has to have."""
    question: str
    answers: Sequence[tuple[str, str]]
    """Each answer, after what the one who answers says before it."""


def prompt_row(prompt: Prompt, part: str, tokenizer: Any, length: int, *, chat: bool) -> RecallRow:
    """A row of exactly ``length`` tokens, of which none is cut away: the body fills what the rest leaves.

    Args:
        part: what the answers are called in the row.
        chat: instruction, body and question are what the user says, by the tokenizer's chat template, and the answers
            what the assistant says.

    Raises:
        NoRoomError: the row has no room for the prompt.
        ValueError: the tokenizer has no chat template, or does not know the letters of an answer.
    """
    before, after = chat_frame(tokenizer) if chat else (first_token(tokenizer), [])
    start = [*before, *encode(tokenizer, prompt.instruction)]
    end = [*encode(tokenizer, prompt.question), *after]
    said: list[int] = []
    spans = []
    for lead, answer in prompt.answers:
        lead = lead.lstrip() if chat and not said else lead  # nothing comes before it
        tokens, (first, stop) = question_tokens(tokenizer, lead, answer)
        spans.append((len(said) + first, len(said) + stop))
        said += tokens
    room = length - len(start) - len(end) - len(said)
    if room < prompt.least:
        raise NoRoomError(
            f"length={length}; allowed: at least {length - room + prompt.least} for {part} with this tokenizer"
        )
    ids = [*start, *prompt.body(room), *end]
    answers = {"text": (len(start) + 1, len(start) + room)}
    for number, (first, stop) in enumerate(spans, 1):
        answers[part if number == 1 else f"{part} {number}"] = (len(ids) + first, len(ids) + stop)
    ids += said
    assert len(ids) == length, (len(ids), length)
    return RecallRow(input_ids_N=torch.tensor(ids), answers=answers)


def chat_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens that a chat template puts before what a user says, and from there on to where the assistant begins.

    Raises:
        ValueError: the tokenizer has no chat template, or one that does not repeat what the user says as it is.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat=True, and the tokenizer has no chat template; allowed: chat=False")
    said = [{"role": "user", "content": BODY}]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    if text.count(BODY) != 1:
        raise ValueError(
            f"chat=True, and the tokenizer's chat template says {text.count(BODY)} times what the user says; allowed: "
            "chat=False"
        )
    before, _, after = text.partition(BODY)
    return encode(tokenizer, before), encode(tokenizer, after)
