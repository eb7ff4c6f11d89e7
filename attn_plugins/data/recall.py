"""Rows in which something of the beginning is asked for at the end, made of a user's own text.

Perplexity does not show whether a model still finds what stood far away; these rows do.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COPIED = 8
"""Tokens of a passage that are given before it has to go on from memory."""

WORDS = re.findall(
    r"\w+",
    """apple river stone garden window candle mirror silver forest bridge engine pencil castle dragon market winter
    hammer butter ticket ladder rocket violin basket camera desert island jacket kitchen lemon monkey needle ocean
    pepper rabbit saddle tunnel velvet whistle yellow zebra""",
)


@dataclass(frozen=True, kw_only=True)
class RecallRow:
    """Tokens of a text that tells something, goes on with something else, and asks for what it told."""

    input_ids_N: torch.Tensor
    """int64, on the CPU."""
    answers: dict[str, tuple[int, int]]
    """Tokens [start, stop) that can be known from the beginning alone, and are predicted from the logits at start - 1
    to stop - 2; and under "text" what lies between, but for its first token. A part that asks for several things has
    the further ones beside it: "names", "names 2", "names 3"."""

    def spans(self, part: str) -> list[tuple[int, int]]:
        """All that a part asks for, in order."""
        return [span for name, span in self.answers.items() if name.split(" ")[0] == part]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one part tells at the beginning, and asks at the end."""

    told: list[int]
    asked: list[int]
    answers: list[tuple[int, int]]
    """Tokens [start, stop) of ``asked``."""


def recall_rows(
    documents: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int = 0,
    parts: Sequence[str] = ("passkey", "copy"),
    passage: int = 64,
) -> list[RecallRow]:
    """Rows of exactly ``length`` tokens: what is told, a stretch of the documents, what is asked.

    From an answer back to where it was told are ``length`` tokens, less the few of the sentences around it (and less
    the other parts' where a row has several). Parts:

    - passkey: seven digits (as in landmark attention, Mohtashami and Jaggi 2023)
    - copy: a natural passage of the documents again; asked for from its ninth token on
    - names: a dictionary of six lines such as "A: apple", five of its words
    - codes: one of eight lines such as "The code of river is 371."

    Args:
        documents: token ids of texts, without special tokens. What is too short for a stretch is joined.
        tokenizer: of the model; a row begins with the token that it begins texts with, where there is one.
        seed: the same one gives the same rows.
        passage: tokens of the passage of ``copy``.

    Raises:
        ValueError: there is no such part, a row has no room for them, the documents are too short, or the tokenizer
            does not know the letters of an answer.
    """
    if not parts or len(set(parts)) < len(parts) or not set(parts) <= set(PARTS):
        raise ValueError(f"parts={list(parts)!r}; allowed: any of {', '.join(PARTS)}, each once")
    if count < 1:
        raise ValueError(f"count={count}; allowed: at least 1")
    if passage <= COPIED:
        raise ValueError(f"passage={passage}; allowed: more than the {COPIED} tokens that are given of it")
    chance = random.Random(f"{seed} {length} {' '.join(sorted(parts))}")
    text = Stretches(documents, tokenizer)
    begin = first_token(tokenizer)
    rows = []
    for _ in range(count):
        taken = text.cut(chance, passage, []) if "copy" in parts else range(0)
        made = {name: PARTS[name](chance, tokenizer, text[taken]) for name in PARTS if name in parts}
        told = [token for name in made for token in made[name].told]
        asked = sum(len(part.asked) for part in made.values())
        room = length - len(begin) - len(told) - asked
        if room < 2:
            raise ValueError(
                f"length={length}; allowed: at least {length - room + 2} for {' and '.join(parts)} with this tokenizer"
                + (f" and passage={passage}" if "copy" in parts else "")
            )
        filler = text[text.cut(chance, room, [taken])]
        ids = [*begin, *told, *filler]
        answers = {"text": (len(ids) - room + 1, len(ids))}
        for name in reversed(made):  # what was told last is asked for first
            for number, (start, stop) in enumerate(made[name].answers, 1):
                answers[name if number == 1 else f"{name} {number}"] = (len(ids) + start, len(ids) + stop)
            ids += made[name].asked
        rows.append(RecallRow(input_ids_N=torch.tensor(ids), answers=answers))
    return rows


