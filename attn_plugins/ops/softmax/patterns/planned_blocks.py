"""The blocks of a BigBird model: as it plans them, the last one global too, some of them counted several times."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.own_pattern import OwnBlocks
from attn_plugins.ops.softmax.patterns.random_blocks import RandomBlocks, joined
from attn_plugins.ops.softmax.tables import Tables, tables_of
from attn_plugins.ops.softmax.tiles import Pattern, Tile, make_tile

Drawn = tuple[tuple[int, ...], ...]
"""For each block of queries but the first and the last, blocks beside the global ones and those around it."""


@dataclass(frozen=True)
class PlannedBlocks:
    """Blocks of ``block_size`` tokens from the first of a row on, padding or not.

    A query sees the first and the last block, its own and those beside it, and those drawn for its block; queries of
    the first and of the last block see all. For queries that are as many as keys.
    """

    block_size: int
    drawn: Drawn
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        own, block, last = q_index // self.block_size, k_index // self.block_size, self._last(mask)
        seen = (own - block <= 1) & (block - own <= 1)
        seen = seen | (block < 1) | (block >= last) | (own < 1) | (own >= last)
        return seen | mask.look_up(self._drawn_1TT(mask), own, block) if any(self.drawn) else seen

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        size, last, length = self.block_size, self._last(mask), mask.kv_length
        for block in range(last + 1):
            needed = range(last + 1) if block in (0, last) else self._needed(block, last)
            keys = joined([slice(n * size, min((n + 1) * size, length)) for n in needed])
            yield make_tile(mask, self.sees, slice(block * size, min((block + 1) * size, length)), keys)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        size, last, device = self.block_size, self._last(mask), mask.device
        inside = torch.arange(size, device=device)
        ends = torch.tensor(sorted({0, last}), device=device)
        queries, every = ends.view(1, -1, 1) * size + inside, torch.arange(mask.kv_length, device=device)
        found = [tables_of(mask, self.sees, queries, every.view(1, 1, -1))]
        if last > 1:
            rows = [self._needed(block, last) for block in range(1, last)]
            width = max(map(len, rows))
            needed = torch.tensor([[*row, *[last + 1] * (width - len(row))] for row in rows], device=device)
            keys = (needed.unsqueeze(2) * size + inside).flatten(1).unsqueeze(0)
            queries = torch.arange(1, last, device=device).view(1, -1, 1) * size + inside
            found.append(tables_of(mask, self.sees, queries, keys))
        return found

    def _last(self, mask: AttentionMask) -> int:
        return (mask.kv_length - 1) // self.block_size

    def _needed(self, block: int, last: int) -> list[int]:
        return sorted({0, block - 1, block, block + 1, last, *(self.drawn[block - 1] if self.drawn else ())})

    def _drawn_1TT(self, mask: AttentionMask) -> torch.Tensor:
        def build() -> torch.Tensor:
            table = torch.zeros(1, self._last(mask) + 1, self._last(mask) + 1, dtype=torch.bool)
            for block, chosen in enumerate(self.drawn, start=1):
                table[0, block, list(chosen)] = True
            return table.to(mask.device)

        return mask.cached((self, "drawn"), build)


def planned_blocks(own: OwnBlocks, heads: int, length: int) -> list[tuple[slice, Pattern]]:
    """Slices of the query heads, each with its pattern, for rows of ``length`` keys."""
    if own.drawn is None:
        return [(slice(0, heads), RandomBlocks(length, 1, 1, 0, 0))]
    last = (length - 1) // own.block_size
    parts: list[tuple[slice, Pattern]] = []
    for number, plan in enumerate(own.drawn):
        beside = [
            tuple(sorted({n for n in row if n not in (0, last) and abs(n - block) > 1}))
            for block, row in enumerate(plan, start=1)
        ]
        of_heads = slice(0, heads) if len(own.drawn) == 1 else slice(number, number + 1)
        parts.append((of_heads, PlannedBlocks(own.block_size, tuple(beside) if any(beside) else ())))
    return parts


def counted_blocks(q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, own: OwnBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys in which a block that counts several times has as many times the weight.

    They get an entry more for each such block: 1 in its keys, and in queries the logarithm of how often they count it,
    over the scale of scores. Softmax makes a factor of it.
    """
    if own.drawn is None:
        return q_BHQD, k_BGKD
    length, size = k_BGKD.shape[2], own.block_size
    last = (length - 1) // size
    logs: dict[tuple[int, int, int], float] = {}
    for head, plan in enumerate(own.drawn):
        for block, row in enumerate(plan, start=1):
            anyway = {0, last, block - 1, block, block + 1}
            for chosen, times in Counter(row).items():
                if times + (chosen in anyway) > 1:
                    logs[head, block, chosen] = math.log(times + (chosen in anyway))
    if not logs:
        return q_BHQD, k_BGKD
    several = sorted({chosen for _, _, chosen in logs})
    logs_HTC = torch.zeros(len(own.drawn), last + 1, len(several))
    for (head, block, chosen), log in logs.items():
        logs_HTC[head, block, several.index(chosen)] = log
    of_query = (logs_HTC / own.scale).repeat_interleave(size, dim=1)[:, : q_BHQD.shape[2]].to(q_BHQD)
    block_K = torch.arange(length, device=k_BGKD.device) // size
    of_key = (block_K.unsqueeze(1) == torch.tensor(several, device=k_BGKD.device)).to(k_BGKD.dtype)
    query = torch.cat([q_BHQD, of_query.expand(*q_BHQD.shape[:3], -1)], dim=3)
    return query, torch.cat([k_BGKD, of_key.expand(*k_BGKD.shape[:3], -1)], dim=3)
