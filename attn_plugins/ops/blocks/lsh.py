"""Attention to keys that hash to the query's bucket, by sorting both: O(N num_hashes (bucket_size + TILE) D).

Letter beside the legend's: E hash rounds.
"""

from dataclasses import dataclass

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.gather import PairTiles, gathered_attention, positions
from attn_plugins.ops.reference import accumulation_dtype, expand_heads

TILE = 32
"""Sorted queries, and sorted keys, that are multiplied with each other at a time."""


@torch.no_grad()
def buckets(x_BHND: torch.Tensor, rotations_EFD: torch.Tensor) -> torch.Tensor:
    """(E, B, H, N): the bucket of each vector in each round, the argmax of [R x; -R x]; its length is no matter."""
    dtype = accumulation_dtype(x_BHND)
    rounds = [x_BHND.to(dtype) @ rotation_FD.to(dtype).mT for rotation_FD in rotations_EFD]
    return torch.stack([torch.cat([x, -x], dim=-1).argmax(dim=-1) for x in rounds])


def dense_visible(
    q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask, rotations_EFD: torch.Tensor, bucket_size: int
) -> torch.Tensor:
    """(B, H, Q, K) bool: the definition, through the whole matrix."""
    j = torch.arange(mask.kv_length, device=q_BHQD.device)
    i = positions(mask).unsqueeze(1)
    seen = i == j
    of_queries = buckets(q_BHQD, rotations_EFD)
    of_keys = buckets(expand_heads(k_BGKD, q_BHQD.shape[1]), rotations_EFD)
    for of_query, of_key in zip(of_queries, of_keys, strict=True):
        same = mask.dense() & (of_query.unsqueeze(-1) == of_key.unsqueeze(-2))
        before, after = same & (j <= i), same & (j > i)
        later = before.flip(-1).cumsum(dim=-1).flip(-1)
        seen = seen | (before & (later <= bucket_size)) | (after & (after.cumsum(dim=-1) <= bucket_size))
    return seen & mask.dense()


@dataclass(frozen=True)
class Round:
    """One hash round. Queries and keys are numbered by row, head and position; keys are sorted by bucket and position.

    A query sees the keys from its ``low``-th in this order to before its ``high``-th.
    """

    place: torch.Tensor
    """Place of each key in the order; -1 for padding."""
    keys: torch.Tensor
    """The keys in order, padding left out."""
    low: torch.Tensor
    high: torch.Tensor
    queries: torch.Tensor
    """The queries in the same order: both bounds rise along it."""

    def sees(self, rows_TR: torch.Tensor, keys_TC: torch.Tensor) -> torch.Tensor:
        place = self.place[keys_TC].unsqueeze(1)
        return (place >= self.low[rows_TR].unsqueeze(2)) & (place < self.high[rows_TR].unsqueeze(2))


