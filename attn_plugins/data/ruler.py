"""Rows like those of RULER (Hsieh et al. 2024, arXiv:2404.06654), made of a user's own text.

What differs from RULER: the text around needles is the user's, and so are the words of a list; rows have exactly as
many tokens as are asked for; and answers have one right order, so that they can be scored in one pass too.
"""

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attn_plugins.data.prompts import Prompt, prompt_row
from attn_plugins.data.recall import WORDS, RecallRow, Stretches, encode

LETTERS = 5
"""Of the name of a variable."""
SHARES = (6, 9, 14)
"""One of so many words of a list is the most frequent one, the second, the third."""
RARER = 5
"""Times that a word of a list occurs less than the third, at least."""
FEWEST = 70
"""Words of a list: with fewer the third is not so many times another."""
DIFFERENT = 100
"""Different words that the text has to have for lists, whatever their length."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What rows are made of."""

    text: Stretches
    words: Sequence[str]
    """Different words of the text."""
    tokenizer: Any
    needles: int
    chains: int
    hops: int


def words_of(texts: Sequence[str]) -> list[str]:
    """The different words of 4 to 10 small letters in texts, in their order."""
    return list(dict.fromkeys(word for text in texts for word in re.findall(r"(?<!\w)[a-z]{4,10}(?!\w)", text)))


def ruler_rows(
    source: Source, part: str, *, length: int, count: int, seed: int = 0, chat: bool = False
) -> list[RecallRow]:
    """Rows of exactly ``length`` tokens, whose answers stand anywhere in them. Parts:

    - multikey: ``needles`` sentences such as "One of the special magic numbers for river is: 1234567." at random places
      of the text; one of the numbers is asked for, from row to row a later one
    - multiquery: the same, and all numbers are asked for, in an order that the question says
    - variable-tracking: ``chains`` of assignments, VAR ABCDE = 12345, then ``hops`` times VAR FGHIJ = VAR ABCDE; asked
      for are the variables of one chain, in the order in which they are assigned
    - common-words: a list of words of the text, of which three come more often than all others; asked for are these
      three, the most frequent first

    Args:
        seed: the same one gives the same rows.
        chat: as the tokenizer's chat template has it (:func:`~attn_plugins.data.prompts.prompt_row`).

    Raises:
        ValueError: there is no such part, a row has no room for it, or the text has too few tokens or words for it.
    """
    if part not in RULER:
        raise ValueError(f"part={part!r}; allowed: {', '.join(RULER)}")
    chance = random.Random(f"{seed} {length} {part}")
    made = (RULER[part](chance, source, number / count) for number in range(count))
    return [prompt_row(prompt, part, source.tokenizer, length, chat=chat) for prompt in made]


def _scattered(chance: random.Random, source: Source, sentences: list[str]) -> tuple[Callable[[int], list[int]], int]:
    """A body of text with sentences in it, in their order, each on a line; and the least tokens of one."""
    pieces = [encode(source.tokenizer, f"\n{sentence}\n") for sentence in sentences]
    taken = sum(map(len, pieces))

    def body(room: int) -> list[int]:
        filler = source.text[source.text.cut(chance, room - taken, [])]
        ends = {token for token in set(filler) if source.tokenizer.decode([token]).endswith((".", "!", "?", "\n"))}
        places = [place for place, token in enumerate(filler, 1) if token in ends]
        if len(places) < len(pieces):  # no sentences to stand between
            places = list(range(1, len(filler) + 1))
        ids, done = [], 0
        for place, piece in zip(sorted(chance.sample(places, len(pieces))), pieces, strict=True):
            ids += [*filler[done:place], *piece]
            done = place
        return [*ids, *filler[done:]]

    return body, taken + max(2, len(pieces))


def _needles(chance: random.Random, source: Source) -> tuple[dict[str, str], Callable[[int], list[int]], int]:
    keys = chance.sample(WORDS, source.needles)
    numbers = dict(zip(keys, map(str, chance.sample(range(10**6, 10**7), source.needles)), strict=True))
    told = [f"One of the special magic numbers for {key} is: {number}." for key, number in numbers.items()]
    return numbers, *_scattered(chance, source, told)


HIDDEN = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n\n"
)


def _multikey(chance: random.Random, source: Source, share: float) -> Prompt:
    numbers, body, least = _needles(chance, source)
    key = list(numbers)[int(share * source.needles)]
    return Prompt(
        instruction=HIDDEN,
        body=body,
        least=least,
        question=f"\n\nWhat is the special magic number for {key} mentioned in the provided text?",
        answers=[(f" The special magic number for {key} mentioned in the provided text is", f" {numbers[key]}")],
    )


