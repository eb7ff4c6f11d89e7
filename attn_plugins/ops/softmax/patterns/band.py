"""Patterns of :mod:`attn_plugins.ops.softmax.tiles` that several attentions share: bands and blocks.

Positions count from the first real key of a row or segment, so that padding, packing and caches change nothing.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.softmax.tables import Tables, counted, most, rows_for, tables_of
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


def first_columns(mask: AttentionMask, q_1TR: torch.Tensor, number: int) -> torch.Tensor:
    """As :func:`first_keys` of each tile's queries, which are in order: (B or 1, T or 1, S)."""
    number = min(number, mask.kv_length)
    count = counted(number, mask.device)
    if not mask.row_starts:
        return count
    starts = mask.starts_BK()
    own = starts[:, q_1TR[0].clamp(0, mask.q_length - 1) + first_query(mask)]
    if mask.segments_BK is None:
        start = own[..., -1:]  # what is before it is padding
    else:
        rank = pad((own[..., 1:] != own[..., :-1]).cumsum(dim=2), (1, 0))
        bound = most(rank[..., -1] + 1, own.shape[2])
        start = own.new_full((*own.shape[:2], bound), -number).scatter(2, rank, own)
    keys = start.unsqueeze(3) + count
    inside = (keys >= 0) & (keys < mask.kv_length)
    keys = keys.masked_fill(~inside, 0)
    same = starts.gather(1, keys.flatten(1)).view(keys.shape) == start.unsqueeze(3)
    return keys.masked_fill(~(inside & same), -1).flatten(2)


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
    marked: bool = False
    """Whether all see the tokens that ``mask.own`` marks."""
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
        if self.marked:
            seen = seen | mask.look_up(_marked_BK(mask), k_index)
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
                if mask.plain and not mask.row_starts and not self.marked and same_shape in known:
                    yield dataclasses.replace(known[same_shape], queries=queries, keys=(keys,))
                    continue
                extra = first_keys(mask, part, self.num_first) if self.num_first else None
                if self.marked:
                    extra = _with_marked(mask, self, extra)
                known[same_shape] = make_tile(mask, sees, queries, (keys,), extra)
                yield known[same_shape]
        if global_queries:
            yield from global_tiles(mask, self.sees, self.num_first)

    def tables(self, mask: AttentionMask, but: "Band | None" = None) -> Sequence[Tables]:
        """As :meth:`Pattern.tables`, but for what another band shows already."""
        first, step, device = first_query(mask), self.dilation, mask.device
        queries, keys = -(-mask.q_length // step), -(-mask.kv_length // step)  # of a phase, at most
        window, ahead = min(self.window_size, keys), 0 if mask.causal else min(self.look_forward, keys)
        rows = min(rows_for(self.window_size + (0 if mask.causal else self.look_forward)), queries)
        phase = torch.arange(min(step, mask.q_length), device=device).view(-1, 1, 1)
        begin = torch.arange(0, queries, rows, device=device).unsqueeze(1)
        q_1TR = (phase + (begin + counted(rows, device)) * step).flatten(0, 1).unsqueeze(0)
        width = window - 1 + rows + ahead
        if width < keys:
            k_1TC = first + phase + (begin - (window - 1) + counted(width, device)) * step
        else:
            k_1TC = ((first + phase) % step + counted(keys, device) * step).expand(-1, len(begin), -1)
        k_BTC = k_1TC.flatten(0, 1).unsqueeze(0)
        if self.num_first or self.marked:
            extra = first_columns(mask, q_1TR, self.num_first) if self.num_first else k_BTC.new_empty(1, 1, 0)
            if self.marked:
                extra = _with_marked(mask, self, extra)
            low, high = k_BTC[..., :1], k_BTC[..., -1:]
            extra = extra.masked_fill((extra >= low) & (extra <= high) & ((extra - low) % step == 0), -1)
            k_BTC = torch.cat([extra, k_BTC.expand(len(extra), -1, -1)], dim=2)
        global_queries = self.first_see_all and not mask.causal

        def sees(mask, q_index, k_index):
            seen = self.sees(mask, q_index, k_index)
            if but is not None:
                seen = seen & ~but.sees(mask, q_index, k_index)
            return seen & ~self._of_the_first(mask, q_index) if global_queries else seen

        tables = [tables_of(mask, sees, q_1TR, k_BTC)]
        return [*tables, global_tables(mask, self.sees, self.num_first)] if global_queries else tables

    def _of_the_first(self, mask: AttentionMask, q_index: torch.Tensor) -> torch.Tensor:
        return query_in_row(mask, q_index) < self.num_first


def _marked_BK(mask: AttentionMask) -> torch.Tensor:
    assert mask.own is not None
    assert mask.own.marked_BK is not None
    return mask.own.marked_BK


def _with_marked(mask: AttentionMask, band: Band, extra: torch.Tensor | None) -> torch.Tensor:
    """(..., S) keys that all see, -1 for none: the first, and those that are marked and not among them."""

    def build() -> torch.Tensor:
        marked_BK = _marked_BK(mask)
        index = torch.arange(mask.kv_length, device=mask.device).unsqueeze(0)
        if band.num_first:
            marked_BK = marked_BK & (in_row(mask, index) >= band.num_first)
        found = where_true(marked_BK, most(marked_BK.sum(dim=1), mask.kv_length))
        return found.masked_fill(found >= mask.kv_length, -1)

    marked = mask.cached((band, "marked"), build)
    if extra is None:
        return marked
    marked = marked if extra.ndim == 2 else marked.unsqueeze(1)
    sizes = [max(a, b) for a, b in zip(extra.shape[:-1], marked.shape[:-1], strict=True)]
    return torch.cat([extra.expand(*sizes, -1), marked.expand(*sizes, -1)], dim=-1)


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


def global_tables(mask: AttentionMask, sees: Sees, num_global: int) -> Tables:
    """The first ``num_global`` queries of each row or segment with all of its keys."""
    own = torch.arange(mask.q_length, device=mask.device).unsqueeze(0)
    flags = in_row(mask, own + first_query(mask)) < num_global
    bound = num_global if mask.padding_BK is None else 2 * num_global  # padding before the first real key counts alone
    if mask.segments_BK is not None:
        bound = max(1, most(flags.sum(dim=1), mask.q_length))
    q_BS = where_true(flags, bound)
    rows = min(ROWS, q_BS.shape[1])
    q_BTR = pad(q_BS, (0, -q_BS.shape[1] % rows), value=-1).unflatten(1, (-1, rows))
    return tables_of(mask, sees, q_BTR, counted(mask.kv_length, mask.device))


def where_true(flags_BN: torch.Tensor, bound: int) -> torch.Tensor:
    """Where a row is True, which is ``bound`` times at most: (B, bound or N) ascending indices, N after the last."""
    number = flags_BN.shape[1]
    index = torch.arange(number, device=flags_BN.device)
    return torch.where(flags_BN, index, number).topk(min(bound, number), dim=1, largest=False, sorted=True).values


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

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        first, size, device = first_query(mask), self.block_size, mask.device
        before, after = self.look_backward * size, 0 if mask.causal else self.look_forward * size
        if mask.row_starts or size >= mask.q_length:
            # Blocks begin anywhere in a tile.
            before, after = before + size - 1, 0 if mask.causal else after + size - 1
            rows = min(rows_for(size), mask.q_length)
            begin = torch.arange(0, mask.q_length, rows, device=device).view(-1, 1, 1)
            q_TPR, unit = begin + counted(rows, device), rows
        else:
            unit = size * max(1, ROWS // size)  # blocks of a tile, or tiles of a block
            parts = max(1, round(unit / (2 * ROWS)))
            low, high = (first + self.shift) // size, (first + mask.q_length - 1 + self.shift) // size + 1
            begin = torch.arange(low * size, high * size, unit, device=device).view(-1, 1, 1) - self.shift - first
            inside = torch.arange(parts * -(-unit // parts), device=device).view(1, parts, -1)
            q_TPR = (begin + inside).masked_fill(inside >= unit, -1)
        if (width := before + unit + after) < mask.kv_length:
            k_TPC = first + begin - before + counted(width, device).expand(-1, q_TPR.shape[1], -1)
        else:
            k_TPC = counted(mask.kv_length, device).expand(*q_TPR.shape[:2], -1)
        return [tables_of(mask, self.sees, q_TPR.flatten(0, 1).unsqueeze(0), k_TPC.flatten(0, 1).unsqueeze(0))]

    def _block(self, position: torch.Tensor) -> torch.Tensor:
        return (position + self.shift) // self.block_size
