"""The abstract base of the attentions whose visible pairs are known before the scores."""

import abc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from attn_plugins.core.attention import Attention
from attn_plugins.core.grid import GridSize
from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rotary import Rotary
from attn_plugins.ops.parts.first_queries import attend_first
from attn_plugins.ops.parts.halo import Reach, with_halo, within_row
from attn_plugins.ops.parts.pattern import in_part
from attn_plugins.ops.reference import dense_attention, expand_heads
from attn_plugins.ops.softmax.batched import batched_pattern_attention
from attn_plugins.ops.softmax.tiles import Pattern, Rule, dense_pattern, tiled_attention


@runtime_checkable
class FollowsRules(Protocol):
    """An attention that is softmax attention over the keys that rules and the mask show, for kernels that take rules.

    A capability, not a base: whatever has this method is served.
    """

    def by_rules(
        self,
        q_BHQD: torch.Tensor,
        k_BGKD: torch.Tensor,
        mask: AttentionMask,
        *,
        rotary: Rotary | None = None,
        grid_size: GridSize | None = None,
        sinks: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, Sequence[tuple[slice, Rule]], torch.Tensor | None]:
        """Queries and keys of the scores, slices of the query heads with their rules, and all sinks (H,).

        Args:
            sinks: the model's own.
        """


class PatternAttention(Attention, abc.ABC):
    """Softmax attention over the keys that a pattern and the mask show: a subclass says which pattern that is."""

    @abc.abstractmethod
    def patterns(
        self, heads: int, mask: AttentionMask, grid_size: GridSize | None = None
    ) -> Sequence[tuple[slice, Pattern]]:
        """Slices of the query heads, in order and together all of them, each with its pattern.

        Args:
            heads: the number of query heads, H.
            grid_size: as ``attend`` gets it, where the class :attr:`wants_grid`.

        Raises:
            ValueError: the mask is of something that the attention cannot serve.
        """

    def place(
        self, q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, rotary: Rotary | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as the scores are made of them: as they are, unless a subclass changes their positions."""
        return q_BHQD, k_BGKD

    def by_rules(self, q_BHQD, k_BGKD, mask, *, rotary=None, grid_size=None, sinks=None):
        """As :class:`FollowsRules` says."""
        q_BHQD, k_BGKD = self.place(q_BHQD, k_BGKD, mask, rotary)
        return q_BHQD, k_BGKD, self.patterns(q_BHQD.shape[1], mask, grid_size), sinks

    def reference(self, q_BHQD, k_BGKD, v_BGKV, *, mask, rotary=None, grid_size=None, **options):
        q_BHQD, k_BGKD = self.place(q_BHQD, k_BGKD, mask, rotary)
        parts = self.patterns(q_BHQD.shape[1], mask, grid_size)
        visible = [dense_pattern(mask, pattern) for _, pattern in parts]
        if len(parts) > 1:
            number = [heads.stop - heads.start for heads, _ in parts]
            visible = [seen.expand(-1, n, -1, -1) for seen, n in zip(visible, number, strict=True)]
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, torch.cat(visible, dim=1), **options)

    def attend(self, q_BHQD, k_BGKD, v_BGKV, *, mask, rotary=None, grid_size=None, **options):
        q_BHQD, k_BGKD = self.place(q_BHQD, k_BGKD, mask, rotary)
        parts = self.patterns(q_BHQD.shape[1], mask, grid_size)
        return by_heads(tiled_attention, q_BHQD, k_BGKD, v_BGKV, mask, parts, **options)

    def attend_batched(self, q_BHQD, k_BGKD, v_BGKV, *, mask, rotary=None, grid_size=None, **options):
        q_BHQD, k_BGKD = self.place(q_BHQD, k_BGKD, mask, rotary)
        parts = self.patterns(q_BHQD.shape[1], mask, grid_size)
        return by_heads(batched_pattern_attention, q_BHQD, k_BGKD, v_BGKV, mask, parts, **options)

    def reach(self, causal: bool) -> Reach:
        """How far queries see, where the class serves :attr:`in_parts`: its patterns show no key beyond it."""
        raise NotImplementedError(f"attention {self.name!r} sets in_parts and does not say how far its queries see")

    def attend_part(self, q_BHTD, k_BGTD, v_BGTV, *, part, mask, **options):
        reach = within_row(self.reach(mask.causal), part)
        k_BGKD, v_BGKV = with_halo(k_BGTD, v_BGTV, part, reach)
        around, rules = in_part(self.patterns(q_BHTD.shape[1], mask), part, reach)
        attend = batched_pattern_attention if self.prefers_batched(q_BHTD) else tiled_attention
        out_BHTV = by_heads(attend, q_BHTD, k_BGKD, v_BGKV, around, rules, **options)
        if reach.first_see_all and reach.first:
            out_BHTV = out_BHTV + attend_first(q_BHTD, k_BGTD, v_BGTV, part, reach.first, **options)
        return out_BHTV


def by_heads(
    attend: Callable[..., torch.Tensor],
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    parts: Sequence[tuple[slice, Rule]],
    *,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """out_BHQV of ``attend(q, k, v, mask, pattern, ...)`` for each part of the heads."""
    outs = [
        attend(
            q, k, v, mask, pattern,
            position_bias=_of_heads(position_bias, heads),
            sinks=None if sinks is None else sinks[heads],
            **options,
        )
        for (heads, pattern), (q, k, v) in zip(parts, _inputs(q_BHQD, k_BGKD, v_BGKV, parts), strict=True)
    ]  # fmt: skip
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def _inputs(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, v_BGKV: torch.Tensor, parts: Sequence[tuple[slice, Rule]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries of each part of the heads, and the key/value heads that these share."""
    number, groups = q_BHQD.shape[1], k_BGKD.shape[1]
    shared = number // groups
    if groups > 1 and any(heads.start % shared or heads.stop % shared for heads, _ in parts):
        # The query heads that share a key/value head are in several parts.
        k_BGKD, v_BGKV = expand_heads(k_BGKD, number), expand_heads(v_BGKV, number)
        groups, shared = number, 1
    for heads, _ in parts:
        share = slice(None) if groups == 1 else slice(heads.start // shared, heads.stop // shared)
        yield q_BHQD[:, heads], k_BGKD[:, share], v_BGKV[:, share]


def _of_heads(position_bias: torch.Tensor | None, heads: slice) -> torch.Tensor | None:
    if position_bias is None or position_bias.ndim < 3 or position_bias.shape[-3] == 1:
        return position_bias
    return position_bias[..., heads, :, :]
