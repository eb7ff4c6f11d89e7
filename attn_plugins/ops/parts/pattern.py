"""A pattern over whole rows, as one over a part's queries and the keys that are brought to them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.part import Part
from attn_plugins.ops.parts.halo import Reach, positions
from attn_plugins.ops.softmax.patterns.band import ROWS, first_columns, first_keys, query_in_row
from attn_plugins.ops.softmax.tables import Tables, counted, rows_for, tables_of
from attn_plugins.ops.softmax.tiles import Rule, Tile, make_tile


@dataclass(frozen=True, eq=False)
class InPart:
    """What a rule and the mask of whole rows show, over the keys of :func:`attn_plugins.ops.parts.halo.with_halo`.

    The rule is asked about positions in whole rows: what it says is what it says in one process. Tiles are as wide as
    the reach, whatever the rule leaves out of it. Queries that see all are left to
    :func:`attn_plugins.ops.parts.first_queries.attend_first`.
    """

    rule: Rule
    whole: AttentionMask
    start: int
    length: int
    reach: Reach
    position_BK: torch.Tensor
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        whole, query = self.whole, q_index + self.start
        position = mask.look_up(self.position_BK, k_index)
        seen = (position >= 0) & whole.visible(query, key := position.clamp(min=0))
        query = query.clamp(max=whole.q_length - 1)
        seen = seen & self.rule.sees(whole, query, key)
        return seen & (query_in_row(whole, query) >= self.reach.first) if self.reach.first_see_all else seen

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        before, after, first, _ = self.reach
        missing = max(0, before - self.start)
        end = first + before + min(self.length + after, self.whole.kv_length - self.start)
        for low in range(0, self.length, ROWS):
            high = min(low + ROWS, self.length)
            keys = slice(first + max(low, missing), min(first + before + high + after, end))
            extra = None
            if first:
                queries = range(self.start + low, self.start + high)
                extra = self._places(first_keys(self.whole, queries, first))
            yield make_tile(mask, self.sees, slice(low, high), (keys,), extra)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        before, after, first, _ = self.reach
        rows = min(rows_for(before + after), self.length)
        begin = torch.arange(0, self.length, rows, device=mask.device).view(1, -1, 1)
        queries, keys = begin + counted(rows, mask.device), first + begin + counted(before + rows + after, mask.device)
        if first:
            extra = self._places(first_columns(self.whole, queries + self.start, first))
            inside = (extra >= keys[..., :1]) & (extra <= keys[..., -1:])
            extra = extra.masked_fill(inside, -1).expand(-1, keys.shape[1], -1)
            keys = torch.cat([extra, keys.expand(len(extra), -1, -1)], dim=2)
        return [tables_of(mask, self.sees, queries, keys)]

    def _places(self, position: torch.Tensor) -> torch.Tensor:
        """Where first keys are that have these positions in the row, (B or 1, ...), -1 for none."""
        before, after, first, _ = self.reach
        oldest = self.start - before
        start_B = self.whole.starts_BK()[:, max(self.start - 1, 0)]
        of_text_before = position - start_B.view(-1, *[1] * (position.ndim - 1))
        brought = torch.where((of_text_before >= 0) & (of_text_before < first), of_text_before, -1)
        place = torch.where(position >= oldest, first + position - oldest, brought)
        return place.masked_fill((position < 0) | (position >= self.start + self.length + after), -1)


def in_part(
    rules: Sequence[tuple[slice, Rule]], part: Part, reach: Reach
) -> tuple[AttentionMask, list[tuple[slice, InPart]]]:
    """(A mask of the part's queries and their keys that hides nothing, rules over them), once for all layers."""

    def build() -> tuple[AttentionMask, list[tuple[slice, InPart]]]:
        position_BK = positions(part, reach)
        sizes = (part.mask.batch_size, part.length, position_BK.shape[1])
        mask = AttentionMask(*sizes, causal=False, cross=True, device=part.mask.device)
        return mask, [
            (heads, InPart(rule, part.mask, part.start, part.length, reach, position_BK)) for heads, rule in rules
        ]

    key = (tuple((heads.start, heads.stop, rule) for heads, rule in rules), reach)
    if key not in part.memo:
        part.memo[key] = build()
    return part.memo[key]
