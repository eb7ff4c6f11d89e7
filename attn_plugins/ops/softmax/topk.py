"""Top-k attention looks at every pair of query and key, a tile of queries at a time: time O(Q K), memory O(tile K)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.query_chunks import bias_of, in_large_chunks, softmax_of_visible, visible_pairs
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, scores, with_dropout
from attn_plugins.ops.softmax.tile_engine import Tile, attend_tiles, slices, visible_tile

SCORES_AT_ONCE = 2**21
"""Scores of a tile, over the query heads that are treated together."""
LARGEST_TILE = 128
"""Queries of a tile; more gain nothing."""
MULTIPLE = 64
"""Keys of a matrix product are a multiple of it, lest its ragged end be summed in another order than the rest."""


def round_up(seen: int, total: int, multiple: int = 1) -> int:
    """``seen`` or somewhat more, one of 8 sizes up to ``total``, each but the last a multiple of ``multiple``.

    Tiles that grow one by one would each find what the last one freed too small, and the heap would grow with them.
    """
    step = -(-total // (8 * multiple)) * multiple
    return min(-(-max(seen, 1) // step) * step, total)


def tie_stable_scores(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    *,
    scale: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """:func:`attn_plugins.ops.reference.scores`, to the bit the same for equal keys, so that ties are ties.

    Zeros keep the ragged end of the matrix product off the keys.
    """
    keys = k_BGKD.shape[2]
    if keys % MULTIPLE:
        k_BGKD = pad(k_BGKD, (0, 0, 0, -keys % MULTIPLE))
    s_BHQK = scores(q_BHQD, k_BGKD, scale=scale, softcap=softcap)[..., :keys]
    return s_BHQK if position_bias is None else s_BHQK + position_bias.to(s_BHQK.dtype)


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def topk_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    topk: int,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the ``topk`` visible keys of highest score, after softcap and bias, of each query.

    Where the mask is causal, most keys after a tile are left out.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    (batch, heads, queries, _), groups = q_BHQD.shape, k_BGKD.shape[1]
    shared = heads // groups
    ragged = -k_BGKD.shape[2] % MULTIPLE
    if ragged:  # keys of zeros, which the mask hides
        k_BGKD, v_BGKV = (pad(x, (0, 0, 0, ragged)) for x in (k_BGKD, v_BGKV))
        if position_bias is not None and position_bias.shape[-1] > 1:
            position_bias = pad(position_bias, (0, ragged))
    keys = k_BGKD.shape[2]
    # A few heads at a time where there are many keys, so that a tile has many queries.
    at_once = min(groups, max(1, SCORES_AT_ONCE // (batch * shared * keys * min(queries, LARGEST_TILE))))
    size = min(LARGEST_TILE, max(1, SCORES_AT_ONCE // (batch * shared * at_once * keys)))

    def tiles() -> Iterator[Tile]:
        for at in slices(queries, size):
            seen = round_up(at.stop + mask.q_offset - mask.kv_offset, keys, MULTIPLE) if mask.causal else keys
            i = torch.arange(at.start, at.stop, device=q_BHQD.device).view(1, -1, 1)
            visible = mask.visible(i, torch.arange(seen, device=q_BHQD.device).view(1, 1, -1))
            yield visible_tile(visible, at, slice(0, seen))

    def part(q, k, v, position_bias, sinks):
        extras: dict[str, Any] = {"position_bias": position_bias, "softcap": softcap, "sinks": sinks}
        return attend_tiles(q, k, v, tiles, topk=topk, scale=scale, dropout=dropout, **extras)

    if at_once == groups:
        return part(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks)
    number = -(-groups // at_once)
    bias, logits = [position_bias] * number, [sinks] * number
    if position_bias is not None and position_bias.ndim > 2 and position_bias.shape[-3] > 1:
        bias = list(position_bias.split(at_once * shared, dim=-3))
    if sinks is not None:
        logits = list(sinks.split(at_once * shared))
    q_parts, k_parts, v_parts = q_BHQD.split(at_once * shared, 1), k_BGKD.split(at_once, 1), v_BGKV.split(at_once, 1)
    parts = zip(q_parts, k_parts, v_parts, bias, logits, strict=True)
    return torch.cat([part(*one) for one in parts], dim=1)


def batched_topk_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    topk: int,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The same in few large pieces, for devices that are not a CPU; may be traced."""
    dtype, heads = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), q_BHQD.shape[1]
    q, k, v = q_BHQD.to(dtype), *(expand_heads(x, heads).to(dtype) for x in (k_BGKD, v_BGKV))

    def attend(queries: slice, keys: slice) -> torch.Tensor:
        bias = bias_of(position_bias, queries, keys)
        s_BHQK = tie_stable_scores(q[:, :, queries], k[:, :, keys], position_bias=bias, **options)
        chosen = topk_of_visible(s_BHQK.detach(), visible_pairs(mask, queries, keys), topk)
        weights_BHQK = softmax_of_visible(s_BHQK, chosen, sinks)
        weights_BHQK = with_dropout(weights_BHQK, dropout)
        return weights_BHQK @ v[:, :, keys]

    return in_large_chunks(attend, mask, heads, dropout=dropout).to(v_BGKV.dtype)


def topk_of_visible(s_BHQK: torch.Tensor, visible: torch.Tensor, topk: int) -> torch.Tensor:
    """:func:`attn_plugins.ops.softmax.tile_engine.topk_mask` of the visible scores, without a look at them."""
    s_BHQK = torch.where(visible, s_BHQK, -torch.inf).nan_to_num_(torch.inf, torch.inf, -torch.inf)
    lowest = s_BHQK.topk(min(topk, s_BHQK.shape[3]), dim=3).values[..., -1:].clamp(min=MASKED_SCORE / 2)
    above, tied = s_BHQK > lowest, s_BHQK == lowest
    wanted = topk - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1, dtype=torch.int32) <= wanted))
