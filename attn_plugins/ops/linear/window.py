"""Softmax over a window and linear attention over all that has left it, with one denominator: O(N (window + F)).

The window's part is computed for a few dozen queries at a time, which see one slice of the keys, and again in the
backward. The linear part is causal linear attention whose keys lag behind the queries by the window.
"""

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import contiguous_segments, dense_is_cheaper, last_queries, padding_of, project
from attn_plugins.ops.linear.feature_maps import FEATURE_MAPS
from attn_plugins.ops.linear.features import Prepared
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, scores
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.tiles import tiled_attention


def _in_window(mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor, window_size: int) -> torch.Tensor:
    distance = q_index + (mask.q_offset - mask.kv_offset) - k_index
    return (distance if mask.causal else distance.abs()) < window_size


def dense_linear_window(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    prepared: Prepared,
    mask: AttentionMask,
    *,
    window_size: int,
    factor_H: torch.Tensor,
    branch: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix of weights.

    Args:
        prepared: queries and keys for the linear part.
        factor_H: the window's weight.
        branch: "both", or the only one that takes part, "window" or "linear".

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    q_index = torch.arange(mask.q_length, device=q_BHQD.device).view(1, 1, -1, 1)
    k_index = torch.arange(mask.kv_length, device=q_BHQD.device)
    near = _in_window(mask, q_index, k_index, window_size)
    visible, heads = mask.dense(), q_BHQD.shape[1]
    a_BHQK = torch.zeros((), dtype=accumulation_dtype(q_BHQD, k_BGKD), device=q_BHQD.device)
    if branch != "linear":
        s_BHQK = scores(q_BHQD, k_BGKD, scale=scale).masked_fill(~(visible & near), -torch.inf)
        top = s_BHQK.max(dim=-1, keepdim=True).values
        a_BHQK = torch.exp(s_BHQK - torch.where(top == -torch.inf, 0.0, top)) * factor_H.view(-1, 1, 1)
    if branch != "window":
        phi = FEATURE_MAPS[prepared.options["feature_map"]].features
        fq_BHQF = phi(project(prepared.q_BHQD, prepared.options.get("query_projection")))
        fk_BGKF = phi(project(prepared.k_BGKD, prepared.options.get("key_projection")))
        a_BHQK = a_BHQK + (fq_BHQF @ expand_heads(fk_BGKF, heads).mT).masked_fill(~(visible & ~near), 0.0)
    total = a_BHQK.sum(dim=-1, keepdim=True)
    # The window's largest weight is the factor: only the linear part alone may add up to nothing.
    total = total + prepared.options["eps"] if branch == "linear" else total.masked_fill(total == 0, 1.0)
    weights_BHQK = a_BHQK / total
    return (weights_BHQK @ expand_heads(v_BGKV, heads).to(weights_BHQK.dtype)).to(v_BGKV.dtype), weights_BHQK


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def linear_window_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    prepared: Prepared,
    mask: AttentionMask,
    *,
    window_size: int,
    factor_H: torch.Tensor,
    branch: str,
    scale: float,
    chunk_size: int,
    sums: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in O(Q (window_size + F)) time and linear memory: out_BHQV in the dtype of v. Differentiable once.

    Args:
        sums: over keys that come before these and have left the window, (B, G, F, V + 1), if the mask is causal.

    Raises:
        ValueError: a packed segment goes on after another one began.
    """
    linear = (prepared.options["feature_map"], prepared.options.get("query_projection"))
    if sums is None and dense_is_cheaper(prepared.q_BHQD, v_BGKV, *linear):
        return dense_linear_window(
            q_BHQD,
            k_BGKD,
            v_BGKV,
            prepared,
            mask,
            window_size=window_size,
            factor_H=factor_H,
            branch=branch,
            scale=scale,
        )[0]
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    near = None
    if branch != "linear":
        band, v = Band(window_size, window_size - 1), v_BGKV.to(dtype)
        near = tiled_attention(q_BHQD, k_BGKD, v, mask, band, scale=scale, return_lse=True)
        if branch == "window":
            return near.out_BHQV.to(v_BGKV.dtype)
    eps = prepared.options["eps"]
    far, total = _far(prepared, v_BGKV.to(dtype), mask, window_size, chunk_size, sums)
    if near is None:
        return (far / (total + eps)).to(v_BGKV.dtype)
    weight = torch.exp(near.lse_BHQ1 - near.max_BHQ1) * factor_H.to(dtype).view(-1, 1, 1)
    whole = weight + total
    return (torch.addcmul(far, near.out_BHQV, weight) / whole.masked_fill(whole == 0, 1.0)).to(v_BGKV.dtype)


def _far(
    prepared: Prepared,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    window_size: int,
    chunk_size: int,
    sums: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the keys outside the window: of phi(q).phi(k) v, (B, H, Q, V), and without v, (B, H, Q, 1)."""
    padding_BK, segments_BK = padding_of(mask), contiguous_segments(mask)
    tokens = (prepared.q_BHQD, prepared.k_BGKD, v_BGKV)
    before, sizes = mask.q_offset - mask.kv_offset, (window_size, chunk_size)
    far, total = _lagging(*tokens, padding_BK, segments_BK, prepared.options, before, *sizes, sums)
    if not mask.causal:
        q, k, v = (x.flip(2) for x in tokens)
        padding_BK, segments_BK = (None if x is None else x.flip(1) for x in (padding_BK, segments_BK))
        behind = mask.kv_length - before - mask.q_length
        after, total_after = _lagging(q, k, v, padding_BK, segments_BK, prepared.options, behind, *sizes)
        far, total = far + after.flip(2), total + total_after.flip(2)
    return far, total


def _lagging(q_BHQD, k_BGKD, v_BGKV, padding_BK, segments_BK, options, before, window_size, chunk_size, sums=None):
    """:func:`_far` for the keys that are ``window_size`` or more before a query; query i is at key ``before + i``."""
    (batch, heads, queries, _), value_dim = q_BHQD.shape, v_BGKV.shape[3]
    keys = before + queries - window_size
    if keys <= 0:
        return v_BGKV.new_zeros(batch, heads, queries, value_dim), v_BGKV.new_zeros(batch, heads, queries, 1)
    alone = max(0, window_size - before)  # queries whose window holds all keys before them
    # Key j enters together with the query at j + window_size, if that is of its segment, and as one of that segment.
    seen = None if padding_BK is None else padding_BK[:, :keys]
    labels = None
    if segments_BK is not None:
        labels = segments_BK[:, window_size : window_size + keys]
        same = segments_BK[:, :keys] == labels
        seen = same if seen is None else seen & same
    dtype, eps = v_BGKV.dtype, options["eps"]
    projections = [options.get(name) for name in ("query_projection", "key_projection")]
    w_q, w_k = (None if w is None else w.to(dtype) for w in projections)
    q, k, v = q_BHQD[:, :, alone:], k_BGKD[:, :, :keys], v_BGKV[:, :, :keys]
    out, total = last_queries(q, k, v, w_q, w_k, seen, labels, options["feature_map"], chunk_size, eps, sums)
    far = out * (total + eps).unsqueeze(3)
    return pad(far, (0, 0, alone, 0)), pad(total.unsqueeze(3), (0, 0, alone, 0))
