"""Several attentions in the slot of one module, each on key/value heads of its own with the queries that share them.

Heads that no rule names keep the model's own attention, called on the slice. Elsewhere a slot is one attention; to
code that looks at slots this is one too, and :func:`parts_of` tells what is in either.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig, HeadShape
from attn_plugins.core.decode_state import State
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.native_attention import OwnCall, per_head
from attn_plugins.ops.decode.all_keys import AllKeys
from attn_plugins.ops.decode.split_state import SplitState


@dataclass(frozen=True)
class Heads:
    """Some of a module's heads: whole groups, each a key/value head with the query heads that share it."""

    kv_heads: tuple[int, ...]
    """Ascending."""
    group_size: int
    """Query heads of a key/value head."""

    @property
    def num_heads(self) -> int:
        return len(self.kv_heads) * self.group_size

    def of_queries(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The part of a tensor that has all query heads along ``axis``: a view where they follow one another."""
        return _take(x, axis, [(first * self.group_size, last * self.group_size) for first, last in self.runs()])

    def of_keys(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        """The same of one that has all key/value heads."""
        return _take(x, axis, self.runs())

    def runs(self) -> list[tuple[int, int]]:
        """(first, last + 1) of key/value heads that follow one another."""
        found: list[tuple[int, int]] = []
        for head in self.kv_heads:
            first = found.pop()[0] if found and found[-1][1] == head else head
            found.append((first, head + 1))
        return found

    def shape(self, whole: HeadShape | None) -> HeadShape | None:
        """Sizes of these heads, by those of all heads."""
        if whole is None:
            return None
        return dataclasses.replace(whole, num_heads=self.num_heads, num_key_value_heads=len(self.kv_heads))


@dataclass(frozen=True)
class Part:
    """What serves some of a module's heads, or all of them."""

    kv_heads: tuple[int, ...] | None
    """None is all of them."""
    attention: Attention | None
    """None is the model's own."""

    @property
    def rule(self) -> tuple[Any, ...]:
        """Heads, name, options and backend: what makes two parts the same, weights aside."""
        attention = self.attention
        return (self.kv_heads, *(() if attention is None else (attention.name, attention.config, attention.backend)))

    def __str__(self) -> str:
        attention = self.attention
        told = "own" if attention is None else f"{attention.name}({attention.extra_repr()})"
        return told if self.kv_heads is None else f"kv_heads {list(self.kv_heads)}: {told}"


class SplitAttention(Attention):
    """Attentions side by side: each attends with its heads alone, what it returns is put together in their order.

    Each honours what it can, and refuses the rest, as it does in a slot of its own. A part that is the model's own
    attention calls the implementation that served the module before, with the mask that it would have been given; where
    that cannot be called on some of the heads, since it is part of the module's forward or reads weights a head from
    the module, what serves is softmax attention, which computes the same.

    Args:
        parts: which together have all heads; those with an attention in the order of their rules.
        group_size: query heads of a key/value head.
        heads: sizes of all its heads, where they are known.
    """

    name = "split"
    causal = bidirectional = cross = any_mask = segments = position_bias = softcap = sinks = dropout = True
    convex = False
    heads_alike = False
    subquadratic = False

    @dataclass(frozen=True, kw_only=True)
    class Config(AttentionConfig):
        parts: tuple[Any, ...]
        """:attr:`Part.rule` of each."""

    def __init__(self, parts: Sequence[Part], group_size: int, heads: HeadShape | None):
        super().__init__(self.Config(parts=tuple(part.rule for part in parts)), heads)
        self.parts = nn.ModuleList(part.attention for part in parts if part.attention is not None)
        self.own: dict[tuple[int, ...], Attention] = {}
        """Softmax attention for each part that is the model's own; no submodules, since most calls pass them by."""
        self.taken: list[Heads] = []
        """Heads of each part, in the order of ``parts``, those of the model's own last."""
        for part in sorted(parts, key=lambda part: part.attention is None):
            assert part.kv_heads is not None
            self.taken.append(held := Heads(part.kv_heads, group_size))
            if part.attention is None:
                softmax = get_attention("softmax")
                self.own[part.kv_heads] = softmax(softmax.Config(), held.shape(heads))
        self.here = self.taken
        """The same among the heads that a call has: none of a part whose heads are in other processes."""
        self.order = _order(self.here)
        """(part, first of its key/value heads, number) of heads that follow one another in both."""
        self.group_size, self.num_key_value_heads = group_size, sum(number for _, _, number in self.order)

    def share(self, number: int, processes: int) -> None:
        """Leave to it the heads of one of so many processes, that share them in order and each has as many of."""
        groups = self.num_key_value_heads // processes
        first = number * groups
        self.here = [
            Heads(tuple(head - first for head in taken.kv_heads if first <= head < first + groups), self.group_size)
            for taken in self.taken
        ]
        self.order, self.num_key_value_heads = _order(self.here), groups

    @property
    def unwritten_keys(self) -> bool:  # type: ignore[override]
        return all(part.unwritten_keys for part in self.parts)

    @property
    def linear_in_values(self) -> bool:  # type: ignore[override]
        return all(part.linear_in_values for part in self.parts)

    @property
    def gated_by_values(self) -> bool:  # type: ignore[override]
        return any(part.gated_by_values for part in self.parts)

    @property
    def wants_rotary(self) -> bool:  # type: ignore[override]
        return any(part.wants_rotary for part in self.parts)

    @property
    def wants_grid(self) -> bool:  # type: ignore[override]
        return any(part.wants_grid for part in self.parts)

    @property
    def wants_hidden(self) -> bool:  # type: ignore[override]
        return any(part.wants_hidden for part in self.parts)

    @property
    def wants_hidden_of_keys(self) -> bool:  # type: ignore[override]
        return any(part.wants_hidden_of_keys for part in self.parts)

    def described(self) -> list[Part]:
        """Its parts, in the order of ``taken``."""
        attentions: Any = itertools.chain(self.parts, itertools.repeat(None))
        return [Part(taken.kv_heads, attention) for taken, attention in zip(self.taken, attentions, strict=False)]

    def present(self) -> list[Part]:
        """The parts with heads in a call, in the order of ``taken``: those that have states."""
        return [part for part, here in zip(self.described(), self.here, strict=True) if here.kv_heads]

    def forward(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        v_BGKV: torch.Tensor,
        *,
        mask: AttentionMask,
        position_bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        state: State | None = None,
        gates_of: torch.Tensor | None = None,
        need_weights: bool = False,
        own: OwnCall | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`Attention.forward`.

        Args:
            own: the call as the module made it, for its own attention; without it softmax attention serves.
        """
        num_heads = self.group_size * self.num_key_value_heads
        got, want = (q_BHQD.shape[1], k_BGKD.shape[1]), (num_heads, self.num_key_value_heads)
        if got != want:
            raise ValueError(f"{self.extra_repr()}: built for (query heads, key/value heads) = {want}, got {got}")
        present = [number for number, here in enumerate(self.here) if here.kv_heads]
        states: list[Any] = state.parts if isinstance(state, SplitState) else [None] * len(present)
        for number, kept in zip(present, states, strict=True):
            if kept is not None:  # before any of them changes; of as many heads as there are in the part
                queries, keys = slice(self.here[number].num_heads), slice(len(self.here[number].kv_heads))
                given = q_BHQD[:, queries], k_BGKD[:, keys], v_BGKV[:, keys]
                kept.check(*given, mask, need_weights=need_weights)
        outs: dict[int, torch.Tensor] = {}
        weights: dict[int, Any] = {}
        for number, kept in zip(present, states, strict=True):
            taken = self.here[number]
            attention: Any = self.parts[number] if number < len(self.parts) else self.own[self.taken[number].kv_heads]
            natively = own if own is not None and number >= len(self.parts) and own.divides(need_weights) else None
            if natively is not None and kept is None:
                k, v, seen = natively.key, natively.value, natively.mask
            else:
                k, v, seen = k_BGKD, v_BGKV, mask
            k, v = taken.of_keys(k, 1), taken.of_keys(v, 1)
            if isinstance(kept, AllKeys):
                k, v, seen = _keys_seen(kept, k, v, mask, unwritten=attention.unwritten_keys)
                kept = None
            if natively is not None:
                out_BQhV, weights_BhQK = natively.attend(taken.of_queries, k, v, seen, need_weights=need_weights)
                if weights_BhQK is not None:  # of a static layer's keys, written or not
                    weights_BhQK = weights_BhQK[..., : mask.kv_length]
            else:
                out_BQhV, weights_BhQK = attention(
                    taken.of_queries(q_BHQD, 1),
                    k,
                    v,
                    mask=seen,
                    position_bias=_of_heads(taken, position_bias, num_heads),
                    sinks=None if sinks is None else taken.of_queries(sinks, 0),
                    state=kept,
                    gates_of=None if gates_of is None else taken.of_keys(gates_of, 1),
                    need_weights=need_weights,
                    **options,
                )
            outs[number], weights[number] = out_BQhV, weights_BhQK
        return self._together(outs, 2), self._together(weights, 1) if need_weights else None

    def _together(self, parts: Mapping[int, Any], axis: int) -> torch.Tensor:
        """One tensor of what the parts return, by the order of heads."""
        size = self.group_size
        pieces = [parts[part].narrow(axis, first * size, number * size) for part, first, number in self.order]
        return torch.cat(pieces, dim=axis)

    def new_state(self, fixed_length: int | None = None) -> SplitState | None:
        """What each part keeps of its heads; None where all of them need all keys and values."""
        kept = [None if part.attention is None else part.attention.new_state(fixed_length) for part in self.present()]
        if all(state is None for state in kept):
            return None
        return SplitState([AllKeys(fixed_length) if state is None else state for state in kept])

    def reset_parameters(self) -> None:
        part: Any
        for part in self.parts:
            part.reset_parameters()

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.described()))


def parts_of(slot: Attention | None) -> list[Part]:
    """What serves a module with this attention in its slot, or with none."""
    return slot.described() if isinstance(slot, SplitAttention) else [Part(None, slot)]


def states_in(slot: Any, state: Any) -> list[tuple[Any, Any]]:
    """The states that a slot attends from, each with its attention; None beside keys that are kept as they come."""
    if not isinstance(state, SplitState):
        return [(slot, state)]
    both = zip(slot.present(), state.parts, strict=True)
    return [(None if isinstance(own, AllKeys) else part.attention, own) for part, own in both]


def attentions_in(slot: nn.Module) -> Iterator[Attention]:
    """The attentions that a slot, or what PEFT has put around it, is made of."""
    return (x for x in slot.modules() if isinstance(x, Attention) and not isinstance(x, SplitAttention))


def _keys_seen(
    state: AllKeys, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, mask: Any, *, unwritten: bool
) -> tuple[torch.Tensor, torch.Tensor, AttentionMask]:
    """Keys, values and mask of all tokens, the new ones taken in.

    Args:
        mask: of all tokens so far; of one query and all that a static cache has room for.
        unwritten: whether keys that a static cache has not written may be among them, in a compiled step.
    """
    state.append(k_BGKD, v_BGKV)
    k, v = state.tensors["k"], state.tensors["v"]
    if state.fixed_length is None:
        return k, v, mask
    if unwritten and mask.q_length == 1 and torch.compiler.is_compiling():
        return k, v, mask.hiding_unwritten()
    number = state.length
    return k[:, :, :number], v[:, :, :number], mask.written() if mask.q_length == 1 else mask


def _of_heads(taken: Heads, x_BHQK: Any, num_heads: int) -> Any:
    """The part of a bias or mask, where it has one a head."""
    return taken.of_queries(x_BHQK, 1) if per_head(x_BHQK, num_heads) else x_BHQK


def _take(x: torch.Tensor, axis: int, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    pieces = [x.narrow(axis, first, last - first) for first, last in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)


def _order(taken: Sequence[Heads]) -> list[tuple[int, int, int]]:
    found = []
    for part, heads in enumerate(taken):
        place = 0
        for first, last in heads.runs():
            found.append((first, (part, place, last - first)))
            place += last - first
    return [piece for _, piece in sorted(found)]
