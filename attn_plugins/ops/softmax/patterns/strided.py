"""The two patterns of the Sparse Transformer."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.patterns.band import Band, BlockBand, ends_BK, first_query, in_row, places, where_true
from attn_plugins.ops.softmax.tables import Tables, counted, tables_of
from attn_plugins.ops.softmax.tiles import Tile, make_tile

SUMMED_ROWS = 512
"""Queries of a tile of the tables of all summaries, which are copied for each."""


@dataclass(frozen=True)
class Strided:
    """The nearest ``window_size`` keys, and those at a distance that ``stride`` divides.

    A band and a dilated band: most queries see keys in both.
    """

    window_size: int
    stride: int
    merged: ClassVar[bool] = True

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        distance = q_index + first_query(mask) - k_index
        return (distance.abs() < self.window_size) | (distance % self.stride == 0)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        near, far = self._bands(mask)
        yield from near.tiles(mask)
        yield from far.tiles(mask, but=near)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        near, far = self._bands(mask)
        return [*near.tables(mask), *far.tables(mask, but=near)]

    def _bands(self, mask: AttentionMask) -> tuple[Band, Band]:
        length = -(-mask.kv_length // self.stride)
        return Band(self.window_size, self.window_size - 1), Band(length, length, self.stride)


@dataclass(frozen=True)
class Fixed:
    """Blocks from ``look_backward`` before a query's own to its own, and the last ``summary`` keys of every block.

    Where the mask is not causal, as many blocks after its own as before."""

    block_size: int
    look_backward: int
    summary: int
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return self._near().sees(mask, q_index, k_index) | self._sums_up(mask, k_index)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        first, starts, ends = first_query(mask), mask.starts_BK().clamp(min=0), ends_BK(mask)
        index = torch.arange(mask.kv_length, device=mask.device).expand_as(starts)
        summaries = places(self._sums_up(mask, index))
        known: dict[tuple[int, ...], Tile] = {}
        # The last tiles have the most columns, and their masks begin with those of the summaries, all visible where
        # causal: without padding or rules the masks of the others are the ends of theirs.
        for queries, keys in reversed(list(self._near().slices(mask))):
            own = slice(first + queries.start, first + queries.stop)
            high = keys.start if mask.causal else int(ends[:, own].max())
            needed = ((summaries >= int(starts[:, own].min())) & (summaries < high)).any(dim=0)
            extra = summaries[:, needed]
            same_shape = (queries.stop - queries.start, keys.start - queries.start, keys.stop - queries.start)
            if keys.start and mask.causal and mask.plain and not mask.row_starts:
                if same_shape not in known:
                    known[same_shape] = make_tile(mask, self.sees, queries, (keys,), extra)
                hidden = known[same_shape].hidden
                if hidden is not None:
                    hidden = hidden[..., -(extra.shape[1] + keys.stop - keys.start) :]
                beside = extra if extra.shape[1] else None
                yield dataclasses.replace(known[same_shape], queries=queries, keys=(keys,), extra=beside, hidden=hidden)
            else:
                yield make_tile(mask, self.sees, queries, (keys,), extra)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        near, index = self._near(), torch.arange(mask.kv_length, device=mask.device).unsqueeze(0)
        # No row has more, however it is cut into segments; but where keys were dropped its first block has a part left.
        bound = mask.kv_length * self.summary // self.block_size + (self.summary if mask.kv_offset else 0)
        if not bound:
            return near.tables(mask)
        summaries = where_true(self._sums_up(mask, index), bound).unsqueeze(1)
        begin = torch.arange(0, mask.q_length, SUMMED_ROWS, device=mask.device).view(1, -1, 1)
        queries = begin + counted(min(SUMMED_ROWS, mask.q_length), mask.device)

        def sees(mask, q_index, k_index):
            return self._sums_up(mask, k_index) & ~near.sees(mask, q_index, k_index)

        return [*near.tables(mask), tables_of(mask, sees, queries, summaries)]

    def _near(self) -> BlockBand:
        return BlockBand(self.block_size, self.look_backward, self.look_backward)

    def _sums_up(self, mask: AttentionMask, k_index: torch.Tensor) -> torch.Tensor:
        return in_row(mask, k_index) % self.block_size >= self.block_size - self.summary
