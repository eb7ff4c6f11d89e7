"""The pattern of neighbourhood attention on a grid of patches, in tiles that are rectangles of it."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.tables import Tables, counted, tables_of
from attn_plugins.ops.softmax.tiles import Tile, make_tile

SIDE = 8
"""Patches along each side of a tile. Larger ones share more keys of their neighbourhoods, and hide more of them."""


@dataclass(frozen=True)
class Neighborhood:
    """The nearest patches in both directions, every ``dilation``-th of them; and tokens before the grid, for all.

    Patches of one phase (row and column modulo ``dilation``) are a grid of their own. There a patch sees the square of
    ``kernel_size`` patches around it, shifted where it would reach over a border, or all where there are fewer.
    """

    kernel_size: int
    dilation: int
    num_prefix_tokens: int
    grid_size: tuple[int, int]
    """Rows and columns."""
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        prefix = self.num_prefix_tokens
        q_patch, k_patch, columns = (q_index - prefix).clamp(min=0), (k_index - prefix).clamp(min=0), self.grid_size[1]
        near = self._near(q_patch // columns, k_patch // columns, self.grid_size[0])
        near = near & self._near(q_patch % columns, k_patch % columns, columns)
        return near | (q_index < prefix) | (k_index < prefix)

    def _near(self, q: torch.Tensor, k: torch.Tensor, length: int) -> torch.Tensor:
        """Of one direction, whether places k are among the neighbours of places q."""
        step, size = self.dilation, self.kernel_size
        number = (length - q % step + step - 1) // step
        first = torch.minimum(q // step - size // 2, number - size).clamp(min=0)
        distance = k // step - first
        return (q % step == k % step) & (distance >= 0) & (distance < size)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        prefix, (rows, columns) = self.num_prefix_tokens, self.grid_size
        if prefix:
            yield make_tile(mask, self.sees, slice(0, prefix), (slice(0, mask.kv_length),))

        def indices(part: range, across: range) -> torch.Tensor:
            down = torch.tensor(part, device=mask.device).unsqueeze(1) * columns
            return (prefix + down + torch.tensor(across, device=mask.device)).view(1, -1)

        first = torch.arange(prefix, device=mask.device).unsqueeze(0)
        known: dict[tuple[tuple[int, ...], ...], Tile] = {}
        for q_rows, k_rows, row_starts in self._parts(rows):
            for q_columns, k_columns, column_starts in self._parts(columns):
                queries = indices(q_rows, q_columns)
                extra = torch.cat([first, indices(k_rows, k_columns)], dim=1)
                # Almost all tiles hide the same: where each patch's neighbourhood begins within the keys says it all.
                same_shape = (row_starts, column_starts, (len(k_rows), len(k_columns)))
                if mask.plain and not mask.row_starts and same_shape in known:
                    yield dataclasses.replace(known[same_shape], queries=queries, extra=extra)
                    continue
                known[same_shape] = make_tile(mask, self.sees, queries, extra=extra)
                yield known[same_shape]

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        prefix, columns = self.num_prefix_tokens, self.grid_size[1]
        (q_down, k_down), (q_across, k_across) = (self._squares(length, mask.device) for length in self.grid_size)

        def indices(down: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
            down, across = down[:, None, :, None], across[None, :, None, :]
            index = (prefix + down * columns + across).masked_fill((down < 0) | (across < 0), -1)
            return index.flatten(2).flatten(0, 1).unsqueeze(0)

        queries, keys = indices(q_down, q_across), indices(k_down, k_across)
        first = counted(prefix, mask.device)
        tables = [tables_of(mask, self.sees, queries, torch.cat([first.expand(-1, keys.shape[1], -1), keys], dim=2))]
        if prefix:
            tables.append(tables_of(mask, self.sees, first, counted(mask.kv_length, mask.device)))
        return tables

    def _squares(self, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_parts`, of all tiles: (tiles, side) places and (tiles, those that they see), -1 for none."""
        step, longest = self.dilation, -(-length // self.dilation)
        side, width = min(SIDE, longest), min(SIDE + self.kernel_size - 1, longest)
        phase = torch.arange(min(step, length), device=device).view(-1, 1, 1)
        number = (length - phase + step - 1) // step
        begin = torch.arange(0, longest, side, device=device).unsqueeze(1)
        own = begin + counted(side, device)
        seen = torch.minimum(begin - self.kernel_size // 2, number - self.kernel_size).clamp(min=0)
        seen = seen + counted(width, device)
        own, seen = ((phase + i * step).masked_fill(i >= number, -1).flatten(0, 1) for i in (own, seen))
        return own, seen

    def _parts(self, length: int) -> Iterator[tuple[range, range, tuple[int, ...]]]:
        """Of one direction: a tile's places, those that they see, and where among these each one's neighbours begin."""
        for phase in range(min(self.dilation, length)):
            places = range(phase, length, self.dilation)
            number = -(-len(places) // SIDE)
            for part in range(number):
                own = range(len(places))[part * len(places) // number : (part + 1) * len(places) // number]
                starts = [max(0, min(i - self.kernel_size // 2, len(places) - self.kernel_size)) for i in own]
                seen = places[starts[0] : starts[-1] + self.kernel_size]
                yield places[own.start : own.stop], seen, tuple(start - starts[0] for start in starts)
