"""Softmax attention to keys that an index chooses, the same for all heads: so many of each query.

A piece of queries at a time, index scores are formed, keys chosen and their rows gathered; in backward again. So what
is held is one piece. Index scores are of all pairs, which is the one part here that is quadratic in time.
"""

from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.blocks.lightning_index import Index
from attn_plugins.ops.decode.block_cache import rows_at
from attn_plugins.ops.decode.indexed_keys import IndexedKeys
from attn_plugins.ops.query_chunks import in_query_chunks, softmax_of_visible, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, with_dropout
from attn_plugins.ops.softmax.topk import topk_of_visible

ON_CPU = 2**21
"""Numbers that are held at a time on a CPU."""
FEW = 16
"""Queries that attend from a state at once, without pieces."""


def chosen_by_index(index: Index, visible_B1QK: torch.Tensor, topk: int) -> torch.Tensor:
    """(B or 1, 1, Q, K): the ``topk`` visible keys of highest score; of equal ones the earlier."""
    if visible_B1QK.shape[-1] <= topk:
        return visible_B1QK
    return topk_of_visible(index.scores().unsqueeze(1), visible_B1QK, topk)


def attention_by_index(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    index: Index,
    *,
    topk: int,
    at_once: int,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Each query's softmax attention over its ``topk`` visible keys of highest score.

    Args:
        index: of all queries and keys; no gradient goes through it.
        at_once: numbers that are held at a time.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32.
    """
    (batch, heads, _, size), (groups, length) = q_BHQD.shape, k_BGKD.shape[1:3]
    k, v = k_BGKD.contiguous(), v_BGKV.contiguous()  # of which rows are gathered
    options = {"scale": scale, "dropout": dropout}

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        q, visible = q_BHQD[:, :, queries], visible_pairs(mask, queries, keys)
        if keys.stop <= topk:
            return _attend_to_all(q, k[:, :, keys], v[:, :, keys], visible, **options)
        return _attend_to_chosen(q, k, v, chosen_by_index(index.of(queries, keys), visible, topk), topk, **options)

    # Gathered rows and copies of them, or scores with what they are made by and chosen by.
    rows = min(topk, length) * (groups * (size + v_BGKV.shape[3]) * 3 + heads * 3)
    of_query = max(rows, length * (len(index.bias_J) + 4))
    return in_query_chunks(attend, mask, max(1, at_once // max(1, batch * of_query)), dropout=dropout)


def attention_from_index(
    q_BHQD: torch.Tensor, state: IndexedKeys, mask: AttentionMask, index: Index, *, topk: int, **options: Any
) -> torch.Tensor:
    """The same for the last tokens of a state, which has taken them in.

    Args:
        index: of these queries and all keys of the state.
        options: as there.
    """
    queries, (k, v) = q_BHQD.shape[2], (state.tensors[name] for name in "kv")
    if queries > FEW:
        seen = slice(state.length)
        return attention_by_index(
            q_BHQD, k[:, :, seen], v[:, :, seen], mask, index.of(slice(None), seen), topk=topk, **options
        )
    options.pop("at_once")
    visible = state.visible(queries, mask)
    if k.shape[2] <= topk:
        return _attend_to_all(q_BHQD, k, v, visible, **options)
    return _attend_to_chosen(q_BHQD, k, v, chosen_by_index(index, visible, topk), topk, **options)


def _attend_to_chosen(q_BHQD, k_BGKD, v_BGKV, chosen_B1QK, topk, scale, dropout):
    """At most ``topk`` keys of each query, of which there may be a choice among the first alone."""
    dtype, (batch, groups), keys = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), k_BGKD.shape[:2], chosen_B1QK.shape[-1]
    # Positions without a look at how many there are: a number that is the higher the earlier a key is, 0 for others.
    rank_BQK = torch.arange(keys, 0, -1, device=chosen_B1QK.device) * chosen_B1QK.squeeze(1)
    rank_BQT = rank_BQK.topk(min(topk, keys), dim=-1).values.expand(batch, -1, -1)
    hidden = (rank_BQT == 0)[:, None, :, None, :]
    index_BGQT = torch.where(rank_BQT > 0, keys - rank_BQT, 0).unsqueeze(1).expand(-1, groups, -1, -1)
    # A row that stands for none may hold anything.
    k, v = (rows_at(x, index_BGQT).to(dtype).masked_fill(hidden.mT, 0.0) for x in (k_BGKD, v_BGKV))
    q_BGQRD = (q_BHQD.to(dtype) * scale).unflatten(1, (groups, -1)).transpose(2, 3)
    s_BGQRT = (q_BGQRD @ k.mT).masked_fill(hidden, -torch.inf)
    # A query that has none is not a number, and nothing of it is let through, neither here nor in backward.
    weights = with_dropout(s_BGQRT.softmax(-1).masked_fill(hidden, 0.0), dropout)
    return (weights @ v).transpose(2, 3).flatten(1, 2).to(v_BGKV.dtype)


def _attend_to_all(q_BHQD, k_BGKD, v_BGKV, visible, scale, dropout):
    """Where there are no more keys than a query may have."""
    dtype, groups = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), k_BGKD.shape[1]
    q = (q_BHQD.to(dtype) * scale).unflatten(1, (groups, -1))
    k, v = (x.to(dtype).unsqueeze(2) for x in (k_BGKD, v_BGKV))
    weights = with_dropout(softmax_of_visible((q @ k.mT).flatten(1, 2), visible), dropout)
    return (weights.unflatten(1, (groups, -1)) @ v).flatten(1, 2).to(v_BGKV.dtype)
