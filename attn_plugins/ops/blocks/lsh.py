"""Attention to keys that hash to the query's bucket, by sorting both: O(N num_hashes (bucket_size + TILE) D).

Letter beside the legend's: E hash rounds.
"""

from dataclasses import dataclass

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks import batched
from attn_plugins.ops.blocks.gather import PairTiles, gathered_attention, positions
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, with_dropout

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


@torch.no_grad()
def batched_parts_of(
    of_queries_EBHQ: torch.Tensor, of_keys_EBGK: torch.Tensor, mask: AttentionMask, number: int, bucket_size: int
) -> batched.PairTiles:
    """As :func:`parts_of` but for queries with their own keys: a query has a pair in each round.

    What a query sees of a round are at most ``bucket_size`` keys one after the other in the round's order, or twice as
    many. The order is cut into blocks of ``bucket_size``, each with as many keys behind it as a query that begins in it
    may see: so all of them lie in one block.
    """
    (rounds, batch, groups, length), device = of_keys_EBGK.shape, mask.device
    heads = of_queries_EBHQ.shape[2]
    position_Q, starts_BK = positions(mask), mask.starts_BK().expand(batch, -1).clamp(min=0)
    # One number that sorts the keys of a row by row or segment, bucket, and position.
    codes = (starts_BK.unsqueeze(1) * number + of_keys_EBGK) * length + torch.arange(length, device=device)
    last = torch.iinfo(torch.long).max
    if mask.padding_BK is not None:
        codes = codes.masked_fill(~mask.padding_BK.unsqueeze(1), last)
    codes_XK, keys_XK = codes.flatten(0, 2).sort(dim=1)
    there_XK = codes_XK < last
    index_K = torch.arange(length, device=device)
    place = torch.empty_like(keys_XK).scatter_(1, keys_XK, torch.where(there_XK, index_K, -1))
    begin = (starts_BK[:, position_Q].unsqueeze(1) * number + of_queries_EBHQ) * length
    own_XQ = (begin + position_Q).view(len(codes_XK), -1)
    begin_XQ = begin.view(own_XQ.shape)
    middle = torch.searchsorted(codes_XK, own_XQ, right=True)
    low = torch.maximum(torch.searchsorted(codes_XK, begin_XQ), middle - bucket_size)
    high = middle
    if not mask.causal:
        high = torch.minimum(torch.searchsorted(codes_XK, begin_XQ + length), middle + bucket_size)
    # Blocks of each round, row and key/value head.
    size = min(bucket_size, length)
    begins_N = torch.arange(0, length, size, device=device)
    order_NC = begins_N.unsqueeze(1) + torch.arange(min(size * (2 if mask.causal else 3), length), device=device)
    blocks = len(begins_N)
    row_X = torch.arange(len(codes_XK), device=device).unsqueeze(1)
    block = torch.where(low < high, row_X * blocks + low // size, row_X.numel() * blocks)
    pair_TR, block_T = batched.pairs_by_block(block.view(rounds, -1).mT.flatten(), row_X.numel() * blocks, filled=2)
    none, inside = batch * groups * length, order_NC.clamp(max=length - 1).flatten()
    keys = keys_XK[:, inside] + row_X % (batch * groups) * length
    keys_XC = torch.where(there_XK[:, inside] & (order_NC < length).flatten(), keys, none).view(-1, order_NC.shape[1])
    row = torch.arange(batch * groups, device=device).view(-1, 1, 1) * length
    own_N = (row + position_Q).expand(-1, heads // groups, -1).flatten()
    pad = torch.nn.functional.pad
    tables = (
        pad(place.view(rounds, -1), (0, 1), value=-1),
        pad(low.view(rounds, -1), (0, 1)),
        pad(high.view(rounds, -1), (0, 1)),
        pad(own_N, (0, 1), value=-1),
        torch.arange(rounds, device=device).repeat_interleave(len(keys_XC) // rounds, output_size=len(keys_XC)),
    )
    return batched.PairTiles(pair_TR, block_T, keys_XC, rounds, _hidden, tables)


def _hidden(rows_TR, block_T, keys_TC, place_EN, low_EN, high_EN, own_N, round_X):
    """Whether a key is the query's own, was seen in an earlier round, or is not seen in this one."""
    each_E1, round_T = torch.arange(len(place_EN), device=place_EN.device).unsqueeze(1), round_X[block_T]
    place_ETC, low_ETR = place_EN[:, keys_TC].unsqueeze(2), low_EN[:, rows_TR].unsqueeze(3)
    # Nothing is seen in later rounds, of which nothing is asked.
    high_ETR = high_EN[:, rows_TR].masked_fill_((each_E1 > round_T).unsqueeze(2), -1).unsqueeze(3)
    seen_ETRC = place_ETC >= low_ETR
    seen_ETRC &= place_ETC < high_ETR
    seen_ETRC ^= (each_E1 == round_T)[..., None, None]
    return seen_ETRC.any(dim=0) | (own_N[rows_TR].unsqueeze(2) == keys_TC.unsqueeze(1))


def batched_lsh_attention(
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
    """As :func:`lsh_attention`, in operations of a fixed number without a sync; may be traced.

    A query's own key, which it sees in any case, is merged with what it sees in rounds.
    """
    part = batched_parts_of(
        buckets(q_BHQD, rotations_EFD),
        buckets(k_BGKD, rotations_EFD),
        mask,
        2 * rotations_EFD.shape[1],
        bucket_size,
    )
    dtype, groups = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), k_BGKD.shape[1]
    out_BHQV, lse_BHQ = batched.batched_gathered_attention(
        q_BHQD, k_BGKD, v_BGKV, [part], scale=scale, dropout=dropout, out_dtype=dtype
    )
    own = slice(mask.kv_length - mask.q_length, None)
    k_BG1QD, v_BG1QV = (x[:, :, own].to(dtype).unsqueeze(2) for x in (k_BGKD, v_BGKV))
    padding = None
    if mask.padding_BK is not None:
        padding = ~mask.padding_BK[:, None, None, own, None]
        k_BG1QD, v_BG1QV = (x.masked_fill(padding, 0.0) for x in (k_BG1QD, v_BG1QV))  # it may hold anything
    q = q_BHQD.to(dtype).unflatten(1, (groups, -1))
    score = torch.einsum("bgsqd,bgxqd->bgsq", q, k_BG1QD).unsqueeze(4) * scale
    lse = lse_BHQ.clamp(min=MASKED_SCORE).unflatten(1, (groups, -1)).unsqueeze(4)
    share = torch.sigmoid(score - lse)
    if padding is not None:
        share = share.masked_fill(padding, 0.0)
    rest = out_BHQV.unflatten(1, (groups, -1)) * (1 - share)
    out = rest + with_dropout(share, dropout) * v_BG1QV
    return out.flatten(1, 2).to(v_BGKV.dtype)
