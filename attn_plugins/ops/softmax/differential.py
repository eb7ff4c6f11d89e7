"""Attention of heads in pairs, each map over the values of both, some queries at a time.

Letters beside the legend's: P pairs of heads. W size of the values of both, 2 V.
"""

from collections.abc import Callable
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import (
    bias_of,
    in_large_chunks,
    in_query_chunks,
    softmax_of_visible,
    visible_pairs,
)
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax, scores


def attention_of_pairs(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    chunk_size: int | None,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """``combine`` of what the maps of neighbouring heads 0 and 1 make of the values of both, side by side.

    Args:
        combine: (first_BPQW, second_BPQW) -> out_BHQV of some queries.
        chunk_size: queries at a time; None for few large chunks, for devices that are not a CPU.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32.
    """
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    q_BHQD, k_BGKD, v_BHKV = q_BHQD.to(dtype), k_BGKD.to(dtype), expand_heads(v_BGKV.to(dtype), heads)
    v_BPKW = v_BHKV.unflatten(1, (-1, 2)).transpose(2, 3).flatten(3)
    v_BHKW = v_BPKW.repeat_interleave(2, dim=1)
    softmax = masked_softmax if chunk_size is not None else softmax_of_visible

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        bias, visible = bias_of(position_bias, queries, keys), visible_pairs(mask, queries, keys)
        s_BHQK = scores(q_BHQD[:, :, queries], k_BGKD[:, :, keys], position_bias=bias, **options)
        both_BHQW = softmax(s_BHQK, visible, sinks) @ v_BHKW[:, :, keys]
        return combine(*both_BHQW.unflatten(1, (-1, 2)).unbind(2))

    if chunk_size is None:
        return in_large_chunks(attend, mask, heads).to(v_BGKV.dtype)
    return in_query_chunks(attend, mask, chunk_size).to(v_BGKV.dtype)
