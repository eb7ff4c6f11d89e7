"""Relations between the tokens of a row: who sees whom, looked up pair by pair and never held for all pairs.

A relation is a table of a few numbers a token, or the list of its edges, for every row of a batch or one for all. What
asks has ``look_up(table, *index)`` and ``look_up_edge(edges, q, k)``, as :class:`attn_plugins.core.mask.AttentionMask`
has them, so that the same relation answers for tensors of indices, for blocks of them and inside a kernel.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.nn.functional import pad

Move: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

NO_LABEL = -1
"""Label of pairs that have none."""


@dataclass(frozen=True, eq=False)
class Groups:
    """A query sees the keys of the same group: those whose number is the query's own.

    What a token is as a query and as a key may differ: one that all see has the number 0 as a key, as all others have
    it as queries.
    """

    q_BN: torch.Tensor
    """(B, N) int64, the group that a token looks at, -1 for none."""
    k_BN: torch.Tensor
    """(B, N) int64, the group that a token is seen in, -1 for none."""
    label: int = NO_LABEL
    """Label of its pairs."""
    window_size: int | None = None
    """Tokens to either side that are seen, the query itself among them; None is all of the group."""
    itself: bool = True
    """Whether a token that looks at its own group sees itself."""

    @property
    def kind(self) -> Hashable:
        """What code that asks it depends on, beside tensors."""
        return (self.label, self.window_size, self.itself, len(self.q_BN) > 1)

    def shows(self, reader: Any, q: Any, k: Any) -> Any:
        """Whether queries see keys, for positions in range that broadcast."""
        own, group = reader.look_up(self.q_BN, q), reader.look_up(self.k_BN, k)
        return self.shows_within(q, k, (own == group) & (own >= 0))

    def shows_within(self, q: Any, k: Any, shown: Any) -> Any:
        """The same for pairs of which it is known whether their groups are the same."""
        if self.window_size is not None:
            shown = shown & ((q - k).abs() < self.window_size)
        return shown if self.itself else shown & (q != k)

    def labels_of(self, reader: Any, q: Any, k: Any) -> Any:
        """The labels of pairs that it shows."""
        return self.label

    def most_labels(self) -> int:
        """One more than its highest label."""
        return self.label + 1

    def mapped(self, move: Move) -> "Groups":
        return replace(self, q_BN=move(self.q_BN), k_BN=move(self.k_BN))

    def padded(self, before: int, after: int) -> "Groups":
        """With so many tokens around, which see nothing and are not seen."""
        return self.mapped(lambda table: pad(table, (before, after), value=-1))

    def number_of_pairs(self) -> int:
        """How many pairs it shows at most, in all rows."""
        total = 0
        for q_N, k_N in zip(self.q_BN, self.k_BN, strict=True):
            q_N, k_N = q_N[q_N >= 0], k_N[k_N >= 0]
            size = int(max([q_N.max() if len(q_N) else -1, k_N.max() if len(k_N) else -1])) + 1
            keys = torch.bincount(k_N, minlength=size)
            if self.window_size is not None:
                keys = keys.clamp(max=2 * self.window_size - 1)
            total += int((torch.bincount(q_N, minlength=size) * keys).sum())
        return total


@dataclass(frozen=True, eq=False)
class Edges:
    """A query sees the keys that its row of a compressed sparse matrix lists."""

    starts_BN: torch.Tensor
    """(B, N + 1) int64: where the keys of each query begin in ``columns_BE``."""
    columns_BE: torch.Tensor
    """(B, E) int64: keys, query after query, ascending for each. At least one more than there are edges, which a search
    that finds nothing may read."""
    labels_BE: torch.Tensor
    """(B, E) int64, the label of each."""
    steps: int
    """Halvings that find one of a query's keys among all: the logarithm of the highest degree, rounded up to even."""

    @staticmethod
    def of(q_E: torch.Tensor, k_E: torch.Tensor, labels_E: torch.Tensor, length: int) -> "Edges":
        """Of one row; where a pair comes more than once, its first label holds."""
        pairs = q_E * length + k_E
        order = pairs.argsort(stable=True)
        pairs, labels_E = pairs[order], labels_E[order]
        first = torch.ones_like(pairs, dtype=torch.bool)
        first[1:] = pairs[1:] != pairs[:-1]
        pairs, labels_E = pairs[first], labels_E[first]
        degree = torch.bincount(pairs // max(length, 1), minlength=length)
        starts = pad(degree.cumsum(0), (1, 0))
        columns, labels = (pad(table, (0, 1))[None] for table in (pairs % max(length, 1), labels_E))
        return Edges(starts[None], columns, labels, _steps(degree))

    @property
    def kind(self) -> Hashable:
        """What code that asks it depends on, beside tensors."""
        return (self.steps, len(self.starts_BN) > 1)

    def rows_BE(self) -> torch.Tensor:
        """The query of each edge, N past the last one."""
        count = torch.arange(self.columns_BE.shape[1], device=self.columns_BE.device)
        count = count.expand(len(self.starts_BN), -1).contiguous()
        return torch.searchsorted(self.starts_BN[:, 1:].contiguous(), count, right=True)

    def find(self, look_up: Callable[..., Any], q: Any, k: Any) -> tuple[Any, Any]:
        """(Whether pairs are edges, where these stand in ``columns_BE``), by halving: O(log degree) a pair."""
        low, end = look_up(self.starts_BN, q), look_up(self.starts_BN, q + 1)
        high = end
        for _ in range(self.steps):
            middle = (low + high) // 2
            right = (look_up(self.columns_BE, middle) < k) & (low < high)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        return (low < end) & (look_up(self.columns_BE, low) == k), low

    def shows(self, reader: Any, q: Any, k: Any) -> Any:
        """Whether queries see keys, for positions in range that broadcast."""
        return reader.look_up_edge(self, q, k)

    def labels_of(self, reader: Any, q: Any, k: Any) -> Any:
        """The labels of pairs that it shows."""
        return reader.look_up(self.labels_BE, self.find(reader.look_up, q, k)[1])

    def most_labels(self) -> int:
        """One more than its highest label."""
        return int(self.labels_BE.max()) + 1 if self.labels_BE.numel() else 0

    def mapped(self, move: Move) -> "Edges":
        return Edges(move(self.starts_BN), move(self.columns_BE), move(self.labels_BE), self.steps)

    def padded(self, before: int, after: int) -> "Edges":
        """With so many tokens around, which see nothing and are not seen."""
        last = self.starts_BN[:, -1:].expand(-1, after)
        starts = torch.cat([pad(self.starts_BN, (before, 0)), last], dim=1)
        return Edges(starts, self.columns_BE + before, self.labels_BE, self.steps)

    def number_of_pairs(self) -> int:
        """How many pairs it shows, in all rows."""
        return int(self.starts_BN[:, -1].sum())


Relation: TypeAlias = Groups | Edges


class ReaderOfRows:
    """Looks up pairs of the given rows, whatever shapes and transforms (torch.vmap) they come in."""

    def __init__(self, row: torch.Tensor):
        self.row = row

    def look_up(self, table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        places = (self.row if len(table) > 1 else self.row * 0, index)
        return table[places]

    def look_up_edge(self, edges: Edges, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return edges.find(self.look_up, q, k)[0]


def stacked(relations: "list[Relation | None]", length: int) -> Relation:
    """One relation of as many rows as there are, each of one row; None shows nothing."""
    given = next(one for one in relations if one is not None)
    if isinstance(given, Groups):
        none = torch.full((1, length), -1, device="cpu")
        rows = [(none, none) if one is None else (one.q_BN, one.k_BN) for one in relations]  # type: ignore[union-attr]
        q_BN, k_BN = (torch.cat(tables) for tables in zip(*rows, strict=True))
        return replace(given, q_BN=q_BN, k_BN=k_BN)
    nothing = torch.zeros(1, 1, dtype=torch.long, device="cpu")
    empty = Edges(torch.zeros(1, length + 1, dtype=torch.long, device="cpu"), nothing, nothing, 2)
    edges: list[Any] = [empty if one is None else one for one in relations]
    most = max(one.columns_BE.shape[1] for one in edges)
    starts = torch.cat([one.starts_BN for one in edges])
    columns, labels = (
        torch.cat([pad(table(one), (0, most - table(one).shape[1])) for one in edges])
        for table in (lambda one: one.columns_BE, lambda one: one.labels_BE)
    )
    return Edges(starts, columns, labels, max(one.steps for one in edges))


def within(
    q_E: torch.Tensor, k_E: torch.Tensor, length: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of different nodes within ``most`` steps of the edges, and how many it takes.

    Args:
        length: number of nodes.
    """
    near = torch.unique(q_E * length + k_E)
    starts = torch.searchsorted(near, torch.arange(length + 1, device="cpu") * length)
    keys = near % length
    seen = torch.arange(length, device="cpu") * (length + 1)
    found = [(seen, torch.zeros_like(seen))]
    reached = seen
    for distance in range(1, most + 1):
        q, through = reached // length, reached % length
        number = starts[through + 1] - starts[through]
        first = (starts[through] - number.cumsum(0) + number).repeat_interleave(number)
        through_E = first + torch.arange(len(first), device="cpu")
        more = torch.unique(q.repeat_interleave(number) * length + keys[through_E])
        reached = more[~torch.isin(more, seen, assume_unique=True)]
        if not len(reached):
            break
        seen = torch.cat([seen, reached])
        found.append((reached, torch.full_like(reached, distance)))
    pairs, distances = (torch.cat(parts)[length:] for parts in zip(*found, strict=True))  # the first are nodes alone
    return pairs // length, pairs % length, distances


def _steps(degree_N: torch.Tensor) -> int:
    """Even, so that few numbers of them occur: each makes for a kernel of its own."""
    most = int(degree_N.max()) if degree_N.numel() else 0
    return (most.bit_length() + 1) // 2 * 2
