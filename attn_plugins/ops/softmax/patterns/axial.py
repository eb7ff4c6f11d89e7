"""The pattern of axial attention on a grid of patches: lines and planes of it, each a few tiles."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.patterns.on_grid import OnGrid
from attn_plugins.ops.softmax.tables import Tables, tables_of
from attn_plugins.ops.softmax.tiles import Tile, make_tile

ROWS = 128
"""Most queries of a tile, of a line or plane longer than that."""


@dataclass(frozen=True)
class Axial(OnGrid):
    """Patches that differ in place along one axis at most, or along those of one of the spans; and tokens before them.

    A query sees the keys of each span in a tile of its own, but for those that an earlier span has shown.
    """

    spans: tuple[tuple[int, ...], ...]
    """Sets of axes: a patch sees all patches that lie as it does along the other axes."""
    merged: ClassVar[bool] = True

    def near(self, q_places: Sequence[Any], k_places: Sequence[Any]) -> Any:
        seen = self._along(0, q_places, k_places)
        for span in range(1, len(self.spans)):
            seen = seen | self._along(span, q_places, k_places)
        return seen

    def _along(self, span: int, q_places: Sequence[Any], k_places: Sequence[Any]) -> Any:
        seen: Any = q_places[0] == q_places[0]
        for axis, (q, k) in enumerate(zip(q_places, k_places, strict=True)):
            if axis not in self.spans[span]:
                seen = seen & (q == k)
        return seen

    def _new(self, span: int) -> Any:
        """A rule: what a span shows and none before it. Tokens before the patches are keys of the first."""

        def sees(mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
            q_places, k_places = self.places(mask, q_index), self.places(mask, k_index)
            seen = self._along(span, q_places, k_places)
            for earlier in range(span):
                seen = seen & ~self._along(earlier, q_places, k_places)
            prefix = k_index < self.num_prefix_tokens
            return seen & ~prefix if span else seen | prefix

        return sees

    def _lines(self, mask: AttentionMask, span: int) -> torch.Tensor:
        """(lines, length) tokens of each line or plane."""
        sides = self.grid.sides
        along = [torch.arange(side, device=mask.device) for side in sides]
        tokens = self.tokens(mask, *along).view(sides)
        axes = self.spans[span]
        others = [axis for axis in range(len(sides)) if axis not in axes]
        return tokens.permute(*others, *axes).reshape(-1, math.prod([sides[axis] for axis in axes])).contiguous()

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        yield from self.first_tile(mask)
        alike = mask.plain and not mask.row_starts
        for span in range(len(self.spans)):
            lines, sees = self._lines(mask, span), self._new(span)
            length = lines.shape[1]
            if span and length == 1:
                continue
            first = self.first(mask)[0] if span == 0 else lines.new_empty(1, 0)
            known: dict[tuple[int, int], Tile] = {}
            # Short lines share a tile, in which those of others are hidden.
            together = max(1, min(len(lines), ROWS // 2 // length))
            for group in lines.split(together):
                for low in range(0, group.numel(), ROWS):
                    queries = group.view(1, -1)[:, low : low + ROWS]
                    extra = torch.cat([first, group.view(1, -1)], dim=1)
                    shape = (low, len(group))
                    if alike and shape in known and same_columns(known[shape], extra):
                        yield dataclasses.replace(known[shape], queries=queries, extra=extra)
                        continue
                    known[shape] = make_tile(mask, sees, queries, extra=extra)
                    yield known[shape]

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        found: list[Tables] = []
        for span in range(len(self.spans)):
            lines = self._lines(mask, span).unsqueeze(0)
            queries, keys = self._cut(lines)
            if span == 0:
                found += self.tables_with_first(mask, self._new(0), queries, keys)
            elif lines.shape[2] > 1:
                found.append(tables_of(mask, self._new(span), queries, keys))
        return found

    def _cut(self, lines: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys of all tiles: lines as they are, or in parts of which each sees all of its line."""
        length = lines.shape[2]
        if length <= 2 * ROWS:
            return lines, lines
        parts = torch.nn.functional.pad(lines, (0, -length % ROWS), value=-1).unflatten(2, (-1, ROWS))
        return parts.flatten(1, 2), lines.repeat_interleave(parts.shape[2], dim=1)


def same_columns(tile: Tile, extra: torch.Tensor) -> bool:
    """Whether a tile was made of as many keys, none of which it has left out because nobody sees them."""
    return tile.extra is not None and tile.extra.shape[1] == extra.shape[1]
