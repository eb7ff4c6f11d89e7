"""What patterns on a grid of patches share: where tokens lie, and tokens before the patches, which see all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attn_plugins.core.attention import Attention
from attn_plugins.core.grid import Grid, GridSize, as_grid
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import recorded
from attn_plugins.ops.softmax.tables import Tables, counted, tables_of
from attn_plugins.ops.softmax.tiles import Sees, Tile, make_tile


@dataclass(frozen=True)
class OnGrid:
    """Tokens of an image or a video: ``num_prefix_tokens`` that see all and are seen by all, then the patches."""

    grid: Grid
    num_prefix_tokens: int

    def near(self, q_places: Sequence[Any], k_places: Sequence[Any]) -> Any:
        """Whether patches see patches, given their places along each axis."""
        raise NotImplementedError

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        prefix = self.num_prefix_tokens
        seen = self.near(self.places(mask, q_index), self.places(mask, k_index))
        return seen | (q_index < prefix) | (k_index < prefix)

    def places(self, mask: AttentionMask, index: Any) -> list[Any]:
        """Frame if there are any, row and column of each token."""
        number, found = self.grid.places(mask, index, self.num_prefix_tokens), []
        for axis, side in enumerate(self.grid.sides):
            step = math.prod(self.grid.sides[axis + 1 :])
            place = number if step == 1 else number // step
            found.append(place % side if axis else place)
        return found

    def tokens(self, mask: AttentionMask, *places: torch.Tensor) -> torch.Tensor:
        """Tokens at all combinations of places along each axis, (..., n) each; -1 where one of them is -1.

        Returns:
            (..., product of n).
        """
        sides = self.grid.sides
        number, none = places[0] * math.prod(sides[1:]), places[0] < 0
        for axis, along in enumerate(places[1:], start=1):
            number = (number.unsqueeze(-1) + (along * math.prod(sides[axis + 1 :])).unsqueeze(-2)).flatten(-2)
            none = (none.unsqueeze(-1) | (along < 0).unsqueeze(-2)).flatten(-2)
        return self.grid.tokens(mask, number.masked_fill(none, -1), self.num_prefix_tokens)

    def first(self, mask: AttentionMask) -> torch.Tensor:
        """(1, 1, prefix) tokens before the patches."""
        return counted(self.num_prefix_tokens, mask.device)

    def first_tile(self, mask: AttentionMask) -> list[Tile]:
        """The tile of what the tokens before the patches see, if there are any."""
        prefix = self.num_prefix_tokens
        return [make_tile(mask, self.sees, slice(0, prefix), (slice(0, mask.kv_length),))] if prefix else []

    def tables_with_first(
        self, mask: AttentionMask, sees: Sees, q_BTR: torch.Tensor, k_BTC: torch.Tensor
    ) -> Sequence[Tables]:
        """Tables of these patches, the tokens before them among the keys, and of what those see."""
        first = self.first(mask)
        beside = first.expand(-1, k_BTC.shape[1], -1)
        found = [tables_of(mask, sees, q_BTR, torch.cat([beside, k_BTC], dim=2))]
        if self.num_prefix_tokens:
            found.append(tables_of(mask, self.sees, first, counted(mask.kv_length, mask.device)))
        return found


def grid_for(attention: Attention, mask: AttentionMask, told: GridSize | None, axes: Sequence[int]) -> Grid:
    """The grid of a call: what the option ``grid_size`` says, what the model has made of its images, or its config.

    Where none of them does, that of a square image.

    Args:
        told: what is known of the images of this call.
        axes: how many a grid may have, of 2 and 3. An image is a video of one frame, where only those are served.

    Raises:
        ValueError: tokens are not those of such a grid.
    """
    name, config = attention.name, attention.config
    if mask.q_length != mask.kv_length:
        raise ValueError(
            f"attention {name!r} takes whole images, got {mask.q_length} queries and {mask.kv_length} "
            "keys; allowed: as many queries as keys"
        )
    padding_BK = mask.padding_BK
    if padding_BK is not None and (recorded(padding_BK) or not mask.cached("all real", lambda: bool(padding_BK.all()))):
        raise ValueError(f"attention {name!r} got padding; allowed: images of one size in a batch")
    prefix = config.num_prefix_tokens
    patches = mask.kv_length - prefix
    known: GridSize | None = None if attention.heads is None else attention.heads.grid_size
    if told is None and known is not None and max(axes) > len(known) and patches > math.prod(known):
        known = (patches // math.prod(known), *known)  # as many frames as there are
    names = "(height, width)" if 2 in axes else "(frames, height, width)"
    asked = config.grid_size or told or known
    grid = Grid((math.isqrt(max(patches, 0)),) * 2) if asked is None else as_grid(asked)
    if len(grid.sides) == 2 and 2 not in axes:
        grid = Grid((1, *grid.sides), grid.blocks)
    if len(grid.sides) not in axes:
        sides = " x ".join(map(str, grid.sides))
        raise ValueError(
            f"attention {name!r} got a video of {sides} patches; allowed: images ('neighborhood_3d' and 'axial' take "
            "videos)"
        )
    if patches < 1 or math.prod(grid.sides) != patches:
        sides = " x ".join(map(str, grid.sides))
        square = f"a square number of patches, or the option grid_size={names}"
        raise ValueError(
            f"attention {name!r} got {mask.kv_length} tokens, of which {prefix} come before the patches "
            f"(num_prefix_tokens); allowed: {square if asked is None else f'{sides} patches (grid_size)'}"
        )
    return grid
