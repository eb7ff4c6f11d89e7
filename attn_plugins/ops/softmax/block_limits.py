"""Which blocks of queries and keys hold visible pairs, from what bounds each block: for kernels that leave blocks out.

A rule (:meth:`AttentionMask.shows`, :meth:`Rule.sees`) gets :class:`Span` in place of indices, and computes with the
limits of all blocks at once what it would compute pair by pair. What comes out is :class:`Blocks`. Nothing here is
Q x K, and nothing is read on the host.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.relations import Edges
from attn_plugins.ops.softmax.tiles import Rule

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Blocks:
    """Of a condition on pairs: the blocks in which it may hold for some pair, and those in which it does for every.

    Both (B or 1, blocks of queries or 1, blocks of keys or 1) bool. ``some`` may have a block too many, ``every`` one
    too few.
    """

    some: torch.Tensor
    every: torch.Tensor

    def __and__(self, other: "Blocks") -> "Blocks":
        return Blocks(self.some & other.some, self.every & other.every)

    def __or__(self, other: "Blocks") -> "Blocks":
        return Blocks(self.some | other.some, self.every | other.every)

    def __invert__(self) -> "Blocks":
        return Blocks(~self.every, ~self.some)


@dataclass(frozen=True, eq=False)
class Span:
    """Of an integer for each query or key: the least and the greatest in each block, in the shape of :class:`Blocks`.

    It computes as a tensor of integers does, as far as rules need it.
    """

    low: torch.Tensor
    high: torch.Tensor
    size: int | None = None
    """Where it is indices that follow one another: how many there may be."""

    @property
    def device(self) -> torch.device:
        return self.low.device

    def __add__(self, other: "Span | int") -> "Span":
        if isinstance(other, Span):
            return Span(self.low + other.low, self.high + other.high)
        return Span(self.low + other, self.high + other, self.size)

    def __neg__(self) -> "Span":
        return Span(-self.high, -self.low)

    def __sub__(self, other: "Span | int") -> "Span":
        return self + -other

    def __rsub__(self, other: int) -> "Span":
        return -self + other

    def __floordiv__(self, other: int) -> "Span":
        return Span(self.low // other, self.high // other)

    def __mod__(self, other: int) -> "Span":
        one = self.low // other == self.high // other
        return Span(torch.where(one, self.low % other, 0), torch.where(one, self.high % other, other - 1))

    def clamp(self, min: int) -> "Span":
        return Span(self.low.clamp(min=min), self.high.clamp(min=min))

    def abs(self) -> "Span":
        low = torch.maximum(self.low, -self.high).clamp(min=0)
        return Span(low, torch.maximum(self.low.abs(), self.high.abs()))

    def __lt__(self, other: "Span | int") -> Blocks:
        low, high = _limits(other)
        return Blocks(self.low < high, self.high < low)

    def __le__(self, other: "Span | int") -> Blocks:
        low, high = _limits(other)
        return Blocks(self.low <= high, self.high <= low)

    def __gt__(self, other: "Span | int") -> Blocks:
        low, high = _limits(other)
        return Blocks(self.high > low, self.low > high)

    def __ge__(self, other: "Span | int") -> Blocks:
        low, high = _limits(other)
        return Blocks(self.high >= low, self.low >= high)

    def __eq__(self, other: Any) -> Any:
        return (self <= other) & (self >= other)

    def __ne__(self, other: Any) -> Any:
        return ~(self == other)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.minimum:
            return NotImplemented
        one, other = args
        return Span(torch.minimum(one.low, other.low), torch.minimum(one.high, other.high))


def _limits(value: Span | int) -> tuple[Any, Any]:
    return (value.low, value.high) if isinstance(value, Span) else (value, value)


def positions(number: int, size: int, device: torch.device) -> Span:
    """The indices from 0 to ``number`` in blocks of ``size``: limits (1, blocks)."""
    low = torch.arange(0, number, size, device=device).unsqueeze(0)
    return Span(low, (low + (size - 1)).clamp(max=number - 1), size)


class MaskOfBlocks(AttentionMask):
    """A mask that answers for :class:`Span` as another one does for indices.

    What it makes of the other mask on the way is in ``made``: all that the rules look up.
    """

    def __init__(self, mask: AttentionMask):
        super().__init__(**mask.fields())
        self.mask = mask
        self.made: dict[Hashable, Any] = {}

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self.made:
            self.made[key] = self.mask.cached(key, compute)
        return self.made[key]

    def look_up(self, table: torch.Tensor, *index: Any) -> Any:
        first, *other = index
        if not isinstance(first, Span):
            return super().look_up(table, *index)
        assert first.size is not None, "indices of a table follow one another"
        count = torch.arange(first.size, device=table.device)
        low, high = first.low.flatten(1).unsqueeze(2), first.high.flatten(1).unsqueeze(2)
        entries = super().look_up(table, torch.minimum(low + count, high))
        if not other:
            shape = (-1, *first.low.shape[1:])
            if table.dtype == torch.bool:
                return Blocks(entries.any(2).view(shape), entries.all(2).view(shape))
            return Span(entries.amin(2).view(shape), entries.amax(2).view(shape))
        (second,) = other
        low, high = second.low, second.high + 1
        length = table.shape[2]

        def held(entries_BNM: torch.Tensor) -> torch.Tensor:
            """How many entries are True from low to high."""
            sums = torch.nn.functional.pad(entries_BNM.cumsum(2), (1, 0))
            batch = max(len(sums), len(low))
            ends = (end.clamp(0, length).expand(batch, sums.shape[1], -1) for end in (high, low))
            to_high, to_low = (sums.expand(batch, -1, -1).gather(2, end) for end in ends)
            return to_high - to_low

        return Blocks(held(entries.any(2)) > 0, held(entries.all(2)) == high - low)

    def look_up_edge(self, edges: Edges, q_position: Any, k_position: Any) -> Any:
        """Blocks with an edge; of none it is known that all pairs in it are edges."""
        size, queries, keys = q_position.size, q_position.low.shape[1], k_position.low.shape[2]
        row_BE, column_BE = edges.rows_BE(), edges.columns_BE
        block = (row_BE // size * keys + column_BE // size).masked_fill(row_BE >= edges.starts_BN.shape[1] - 1, -1)
        some = torch.zeros(len(block), queries * keys + 1, dtype=torch.bool, device=block.device)
        some = some.scatter(1, block.masked_fill(block < 0, queries * keys), 1)[:, :-1].unflatten(1, (queries, keys))
        return Blocks(some, torch.zeros_like(some))

    def _evaluate(self, q_position: Any, k_position: Any) -> Any:
        """Of a rule nothing is known but that it is causal."""
        none = torch.zeros((), dtype=torch.bool, device=self.device)
        return (k_position <= q_position if self.causal else k_position >= 0) & Blocks(~none, none)


def visible_blocks(mask: MaskOfBlocks, pattern: Rule, size: int) -> Blocks:
    """What mask and pattern show, in blocks of ``size`` queries and keys: tables (B or 1, ceil(Q/size), ceil(K/size)).

    Blocks that reach over the end are never among those of which every pair is visible.
    """
    q, k = positions(mask.q_length, size, mask.device), positions(mask.kv_length, size, mask.device)
    whole = tuple(span.high - span.low == size - 1 for span in (q, k))
    q = Span(q.low.unsqueeze(2), q.high.unsqueeze(2), size)
    k = Span(k.low.unsqueeze(1), k.high.unsqueeze(1), size)
    rule: Any = pattern.sees
    blocks: Blocks = mask.shows(q, k) & rule(mask, q, k)  # type: ignore[arg-type]
    whole_QK = whole[0].unsqueeze(2) & whole[1].unsqueeze(1)
    some, every, _ = torch.broadcast_tensors(blocks.some, blocks.every & whole_QK, whole_QK)
    return Blocks(some, every)