class Stretches:
    """Documents laid end to end, and stretches of them."""

    def __init__(self, documents: Sequence[Sequence[int]], tokenizer: Any):
        between = encode(tokenizer, "\n\n")
        self.ids: list[int] = []
        self.whole: list[range] = []
        for document in documents:
            start = len(self.ids)
            self.ids += document
            self.whole.append(range(start, len(self.ids)))
            self.ids += between

    def __getitem__(self, taken: range) -> list[int]:
        return self.ids[taken.start : taken.stop]

    def cut(self, chance: random.Random, length: int, apart: list[range]) -> range:
        """A stretch of one document, else of several, that shares nothing with those that it is to be apart from."""
        for whole in (self.whole, [range(len(self.ids))]):
            free = [piece for document in whole for piece in _without(document, apart) if len(piece) >= length]
            if free:
                break
        if not free:
            raise ValueError(
                f"the text has {len(self.ids):,} tokens, which gives no stretch of {length} beside what is asked for; "
                "allowed: more text, a smaller length"
            )
        piece = chance.choice(free)
        start = piece.start + chance.randrange(len(piece) - length + 1)
        return range(start, start + length)


def _without(whole: range, apart: list[range]) -> Iterator[range]:
    """What is left of a range without others, which don't overlap, in order."""
    start = whole.start
    for taken in sorted(apart, key=lambda one: one.start):
        if taken.start < whole.stop and taken.stop > whole.start:
            yield range(start, max(start, taken.start))
            start = taken.stop
    yield range(start, max(start, whole.stop))


def _passkey(chance: random.Random, tokenizer: Any, passage: list[int]) -> _Part:
    key = str(chance.randrange(10**6, 10**7))
    told = encode(tokenizer, f"The pass key is {key}. Remember it. {key} is the pass key.\n\n")
    asked, answer = question_tokens(tokenizer, "\n\nWhat is the pass key? The pass key is ", key)
    return _Part(told=told, asked=asked, answers=[answer])


def _copy(chance: random.Random, tokenizer: Any, passage: list[int]) -> _Part:
    between = encode(tokenizer, "\n\n")
    answer = (len(between) + COPIED, len(between) + len(passage))
    return _Part(told=[*passage, *between], asked=[*between, *passage], answers=[answer])


def _names(chance: random.Random, tokenizer: Any, passage: list[int]) -> _Part:
    lines = [f"{letter}: {word}" for letter, word in zip("ABCDEF", chance.sample(WORDS, 6), strict=True)]
    told = encode(tokenizer, "\n".join(lines) + "\n\n")
    asked = encode(tokenizer, f"\n\n{lines[0]}")
    answers = []
    for line in lines[1:]:  # the first one tells the form
        more, (start, stop) = question_tokens(tokenizer, f"\n{line[:3]}", line[3:])
        answers.append((len(asked) + start, len(asked) + stop))
        asked += more
    return _Part(told=told, asked=asked, answers=answers)


def _codes(chance: random.Random, tokenizer: Any, passage: list[int]) -> _Part:
    words = chance.sample(WORDS, 8)
    codes = [str(number) for number in chance.sample(range(100, 1000), 8)]
    lines = [f"The code of {word} is {code}.\n" for word, code in zip(words, codes, strict=True)]
    number = chance.randrange(8)
    asked, answer = question_tokens(tokenizer, f"\n\nThe code of {words[number]} is ", codes[number])
    return _Part(told=encode(tokenizer, "".join(lines) + "\n"), asked=asked, answers=[answer])


PARTS: dict[str, Callable[[random.Random, Any, list[int]], _Part]] = {
    "passkey": _passkey,
    "names": _names,
    "codes": _codes,
    "copy": _copy,
}
"""In the order in which a row tells them."""


def question_tokens(tokenizer: Any, question: str, answer: str) -> tuple[list[int], tuple[int, int]]:
    """Tokens of both together, as the tokenizer joins them, and which of them, [start, stop), are the answer's.

    Raises:
        ValueError: the tokenizer does not know the letters of the answer.
    """
    both, alone = encode(tokenizer, question + answer), encode(tokenizer, question)
    start = next((n for n, (one, other) in enumerate(zip(both, alone, strict=False)) if one != other), len(alone))
    if start >= len(both) or tokenizer.unk_token_id in both[start:]:
        raise ValueError(f"the tokenizer does not know the letters of {answer!r}, so that it cannot be asked for")
    return both, (start, len(both))


def first_token(tokenizer: Any) -> list[int]:
    """The token that a tokenizer begins texts with, where there is one."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
