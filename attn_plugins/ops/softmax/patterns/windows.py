"""The pattern of attention within windows of a grid of patches, which may be shifted: a tile or a few for each."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.patterns.on_grid import OnGrid
from attn_plugins.ops.softmax.tables import Tables, counted
from attn_plugins.ops.softmax.tiles import Tile, make_tile

ROWS = 128
"""Most queries of a tile, of a window larger than that."""


@dataclass(frozen=True)
class Windows(OnGrid):
    """Patches of one window of the grid, and tokens before them. Windows at a border are cut off by it."""

    window_size: tuple[int, ...]
    shift: tuple[int, ...]
    """How far windows lie up and left of where they would begin with the grid, less than their size."""
    merged: ClassVar[bool] = False

    def near(self, q_places: Sequence[Any], k_places: Sequence[Any]) -> Any:
        seen = None
        for size, shift, q, k in zip(self.window_size, self.shift, q_places, k_places, strict=True):
            along = (q + shift) // size == (k + shift) // size
            seen = along if seen is None else seen & along
        return seen

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        yield from self.first_tile(mask)
        first = self.first(mask)[0]
        known: dict[tuple[int, int], Tile] = {}
        alike = mask.plain and not mask.row_starts
        for window in itertools.product(*(self._along(axis) for axis in range(len(self.grid.sides)))):
            tokens = self.tokens(mask, *(torch.tensor([[*part]], device=mask.device) for part in window))
            extra = torch.cat([first, tokens], dim=1)
            for queries in tokens.split(ROWS, dim=1):
                size = (queries.shape[1], tokens.shape[1])
                if alike and size in known:  # all see all
                    yield dataclasses.replace(known[size], queries=queries, extra=extra)
                    continue
                known[size] = make_tile(mask, self.sees, queries, extra=extra)
                yield known[size]

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        axes, places = len(self.grid.sides), []
        for axis, (side, size, shift) in enumerate(zip(self.grid.sides, self.window_size, self.shift, strict=True)):
            begin = torch.arange(-shift, side, size, device=mask.device).unsqueeze(1)
            along = begin + counted(min(size, shift + side), mask.device)[0]
            along = along.masked_fill((along < 0) | (along >= side), -1)
            places.append(along.view(*[-1 if i == axis else 1 for i in range(axes)], along.shape[1]))
        tokens = self.tokens(mask, *places).flatten(0, axes - 1).unsqueeze(0)
        return self.tables_with_first(mask, self.sees, tokens, tokens)

    def _along(self, axis: int) -> list[range]:
        """The places of each window along an axis."""
        side, size = self.grid.sides[axis], self.window_size[axis]
        return [range(max(0, begin), min(begin + size, side)) for begin in range(-self.shift[axis], side, size)]