def sort_round(bucket_BHQ: torch.Tensor, bucket_BGK: torch.Tensor, mask: AttentionMask, bucket_size: int) -> Round:
    (batch, groups, length), heads = bucket_BGK.shape, bucket_BHQ.shape[1]
    position_Q, device = positions(mask), bucket_BHQ.device
    starts_BK = mask.starts_BK().expand(batch, -1).clamp(min=0)
    number = 1 + int(max(bucket_BHQ.max(), bucket_BGK.max()))
    # One number that sorts by row, key/value head, row or segment, bucket, and position.
    row_BG1 = torch.arange(batch * groups, device=device).view(batch, groups, 1)
    key_BGK = ((row_BG1 * length + starts_BK[:, None]) * number + bucket_BGK) * length
    key_BGK = key_BGK + torch.arange(length, device=device)
    row_BH1, start_BQ = row_BG1.repeat_interleave(heads // groups, dim=1), starts_BK[:, position_Q]
    begin_BHQ = ((row_BH1 * length + start_BQ[:, None]) * number + bucket_BHQ) * length
    query_BHQ = begin_BHQ + position_Q
    if mask.padding_BK is not None:
        key_BGK = key_BGK.masked_fill(~mask.padding_BK[:, None], torch.iinfo(torch.long).max)
    codes, keys = key_BGK.flatten().sort()
    not_padding = int((codes < torch.iinfo(torch.long).max).sum())
    codes, keys = codes[:not_padding], keys[:not_padding]
    place = torch.full((batch * groups * length,), -1, dtype=torch.int32, device=device)
    place[keys] = torch.arange(not_padding, dtype=torch.int32, device=device)
    middle = torch.searchsorted(codes, query_BHQ.flatten(), right=True)
    low = torch.maximum(torch.searchsorted(codes, begin_BHQ.flatten()), middle - bucket_size)
    high = middle
    if not mask.causal:
        high = torch.minimum(torch.searchsorted(codes, begin_BHQ.flatten() + length), middle + bucket_size)
    return Round(place, keys, low.int(), high.int(), query_BHQ.flatten().argsort())


def parts_of(rounds: list[Round], own_key: torch.Tensor, group: int) -> list[PairTiles]:
    """Tiles of all pairs, each once: of queries with their own keys, and round by round what is seen there first.

    Args:
        own_key: the own key of each query, by the number of the query.
        group: query heads that share a key/value head, whose queries with the same own key make a tile.
    """
    together = own_key.argsort(stable=True).view(-1, group)
    first = torch.arange(len(together), device=own_key.device)
    parts = [PairTiles(together, own_key[together[:, :1]], None, first, None)]
    for at, now in enumerate(rounds):
        queries = torch.nn.functional.pad(now.queries, (0, -len(now.queries) % TILE), value=-1).view(-1, TILE)
        last = now.queries[
            torch.arange(TILE - 1, queries.numel(), TILE, device=own_key.device).clamp(max=len(now.queries) - 1)
        ]
        low, high = now.low[queries[:, 0]].long() // TILE, -(-now.high[last].long() // TILE)
        count = (high - low).clamp(min=0)
        tile = torch.arange(len(count), device=own_key.device).repeat_interleave(count)
        if not len(tile):
            continue
        within = torch.arange(len(tile), device=own_key.device) - (count.cumsum(0) - count)[tile]
        keys_XC = torch.nn.functional.pad(now.keys, (0, -len(now.keys) % TILE), value=-1).view(-1, TILE)
        not_padding_XC = None if len(now.keys) % TILE == 0 else keys_XC >= 0

        def hidden(rows_TR, keys_TC, now=now, before=rounds[:at]):
            seen = now.sees(rows_TR, keys_TC) & (own_key[rows_TR].unsqueeze(2) != keys_TC.unsqueeze(1))
            for earlier in before:
                seen &= ~earlier.sees(rows_TR, keys_TC)
            return seen.logical_not_()

        parts.append(PairTiles(queries[tile], keys_XC.clamp(min=0), not_padding_XC, low[tile] + within, hidden))
    return parts


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def lsh_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    rotations_EFD: torch.Tensor,
    *,
    bucket_size: int,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """Softmax attention over the keys that :func:`dense_visible` describes.

    Args:
        mask: causal or bidirectional, padding, segments; no other rule.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    of_queries, of_keys = buckets(q_BHQD, rotations_EFD), buckets(k_BGKD, rotations_EFD)
    rounds = [sort_round(*both, mask, bucket_size) for both in zip(of_queries, of_keys, strict=True)]
    (batch, groups, length), heads = k_BGKD.shape[:3], q_BHQD.shape[1]
    row = torch.arange(batch * groups, device=q_BHQD.device).repeat_interleave(heads // groups)
    own_key = (row.unsqueeze(1) * length + positions(mask)).flatten()
    parts = parts_of(rounds, own_key, heads // groups)
    return gathered_attention(q_BHQD, k_BGKD, v_BGKV, mask, parts, scale=scale, dropout=dropout)
