"""Linformer: keys and values projected along the length to a fixed number of each.

Letters beside the legend's: L positions counted from a row's first real key, P projected positions.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import recorded
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax, with_dropout


class Projection(NamedTuple):
    """What a mask makes of the projection of ``max_length`` positions to P runs of positions."""

    position_BK: torch.Tensor
    """(B or 1, K): position of each key."""
    not_padding_BK: torch.Tensor
    """(B or 1, K): whether it is no padding."""
    keys: tuple[torch.Tensor, torch.Tensor] | None
    """(B or 1, L): key at each position, and whether there is a real one; None where all keys are real."""
    averages_PL: torch.Tensor
    """1 / length of the run at the positions of a run, 0 elsewhere."""
    factor_BP: torch.Tensor
    """(B or 1, P): length of a run / number of real keys in it; 0 where it has none and is invisible."""


def projection_of(mask: AttentionMask, max_length: int, projected_length: int, dtype: torch.dtype) -> Projection:
    """The projection's runs as the rows of a mask fill them; made once a forward pass.

    Raises:
        ValueError: a row has a real key beyond ``max_length``.
    """

    def build() -> Projection:
        index = torch.arange(mask.kv_length, device=mask.device).unsqueeze(0)
        position_BK, not_padding_BK, keys = index, torch.ones_like(index, dtype=torch.bool), None
        if mask.padding_BK is not None:
            not_padding_BK = mask.padding_BK
            start_B1 = mask.starts_BK()[:, -1:]
            position_BK = index - start_B1
            key_BL = index[:, :max_length] + start_B1
            inside_BL = key_BL.clamp(max=mask.kv_length - 1)
            keys = inside_BL, not_padding_BK.gather(1, inside_BL) & (key_BL == inside_BL)
        longest = mask.kv_length
        if longest > max_length and not recorded(not_padding_BK):  # unless the rest is padding
            longest = int(position_BK.masked_fill(~not_padding_BK, -1).max()) + 1
        if longest > max_length:
            raise ValueError(
                f"linformer has weights for {max_length} positions, got a sequence of {longest} tokens; "
                f"allowed: up to max_length={max_length}"
            )
        run_L = torch.arange(max_length, device=mask.device) * projected_length // max_length
        member_PL = run_L == torch.arange(projected_length, device=mask.device).unsqueeze(1)
        size_P = member_PL.sum(dim=1, keepdim=True).to(dtype)
        run_BK = run_L[position_BK.clamp(0, max_length - 1)]
        count_BP = torch.zeros(len(not_padding_BK), projected_length, dtype=dtype, device=mask.device)
        count_BP = count_BP.scatter_add(1, run_BK, not_padding_BK.to(dtype))
        factor_BP = torch.where(count_BP > 0, size_P.squeeze(1) / count_BP, 0.0)
        return Projection(position_BK, not_padding_BK, keys, member_PL / size_P, factor_BP)

    return mask.cached(("linformer", max_length, projected_length, dtype), build)


def dense_linformer_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    weights: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, a projection matrix a row: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    key_weight_GPL, value_weight_GPL = weights
    projected_length, max_length = key_weight_GPL.shape[1:]
    made = projection_of(mask, max_length, projected_length, dtype)

    def matrix(weight_GPL):
        e_GPL = made.averages_PL + weight_GPL.to(dtype)
        e_GPBK = e_GPL[:, :, made.position_BK.clamp(0, max_length - 1)] * made.not_padding_BK
        return e_GPBK.permute(2, 0, 1, 3) * made.factor_BP[:, None, :, None]

    k_BHPD = expand_heads(matrix(key_weight_GPL) @ k_BGKD.to(dtype), heads)
    s_BHQP = q_BHQD.to(dtype) @ k_BHPD.mT * scale
    p_BHQP = with_dropout(masked_softmax(s_BHQP, (made.factor_BP > 0)[:, None, None]), dropout)
    f_BGPK = matrix(value_weight_GPL)
    f_BHPK = f_BGPK if f_BGPK.shape[1] == 1 else expand_heads(f_BGPK, heads)
    weights_BHQK = p_BHQP @ f_BHPK
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, heads).to(dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


def linformer_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    weights: tuple[torch.Tensor, torch.Tensor],
    *,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """The same in O((Q + K) P D): out_BHQV in the dtype of v.

    Args:
        weights: what is added to the averages for the keys and for the values, (G, P, L), or (1, P, L) for all heads.

    Raises:
        ValueError: a row has a real key beyond L.
    """
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    key_weight_GPL, value_weight_GPL = weights
    projected_length, max_length = key_weight_GPL.shape[1:]
    length = min(mask.kv_length, max_length)
    made = projection_of(mask, max_length, projected_length, dtype)

    def project(weight_GPL, x_BGKD):
        x_BGLD = x_BGKD[:, :, :length]
        if made.keys is not None:
            key_BL, not_padding_BL = made.keys
            index = key_BL[:, None, :, None].expand(*x_BGKD.shape[:2], -1, x_BGKD.shape[3])
            x_BGLD = x_BGKD.gather(2, index).masked_fill(~not_padding_BL[:, None, :, None], 0.0)
        e_GPL = made.averages_PL[:, :length] + weight_GPL[:, :, :length].to(dtype)
        return expand_heads((e_GPL @ x_BGLD.to(dtype)) * made.factor_BP[:, None, :, None], heads)

    held = (made.factor_BP > 0)[:, None, None]
    held = held | ~held.any(dim=-1, keepdim=True)  # a row without a real key has values of zero
    k_BHPD, v_BHPV = project(key_weight_GPL, k_BGKD), project(value_weight_GPL, v_BGKV)
    out_BHQV = scaled_dot_product_attention(
        q_BHQD.to(dtype), k_BHPD, v_BHPV, attn_mask=held, dropout_p=dropout, scale=scale
    )
    return out_BHQV.to(v_BGKV.dtype)
