"""Softmax over a window of keys around a centre that each query has of its own, and Gaussian weights around that."""

import math
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, in_query_chunks, visible_pairs
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, masked_softmax, scores, with_dropout


def spans(mask: AttentionMask) -> tuple[torch.Tensor, torch.Tensor]:
    """(Index of the first key that a query sees, number of keys from there to the last), each (B or 1, 1 or Q).

    Padding around a row, or a packed segment, is no part of it.
    """
    index = torch.arange(mask.kv_length, device=mask.device).unsqueeze(0)
    own = torch.arange(mask.q_length, device=mask.device) + mask.keys_before
    if mask.cross:
        padding = torch.ones_like(index, dtype=torch.bool) if mask.padding_BK is None else mask.padding_BK
        first = padding.long().argmax(dim=1, keepdim=True)
        last = mask.kv_length - 1 - padding.flip(1).long().argmax(dim=1, keepdim=True)
    else:
        first = mask.starts_BK()[:, own]
        last = _ends(mask)[:, own]
    return first, (last - first + 1).clamp(min=1)


def _ends(mask: AttentionMask) -> torch.Tensor:
    """For each key the index of the last real key of its row or segment: where it starts, read from behind."""

    def build() -> torch.Tensor:
        turned: dict[str, Any] = {
            name: None if table is None else table.flip(1)
            for name, table in (("padding_BK", mask.padding_BK), ("segments_BK", mask.segments_BK))
        }
        length = mask.kv_length
        back = AttentionMask(mask.batch_size, length, length, causal=False, device=mask.device, **turned)
        return length - 1 - back.starts_BK().flip(1)

    return mask.cached("ends", build)


def dense_window(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor,
    centre_BHQ: torch.Tensor,
    *,
    half_window: int,
    gaussian: bool,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    **options: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through all pairs: (out_BHQV, weights_BHQK).

    Args:
        visible: bool, broadcastable to (B, H, Q, K).
        centre_BHQ: a place among the keys, by their index, in between too.
        gaussian: whether weights fall off from the centre, with a deviation of half of ``half_window``.
        options: scale and softcap.
    """
    index = torch.arange(k_BGKD.shape[2], device=q_BHQD.device)
    away_BHQK = index - centre_BHQ.unsqueeze(3)
    s_BHQK = scores(q_BHQD, k_BGKD, position_bias=position_bias, **options)  # type: ignore[arg-type]
    weights_BHQK = masked_softmax(s_BHQK, visible & (away_BHQK.abs() <= half_window))
    if gaussian:
        weights_BHQK = weights_BHQK * fall_off(away_BHQK, half_window)
    weights_BHQK = with_dropout(weights_BHQK, dropout)
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


def windowed(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    centre_BHQ: torch.Tensor,
    *,
    half_window: int,
    gaussian: bool,
    chunk_size: int | None,
    scale: float,
    dropout: float,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same over the keys of each query's window alone, gathered unless it is as wide as the row: out_BHQV.

    Args:
        chunk_size: queries treated at a time; None for as many as a device takes at once.
    """
    heads, dtype = q_BHQD.shape[1], accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    k_BHKD, v_BHKV = (expand_heads(x, heads).to(dtype) for x in (k_BGKD, v_BGKV))
    number, width = k_BGKD.shape[2], 2 * half_window + 2
    offsets = torch.arange(min(width, number), device=q_BHQD.device) - half_window

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        if width >= number:
            whole = slice(0, number)
            return dense_window(
                q_BHQD[:, :, queries],
                k_BHKD,
                v_BHKV,
                visible_pairs(mask, queries, whole),
                centre_BHQ[:, :, queries],
                half_window=half_window,
                gaussian=gaussian,
                scale=scale,
                dropout=dropout,
                softcap=softcap,
                position_bias=bias_of(position_bias, queries, whole),
            )[0]
        q, centre = q_BHQD[:, :, queries].to(dtype), centre_BHQ[:, :, queries].expand(len(q_BHQD), -1, -1)
        # From floor(p) - D to floor(p) + D + 1, which holds every key within D of p, however p - D is rounded.
        index = centre.detach().floor().long().unsqueeze(3) + offsets
        q_index = torch.arange(queries.start, queries.stop, device=q.device).view(1, 1, -1, 1)
        away = index - centre.unsqueeze(3)
        seen = mask.visible(q_index, index) & (away.abs() <= half_window)
        at = index.clamp(0, number - 1)
        s = (q.unsqueeze(3) * _gathered(k_BHKD, at)).sum(dim=4) * scale
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        if position_bias is not None:
            bias = position_bias[:, :, queries] if position_bias.shape[2] > 1 else position_bias
            s = s + bias.to(dtype).expand(*s.shape[:3], -1).gather(3, at if bias.shape[3] > 1 else torch.zeros_like(at))
        weights = masked_softmax(s, seen)
        if gaussian:
            weights = weights * fall_off(away, half_window)
        weights = with_dropout(weights, dropout)
        return (weights.unsqueeze(4) * _gathered(v_BHKV, at)).sum(dim=3)

    if chunk_size is None:
        size = max(k_BGKD.shape[3], v_BGKV.shape[3])
        out_BHQV = in_large_chunks(attend, mask, heads, dropout=dropout, copies=max(1, 2 * width * size // number))
    else:
        out_BHQV = in_query_chunks(attend, mask, chunk_size, dropout=dropout)
    return out_BHQV.to(v_BGKV.dtype)


def _gathered(x_BHKD: torch.Tensor, index_BHQW: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, W, D) of the keys at these places."""
    flat = index_BHQW.flatten(2).unsqueeze(3).expand(-1, -1, -1, x_BHKD.shape[3])
    return x_BHKD.gather(2, flat).unflatten(2, index_BHQW.shape[2:])


def fall_off(away: torch.Tensor, half_window: int) -> torch.Tensor:
    """exp(-away^2 / (2 sigma^2)) with sigma = half_window / 2."""
    return torch.exp(away.square() * (-2 / math.pow(half_window, 2)))
