"""Patterns of :mod:`attn_plugins.ops.softmax.tiles` that several attentions share: bands and blocks.

Positions count from the first real key of a row or segment, so that padding, packing and caches change nothing.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.tiles import Sees, Tile, make_tile

ROWS = 64
"""Queries of a tile. A tile of R rows in a window of W costs (W + R) keys a row, so R stays small beside the window,
yet large enough for the matrix products to dominate: 64 was the fastest of 32 to 256 for windows of 256 on CPU."""


def first_query(mask: AttentionMask) -> int:
    """The index among the keys of the first query's own key."""
    return mask.q_offset - mask.kv_offset


def distance(mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
    """How far keys lie before queries, negative where after."""
    return q_index + mask.q_offset - mask.key_positions(k_index)


def query_in_row(mask: AttentionMask, q_index: torch.Tensor) -> torch.Tensor:
    """As :func:`in_row`, of queries."""
    if mask.positions_BK is None:
        return in_row(mask, q_index + first_query(mask))
    assert mask.first_B is not None
    return q_index + mask.q_offset - mask.first_B.view(-1, *[1] * (q_index.ndim - 1))


def in_row(mask: AttentionMask, k_index: torch.Tensor) -> torch.Tensor:
    """Positions of keys (B or 1, ...) counted from the first real key of their row or segment."""
    if mask.positions_BK is not None:
        assert mask.first_B is not None
        return mask.key_positions(k_index) - mask.first_B.view(-1, *[1] * (k_index.ndim - 1))
    if not mask.row_starts:
        return k_index
    return k_index - mask.look_up(mask.starts_BK(), k_index)


def ends_BK(mask: AttentionMask) -> torch.Tensor:
    """For each key the index after the last one of its row or segment, (B or 1, K)."""
    starts = mask.starts_BK()
    ends = torch.full_like(starts, mask.kv_length)
    after = torch.arange(1, starts.shape[1], device=starts.device)
    ends[:, :-1] = torch.where(starts[:, 1:] != starts[:, :-1], after, mask.kv_length)
    return ends.flip(1).cummin(dim=1).values.flip(1)


def places(flags_BN: torch.Tensor) -> torch.Tensor:
    """Where a row is True: (B, most in a row) ascending indices, -1 after a row's last."""
    order = flags_BN.long().argsort(dim=1, descending=True, stable=True)[:, : int(flags_BN.sum(dim=1).max())]
    return order.masked_fill(~flags_BN.gather(1, order), -1)


def first_keys(mask: AttentionMask, queries: range, number: int) -> torch.Tensor:
    """The first ``number`` keys of each row or segment that these queries are of: (B or 1, S), -1 for none."""
    number = min(number, mask.kv_length)
    count = torch.arange(number, device=mask.device)
    if not mask.row_starts:
        return count.unsqueeze(0)
    starts = mask.starts_BK()
    own = starts[:, first_query(mask) + queries.start : first_query(mask) + queries[-1] + 1]
    if mask.segments_BK is None:
        start = own[:, -1:]  # what is before it is padding
        keys = start.unsqueeze(2) + count
    else:
        changes = torch.cat([torch.ones_like(own[:, :1], dtype=torch.bool), own[:, 1:] != own[:, :-1]], dim=1)
        index = places(changes)
        start = own.gather(1, index.clamp(min=0)).masked_fill(index < 0, -number)
        keys = start.unsqueeze(2) + count
    inside = (keys >= 0) & (keys < mask.kv_length)
    keys = keys.masked_fill(~inside, 0)
    same = starts.gather(1, keys.flatten(1)).view(keys.shape) == start.unsqueeze(2)
    return keys.masked_fill(~(inside & same), -1).flatten(1)


@dataclass(frozen=True)
class Band:
    """The nearest keys, every ``dilation``-th of them, and the first of the row or segment.

    A query sees ``window_size`` keys up to and including its own and, where the mask is not causal, ``look_forward``
    after it.
    """

    window_size: int
    look_forward: int
    dilation: int = 1
    num_first: int = 0
    """This many keys from the first real one on are seen from everywhere."""
    first_see_all: bool = False
    """Whether the first tokens also see everything."""
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        before = distance(mask, q_index, k_index)
        seen = before < self.window_size * self.dilation
        seen = seen & (before >= 0 if mask.causal else before >= -self.look_forward * self.dilation)
        if self.dilation > 1:
            seen = seen & (before % self.dilation == 0)
        if self.num_first:
            seen = seen | (in_row(mask, k_index) < self.num_first)
        if self.first_see_all:
            seen = seen | self._of_the_first(mask, q_index)
        return seen

    def tiles(self, mask: AttentionMask, but: "Band | None" = None) -> Iterator[Tile]:
        """As :meth:`Pattern.tiles`, but for what another band shows already."""
        first, step = first_query(mask), self.dilation
        rows = ROWS if self.window_size < 1024 else 2 * ROWS
        ahead = 0 if mask.causal else self.look_forward
        global_queries = self.first_see_all and not mask.causal

        def sees(mask, q_index, k_index):
            seen = self.sees(mask, q_index, k_index)
            if but is not None:
                seen = seen & ~but.sees(mask, q_index, k_index)
            return seen & ~self._of_the_first(mask, q_index) if global_queries else seen

        known: dict[tuple[int, ...], Tile] = {}
        for phase in range(min(step, mask.q_length)):
            phased = range(phase, mask.q_length, step)
            for at in range(0, len(phased), rows):
                part = phased[at : at + rows]
                queries = slice(part.start, part[-1] + 1, step)
                low = first + part.start - (self.window_size - 1) * step
                keys = slice(
                    low if low >= 0 else low % step, min(mask.kv_length, first + part[-1] + ahead * step + 1), step
                )
                # Without padding or rules only distances matter: almost all tiles look the same, and so do their masks.
                same_shape = (
                    len(part),
                    keys.start - part.start,
                    keys.stop - part.start,
                    min(keys.start, self.num_first),
                )
                if mask.plain and not mask.row_starts and same_shape in known:
                    yield dataclasses.replace(known[same_shape], queries=queries, keys=(keys,))
                    continue
                extra = first_keys(mask, part, self.num_first) if self.num_first else None
                known[same_shape] = make_tile(mask, sees, queries, (keys,), extra)
                yield known[same_shape]
        if global_queries:
            yield from global_tiles(mask, self.sees, self.num_first)

    def _of_the_first(self, mask: AttentionMask, q_index: torch.Tensor) -> torch.Tensor:
        return query_in_row(mask, q_index) < self.num_first


def global_tiles(mask: AttentionMask, sees: Sees, num_global: int) -> Iterator[Tile]:
    """Tiles of the first ``num_global`` queries of each row or segment with all of its keys."""
    own = torch.arange(mask.q_length, device=mask.device).unsqueeze(0) + first_query(mask)
    index = places(in_row(mask, own) < num_global)
    starts, ends = mask.starts_BK().clamp(min=0), ends_BK(mask)
    for queries in index.split(ROWS, dim=1) if index.shape[1] else ():
        rows = torch.arange(len(starts), device=mask.device).unsqueeze(1).expand(-1, queries.shape[1])[queries >= 0]
        at = (queries + first_query(mask))[queries >= 0]
        keys = slice(int(starts[rows, at].min()), int(ends[rows, at].max()))
        yield make_tile(mask, sees, queries, (keys,))


@dataclass(frozen=True)
class BlockBand:
    """The blocks around a query's own, counted from the beginning of the row or segment.

    ``look_forward`` holds where the mask is not causal; blocks begin ``shift`` positions early.
    """

    block_size: int
    look_backward: int = 0
    look_forward: int = 0
    shift: int = 0
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        blocks = self._block(query_in_row(mask, q_index)) - self._block(in_row(mask, k_index))
        return (blocks <= self.look_backward) & (blocks >= (0 if mask.causal else -self.look_forward))

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        known: dict[tuple[int, ...], Tile] = {}
        for queries, keys in self.slices(mask):
            # As in a band, but the place in the block matters too; it is the same at the same distance of the keys.
            same_shape = (queries.stop - queries.start, keys.start - queries.start, keys.stop - queries.start)
            if keys.start and mask.plain and not mask.row_starts and same_shape in known:
                yield dataclasses.replace(known[same_shape], queries=queries, keys=(keys,))
                continue
            tile = make_tile(mask, self.sees, queries, (keys,))
            if keys.start:
                known[same_shape] = tile
            yield tile

    def slices(self, mask: AttentionMask) -> Iterator[tuple[slice, slice]]:
        """Slices of the queries, and the slice of the keys that each needs."""
        first, size = first_query(mask), self.block_size
        # As many rows as divide blocks evenly, so that few tiles reach into two.
        rows = size * max(1, ROWS // size) if size <= ROWS else -(-size // round(size / ROWS))
        own = torch.arange(first, first + mask.q_length, device=mask.device).unsqueeze(0)
        at = in_row(mask, own)
        block = (at + self.shift) // size
        begin = (own - at + ((block - self.look_backward) * size - self.shift).clamp(min=0)).amin(dim=0).tolist()
        ahead = 1 if mask.causal else 1 + self.look_forward
        end = (own - at + (block + ahead) * size - self.shift).amax(dim=0).tolist()
        low = 0
        while low < mask.q_length:
            into = 0 if mask.row_starts else (first + low + self.shift) % size % rows
            high = min(low + rows - into, mask.q_length)
            stop = min(max(end[low:high]), mask.kv_length, first + high if mask.causal else mask.kv_length)
            yield slice(low, high), slice(max(0, min(begin[low:high])), stop)
            low = high

    def _block(self, position: torch.Tensor) -> torch.Tensor:
        return (position + self.shift) // self.block_size
