"""Rotary positions: turning queries that carry them to another position."""

from typing import NamedTuple

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rotary import Rotary
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.patterns.band import first_query, in_row, query_in_row


class Pivot(NamedTuple):
    """cos and sin, (B or 1, Q or 1, R), of the position that queries are turned to if they are beyond it."""

    cos: torch.Tensor
    sin: torch.Tensor


def turned(q_BHQD: torch.Tensor, mask: AttentionMask, rotary: Rotary, pivot: Pivot, position: int) -> torch.Tensor:
    """Queries as if they stood at ``position`` of their row, where they are beyond it."""
    beyond = query_in_row(mask, torch.arange(mask.q_length, device=mask.device).unsqueeze(0)) > position
    cos, sin, to_cos, to_sin = (x.to(accumulation_dtype(x)) for x in (rotary.cos_BQR, rotary.sin_BQR, *pivot))
    # Some models scale cos and sin, which q has in it once and shall not have twice.
    size = cos.square() + sin.square()
    by_cos = torch.where(beyond.unsqueeze(2), (to_cos * cos + to_sin * sin) / size, 1.0)
    by_sin = torch.where(beyond.unsqueeze(2), (to_sin * cos - to_cos * sin) / size, 0.0)
    return rotary.apply(q_BHQD, by_cos.to(q_BHQD.dtype), by_sin.to(q_BHQD.dtype))


def pivot_within(mask: AttentionMask, rotary: Rotary, position: int) -> Pivot:
    """The pivot of each query, found among the queries themselves.

    Raises:
        ValueError: there are keys before the first query, whose positions are not known.
    """
    if mask.q_length != mask.kv_length:
        raise ValueError(
            f"positions='cache' got {mask.q_length} queries and {mask.kv_length} keys; allowed: as many keys as "
            "queries, or a cache that was empty when the attention was put in"
        )
    own = torch.arange(mask.q_length, device=mask.device).unsqueeze(0)
    index = (own - in_row(mask, own + first_query(mask)) + position).clamp(0, mask.q_length - 1).unsqueeze(2)
    tables = []
    for table in (rotary.cos_BQR, rotary.sin_BQR):
        batch = max(len(table), len(index))
        tables.append(table.expand(batch, -1, -1).gather(1, index.expand(batch, -1, table.shape[2])))
    return Pivot(*tables)


def apart(
    q_BHQD: torch.Tensor, turned_BHQD: torch.Tensor, k_BGKD: torch.Tensor, is_first: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of twice the size, whose products are those of ``turned`` for first keys and of q for others.

    Args:
        is_first: (B or 1, K) bool.
    """
    first = is_first[:, None, :, None]
    q = torch.cat([q_BHQD, turned_BHQD], dim=3)
    return q, torch.cat([k_BGKD.masked_fill(first, 0.0), k_BGKD.masked_fill(~first, 0.0)], dim=3)
