"""A pattern with sinks: the first keys of each row or segment beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.patterns.band import first_columns, first_keys, in_row
from attn_plugins.ops.softmax.tables import Tables, counted, tables_of
from attn_plugins.ops.softmax.tiles import Pattern, Tile, make_tile

ROWS = 128
"""Queries of a tile of the first keys, of which there are a few."""


def with_first(pattern: Pattern, number: int) -> Pattern:
    """The pattern, in which the first ``number`` keys of a row or segment are seen from everywhere."""
    return WithFirst(pattern, number) if number else pattern


@dataclass(frozen=True)
class WithFirst:
    """What another pattern shows, and the first ``number`` keys of the row or segment, in tiles of their own."""

    pattern: Pattern
    number: int
    merged: ClassVar[bool] = True

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return self.pattern.sees(mask, q_index, k_index) | (in_row(mask, k_index) < self.number)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        yield from self.pattern.tiles(mask)
        for low in range(0, mask.q_length, ROWS):
            queries = range(low, min(low + ROWS, mask.q_length))
            keys = first_keys(mask, queries, self.number)
            yield make_tile(mask, self._sees_beside, slice(queries.start, queries.stop), extra=keys)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        begin = torch.arange(0, mask.q_length, ROWS, device=mask.device).view(1, -1, 1)
        queries = begin + counted(min(ROWS, mask.q_length), mask.device)
        first = tables_of(mask, self._sees_beside, queries, first_columns(mask, queries, self.number))
        return [*self.pattern.tables(mask), first]

    def _sees_beside(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return (in_row(mask, k_index) < self.number) & ~self.pattern.sees(mask, q_index, k_index)
