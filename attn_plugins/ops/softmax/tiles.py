"""Sparse softmax attention by tiles of a pattern that is known before the scores: cost and memory of the pattern.

A pattern is cut into tiles, each a few dozen queries and the keys that these see, for
:mod:`attn_plugins.ops.softmax.tile_engine`. Where keys are slices nothing is gathered.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import MASKED_SCORE
from attn_plugins.ops.softmax.tile_engine import Tile, attend_tiles, indices

Sees = Callable[[AttentionMask, torch.Tensor, torch.Tensor], torch.Tensor]
"""As :meth:`Pattern.sees`."""


class Rule(Protocol):
    """Who sees whom. A frozen dataclass: it is the key of what follows from it."""

    def __hash__(self) -> int: ...

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        """Whether queries see keys as far as the rule goes, for indices in range whose shapes broadcast.

        It computes with indices as numbers, and looks them up in tables by ``mask.look_up`` alone, so that it takes
        other things than tensors too (:mod:`attn_plugins.ops.softmax.block_limits`).
        """


class Pattern(Rule, Protocol):
    """Who sees whom, as one rule and as the tiles that follow it."""

    @property
    def merged(self) -> bool:
        """Whether a query may see keys in several tiles; partial results are then merged, which costs a little.

        If not, a query may still be in several tiles if it sees keys in none but the last of them."""

    def tiles(self, mask: AttentionMask) -> Iterable[Tile]:
        """Tiles in which every query occurs, and every pair that ``sees`` and the mask allow is visible just once."""

    def tables(self, mask: AttentionMask) -> Iterable[Any]:
        """The same pairs as :class:`attn_plugins.ops.softmax.tables.Tables`, of which there are a few. May be traced.

        A query sees keys in one tile of each of the tables at most.
        """


def dense_pattern(mask: AttentionMask, pattern: Rule) -> torch.Tensor:
    """What mask and pattern show, (B or 1, 1, Q, K) bool: the definition, for the reference form."""
    q_index = torch.arange(mask.q_length, device=mask.device).view(1, -1, 1)
    k_index = torch.arange(mask.kv_length, device=mask.device).view(1, 1, -1)
    return mask.dense() & pattern.sees(mask, q_index, k_index).unsqueeze(1)


def make_tile(
    mask: AttentionMask,
    sees: Sees,
    queries: slice | torch.Tensor,
    keys: Sequence[slice] = (),
    extra: torch.Tensor | None = None,
) -> Tile:
    """The tile of these queries and keys, in which the pairs are visible that ``sees`` and the mask show.

    Args:
        sees: as :meth:`Pattern.sees`; a part of the pattern where other tiles have the rest of these pairs.
        queries: a slice or (B or 1, R) indices, -1 for no query.
        keys: slices that don't overlap.
        extra: (B or 1, S) indices, -1 for no key, each once in a row. Those that are in a slice already are left out.
    """
    q_index = indices(queries, mask.device).unsqueeze(2)
    columns = [indices(part, mask.device).unsqueeze(1) for part in keys]
    if extra is not None:
        beside = extra >= 0
        for part in keys:
            beside &= ~((extra >= part.start) & (extra < part.stop) & ((extra - part.start) % (part.step or 1) == 0))
        extra = extra.masked_fill(~beside, -1)
        seen_extra = _visible(mask, sees, q_index, extra.unsqueeze(1))
        needed = seen_extra.any(dim=1).any(dim=0)
        if not keys:
            needed[0] = True  # a tile without columns would be a case of its own
        extra = extra[:, needed] if bool(needed.any()) else None
    parts = []
    if columns:
        parts = [_visible(mask, sees, q_index, torch.cat(columns, dim=2))]
    if extra is not None:
        parts.insert(0, seen_extra[..., needed])
    batch = max(len(part) for part in parts)
    visible = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=2)
    hidden = None
    if not bool(visible.all()):
        hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED_SCORE)[:, None, None]
    seen = visible.any(dim=2, keepdim=True)
    empty = None if bool(seen.all()) else ~seen[:, None, None]
    return Tile(queries, tuple(keys), None if extra is None else extra.clamp(min=0), hidden, empty)


def _visible(mask: AttentionMask, sees: Sees, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
    shown = sees(mask, q_index.clamp(min=0), k_index.clamp(min=0))
    return mask.visible(q_index, k_index) & shown  # the mask hides the index -1


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def tiled_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern,
    **options: Any,
) -> Any:
    """Softmax attention over the keys that ``mask`` and ``pattern`` show.

    Args:
        options: of :func:`attn_plugins.ops.softmax.tile_engine.attend_tiles`, and what that returns.
    """
    tiles = mask.cached(pattern, lambda: tuple(pattern.tiles(mask)))
    return attend_tiles(q_BHQD, k_BGKD, v_BGKV, lambda: tiles, merged=pattern.merged, **options)
