"""The pattern of neighbourhood attention on a grid of patches, in tiles that are boxes of it."""

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

SIDE = 8
"""Patches along each side of a tile. Larger ones share more keys of their neighbourhoods, and hide more of them."""
FRAMES = 1
"""As SIDE, along time, where neighbourhoods are short: more frames would hide more than they share."""


@dataclass(frozen=True)
class Neighborhood(OnGrid):
    """The nearest patches along each axis, every ``dilation``-th of them; and tokens before the grid, for all.

    Patches of one phase (place modulo ``dilation``) are a grid of their own. There a patch sees the ``kernel_size``
    patches around it, shifted where they would reach over a border, or all where there are fewer. Along an axis that is
    ``causal`` it sees itself and those before it, fewer at the beginning.
    """

    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]
    merged: ClassVar[bool] = False

    def near(self, q_places: Sequence[Any], k_places: Sequence[Any]) -> Any:
        seen = None
        for axis, (q, k) in enumerate(zip(q_places, k_places, strict=True)):
            step, size, side = self.dilation[axis], self.kernel_size[axis], self.grid.sides[axis]
            q_own, k_own = (q, k) if step == 1 else (q // step, k // step)
            if self.causal[axis]:
                first = q_own - (size - 1)
            elif step == 1:
                last = max(side - size, 0)
                first = (-(size // 2 - q_own).clamp(min=-last)).clamp(min=0)  # from 0 to the last that fits
            else:
                number = (side - q % step + step - 1) // step
                first = torch.minimum(q_own - size // 2, number - size).clamp(min=0)
            distance = k_own - first
            along = (distance >= 0) & (distance < size)
            if step > 1:
                along = along & (q % step == k % step)
            seen = along if seen is None else seen & along
        return seen

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        yield from self.first_tile(mask)
        first = self.first(mask)[0]
        known: dict[tuple[tuple[Any, ...], ...], Tile] = {}

        def tokens(places: Sequence[range]) -> torch.Tensor:
            return self.tokens(mask, *(torch.tensor([[*along]], device=mask.device) for along in places))

        for parts in itertools.product(*(list(self._parts(axis)) for axis in range(len(self.grid.sides)))):
            own, seen, starts = zip(*parts, strict=True)
            queries, extra = tokens(own), torch.cat([first, tokens(seen)], dim=1)
            # Almost all tiles hide the same: where each patch's neighbours begin and end within the keys says it all.
            same_shape = (*starts, tuple(map(len, seen)))
            if mask.plain and not mask.row_starts and same_shape in known:
                yield dataclasses.replace(known[same_shape], queries=queries, extra=extra)
                continue
            known[same_shape] = make_tile(mask, self.sees, queries, extra=extra)
            yield known[same_shape]

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        along = [self._boxes(axis, mask.device) for axis in range(len(self.grid.sides))]
        queries, keys = (self._all(mask, [both[i] for both in along]) for i in (0, 1))
        return self.tables_with_first(mask, self.sees, queries, keys)

    def _all(self, mask: AttentionMask, places: list[torch.Tensor]) -> torch.Tensor:
        """(1, tiles, tokens) of all combinations of the tiles along each axis, each (tiles, places)."""
        axes = len(places)
        shaped = [
            along.view(*[-1 if i == axis else 1 for i in range(axes)], along.shape[1])
            for axis, along in enumerate(places)
        ]
        return self.tokens(mask, *shaped).flatten(0, axes - 1).unsqueeze(0)

    def _side(self, axis: int) -> int:
        return FRAMES if len(self.grid.sides) - axis > 2 else SIDE

    def _boxes(self, axis: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As :meth:`_parts`, of all tiles: (tiles, side) places and (tiles, those that they see), -1 for none."""
        step, size, length = self.dilation[axis], self.kernel_size[axis], self.grid.sides[axis]
        longest = -(-length // step)
        side = min(self._side(axis), longest)
        width = min(side + size - 1, longest)
        phase = torch.arange(min(step, length), device=device).view(-1, 1, 1)
        number = (length - phase + step - 1) // step
        begin = torch.arange(0, longest, side, device=device).unsqueeze(1)
        own = begin + counted(side, device)
        if self.causal[axis]:
            # Places before the beginning are none; those after the last query of the tile nobody sees.
            seen = begin - (size - 1) + counted(side + size - 1, device)
        else:
            seen = torch.minimum(begin - size // 2, number - size).clamp(min=0) + counted(width, device)
        own, seen = ((phase + i * step).masked_fill((i >= number) | (i < 0), -1).flatten(0, 1) for i in (own, seen))
        return own, seen

    def _parts(self, axis: int) -> Iterator[tuple[range, range, tuple[tuple[int, int], ...]]]:
        """A tile's places, those that they see, and where among these each one's neighbours begin and end."""
        size, length, side = self.kernel_size[axis], self.grid.sides[axis], self._side(axis)
        for phase in range(min(self.dilation[axis], length)):
            places = range(phase, length, self.dilation[axis])
            number = -(-len(places) // side)
            for part in range(number):
                own = range(len(places))[part * len(places) // number : (part + 1) * len(places) // number]
                if self.causal[axis]:
                    limits = [(max(0, i - size + 1), i + 1) for i in own]
                else:
                    starts = [max(0, min(i - size // 2, len(places) - size)) for i in own]
                    limits = [(start, min(start + size, len(places))) for start in starts]
                low, high = limits[0][0], limits[-1][1]
                yield (
                    places[own.start : own.stop],
                    places[low:high],
                    tuple((start - low, stop - low) for start, stop in limits),
                )
