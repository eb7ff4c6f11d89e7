"""Softmax attention with a forget gate: a score loses the log gates of all tokens between its key and its query.

Log gates come as (B, H, K), at most 0. They are added up over the tokens once, in float64 where a device has it:
what is between two tokens is then a difference of two sums, of which much cancels.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import logsigmoid

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, softmax_of_visible, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, dense_attention, expand_heads, scores, with_dropout
from attn_plugins.ops.softmax.sigmoid import tiles_of
from attn_plugins.ops.softmax.tile_engine import attend_tiles


def of_tokens(x: torch.Tensor, weight: torch.Tensor, bias_H: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``w . x + b`` of each query head and token, (B, H, K).

    Args:
        x: (B, G, K, V), of which each query head has its key/value head's, or (B, K, E), the same for all.
        weight: (H, V) or (H, E).
    """
    x, weight = x.to(dtype), weight.to(dtype)
    if x.ndim == 3:
        z_BHK = (x @ weight.mT).mT
    else:
        z_BHK = (x @ weight.unflatten(0, (x.shape[1], -1)).mT).mT.flatten(1, 2)
    return z_BHK + bias_H.to(dtype).unsqueeze(1)


def log_gates(z_BHK: torch.Tensor, *, paper: bool) -> torch.Tensor:
    """Logarithms of gates: of a sigmoid, or ``-max(z, 0)``, whose gradient at 0 is that from above."""
    return logsigmoid(z_BHK) if paper else -z_BHK.clamp(min=0)


def added_up(log_gate_BHK: torch.Tensor, padding_BK: torch.Tensor | None) -> torch.Tensor:
    """Log gates up to and including each token's, (B, H, K); padding has none.

    Args:
        padding_BK: as in the mask, True for tokens that are none.
    """
    if padding_BK is not None:
        log_gate_BHK = log_gate_BHK.masked_fill(~padding_BK.unsqueeze(1), 0.0)
    precise = log_gate_BHK.dtype if log_gate_BHK.device.type == "mps" else torch.float64  # which MPS does not have
    return log_gate_BHK.cumsum(dim=2, dtype=precise)


def check(mask: AttentionMask) -> None:
    """Raise a ValueError where keys after a query may be visible."""
    if not mask.causal:
        raise ValueError(
            f"a forget gate is of the tokens between a key and a later query; it needs a causal mask, got {mask}"
        )


def between(decay_BHK: torch.Tensor, mask: AttentionMask, queries: slice, keys: slice) -> torch.Tensor:
    """What the gates add to the scores of these pairs, (B, H, queries, keys)."""
    own_BHQ = of_queries(decay_BHK, mask)[:, :, queries]
    return own_BHQ.unsqueeze(3) - decay_BHK[:, :, keys].unsqueeze(2)


def of_queries(decay_BHK: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    """Of the tokens of the queries, (B, H, Q)."""
    if mask.positions_BK is None:
        return decay_BHK[:, :, mask.keys_before :]
    place = torch.arange(mask.q_length, device=decay_BHK.device) + mask.q_offset
    return decay_BHK.index_select(2, place)


def dense_forgetting_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    log_gate_BHK: torch.Tensor,
    *,
    position_bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    check(mask)
    decay_BHK = added_up(log_gate_BHK, mask.padding_BK)
    bias_BHQK = between(decay_BHK, mask, slice(None), slice(None))
    bias_BHQK = bias_BHQK if position_bias is None else bias_BHQK + position_bias
    return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), position_bias=bias_BHQK, **options)


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def forgetting_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    log_gate_BHK: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """The same by tiles: out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once."""
    check(mask)
    decay_BHK = added_up(log_gate_BHK, mask.padding_BK)
    tiles = functools.partial(tiles_of, mask)
    return attend_tiles(q_BHQD, k_BGKD, v_BGKV, tiles, decay_BHK=decay_BHK, merged=True, **options)


def batched_forgetting_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    log_gate_BHK: torch.Tensor,
    *,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same in few large pieces, for devices that are not a CPU, and for a few queries on any."""
    check(mask)
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    q, k, v = q_BHQD.to(dtype), *(expand_heads(x, heads).to(dtype) for x in (k_BGKD, v_BGKV))
    decay_BHK = added_up(log_gate_BHK, mask.padding_BK)

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        bias = bias_of(position_bias, queries, keys)
        s_BHQK = scores(q[:, :, queries], k[:, :, keys], position_bias=bias, **options)
        s_BHQK = s_BHQK + between(decay_BHK, mask, queries, keys).to(dtype)
        weights_BHQK = softmax_of_visible(s_BHQK, visible_pairs(mask, queries, keys), sinks)
        return with_dropout(weights_BHQK, dropout) @ v[:, :, keys]

    return in_large_chunks(attend, mask, heads, dropout=dropout, copies=3).to(v_BGKV.dtype)
