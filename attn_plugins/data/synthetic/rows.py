"""Rows that are drawn: the same for a seed, and never one of those to train on among those that are held out."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset

CHUNK = 1000
"""Rows that are drawn at once, where that is quick."""
MOST_DRAWN = 1000
"""Times the rows that are asked for, at most, that are drawn for them."""

Drawn = dict[str, torch.Tensor]
"""Columns: tensors with a row each."""
Draw = Callable[[int, torch.Generator], Drawn]
"""(number, generator) -> so many rows, with "input_ids" (R, N) among their columns."""


class TokenRows(Dataset[dict[str, torch.Tensor]]):
    """Rows to train on, as columns of tensors."""

    def __init__(self, columns: Drawn):
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def drawn(draw: Draw, number: int, *, seed: int, held_out: bool, chunk: int = CHUNK) -> Drawn:
    """So many rows to train on, or held-out ones.

    Of all rows that can be drawn, half are held out, whatever the seed: those in whose hash a bit is set. So none is on
    both sides, however few there are, and no one has to know the others.

    Args:
        chunk: rows that are drawn at once.

    Raises:
        ValueError: hardly a row of that side is among those that are drawn.
    """
    generator = torch.Generator().manual_seed(2 * seed + held_out)
    kept: list[Drawn] = []
    found = tried = 0
    while found < number:
        rows = draw(chunk, generator)
        mine = hashes(rows["input_ids"]) % 2 == held_out
        kept.append({name: column[mine] for name, column in rows.items()})
        found, tried = found + int(mine.sum()), tried + chunk
        if tried > MOST_DRAWN * max(number, chunk):
            raise ValueError(f"of {tried} rows that were drawn, {found} may be used; allowed: options with more rows")
    return {name: torch.cat([rows[name] for rows in kept])[:number] for name in kept[0]}


def hashes(ids_RN: torch.Tensor) -> torch.Tensor:
    """A whole number of 20 bits for each row, which follows from its tokens and their order alone."""
    generator = torch.Generator().manual_seed(0)
    weights_N = torch.randint(-(2**62), 2**62, (ids_RN.shape[1],), generator=generator)
    return ((ids_RN + 1) * weights_N).sum(1) >> 44 & 0xFFFFF  # of a sum that has run over many times


def joined(groups: list[Drawn]) -> Drawn:
    """Rows of several draws with the same columns, one after the other."""
    return {name: torch.cat([rows[name] for rows in groups]) for name in groups[0]}


def batches(columns: Drawn, size: int) -> Iterator[dict[str, Any]]:
    """The rows, so many at once."""
    parts = {name: column.split(size) for name, column in columns.items()}
    return (dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True))
