"""Index tables of a pattern: all its tiles at once, for devices where starting an operation costs more than running it.

As :mod:`attn_plugins.ops.softmax.tiles`, but the number of operations does not grow with that of the tiles. How many
tiles there are, and how large, follows from lengths and options alone, so that no value of a tensor is asked for; what
depends on values is which queries and keys they hold.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import readable
from attn_plugins.ops.sizes import scores_at_once
from attn_plugins.ops.softmax.tiles import Pattern, Sees

ALIGNMENT = 8
"""Columns of a tile are a multiple of this, as matrix units want rows to begin."""


class Tables(NamedTuple):
    """T tiles of R queries and the C keys that they need, for every row of the batch or one for all."""

    q_BTR: torch.Tensor
    """(B or 1, T, R) indices of queries, each once in a row, -1 for no query."""
    k_BTC: torch.Tensor
    """(B or 1, T, C) indices of keys, each once in a tile as far as they are visible, -1 for no key."""
    hidden_BTRC: torch.Tensor
    """(B or 1, T, R, C): True where a query does not see a key."""
    label_BTRC: torch.Tensor
    """(B or 1, T, R, C) int64 labels of pairs, -1 for none, or (1, T, 0, 0) where these have no biases."""


def tables_of(mask: AttentionMask, sees: Sees, q_BTR: torch.Tensor, k_BTC: torch.Tensor) -> Tables:
    """The tables of these queries and keys, in which the pairs are visible that ``sees`` and the mask show.

    Args:
        sees: as :meth:`Pattern.sees`; a part of the pattern where other tables have the rest of these pairs.
        q_BTR, k_BTC: as in :class:`Tables`; indices out of range stand for none. T and the batch may be 1 in either.
    """
    q_BTR = q_BTR.masked_fill((q_BTR < 0) | (q_BTR >= mask.q_length), -1)
    k_BTC = k_BTC.masked_fill((k_BTC < 0) | (k_BTC >= mask.kv_length), -1)
    k_BTC = pad(k_BTC, (0, -k_BTC.shape[2] % ALIGNMENT), value=-1)
    tiles = max(q_BTR.shape[1], k_BTC.shape[1])
    q_BTR, k_BTC = q_BTR.expand(-1, tiles, -1), k_BTC.expand(-1, tiles, -1)
    batch = max(len(q_BTR), len(k_BTC))
    parts = []
    for part in pieces(mask.device, tiles, batch * q_BTR.shape[2] * k_BTC.shape[2]):
        q_index, k_index = q_BTR[:, part].unsqueeze(3), k_BTC[:, part].unsqueeze(2)
        shown = sees(mask, q_index.clamp(min=0), k_index.clamp(min=0))
        parts.append(~(mask.visible(q_index, k_index) & shown))  # the mask hides the index -1
    hidden = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return Tables(q_BTR, k_BTC, hidden, q_BTR.new_empty(1, tiles, 0, 0))


def pieces(device: torch.device, tiles: int, elements: int, at_once: int = 0) -> Sequence[slice]:
    """Slices of so many tiles, of this many elements each, that are worked on at a time: one at usual sizes."""
    at_once = max(1, (at_once or scores_at_once(device)) // max(1, elements))
    if tiles <= at_once:
        return [slice(0, tiles)]  # whatever the length, in a graph for all of them
    return [slice(low, min(low + at_once, tiles)) for low in range(0, max(1, tiles), at_once)]


def rows_for(window: int) -> int:
    """Queries of a tile in a band of this many keys, a power of two.

    A tile of R rows in a window of W computes W + R scores a row and copies W / R keys a row, each of which costs about
    as much as 32 scores: that is least at the root of 32 W.
    """
    return 1 << max(4, min(9, (32 * max(window, 1)).bit_length() // 2))


def counted(number: int, device: torch.device) -> torch.Tensor:
    """(1, 1, number) from 0 on."""
    return torch.arange(number, device=device).view(1, 1, -1)


def most(numbers: torch.Tensor, bound: int) -> int:
    """The highest of these numbers, at the price of a sync; ``bound``, which none exceeds, where they are not readable.

    For what packed rows alone need: without segments bounds are known.
    """
    return min(bound, int(numbers.max())) if readable(numbers) else bound


def tables_for(mask: AttentionMask, pattern: Pattern) -> Sequence[Tables]:
    """The tables of a pattern, made once a forward pass."""
    return mask.cached((pattern, "tables"), lambda: tuple(pattern.tables(mask)))
