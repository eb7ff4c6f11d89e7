"""Pairs of halves: of one piece of a document, or of two documents."""

import random
from typing import TYPE_CHECKING

from attn_plugins.config.extras import need

if TYPE_CHECKING:
    from datasets import Dataset

MATCHING = ("other", "same")
"""Classes by number: the second half is of another document, or of the same piece."""


def paired_halves(data: "Dataset", half: int, gap: int, seed: int) -> "Dataset":
    """Rows of "text", "text_pair" and "label": pieces of texts in two halves.

    Texts are cut into pieces of ``2 * half + gap`` characters, what stands between the halves and what is left at the
    end is left out. In one of every two pieces a half of another text takes the place of the second half. In which one
    is drawn: of texts of two pieces each, the place of a half in its text would else tell the class.

    Args:
        half, gap: characters.

    Raises:
        ValueError: there are no pieces of two texts.
    """
    size = 2 * half + gap
    pieces = [
        (number, text[start : start + half], text[start + half + gap : start + size])
        for number, text in enumerate(data["text"])
        for start in range(0, len(text) - size + 1, size)
    ]
    texts = len({number for number, _, _ in pieces})
    if texts < 2:
        raise ValueError(
            f"of {len(data)} texts, {texts} have {size} characters, of which a piece is made; allowed: at "
            "least two, or a smaller half"
        )
    chance = random.Random(seed)
    rows: dict[str, list] = {"text": [], "text_pair": [], "label": []}
    exchanged = False
    for place, (number, first, second) in enumerate(pieces):
        exchanged = not exchanged if place % 2 else chance.random() < 0.5
        if exchanged:
            other = chance.choice(pieces)
            while other[0] == number:
                other = chance.choice(pieces)
            second = other[2]
        rows["text"].append(first)
        rows["text_pair"].append(second)
        rows["label"].append(MATCHING[not exchanged])
    return need("datasets", "train").Dataset.from_dict(rows)
