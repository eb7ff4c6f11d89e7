"""AttentionMask: a lazy attention mask, evaluated only at the pairs that an attention asks for.

Nothing here is dense unless :meth:`AttentionMask.dense` is called. One mask is made a forward pass and shared by all
layers; what is computed from it is cached in ``memo`` for them all.
"""

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from attn_plugins.core.own_pattern import OwnPattern

if TYPE_CHECKING:
    from attn_plugins.core.relations import Edges
    from attn_plugins.core.structure import Structure

T = TypeVar("T")
M = TypeVar("M", bound="AttentionMask")

MaskFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(batch index, head index, query position, key position) -> bool, elementwise over tensors that broadcast."""


class AttentionMask:
    """Visibility of K keys to Q queries in a batch of B rows.

    A key is visible if ``rule`` says so for the absolute positions ``q_offset + i`` and ``kv_offset + j``, the
    ``structure`` shows it, the key is not padding, and both are of the same segment. Queries are the last Q of the K
    keys unless ``cross``.

    Args:
        batch_size, q_length, kv_length: B, Q and K.
        causal: nothing after a query is visible. True also for a rule that is at most causal, such as a sliding window.
        plain: causal (or its absence), padding and segments say it all; ``rule`` is not needed.
        padding_BK: True where a key is real, or None where all are. Tables of one row serve every row.
        segments_BK: number of the packed sequence that a key belongs to, or None where rows are not packed.
        rule: the full rule without padding, needed where not ``plain``; segments may be part of it.
        vectorised: ``rule`` indexes with tensors; if False it is evaluated under ``torch.vmap``.
        dense_BQK: a mask that came dense, instead of a rule.
        q_offset, kv_offset: absolute position of the first query and of the first key.
        first_B: where a cache has dropped keys, index of each row's first real key, which is negative if that was one
            of them; None for rows without padding.
        positions_BK: absolute positions of keys that do not follow one another, as a cache of chosen keys has them,
            instead of ``kv_offset``; ``first_B`` is then absolute too.
        cross: keys belong to another sequence than queries.
        structure: which tokens see which, in absolute positions, beside all else.
        own: what the model's own sparse attention adds to its options here. It hides nothing.
        device: where ``rule`` can be evaluated and results are wanted; None is torch's default device.
    """

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        *,
        causal: bool,
        plain: bool = True,
        padding_BK: torch.Tensor | None = None,
        segments_BK: torch.Tensor | None = None,
        rule: MaskFunction | None = None,
        vectorised: bool = True,
        dense_BQK: torch.Tensor | None = None,
        q_offset: int | None = None,
        kv_offset: int = 0,
        first_B: torch.Tensor | None = None,
        positions_BK: torch.Tensor | None = None,
        cross: bool = False,
        structure: "Structure | None" = None,
        own: OwnPattern | None = None,
        device: torch.device | str | None = None,
    ):
        if not plain and rule is None and dense_BQK is None:
            raise ValueError("a mask that is not plain needs a rule or a dense mask")
        self.batch_size, self.q_length, self.kv_length = batch_size, q_length, kv_length
        self.causal, self.ruled, self.cross, self.structure = causal, not plain, cross, structure
        self.padding_BK, self.segments_BK = padding_BK, segments_BK
        self.rule, self.vectorised, self.dense_BQK = rule, vectorised, dense_BQK
        self.kv_offset, self.first_B, self.positions_BK = kv_offset, first_B, positions_BK
        self.own = own
        self.q_offset = kv_offset + kv_length - q_length if q_offset is None else q_offset
        self.device = self.rule_device = torch.get_default_device() if device is None else torch.device(device)
        self.memo: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        kind = "cross" if self.cross else "causal" if self.causal else "bidirectional"
        extras = [name for name in ("padding_BK", "segments_BK", "dense_BQK") if getattr(self, name) is not None]
        rule = [*(["rule"] if self.ruled else []), *([] if self.structure is None else ["structure"])]
        shape = f"B={self.batch_size}, Q={self.q_length}, K={self.kv_length}"
        return f"AttentionMask({shape}, {', '.join([kind, *extras, *rule])})"

    @property
    def plain(self) -> bool:
        """Whether causality (or its absence), padding and segments say it all."""
        return not self.ruled and self.structure is None

    @property
    def row_starts(self) -> bool:
        """Whether a sequence may start elsewhere than at key 0: after padding, as a segment, at a key since dropped."""
        return self.padding_BK is not None or self.segments_BK is not None or self.kv_offset > 0

    @property
    def keys_before(self) -> int:
        """How many keys come before that of the first query, where queries are the last of the keys."""
        return self.kv_length - self.q_length

    def to(self, device: Any, *args: Any, **kwargs: Any) -> "AttentionMask":
        """A copy whose results are on ``device``, or itself; tensors that the rule holds stay where they are."""
        if not isinstance(device, (torch.device, str, int)):
            return self
        device = torch.device(device)
        if device == self.device:
            return self
        held: dict[str, Any] = {
            name: getattr(self, name) for name in ("padding_BK", "segments_BK", "dense_BQK", "first_B", "positions_BK")
        }
        held |= {"structure": self.structure, "own": self.own}
        return self._copy(device=device, **{name: None if t is None else t.to(device) for name, t in held.items()})

    def as_cross(self) -> "AttentionMask":
        """The same mask for queries and keys of different sequences."""
        return self if self.cross else self.cached("cross", lambda: self._copy(cross=True))

    def with_structure(self: M, structure: "Structure | None") -> M:
        """The same mask, in which that structure holds; without any if it is None.

        Raises:
            ValueError: the structure is of other rows or tokens.
        """
        if structure is None:
            return self._copy(structure=None)
        rows, tokens = structure.batch_size, structure.num_tokens
        if rows not in (1, self.batch_size) or not tokens == self.q_length == self.kv_length:
            raise ValueError(
                f"the structure is of {rows} rows of {tokens} tokens, and the attention has {self.batch_size} rows of "
                f"{self.q_length} queries and {self.kv_length} keys; allowed: one row or as many, as many tokens as "
                "queries and keys, padding among them (Structure.pad, Structure.stack)"
            )
        return self._copy(structure=structure.to(self.device))

    def for_queries(self: M, number: int) -> M:
        """The mask of another number of queries that all see the same keys."""
        return self.cached(("queries", number), lambda: self._copy(q_length=number))

    def last(self, number: int) -> "AttentionMask":
        """The mask of the last ``number`` keys, for the same queries."""
        dropped = self.kv_length - number
        if dropped == 0:
            return self

        def build() -> AttentionMask:
            first_B = self.first_B if self.first_B is None else self.first_B - dropped
            if first_B is None and self.padding_BK is not None:
                first_B = self.padding_BK.long().argmax(dim=1) - dropped
            cut = {
                name: None if table is None else table[..., dropped:]
                for name, table in (
                    ("padding_BK", self.padding_BK),
                    ("segments_BK", self.segments_BK),
                    ("dense_BQK", self.dense_BQK),
                )
            }
            return self._copy(kv_length=number, kv_offset=self.kv_offset + dropped, first_B=first_B, **cut)

        return self.cached(("last", number), build)

    def at(self, positions_BK: torch.Tensor, not_padding_BK: torch.Tensor, first_B: torch.Tensor) -> "AttentionMask":
        """The mask of keys at these absolute positions, for the same queries.

        Args:
            positions_BK: (B or 1, K), in any order.
            real_BK: (B or 1, K), False where there is no key, or padding.
            first_B: (B or 1,), absolute position of each row's first real key.
        """
        dense_BQK = self.dense_BQK
        if dense_BQK is not None:
            index = (positions_BK - self.kv_offset).clamp(0, dense_BQK.shape[2] - 1).unsqueeze(1)
            batch = max(len(index), len(dense_BQK))
            dense_BQK = dense_BQK.expand(batch, -1, -1).gather(2, index.expand(batch, self.q_length, -1))
        return self._copy(
            kv_length=positions_BK.shape[1],
            kv_offset=0,
            padding_BK=not_padding_BK,
            positions_BK=positions_BK,
            first_B=first_B,
            dense_BQK=dense_BQK,
        )

    def key_positions(self, k_index: torch.Tensor) -> torch.Tensor:
        """Absolute positions of keys (B or 1, ...) by their indices in 0..K-1."""
        if self.positions_BK is None:
            return k_index + self.kv_offset
        return self.look_up(self.positions_BK, k_index)

    def look_up(self, table: torch.Tensor, *index: torch.Tensor) -> torch.Tensor:
        """Entries of a table (B or 1, ...) at indices of its other dimensions, each (B or 1, ...), which broadcast."""
        dimensions = max(one.ndim for one in index)
        rows = torch.arange(table.shape[0], device=table.device).view(-1, *[1] * (dimensions - 1))
        places = (rows, *index)
        return table[places]

    def look_up_edge(self, edges: "Edges", q_position: torch.Tensor, k_position: torch.Tensor) -> Any:
        """Whether pairs of positions are edges."""
        return edges.find(self.look_up, q_position, k_position)[0]

    def cached(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Memoise ``compute()`` under ``key`` for all layers of this forward pass."""
        if torch.compiler.is_compiling():
            return compute()  # the compiler finds out by itself what layers compute twice
        if key not in self.memo:
            self.memo[key] = compute()
        return self.memo[key]

    def visible(self, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        """Visibility at the given pairs only.

        Args:
            q_index, k_index: integers in 0..Q-1 and 0..K-1 of shapes that broadcast together; the first dimension is
                the batch, B or 1. Indices outside are allowed and give False.

        Returns:
            bool of the broadcast shape, with B or 1 as its first dimension.
        """
        inside = (q_index >= 0) & (q_index < self.q_length) & (k_index >= 0) & (k_index < self.kv_length)
        q_index, k_index = q_index.clamp(0, max(self.q_length - 1, 0)), k_index.clamp(0, max(self.kv_length - 1, 0))
        return inside & self.shows(q_index, k_index)

    def shows(self, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        """As :meth:`visible`, for indices that are all in range.

        It computes with indices as numbers and looks them up in tables (:meth:`look_up`), nothing else: a subclass may
        give it other things than tensors that do the same.
        """
        if self.dense_BQK is not None:
            seen = self.look_up(self.dense_BQK, q_index, k_index)
        elif self.ruled:
            seen = self._evaluate(q_index + self.q_offset, self.key_positions(k_index))
        else:
            seen = self.key_positions(k_index) <= q_index + self.q_offset if self.causal else k_index >= 0
            if self.segments_BK is not None:
                own = self.look_up(self.segments_BK, q_index + self.keys_before)
                seen = seen & (own == self.look_up(self.segments_BK, k_index))
        if self.structure is not None:
            seen = seen & self.structure.shows(self, q_index + self.q_offset, self.key_positions(k_index))
        if self.padding_BK is not None:
            seen = seen & self.look_up(self.padding_BK, k_index)
        return seen

    def dense(self) -> torch.Tensor:
        """The whole mask, (B or 1, 1, Q, K) bool. The N x N tensor that everything else here avoids."""

        def build() -> torch.Tensor:
            q_index = torch.arange(self.q_length, device=self.device).view(1, -1, 1)
            k_index = torch.arange(self.kv_length, device=self.device).view(1, 1, -1)
            if self.dense_BQK is not None or not self.plain:
                return self.visible(q_index, k_index).unsqueeze(1)
            # All pairs: tables broadcast as they are. Gathers by index cost more, and a compiler checks their bounds.
            seen = torch.ones(1, self.q_length, self.kv_length, dtype=torch.bool, device=self.device)
            if self.causal:
                keys = k_index + self.kv_offset if self.positions_BK is None else self.positions_BK.unsqueeze(1)
                seen = seen & (keys <= q_index + self.q_offset)
            if self.segments_BK is not None:
                own_BQ = self.segments_BK[:, self.kv_length - self.q_length :]
                seen = seen & (own_BQ.unsqueeze(2) == self.segments_BK.unsqueeze(1))
            if self.padding_BK is not None:
                seen = seen & self.padding_BK.unsqueeze(1)
            return seen.unsqueeze(1)

        return self.cached("dense", build)

    def starts_BK(self) -> torch.Tensor:
        """For each key the index of the first real key of its row or segment, (B or 1, K) int64; negative if dropped.

        Patterns with fixed blocks or strides count from here, so that left padding and packing change nothing.
        """

        def build() -> torch.Tensor:
            index = torch.arange(self.kv_length, device=self.device).unsqueeze(0)
            if self.kv_offset and self.segments_BK is None:
                first_B = index.new_full((1,), -self.kv_offset) if self.first_B is None else self.first_B
                return first_B.unsqueeze(1).expand(-1, self.kv_length)
            if not self.row_starts:
                return torch.zeros_like(index)
            if self.segments_BK is None:
                assert self.padding_BK is not None
                first_B1 = self.padding_BK.long().argmax(dim=1, keepdim=True)
                return torch.where(index < first_B1, 0, first_B1)
            not_padding = torch.ones_like(index, dtype=torch.bool) if self.padding_BK is None else self.padding_BK
            not_padding, segments = torch.broadcast_tensors(not_padding, self.segments_BK)
            # A segment starts at its first real key: where the number of real keys seen in it goes from none to one.
            first = torch.ones_like(not_padding[:, :1])
            changed = torch.cat([first, segments[:, 1:] != segments[:, :-1]], dim=1)
            segment_start = torch.where(changed, index, 0).cummax(dim=1).values
            counted = not_padding.long().cumsum(dim=1)
            before_segment = counted.gather(1, segment_start) - not_padding.gather(1, segment_start).long()
            first_of_row = not_padding & (counted - before_segment == 1)
            return torch.maximum(torch.where(first_of_row, index, 0).cummax(dim=1).values, segment_start)

        return self.cached("starts", build)

    def fields(self) -> dict[str, Any]:
        """What makes another one of it, as keywords."""
        return {
            "batch_size": self.batch_size,
            "q_length": self.q_length,
            "kv_length": self.kv_length,
            "causal": self.causal,
            "plain": not self.ruled,
            "padding_BK": self.padding_BK,
            "segments_BK": self.segments_BK,
            "rule": self.rule,
            "vectorised": self.vectorised,
            "dense_BQK": self.dense_BQK,
            "q_offset": self.q_offset,
            "kv_offset": self.kv_offset,
            "first_B": self.first_B,
            "positions_BK": self.positions_BK,
            "cross": self.cross,
            "structure": self.structure,
            "own": self.own,
            "device": self.device,
        }

    def _copy(self: M, **changes: Any) -> M:
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__, memo={}, **changes)
        return copied

    def _evaluate(self, q_position: torch.Tensor, k_position: torch.Tensor) -> torch.Tensor:
        assert self.rule is not None
        batch = torch.arange(self.batch_size, device=q_position.device)
        batch = batch.view(-1, *[1] * (max(q_position.ndim, k_position.ndim) - 1))
        batch, q_position, k_position = (index.to(self.rule_device) for index in (batch, q_position, k_position))
        head = torch.zeros((), dtype=torch.long, device=self.rule_device)
        if self.vectorised:
            return self.rule(batch, head, q_position, k_position).to(self.device)
        # A user's rule may index tensors with scalars, which only works under vmap with this rewrite of indexing.
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        batch, q_position, k_position = torch.broadcast_tensors(batch, q_position, k_position)
        with TransformGetItemToIndex():
            flat = torch.vmap(self.rule, in_dims=(0, None, 0, 0))(
                batch.reshape(-1), head, q_position.reshape(-1), k_position.reshape(-1)
            )
        return flat.reshape(batch.shape).to(self.device)
