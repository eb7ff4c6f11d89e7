"""Attention of a few queries at a time: for methods with a weight for every pair, memory for the weights of one chunk.

What a chunk needs is computed again in backward, so that nothing of Q x K elements is held there either.
"""

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from attn_plugins.core.mask import AttentionMask

Chunk = Callable[[slice, slice], torch.Tensor]
"""(queries, keys, those after which none of the queries sees any) -> out_BHQV of these queries."""


def in_query_chunks(attend: Chunk, mask: AttentionMask, chunk_size: int, *, dropout: float = 0.0) -> torch.Tensor:
    """``attend`` on ``chunk_size`` queries after another; where the mask is causal, keys after a chunk are left out.

    Args:
        attend: is called again in backward, and draws the same dropout then.

    Returns:
        out_BHQV of all queries.
    """
    again = torch.is_grad_enabled() and mask.q_length > chunk_size
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
    q_index, k_index = (torch.arange(part.start, part.stop, device=mask.device) for part in (queries, keys))
    return mask.visible(q_index.view(1, -1, 1), k_index.view(1, 1, -1)).unsqueeze(1)


def bias_of(position_bias: torch.Tensor | None, queries: slice, keys: slice) -> torch.Tensor | None:
    """The position bias of these pairs; of size 1 where it is the same for all."""
    if position_bias is None:
        return None
    bias = position_bias[..., queries, :] if position_bias.shape[-2] > 1 else position_bias
    return bias[..., keys] if bias.shape[-1] > 1 else bias
