"""Where the tokens of an image or a video lie: sides of its grid of patches, and the order that tokens have on it."""

import functools
import math
from typing import NamedTuple

import torch

from attn_plugins.core.mask import AttentionMask


class Grid(NamedTuple):
    """Patches of one image or video, frame by frame, unless ``blocks`` says otherwise row by row."""

    sides: tuple[int, ...]
    """(height, width) in patches, or (frames, height, width)."""
    blocks: tuple[int, ...] = ()
    """Sides of squares, the largest first: within a frame tokens come square by square, and so on within each, as in
    models that merge neighbours (2 x 2) or attend in windows. At the lower and right border squares may be cut."""

    def places(self, mask: AttentionMask, index: torch.Tensor, prefix: int) -> torch.Tensor:
        """Numbers of places, row by row, by the numbers of tokens; 0 for the ``prefix`` tokens before the patches."""
        if not self.blocks:
            return (index - prefix).clamp(min=0)

        def table() -> torch.Tensor:
            return torch.tensor([*[0] * prefix, *order_of(self)], device=mask.device).unsqueeze(0)

        return mask.look_up(mask.cached((self, prefix, "places"), table), index)

    def tokens(self, mask: AttentionMask, places: torch.Tensor, prefix: int) -> torch.Tensor:
        """The other way round: tokens by the numbers of their places; -1 stays."""
        if not self.blocks:
            return torch.where(places < 0, -1, places + prefix)
        table = mask.cached((self, "tokens"), lambda: torch.tensor(tokens_of(self), device=mask.device))
        return torch.where(places < 0, -1, table[places.clamp(min=0)] + prefix)


GridSize = tuple[int, ...] | Grid
"""Sides alone where tokens are in the order of the places."""


def as_grid(told: GridSize) -> Grid:
    return told if isinstance(told, Grid) else Grid(tuple(told))


@functools.lru_cache(maxsize=64)
def order_of(grid: Grid) -> tuple[int, ...]:
    """Places of the tokens of a grid, in their order, as numbers row by row."""
    *frames, rows, columns = grid.sides

    def within(top: int, left: int, height: int, width: int, blocks: tuple[int, ...]) -> list[int]:
        if not blocks:
            return [(top + i) * columns + left + j for i in range(height) for j in range(width)]
        side, *smaller = blocks
        return [
            place
            for i in range(0, height, side)
            for j in range(0, width, side)
            for place in within(top + i, left + j, min(side, height - i), min(side, width - j), tuple(smaller))
        ]

    frame = within(0, 0, rows, columns, grid.blocks)
    return tuple(number * len(frame) + place for number in range(math.prod(frames)) for place in frame)


@functools.lru_cache(maxsize=64)
def tokens_of(grid: Grid) -> tuple[int, ...]:
    """Tokens of the places of a grid, row by row: the inverse of :func:`order_of`."""
    found = [0] * math.prod(grid.sides)
    for token, place in enumerate(order_of(grid)):
        found[place] = token
    return tuple(found)
