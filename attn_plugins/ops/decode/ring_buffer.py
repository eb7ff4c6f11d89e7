"""Softmax attention from a bounded cache: the first keys of each row and the last ones, whatever the pattern in them.

The last keys lie in a ring, each in the place of the one that no query to come can see. Rows of a batch may start at
different positions (left padding), so the first keys are a row's own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rotary import Rotary
from attn_plugins.ops.decode.cache_positions import Anchors, two_keyed
from attn_plugins.ops.reference import accumulation_dtype, masked_softmax, with_dropout
from attn_plugins.ops.softmax.batched import pattern_attention
from attn_plugins.ops.softmax.patterns.band import ROWS, Band
from attn_plugins.ops.softmax.tables import Tables, counted, rows_for, tables_of
from attn_plugins.ops.softmax.tiles import Pattern, Tile, make_tile

GROWTH = 64
"""Fewest keys that a ring has room for before it is complete."""


class KeyWindow(State):
    """Keys and values of the first ``num_first`` real tokens of each row, and of the last ``num_before`` + 1 tokens.

    ``tensors``: k (B, G, num_first + ring, D), v likewise, not_padding (B, num_first + ring), False where there is no
    key too, and start (B,), each row's first real position. The ring has room for ``num_before`` + 1 keys, less while
    fewer have come; the key of position p is in its place p modulo its size.
    """

    supports_fixed_length = True

    def __init__(self, num_first: int, num_before: int, fixed_length: int | None = None):
        super().__init__(fixed_length)
        self.num_first, self.size = num_first, num_before + 1
        if fixed_length is not None:
            self.size = min(self.size, fixed_length)
        self.started = False
        """Whether every row has had a real token."""
        self.complete = False
        """Whether the first keys of all rows are in."""
        self.padded = False
        """Whether there ever was padding."""
        self.anchors = Anchors()

    def reset(self) -> None:
        super().reset()
        if self.tensors:
            self.tensors["start"].fill_(-1)
        self.anchors = Anchors()
        self.started = self.complete = self.padded = False

    @property
    def full(self) -> bool:
        """Whether every place is taken by another token, for sure: where there was padding nothing is."""
        places = self.tensors["k"].shape[2]
        if self.fixed_length is not None or self.padded or places != self.num_first + self.size:
            return False
        return self.length >= places

    def ring(self, number: int) -> int:
        """Places of the ring once ``number`` more tokens have come."""
        held = self.tensors["k"].shape[2] - self.num_first if self.tensors else 0
        if self.fixed_length is not None or (tokens := self.length + number) >= self.size:
            return self.size
        return held if tokens <= held else min(self.size, max(GROWTH, 2 * held, tokens))

    def append(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: AttentionMask) -> None:
        """Write the next tokens, the last of ``mask``'s, into the ring; those that are first ones of a row too."""
        new = k_BGKD.shape[2]
        full = self.reserve(k_BGKD, v_BGKV, mask)
        size = self.tensors["k"].shape[2] - self.num_first
        last = slice(max(0, new - size), None)
        if new > size:
            k_BGKD, v_BGKV = k_BGKD[:, :, last], v_BGKV[:, :, last]

        def places() -> tuple[torch.Tensor, torch.Tensor]:
            position = torch.arange(new, device=k_BGKD.device)[last] + self.position
            return position % size + self.num_first, self._not_padding(mask, position)

        before = None if torch.compiler.is_compiling() else self.length
        index, not_padding_BK = mask.cached(("places", before, new, size, self.num_first), places)
        self.write("k", 2, index, k_BGKD)
        self.write("v", 2, index, v_BGKV)
        if not (full or self.full):
            self.write("not_padding", 1, index, not_padding_BK)
        self.advance(new)

    def reserve(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: AttentionMask) -> bool:
        """Grow the ring for the next tokens and write those that are first ones of a row; idempotent.

        Returns:
            whether there was nothing to do, since the ring is full.
        """
        if self.started and (self.complete or not self.num_first) and mask.padding_BK is None and self.full:
            return True  # as in every call from here on
        new = k_BGKD.shape[2]
        self.padded = self.padded or mask.padding_BK is not None
        self._make_room(k_BGKD, v_BGKV, self.ring(new))
        if not self.started:
            self.started = self.find_starts(self.tensors["start"], mask, new)
        if self.num_first and not self.complete:
            self._write_first(k_BGKD, v_BGKV, mask)
        return False

    def apply(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().apply(change)
        self.anchors = self.anchors.changed(change)

    def kept_mask(self, mask: AttentionMask) -> AttentionMask:
        """The mask of the keys in ``tensors``, in their order."""
        size = self.tensors["k"].shape[2] - self.num_first
        place = torch.arange(size, device=mask.device)
        last = self.position - 1
        position = last - (last - place) % size
        return self._mask(mask, position, self.tensors["not_padding"][:, self.num_first :], self.position - size)

    def concatenated(
        self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: AttentionMask
    ) -> tuple[torch.Tensor, torch.Tensor, AttentionMask]:
        """The first keys, the ring's in order, the new ones; their values; their mask.

        First keys may be among the others too.
        """
        self.reserve(k_BGKD, v_BGKV, mask)
        size = self.tensors["k"].shape[2] - self.num_first
        oldest = max(0, self.length - size)
        position = torch.arange(oldest, self.length + k_BGKD.shape[2], device=k_BGKD.device)
        places = position[: self.length - oldest] % size + self.num_first
        index = torch.cat([torch.arange(self.num_first, device=places.device), places])
        k, v, not_padding = (
            self.tensors[name].index_select(axis, index) for name, axis in (("k", 2), ("v", 2), ("not_padding", 1))
        )
        new_not_padding = self._not_padding(mask, position[self.length - oldest :])
        both = self._mask(
            mask,
            position,
            torch.cat([not_padding[:, self.num_first :], new_not_padding], dim=1),
            len(position) + oldest,
        )
        return torch.cat([k, k_BGKD], dim=2), torch.cat([v, v_BGKV], dim=2), both

    def _mask(
        self, mask: AttentionMask, position: torch.Tensor, not_padding_BK: torch.Tensor, oldest: Any
    ) -> AttentionMask:
        """Of the first keys, as far as they are older than ``oldest``, and of those at ``position``."""
        start_B, rows = self.tensors["start"], slice(None) if self.padded else slice(1)
        first = start_B[rows].unsqueeze(1) + torch.arange(self.num_first, device=start_B.device)
        not_padding_first = self.tensors["not_padding"][rows, : self.num_first] & (first < oldest)
        position_BK = torch.cat([first, position.expand(len(first), -1)], dim=1)
        not_padding = torch.cat([not_padding_first, not_padding_BK[rows] & (position >= 0)], dim=1)
        return mask.at(position_BK, not_padding, start_B[rows])

    def _not_padding(self, mask: AttentionMask, position: torch.Tensor) -> torch.Tensor:
        """Which tokens at these positions are no padding, (B, as many)."""
        if mask.padding_BK is None:
            return position.new_ones(1, 1, dtype=torch.bool).expand(mask.batch_size, len(position))
        return mask.padding_BK.index_select(1, position).expand(mask.batch_size, -1)

    def _make_room(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, size: int) -> None:
        batch, places = k_BGKD.shape[0], self.num_first + size
        if not self.tensors:
            self.tensors = {
                "k": k_BGKD.new_zeros(*k_BGKD.shape[:2], places, k_BGKD.shape[3]),
                "v": v_BGKV.new_zeros(*v_BGKV.shape[:2], places, v_BGKV.shape[3]),
                "not_padding": k_BGKD.new_zeros(batch, places, dtype=torch.bool),
                "start": torch.full((batch,), -1, device=k_BGKD.device),
            }
        elif (more := places - self.tensors["k"].shape[2]) > 0:
            # So far nothing has come round in the ring: positions keep their places.
            for name, axis in (("k", 2), ("v", 2), ("not_padding", 1)):
                held = self.tensors[name]
                shape = (*held.shape[:axis], more, *held.shape[axis + 1 :])
                self.tensors[name] = torch.cat([held, held.new_zeros(shape)], dim=axis)

    def _write_first(self, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: AttentionMask) -> None:
        start_B, new = self.tensors["start"], k_BGKD.shape[2]
        not_padding_BK = self._not_padding(mask, torch.arange(new, device=k_BGKD.device) + self.position)
        index = start_B.unsqueeze(1) + torch.arange(self.num_first, device=start_B.device) - self.position
        here = (index >= 0) & (index < new) & (start_B >= 0).unsqueeze(1)
        index = index.clamp(0, new - 1)
        for name, x in (("k", k_BGKD), ("v", v_BGKV)):
            at = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            first = torch.where(here[:, None, :, None], x.gather(2, at), self.tensors[name][:, :, : self.num_first])
            self.write(name, 2, torch.arange(self.num_first, device=x.device), first)
        not_padding = torch.where(
            here, not_padding_BK.gather(1, index), self.tensors["not_padding"][:, : self.num_first]
        )
        self.write("not_padding", 1, torch.arange(self.num_first, device=not_padding.device), not_padding)
        if self.started and not torch.compiler.is_compiling():
            self.complete = bool((start_B + self.num_first <= self.length + new).all())

    def like(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return (self.tensors["k"], self.tensors["v"]) if self.tensors else super().like()

    def _reaches(self, target: int) -> bool:
        # What has come round in the ring has taken the places of keys that would be seen again.
        return self.length <= self.tensors["k"].shape[2] - self.num_first

    def _rewind(self, target: int) -> None:
        self.length, self.complete = target, False
        start_B = self.tensors["start"]
        start_B.masked_fill_(start_B >= target, -1)
        self.started = bool((start_B >= 0).all())


@dataclass(frozen=True)
class Following:
    """A pattern over the first ``num_first`` keys, then keys at consecutive positions, which may repeat them.

    A first key is visible at its own place only where its position is before those of the tile's other keys.
    """

    pattern: Pattern
    num_first: int
    num_before: int
    merged: ClassVar[bool] = False

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return self.pattern.sees(mask, q_index, k_index)

    def tiles(self, mask: AttentionMask) -> Iterator[Tile]:
        own = mask.kv_length - mask.q_length
        first = torch.arange(self.num_first, device=mask.device).unsqueeze(0) if self.num_first else None
        for low in range(0, mask.q_length, ROWS):
            queries = slice(low, min(low + ROWS, mask.q_length))
            keys = slice(max(self.num_first, own + low - self.num_before), own + queries.stop)
            since = mask.key_positions(torch.tensor([[keys.start]], device=mask.device)).view(-1, 1, 1)

            def sees(mask, q_index, k_index, since=since):
                counts = (k_index >= self.num_first) | (mask.key_positions(k_index) < since)
                return self.pattern.sees(mask, q_index, k_index) & counts

            yield make_tile(mask, sees, queries, (keys,), first)

    def tables(self, mask: AttentionMask) -> Sequence[Tables]:
        own, before = mask.kv_length - mask.q_length, min(self.num_before, mask.kv_length)
        rows = min(rows_for(before), mask.q_length)
        begin = torch.arange(0, mask.q_length, rows, device=mask.device).view(1, -1, 1)
        keys = own + begin - before + counted(before + rows, mask.device)
        first = counted(self.num_first, mask.device).expand(-1, keys.shape[1], -1)

        def sees(mask, q_index, k_index):
            start = (own + q_index // rows * rows - before).clamp(min=self.num_first)
            counts = (k_index >= self.num_first) | (mask.key_positions(k_index) < mask.key_positions(start))
            return self.pattern.sees(mask, q_index, k_index) & counts

        queries, following = begin + counted(rows, mask.device), keys.masked_fill(keys < self.num_first, -1)
        return [tables_of(mask, sees, queries, torch.cat([first, following], dim=2))]


def window_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern,
    state: KeyWindow,
    *,
    rotary: Rotary | None = None,
    **options: Any,
) -> torch.Tensor:
    """Softmax attention of the last Q of K new tokens to what the pattern shows of them and of what came before.

    Args:
        mask: of the queries and all tokens so far, the new ones the last of them.
        pattern: shows nothing beyond what ``state`` keeps.
        state: the new tokens are appended to it.
        rotary: of the queries, where positions are counted within what ``state`` keeps.
        options: scale, dropout, softcap and sinks, as in :meth:`attn_plugins.core.attention.Attention.forward`.

    Returns:
        out_BHQV in the dtype of v.
    """
    new = k_BGKD.shape[2]
    key = (pattern, state.num_first, state.size)
    rotated_BHQD = None
    if rotary is not None:
        state.reserve(k_BGKD, v_BGKV, mask)
        position = state.num_first + state.size - 1
        rotated_BHQD = state.anchors.rotate(q_BHQD, mask, rotary, state.tensors["start"], position)

    def place(q: torch.Tensor, k: torch.Tensor, keys: AttentionMask) -> tuple[torch.Tensor, torch.Tensor]:
        return (q, k) if rotated_BHQD is None else two_keyed(q, rotated_BHQD, k, keys, state.num_first)

    if new == 1:
        state.append(k_BGKD, v_BGKV, mask)
        held, visible = mask.cached(("held", *key), lambda: _kept(mask, pattern, state))
        q, k = q_BHQD, state.tensors["k"]
        if rotated_BHQD is not None:
            q, k = two_keyed(q, rotated_BHQD, k, held, state.num_first)
        return one_query(q, k, state.tensors["v"], visible, **options)
    if state.length:
        k, v, both = state.concatenated(k_BGKD, v_BGKV, mask)
        both = mask.cached(("following", *key), lambda: both)
        q, k = place(q_BHQD, k, both)
        out_BHQV = pattern_attention(q, k, v, both, Following(pattern, state.num_first, state.size - 1), **options)
    else:
        q, k = place(q_BHQD, k_BGKD, mask)
        out_BHQV = pattern_attention(q, k, v_BGKV, mask, pattern, **options)
    state.append(k_BGKD, v_BGKV, mask)
    return out_BHQV


def _kept(mask: AttentionMask, pattern: Pattern, state: KeyWindow) -> tuple[AttentionMask, torch.Tensor | None]:
    """The mask of what the state holds, and what of it the one query sees, (B or 1, 1, 1, K); None if that is all."""
    held = state.kept_mask(mask)
    if state.full and mask.plain and isinstance(pattern, Band) and pattern.dilation == 1:
        return held, None
    q_index = torch.zeros(1, 1, 1, dtype=torch.long, device=mask.device)
    k_index = torch.arange(held.kv_length, device=mask.device).view(1, 1, -1)
    return held, (held.visible(q_index, k_index) & pattern.sees(held, q_index, k_index)).unsqueeze(1)


def one_query(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor | None,
    *,
    scale: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention of one query, Q = 1, to keys as they are: the heads that share them are its queries."""
    batch, heads, _, size = q_BHQD.shape
    q = q_BHQD.reshape(batch, k_BGKD.shape[1], -1, size)
    if softcap is None and sinks is None:
        out = scaled_dot_product_attention(q, k_BGKD, v_BGKV, attn_mask=visible, dropout_p=dropout, scale=scale)
        return out.reshape(batch, heads, 1, -1)
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    s_BHQK = (q.to(dtype) * scale @ k_BGKD.to(dtype).mT).view(batch, heads, 1, -1)
    if softcap is not None:
        s_BHQK = softcap * torch.tanh(s_BHQK / softcap)
    visible = s_BHQK.new_ones((), dtype=torch.bool) if visible is None else visible
    weights = with_dropout(masked_softmax(s_BHQK, visible, sinks), dropout)
    return (weights.view(*q.shape[:3], -1) @ v_BGKV.to(dtype)).view(batch, heads, 1, -1).to(v_BGKV.dtype)