def _multiquery(chance: random.Random, source: Source, share: float) -> Prompt:
    numbers, body, least = _needles(chance, source)
    keys = chance.sample(list(numbers), len(numbers))
    asked = f"the special magic numbers for {', '.join(keys[:-1])}, and {keys[-1]} mentioned in the provided text"
    return Prompt(
        instruction=HIDDEN,
        body=body,
        least=least,
        question=f"\n\nWhat are all {asked}?",
        answers=[(f" T{asked[1:]} are" if key == keys[0] else ",", f" {numbers[key]}") for key in keys],
    )


def _variable_tracking(chance: random.Random, source: Source, share: float) -> Prompt:
    shown = _Chains(chance, source)
    lines = "\n".join(shown.lines)
    tracked = _Chains(chance, source)
    body, least = _scattered(chance, source, tracked.lines)
    question, lead, names = tracked.asked(int(share * source.chains))
    example, its_lead, its_names = shown.asked(0)
    return Prompt(
        instruction="Memorize and track the chains of variable assignment hidden in the following text.\n\n"
        f"{lines}{example}{its_lead} {', '.join(its_names)}\n\n"
        "Memorize and track the chains of variable assignment hidden in the following text.\n\n",
        body=body,
        least=least,
        question=question,
        answers=[(lead if name == names[0] else ",", f" {name}") for name in names],
    )


class _Chains:
    """Assignments of several chains, those of each in order."""

    def __init__(self, chance: random.Random, source: Source):
        wanted, names = source.chains * (source.hops + 1), dict[str, None]()
        while len(names) < wanted:
            names["".join(chance.choices(string.ascii_uppercase, k=LETTERS))] = None
        every = list(names)
        self.chains = [every[at :: source.chains] for at in range(source.chains)]
        self.values = list(map(str, chance.sample(range(10_000, 100_000), source.chains)))
        order = [at for at in range(source.chains) for _ in range(source.hops + 1)]
        chance.shuffle(order)
        done = [0] * source.chains
        self.lines: list[str] = []
        for at in order:
            name, place = self.chains[at][done[at]], done[at]
            given = self.values[at] if place == 0 else f"VAR {self.chains[at][place - 1]}"
            self.lines.append(f"VAR {name} = {given}")
            done[at] += 1

    def asked(self, at: int) -> tuple[str, str, list[str]]:
        value, names = self.values[at], self.chains[at]
        question = (
            f"\n\nQuestion: Find all variables that are assigned the value {value} in the text above, in the order in "
            "which they are assigned."
        )
        lead = (
            " Answer: According to the chains of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        )
        return question, lead, names


def _common_words(chance: random.Random, source: Source, share: float) -> Prompt:
    if len(source.words) < DIFFERENT:
        raise ValueError(
            f"the text has {len(source.words)} different words of 4 to 10 small letters; allowed: at least {DIFFERENT} "
            "for common-words"
        )
    words = chance.sample(source.words, len(source.words))
    costs = [len(encode(source.tokenizer, f" {word}")) for word in words]

    def counts(entries: int) -> list[int]:
        """How often each word comes in a list of so many."""
        common = [entries // part for part in SHARES]
        rare = max(1, common[-1] // RARER)
        rest = entries - sum(common)
        return [*common, *[rare] * (rest // rare), *([rest % rare] if rest % rare else [])]

    def tokens(entries: int) -> int:
        return sum(number * cost for number, cost in zip(counts(entries), costs, strict=False))

    def body(room: int) -> list[int]:
        least, most = FEWEST, room + 1  # a word is at least a token
        while most - least > 1:
            middle = (least + most) // 2
            least, most = (middle, most) if tokens(middle) <= room else (least, middle)
        listed = [word for word, number in zip(words, counts(least), strict=False) for _ in range(number)]
        chance.shuffle(listed)
        ids = [token for word in listed for token in encode(source.tokenizer, f" {word}")]
        return [*source.text[range(room - len(ids))], *ids]

    first, *others = words[: len(SHARES)]
    return Prompt(
        instruction="Below is a list of words in which some words appear much more often than others. Memorize the "
        "ones that appear most often.\n\n",
        body=body,
        least=tokens(FEWEST),
        question="\n\nQuestion: What are the three most common words in the above list, the most common one first?",
        answers=[
            (
                " Answer: The three words that appear most often in the list, from the most common one on, are:",
                f" {first}",
            ),
            *((",", f" {word}") for word in others),
        ],
    )


RULER: dict[str, Callable[[random.Random, Source, float], Prompt]] = {
    "multikey": _multikey,
    "multiquery": _multiquery,
    "variable-tracking": _variable_tracking,
    "common-words": _common_words,
}
"""Part -> (chance, source, how far through the rows this one is) -> what a row says."""
