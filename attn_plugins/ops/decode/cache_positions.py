"""Rotary positions counted within what a bounded cache keeps, as StreamingLLM counts them.

To a query beyond the last position of its row before anything is dropped, the *anchor*, the first keys seem as far away
as they are from there: the query is rotated to the anchor for the first keys, and stays as it is for the others.
"""

from collections.abc import Callable

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.rotary import Rotary
from attn_plugins.ops.reference import accumulation_dtype
from attn_plugins.ops.softmax.patterns.band import first_query, in_row, query_in_row


def rotate_to(
    q_BHQD: torch.Tensor, mask: AttentionMask, rotary: Rotary, cos: torch.Tensor, sin: torch.Tensor, position: int
) -> torch.Tensor:
    """Queries beyond ``position`` of their row as if they stood there.

    Args:
        cos, sin: (B or 1, Q or 1, R), of that position.
    """
    beyond = query_in_row(mask, torch.arange(mask.q_length, device=mask.device).unsqueeze(0)) > position
    own_cos, own_sin, cos, sin = (x.to(accumulation_dtype(x)) for x in (rotary.cos_BQR, rotary.sin_BQR, cos, sin))
    # Some models scale cos and sin, which q has in it once and shall not have twice.
    size = own_cos.square() + own_sin.square()
    by_cos = torch.where(beyond.unsqueeze(2), (cos * own_cos + sin * own_sin) / size, 1.0)
    by_sin = torch.where(beyond.unsqueeze(2), (sin * own_cos - cos * own_sin) / size, 0.0)
    return rotary.apply(q_BHQD, by_cos.to(q_BHQD.dtype), by_sin.to(q_BHQD.dtype))


def unrotated(q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of the same tokens without their rotary positions.

    Raises:
        ValueError: there are other keys than queries, whose positions are not known.
    """
    if q_BHQD.shape[2] != k_BGKD.shape[2]:
        raise ValueError(
            f"positions='none' got {q_BHQD.shape[2]} queries and {k_BGKD.shape[2]} keys; allowed: as many keys as "
            "queries, or a cache of the default kind that was empty when the attention was put in"
        )
    cos, sin = (x.to(accumulation_dtype(x)) for x in (rotary.cos_BQR, rotary.sin_BQR))
    size = cos.square() + sin.square()  # some models scale both
    back = [(x / size).to(q_BHQD.dtype) for x in (cos, -sin)]
    return rotary.apply(q_BHQD, *back), rotary.apply(k_BGKD, *back)


def two_keyed(
    q_BHQD: torch.Tensor, rotated_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, num_first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of twice the size: products of ``rotated`` with the first keys of a row, of q with the others.

    Args:
        mask: of these keys.
    """
    index = torch.arange(mask.kv_length, device=mask.device).unsqueeze(0)
    first = (in_row(mask, index) < num_first)[:, None, :, None]
    q = torch.cat([q_BHQD, rotated_BHQD], dim=3)
    return q, torch.cat([k_BGKD.masked_fill(first, 0.0), k_BGKD.masked_fill(~first, 0.0)], dim=3)


def within_cache(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, rotary: Rotary, num_first: int, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`two_keyed` queries and keys of a whole text, whose anchors are found among the queries.

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

    def at_anchor(table: torch.Tensor) -> torch.Tensor:
        batch = max(len(table), len(index))
        return table.expand(batch, -1, -1).gather(1, index.expand(batch, -1, table.shape[2]))

    rotated = rotate_to(q_BHQD, mask, rotary, at_anchor(rotary.cos_BQR), at_anchor(rotary.sin_BQR), position)
    return two_keyed(q_BHQD, rotated, k_BGKD, mask, num_first)


class Anchors:
    """cos and sin, (B, 1, R), of each row's anchor, as far as it has come.

    Copies of a state share them, so that a rollback leaves them: they tell of a position, not of a token."""

    def __init__(self, tables: dict[str, torch.Tensor] | None = None):
        self.tables = {} if tables is None else tables

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Anchors":
        return Anchors({name: change(table) for name, table in self.tables.items()})

    def rotate(
        self, q_BHQD: torch.Tensor, mask: AttentionMask, rotary: Rotary, start_B: torch.Tensor, position: int
    ) -> torch.Tensor:
        """Queries beyond the anchor at ``position`` of their row as if they stood there.

        Args:
            start_B: each row's first real position, -1 where it has not come.
        """
        queries = q_BHQD.shape[2]
        index = (start_B + position - mask.q_offset).view(-1, 1, 1)
        here = (index >= 0) & (index < queries) & (start_B >= 0).view(-1, 1, 1)
        for name, table in (("cos", rotary.cos_BQR), ("sin", rotary.sin_BQR)):
            table = table.expand(len(start_B), -1, -1)
            found = table.gather(1, index.clamp(0, queries - 1).expand(-1, -1, table.shape[2]))
            kept = self.tables.setdefault(name, torch.ones_like(found))
            kept.copy_(torch.where(here, found, kept))
        rows = mask.at(start_B.unsqueeze(1), start_B.unsqueeze(1) >= 0, start_B)
        return rotate_to(q_BHQD, rows, rotary, self.tables["cos"], self.tables["sin"], position)
