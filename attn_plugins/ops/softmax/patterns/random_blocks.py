"""BigBird's pattern: blocks that everything sees, blocks beside a query's own, and blocks drawn at random."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable
from attn_plugins.ops.hashing import mixed
from attn_plugins.ops.softmax.patterns.band import first_query, global_tables, global_tiles, in_row
from attn_plugins.ops.softmax.tables import Tables, counted, most, tables_of
from attn_plugins.ops.softmax.tiles import Tile, make_tile

LARGEST_TILE = 128
"""Queries of a tile, where a block has more."""


def drawn(
    block: torch.Tensor, count: torch.Tensor, limit: int, low: int, gap: tuple[int, int], number: int, seed: int
) -> torch.Tensor:
    """Blocks drawn without replacement for each of P blocks: (P, at most number) in ascending order, -1 for none.

    Candidates are the blocks from ``low`` to ``count`` except those from ``block - gap[0]`` to ``block + gap[1]``. The
    candidates with the smallest hashes of (seed, block, candidate) are drawn, so that a longer sequence only adds some.

    Args:
        block, count: (P,)
        limit: no count exceeds it.
    """
    candidate = torch.arange(limit, device=block.device)
    distance = candidate - block.unsqueeze(1)
    allowed = (candidate >= low) & (candidate < count.unsqueeze(1)) & ((distance < -gap[0]) | (distance > gap[1]))
    last = torch.iinfo(torch.int64).max
    order = mixed(mixed(mixed(block.new_full((), seed)) + block.unsqueeze(1)) + candidate).masked_fill_(~allowed, last)
    lowest = order.topk(min(number, limit), dim=1, largest=False)
    none = lowest.values == last
    return lowest.indices.masked_fill(none, limit).sort(dim=1).values.masked_fill(none.sort(dim=1).values, -1)


class _Blocks(NamedTuple):
    """T blocks, the first that of the first query; the last of them may be beyond the last key."""

    number_BK: torch.Tensor
    """(B or 1, K): each key's, counted from the left end over all segments."""
    number_BT: torch.Tensor
    at_BT: torch.Tensor
    """The first key, K for none."""
    chosen_BTN: torch.Tensor
    """Blocks drawn for them, counted in the row or segment, -1 for none."""
    bounded: bool
    """Whether T is near the number of blocks that there are, else the number of queries."""


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks of ``block_size`` tokens, counted from the first real one of a row or segment.

    A query sees the first ``num_global`` blocks, ``num_window`` blocks around its own (up to its own where the mask is
    causal) and ``num_random`` others (of those before, where it is causal). The first blocks' queries see everything.
    """

    block_size: int
    num_global: int
    num_window: int
    num_random: int
    seed: int
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        own, block = self._block(mask, q_index + first_query(mask)), self._block(mask, k_index)
        before, after = self._window(mask)
        seen = (own - block <= before) & (block - own <= after) | (block < self.num_global)
        if not mask.causal:
            seen = seen | (own < self.num_global)
        return seen | mask.look_up(self._is_chosen_BQN(mask), q_index, block)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        most = mask.kv_length  # no row has more blocks than keys, nor a longer one
        fitting = dataclasses.replace(
            self,
            block_size=min(self.block_size, most),
            num_global=min(self.num_global, most),
            num_window=min(self.num_window, 2 * most + 1),
        )
        yield from fitting._scattered_tiles(mask) if mask.row_starts else fitting._aligned_tiles(mask)

    def _aligned_tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        """Where every row starts at key 0, blocks are slices."""
        first, size, length = first_query(mask), self.block_size, mask.kv_length
        before, after = self._window(mask)
        chosen = self._chosen_BQN(mask)[0].tolist()
        known: dict[tuple[int, ...], Tile] = {}
        low = 0
        while low < mask.q_length:
            block, into = divmod(first + low, size)
            high = min(low + size - into, low + LARGEST_TILE, mask.q_length)
            queries = slice(low, high)
            stop = first + high if mask.causal else length
            if block < self.num_global and not mask.causal:
                needed = list(range(-(-length // size)))
            else:
                near = range(max(0, block - before), block + after + 1)
                needed = sorted({*range(self.num_global), *near, *(number for number in chosen[low] if number >= 0)})
            keys = joined([slice(n * size, min((n + 1) * size, stop)) for n in needed if n * size < stop])
            # The own block comes last where not everything that a tile holds is visible, which is where it is causal.
            same_shape = (high - low, into, sum(part.stop - part.start for part in keys))
            if mask.plain and same_shape in known:
                yield dataclasses.replace(known[same_shape], queries=queries, keys=keys)
            else:
                known[same_shape] = make_tile(mask, self.sees, queries, keys)
                yield known[same_shape]
            low = high

    def _scattered_tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        """Where rows start at places of their own, so do their blocks: queries and keys are gathered."""
        size, first = self.block_size, first_query(mask)
        before, after = self._window(mask)
        starts, chosen = mask.starts_BK(), self._chosen_BQN(mask)
        index = torch.arange(mask.kv_length, device=mask.device).expand_as(starts)
        begins = (index - starts) % size == 0
        begins[:, 0] = True
        block = begins.long().cumsum(dim=1) - 1  # counted from the left end, over all segments
        count = torch.arange(size, device=mask.device)
        for number in range(int(block[:, -1].max()) + 1):
            at = (block < number).sum(dim=1, keepdim=True)  # the block's first key
            own = at + count
            inside = own.clamp(max=mask.kv_length - 1)
            own = own.masked_fill((own >= mask.kv_length) | (block.gather(1, inside) != number), -1)
            queries = (own - first).masked_fill(own < first, -1)
            if not bool((queries >= 0).any()):
                continue
            start = starts.gather(1, at.clamp(max=mask.kv_length - 1))
            here = (at - start) // size
            near = here + torch.arange(-before, after + 1, device=mask.device)
            top = torch.arange(self.num_global, device=mask.device).expand(len(starts), -1)
            some = queries.amax(dim=1).clamp(min=0)
            drawn_here = chosen[torch.arange(len(chosen), device=mask.device), some]
            needed = torch.cat([top, near.masked_fill(near < self.num_global, -1), drawn_here], dim=1)
            keys = (start + needed * size).unsqueeze(2) + count
            inside = keys.clamp(0, mask.kv_length - 1)
            same = starts.gather(1, inside.flatten(1)).view_as(keys) == start.unsqueeze(2)
            held = (needed >= 0).unsqueeze(2) & (keys == inside) & same
            extra = keys.masked_fill(~held, -1).flatten(1)
            yield make_tile(mask, self._sees_as_one_of_many, queries, (), extra)
        if not mask.causal and self.num_global:
            yield from global_tiles(mask, self.sees, self.num_global * size)

    def _sees_as_one_of_many(self, mask, q_index, k_index):
        seen = self.sees(mask, q_index, k_index)
        return seen if mask.causal else seen & (self._block(mask, q_index + first_query(mask)) >= self.num_global)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        keys = mask.kv_length
        size, num_global = min(self.block_size, keys), min(self.num_global, keys)  # no row has more blocks than keys
        window = min(self.num_window, 2 * keys + 1)
        fitting = RandomBlocks(size, num_global, window, self.num_random, self.seed)
        tables = [fitting._block_tables(mask)]
        if not mask.causal and num_global:
            tables.append(global_tables(mask, fitting.sees, num_global * size))
        return tables

    def _block_tables(self, mask: AttentionMask) -> Tables:
        """A tile of each block, with all the keys that it sees."""
        blocks, size, keys, device = self._blocks(mask), self.block_size, mask.kv_length, mask.device
        first, (before, after), starts = first_query(mask), self._window(mask), mask.starts_BK()
        if blocks.bounded:
            own = blocks.at_BT.unsqueeze(2) + torch.arange(size, device=device)
            inside = own.clamp(max=keys - 1)
            number = blocks.number_BK.gather(1, inside.flatten(1)).view_as(own)
            same = (own == inside) & (number == blocks.number_BT.unsqueeze(2))
            at_BT, chosen, queries = blocks.at_BT, blocks.chosen_BTN, (own - first).masked_fill(~same, -1)
        else:  # there may be as many blocks as queries
            queries = torch.arange(mask.q_length, device=device).view(1, -1, 1)
            at_BT, chosen = (queries[..., 0] + first).expand(len(starts), -1), self._chosen_BQN(mask)
        start = starts.gather(1, at_BT.clamp(max=keys - 1))
        near = ((at_BT - start) // size).unsqueeze(2) + torch.arange(-before, after + 1, device=device)
        top = counted(self.num_global, device).expand(*at_BT.shape, -1)
        needed = torch.cat([top, near.masked_fill(near < self.num_global, -1), chosen], dim=2)
        if needed.shape[2] * size >= keys:
            return tables_of(mask, self._sees_as_one_of_many, queries, counted(keys, device))
        seen = (start.unsqueeze(2) + needed * size).unsqueeze(3) + torch.arange(size, device=device)
        seen = seen.masked_fill((needed < 0).unsqueeze(3), -1).flatten(2)
        return tables_of(mask, self._sees_as_one_of_many, queries, seen)

    def _blocks(self, mask: AttentionMask) -> "_Blocks":
        """The blocks that queries are in."""

        def build() -> _Blocks:
            first, size, starts = first_query(mask), self.block_size, mask.starts_BK()
            index = torch.arange(mask.kv_length, device=mask.device).unsqueeze(0).expand_as(starts)
            begins = (index - starts) % size == 0
            number = begins.long().cumsum(dim=1)
            # The queries of a text without segments begin within a block, and so may the text itself.
            bound = min(-(-mask.q_length // size) + 2, mask.q_length)
            known = mask.segments_BK is None
            if not known:
                reached = number[:, -1] - number[:, first] + 1
                bound, known = most(reached, mask.q_length), readable(reached)
            number_BT = number[:, first : first + 1] + torch.arange(bound, device=mask.device)
            at = torch.searchsorted(number.contiguous(), number_BT)
            some = at.clamp(max=mask.kv_length - 1)
            own = (some - starts.gather(1, some)) // size
            limit = -(-(mask.kv_offset + mask.kv_length) // size)
            count = own
            if not mask.causal:
                count = self._number_of_blocks_BK(mask, self._block(mask, index)).gather(1, some)
            window = self._window(mask)
            chosen = drawn(own.flatten(), count.flatten(), limit, self.num_global, window, self.num_random, self.seed)
            return _Blocks(number, number_BT, at, chosen.view(*own.shape, -1), known)

        return mask.cached((self, "blocks"), build)

    def _chosen_BQN(self, mask: AttentionMask) -> torch.Tensor:
        """Numbers of the random blocks that each query sees, (B or 1, Q, at most num_random), -1 for none."""

        def build() -> torch.Tensor:
            first, blocks = first_query(mask), self._blocks(mask)
            own = blocks.number_BK[:, first : first + mask.q_length] - blocks.number_BT[:, :1]
            return blocks.chosen_BTN.gather(1, own.unsqueeze(2).expand(-1, -1, blocks.chosen_BTN.shape[2]))

        return mask.cached((self, "chosen"), build)

    def _is_chosen_BQN(self, mask: AttentionMask) -> torch.Tensor:
        """Whether each query sees a block as one of the random ones, by the block's number: (B or 1, Q, blocks)."""

        def build() -> torch.Tensor:
            chosen, number = self._chosen_BQN(mask), -(-(mask.kv_offset + mask.kv_length) // self.block_size)
            table = torch.zeros(*chosen.shape[:2], number + 1, dtype=torch.bool, device=chosen.device)
            return table.scatter_(2, chosen.masked_fill(chosen < 0, number), 1)[:, :, :number].contiguous()

        return mask.cached((self, "is chosen"), build)

    def _number_of_blocks_BK(self, mask: AttentionMask, block: torch.Tensor) -> torch.Tensor:
        """For each key the number of blocks of its row or segment as far as there are real keys."""
        if mask.padding_BK is not None:
            block = block.masked_fill(~mask.padding_BK, -1)
        starts = mask.starts_BK().clamp(min=0).expand(len(block), -1)
        last = torch.full_like(block, -1).scatter_reduce(1, starts, block, "amax")
        return last.gather(1, starts) + 1

    def _window(self, mask: AttentionMask) -> tuple[int, int]:
        """Blocks before a query's own and after it."""
        return (self.num_window - 1, 0) if mask.causal else (self.num_window // 2, self.num_window // 2)

    def _block(self, mask: AttentionMask, k_index: torch.Tensor) -> torch.Tensor:
        return in_row(mask, k_index) // self.block_size


def joined(parts: list[slice]) -> tuple[slice, ...]:
    """The same indices in as few slices as there can be."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            joined[-1] = slice(joined[-1].start, part.stop)
        else:
            joined.append(part)
    return tuple(joined)
