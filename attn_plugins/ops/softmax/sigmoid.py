"""Sigmoid attention, tile by tile: O(Q K D) time, and memory for the weights of one tile only.

A weight depends on no other, so tiles of queries and keys add up to the output in any order, without a running maximum.
The weights of a tile are never kept: they are computed again in the backward.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, scores, with_dropout
from attn_plugins.ops.sizes import scores_at_once
from attn_plugins.ops.softmax.tile_engine import Tile, attend_tiles, slices, visible_tile

PAIRS_AT_ONCE = 2**20
"""Pairs of which is counted at a time which are visible."""
TILE = (128, 512)
"""Queries and keys whose weights are formed at a time: few enough for the CPU's cache, enough for its matrix units."""


def tiles_of(mask: AttentionMask) -> Iterator[Tile]:
    """The tiles in which something is visible, queries in the outer order.

    Which keys of a tile are visible is evaluated here, each time anew: kept for all tiles it would be a dense mask.
    """
    first = mask.q_offset - mask.kv_offset
    evaluated = not mask.plain or mask.padding_BK is not None or mask.segments_BK is not None
    for queries in slices(mask.q_length, TILE[0]):
        q_index = torch.arange(queries.start, queries.stop, device=mask.device).view(1, -1, 1)
        for keys in slices(min(mask.kv_length, first + queries.stop) if mask.causal else mask.kv_length, TILE[1]):
            if not evaluated and (not mask.causal or keys.stop <= first + queries.start + 1):
                yield Tile(queries, (keys,), None, None, None)
                continue
            k_index = torch.arange(keys.start, keys.stop, device=mask.device).view(1, 1, -1)
            visible = mask.visible(q_index, k_index)
            if bool(visible.any()):
                yield visible_tile(visible, queries, keys)


def log_count(mask: AttentionMask, dtype: torch.dtype, pairs_at_once: int) -> torch.Tensor:
    """(B or 1, Q): logarithm of the number of keys that a query sees, 0 for none; made once a forward pass.

    Args:
        pairs_at_once: where pairs are looked at one by one, as many at a time.
    """

    def build() -> torch.Tensor:
        tables = (mask.segments_BK, mask.positions_BK, mask.dense_BQK)
        if mask.plain and all(table is None for table in tables):
            count_BQ = _count_of_the_plain(mask)
        else:
            size = max(1, pairs_at_once // max(1, mask.batch_size * mask.kv_length))
            keys = slice(0, mask.kv_length)
            pieces = [visible_pairs(mask, queries, keys).sum(dim=(1, 3)) for queries in slices(mask.q_length, size)]
            count_BQ = torch.cat(pieces, dim=1)
        return count_BQ.clamp(min=1).to(dtype).log()

    return mask.cached(("log_count", dtype), build)


def _count_of_the_plain(mask: AttentionMask) -> torch.Tensor:
    """How many keys each query sees, (B or 1, Q), by causality and padding: keys are counted once for all queries."""
    padding_BK = torch.ones(1, mask.kv_length, device=mask.device) if mask.padding_BK is None else mask.padding_BK
    counted_BK = padding_BK.long().cumsum(dim=1)
    last_Q = torch.full((mask.q_length,), mask.kv_length - 1, device=mask.device)
    if mask.causal:
        own_Q = torch.arange(mask.q_length, device=mask.device) + (mask.q_offset - mask.kv_offset)
        last_Q = torch.minimum(own_Q, last_Q)
    return counted_BK.index_select(1, last_Q.clamp(min=0)) * (last_Q >= 0)


def dense_sigmoid_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    offset: float | None,
    dropout: float,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    s_BHQK, visible = scores(q_BHQD, k_BGKD, **options), mask.dense()
    if offset is None:
        s_BHQK = s_BHQK - visible.sum(dim=-1, keepdim=True).clamp(min=1).to(s_BHQK.dtype).log()
    else:
        s_BHQK = s_BHQK + offset
    weights_BHQK = with_dropout(torch.where(visible, torch.sigmoid(s_BHQK), 0.0), dropout)
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def sigmoid_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    offset: float | None,
    scale: float,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """``out_i = sum_j sigmoid(s_ij + offset) v_j`` over the visible keys.

    Args:
        offset: None for minus the logarithm of the number of keys that the query sees.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    if offset is None:
        offset_BQ = -log_count(mask, dtype, PAIRS_AT_ONCE)
    else:
        offset_BQ = torch.full((1, mask.q_length), float(offset), dtype=dtype, device=q_BHQD.device)
    return attend_tiles(
        q_BHQD,
        k_BGKD,
        v_BGKV,
        functools.partial(tiles_of, mask),
        weights="sigmoid",
        offset_BQ=offset_BQ,
        scale=scale,
        dropout=dropout,
        position_bias=position_bias,
        softcap=softcap,
    )


def batched_sigmoid_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    offset: float | None,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same in few large pieces, for devices that are not a CPU."""
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    q, k, v = q_BHQD.to(dtype), *(expand_heads(x, heads).to(dtype) for x in (k_BGKD, v_BGKV))
    offset_B1Q1: Any = offset
    if offset is None:
        offset_B1Q1 = -log_count(mask, dtype, scores_at_once(mask.device))[:, None, :, None]

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        bias = bias_of(position_bias, queries, keys)
        s_BHQK = scores(q[:, :, queries], k[:, :, keys], position_bias=bias, **options)
        s_BHQK = s_BHQK + (offset_B1Q1 if isinstance(offset_B1Q1, float) else offset_B1Q1[:, :, queries])
        weights_BHQK = torch.sigmoid(s_BHQK).masked_fill(~visible_pairs(mask, queries, keys), 0.0)
        weights_BHQK = with_dropout(weights_BHQK, dropout)
        return weights_BHQK @ v[:, :, keys]

    return in_large_chunks(attend, mask, heads, dropout=dropout).to(v_BGKV.dtype)
