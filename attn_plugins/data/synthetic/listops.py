"""ListOps: nested lists of digits with what is to be done with each, and the digit that comes of it."""

import functools
import random

import torch

from attn_plugins.data.synthetic.rows import Drawn, drawn

OPERATIONS = ("MIN", "MAX", "MED", "SM")
"""Least, greatest, median (cut to a whole number), and sum without its tens: tokens 10 to 13, after the digits."""
END, FIRST, PAD = 14, 15, 16
"""End of a list; what stands before the first list; what fills a row up."""
TOKENS = 17
CHANCE_OF_DIGIT = 0.75
"""That an argument is a digit, where lists may go deeper."""
CHUNK = 100
MOST_DRAWN = 10_000
"""Lists that are drawn for a row, at most."""


@functools.lru_cache(maxsize=4)
def listops_rows(
    number: int, lengths: tuple[int, int], max_depth: int, max_args: int, seed: int, held_out: bool
) -> Drawn:
    """So many rows of least to most ``lengths`` tokens, kept, as they take seconds to make.

    Drawn as by Nangia and Bowman (2018, arXiv:1804.06028) and in the Long Range Arena (arXiv:2011.04006): a list has 2
    to ``max_args`` arguments, each a digit or a list, down to ``max_depth``; what is too short or too long is left out.

    Raises:
        ValueError: hardly a list is of such a length.

    Returns:
        "input_ids" (R, most), filled up with PAD; "length" (R,); "label" (R,), 0 to 9.
    """

    def draw(some: int, generator: torch.Generator) -> Drawn:
        chance = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        rows: list[tuple[list[int], int]] = []
        for _ in range(MOST_DRAWN * some):
            if len(rows) == some:
                break
            tokens = [FIRST]
            value = _list(tokens, 1, lengths[1], max_depth, max_args, chance)
            if value is not None and len(tokens) >= lengths[0]:
                rows.append((tokens, value))
        if len(rows) < some:
            raise ValueError(
                f"lists of at most {max_args} arguments, {max_depth} deep, hardly have {lengths[0]} to {lengths[1]} "
                "tokens; allowed: more of them, or fewer tokens"
            )
        ids_RN = torch.full((some, lengths[1]), PAD)
        for row, (tokens, _) in enumerate(rows):
            ids_RN[row, : len(tokens)] = torch.tensor(tokens)
        length_R, label_R = (torch.tensor(values) for values in zip(*((len(t), v) for t, v in rows), strict=True))
        return {"input_ids": ids_RN, "length": length_R, "label": label_R}

    return drawn(draw, number, seed=seed, held_out=held_out, chunk=CHUNK)


def _list(tokens: list[int], depth: int, most: int, max_depth: int, max_args: int, chance: random.Random) -> int | None:
    """Write a list at the end of ``tokens``; its value, or None where they became more than ``most``."""
    operation = chance.randrange(len(OPERATIONS))
    tokens.append(10 + operation)
    values = []
    for _ in range(chance.randint(2, max_args)):
        value: int | None
        if depth == max_depth or chance.random() < CHANCE_OF_DIGIT:
            value = chance.randrange(10)
            tokens.append(value)
        else:
            value = _list(tokens, depth + 1, most, max_depth, max_args, chance)
        if value is None or len(tokens) >= most:
            return None
        values.append(value)
    tokens.append(END)
    return result(OPERATIONS[operation], values)


def result(operation: str, values: list[int]) -> int:
    """The digit that comes of a list."""
    if operation == "MIN":
        return min(values)
    if operation == "MAX":
        return max(values)
    if operation == "SM":
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2
