"""Softmax attention over all keys that a mask shows, by torch's fused attention wherever that supports the call."""

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import dense_attention, expand_heads


def whole_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    *,
    mask: AttentionMask,
    scale: float,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """out_BHQV; a softcap and learned sinks, which it does not have, go by the dense oracle."""
    if softcap is not None or sinks is not None:
        extras: dict[str, Any] = {"position_bias": position_bias, "softcap": softcap, "sinks": sinks}
        return dense_attention(q_BHQD, k_BGKD, v_BGKV, mask.dense(), scale=scale, dropout=dropout, **extras)[0]
    # As mask.plain and not mask.row_starts say it, for a token with no call of Python.
    dense_free = not mask.ruled and mask.structure is None and mask.padding_BK is None and mask.segments_BK is None
    if (
        position_bias is None
        and dense_free
        and not mask.kv_offset
        and (not mask.causal or mask.q_length == mask.kv_length or mask.q_length == 1)
    ):
        is_causal, grouped = mask.causal and mask.q_length > 1, q_BHQD.shape[1] != k_BGKD.shape[1]
        how: dict[str, Any] = {"is_causal": is_causal, "enable_gqa": grouped, "dropout_p": dropout, "scale": scale}
        return scaled_dot_product_attention(q_BHQD, k_BGKD, v_BGKV, **how)
    k_BHKD, v_BHKV = expand_heads(k_BGKD, q_BHQD.shape[1]), expand_heads(v_BGKV, q_BHQD.shape[1])
    allowed = mask.dense()
    if position_bias is None:
        return scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKV, attn_mask=allowed, dropout_p=dropout, scale=scale)
    bias = torch.where(allowed, position_bias.to(q_BHQD.dtype), torch.finfo(q_BHQD.dtype).min)
    out_BHQV = scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKV, attn_mask=bias, dropout_p=dropout, scale=scale)
    return out_BHQV * allowed.any(dim=-1, keepdim=True)
