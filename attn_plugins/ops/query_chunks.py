"""Attention of a few queries at a time: for methods with a weight for every pair, memory for the weights of one chunk.

What a chunk needs is computed again in backward, so that nothing of Q x K elements is held there either.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.sizes import scores_at_once

Chunk = Callable[[slice, slice], torch.Tensor]
"""(queries, keys, those after which none of the queries sees any) -> out_BHQV of these queries."""


def in_query_chunks(attend: Chunk, mask: AttentionMask, chunk_size: int, *, dropout: float = 0.0) -> torch.Tensor:
    """``attend`` on ``chunk_size`` queries after another; where the mask is causal, keys after a chunk are left out.

    Args:
        attend: is called again in backward, and draws the same dropout then.

    Returns:
        out_BHQV of all queries.
    """
    return _in_chunks(attend, mask, chunk_size, mask.q_length > chunk_size, dropout)


def in_large_chunks(
    attend: Chunk, mask: AttentionMask, heads: int, *, dropout: float = 0.0, copies: int = 1
) -> torch.Tensor:
    """:func:`in_query_chunks` for devices that are not a CPU: as few chunks as a piece of scores allows.

    Args:
        copies: elements of the largest intermediate result for each score.
    """
    scores_of_a_query = mask.batch_size * heads * mask.kv_length * copies
    number = -(-mask.q_length // max(1, scores_at_once(mask.device) // max(1, scores_of_a_query)))
    return _in_chunks(attend, mask, -(-mask.q_length // max(1, number)), True, dropout)


def _in_chunks(attend: Chunk, mask: AttentionMask, chunk_size: int, again: bool, dropout: float) -> torch.Tensor:
    again = again and torch.is_grad_enabled()
    outs = []
    for start in range(0, mask.q_length, chunk_size):
        stop, seen = min(start + chunk_size, mask.q_length), mask.kv_length
        if mask.causal:
            seen = min(max(stop + mask.q_offset - mask.kv_offset, 1), seen)
        queries, keys = slice(start, stop), slice(0, seen)
        if again:
            out = checkpoint(attend, queries, keys, use_reentrant=False, preserve_rng_state=dropout > 0)
        else:
            out = attend(queries, keys)
        outs.append(out)
    return torch.cat(outs, dim=2)


def visible_pairs(mask: AttentionMask, queries: slice, keys: slice) -> torch.Tensor:
    """Which of the keys each of the queries sees, (B or 1, 1, queries, keys)."""
    if mask.plain and mask.dense_BQK is None and mask.positions_BK is None:
        # All pairs: tables broadcast as they are, nothing is gathered.
        first = mask.q_offset - mask.kv_offset
        if mask.causal:
            q_index = torch.arange(first + queries.start, first + queries.stop, device=mask.device)
            seen = (torch.arange(keys.start, keys.stop, device=mask.device) <= q_index.unsqueeze(1))[None, None]
        else:
            shape = (1, 1, queries.stop - queries.start, keys.stop - keys.start)
            seen = torch.ones(shape, dtype=torch.bool, device=mask.device)
        if mask.segments_BK is not None:
            own = slice(*(mask.kv_length - mask.q_length + end for end in (queries.start, queries.stop)))
            same = mask.segments_BK[:, own].unsqueeze(2) == mask.segments_BK[:, keys].unsqueeze(1)
            seen = seen & same.unsqueeze(1)
        return seen if mask.padding_BK is None else seen & mask.padding_BK[:, None, None, keys]
    q_index, k_index = (torch.arange(part.start, part.stop, device=mask.device) for part in (queries, keys))
    return mask.visible(q_index.view(1, -1, 1), k_index.view(1, 1, -1)).unsqueeze(1)


def bias_of(position_bias: torch.Tensor | None, queries: slice, keys: slice) -> torch.Tensor | None:
    """The position bias of these pairs; of size 1 where it is the same for all."""
    if position_bias is None:
        return None
    bias = position_bias[..., queries, :] if position_bias.shape[-2] > 1 else position_bias
    return bias[..., keys] if bias.shape[-1] > 1 else bias


def softmax_of_visible(
    s_BHQK: torch.Tensor, visible: torch.Tensor, sinks_H: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`attn_plugins.ops.reference.masked_softmax` in as few operations as there are, for large chunks."""
    hidden = ~visible
    s_BHQK = s_BHQK.masked_fill(hidden, -torch.inf)
    if sinks_H is not None:
        logits = sinks_H.to(s_BHQK.dtype).view(1, -1, 1, 1).expand(*s_BHQK.shape[:3], 1)
        return torch.cat([s_BHQK, logits], dim=3).softmax(dim=3)[..., :-1]
    # Rows that see nothing are not numbers, and nothing of them is let through, neither here nor in backward.
    return s_BHQK.softmax(dim=3).masked_fill(hidden, 0.0)
