"""Attention that looks at every pair of query and key, a tile of queries at a time: time O(Q K), memory O(tile K)."""

from collections.abc import Iterator

import torch
from torch.utils.checkpoint import checkpoint

from attn_plugins.mask import AttentionMask
from attn_plugins.ops.dense import expand_heads, masked_softmax, scores

SCORES_AT_ONCE = 2**21
"""Scores of a tile, over the query heads that are treated together."""
LARGEST_TILE = 128
"""Queries of a tile; more gain nothing."""


def pieces(number: int, size: int) -> Iterator[slice]:
    """0..number in slices of ``size``."""
    for low in range(0, number, size):
        yield slice(low, min(low + size, number))


def few_sizes(seen: int, total: int) -> int:
    """``seen`` or somewhat more, one of 8 sizes up to ``total``.

    Tiles that grow one by one would each find what the last one freed too small, and the heap would grow with them.
    """
    step = -(-total // 8)
    return min(-(-max(seen, 1) // step) * step, total)


def even_scores(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    *,
    scale: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """:func:`attn_plugins.ops.dense.scores`, to the bit the same for equal keys, so that ties are ties.

    At its ragged end a matrix product may be summed in another order than before; zeros keep that off the keys.
    """
    keys = k_BGKD.shape[2]
    k_BGKD = torch.nn.functional.pad(k_BGKD, (0, 0, 0, -keys % 64))
    s_BHQK = scores(q_BHQD, k_BGKD, scale=scale, softcap=softcap)[..., :keys]
    return s_BHQK if position_bias is None else s_BHQK + position_bias.to(s_BHQK.dtype)


def least_chosen(s_BHQK: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, H, Q, 1): the ``topk``-th highest score of each query; -inf where fewer are visible, as the others are."""
    if topk >= s_BHQK.shape[-1]:
        return s_BHQK.new_full((*s_BHQK.shape[:-1], 1), -torch.inf)
    return s_BHQK.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def highest(s_BHQK: torch.Tensor, least_BHQ1: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, H, Q, K) bool: scores from :func:`least_chosen` on up, ``topk`` at most, of equal ones the first."""
    chosen = (s_BHQK >= least_BHQ1) & (s_BHQK > -torch.inf)
    if bool((chosen.sum(dim=-1) > topk).any()):
        above = s_BHQK > least_BHQ1
        level = chosen & ~above
        chosen = above | (level & (level.cumsum(dim=-1) <= topk - above.sum(dim=-1, keepdim=True)))
    return chosen


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

    Tiles are computed again in the backward, all but the choice: what is kept of it is one number a query. Where the
    mask is causal, most keys after a tile are left out.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32.
    """
    groups, keys = k_BGKD.shape[1:3]
    (batch, heads, queries), shared = q_BHQD.shape[:3], q_BHQD.shape[1] // groups
    # A few heads at a time where there are many keys, so that a tile always has many queries.
    at_once = min(groups, max(1, SCORES_AT_ONCE // (batch * shared * keys * min(queries, LARGEST_TILE))))
    rows = min(LARGEST_TILE, max(1, SCORES_AT_ONCE // (batch * shared * at_once * keys)))
    outs = []
    for g in pieces(groups, at_once):
        h = slice(g.start * shared, g.stop * shared)
        q, k, v = q_BHQD[:, h], k_BGKD[:, g], v_BGKV[:, g]
        # Repeated to the heads that share them once, not in each tile.
        k, v = expand_heads(k, q.shape[1]), expand_heads(v, q.shape[1])
        bias = None
        if position_bias is not None:
            bias = position_bias.expand(*position_bias.shape[:-3], heads, queries, keys)[..., h, :, :]
        parts = []
        # Split and not sliced: the gradient of a slice is as large as the whole.
        for t, q_BHTD in zip(pieces(queries, rows), q.split(rows, dim=2), strict=True):
            seen = few_sizes(t.stop + mask.q_offset - mask.kv_offset, keys) if mask.causal else keys
            i = torch.arange(t.start, t.stop, device=q.device).view(1, -1, 1)
            visible = mask.visible(i, torch.arange(seen, device=q.device).view(1, 1, -1)).unsqueeze(1)
            tile = _Tile(visible, topk, scale, dropout, softcap)
            inputs: list[torch.Tensor | None] = [q_BHTD, k[:, :, :seen], v[:, :, :seen]]
            inputs += [None if bias is None else bias[..., t, :seen], None if sinks is None else sinks[h]]
            if torch.is_grad_enabled():
                parts.append(checkpoint(tile, *inputs, use_reentrant=False, preserve_rng_state=dropout > 0))
            else:
                parts.append(tile(*inputs))
        outs.append(torch.cat(parts, dim=2))
    return torch.cat(outs, dim=1)


class _Tile:
    """One tile of queries, called once, or once more for the backward, which finds what was chosen."""

    def __init__(self, visible: torch.Tensor, topk: int, scale: float, dropout: float, softcap: float | None):
        self.visible, self.topk, self.scale, self.dropout, self.softcap = visible, topk, scale, dropout, softcap
        self.least: torch.Tensor | None = None

    def __call__(self, q, k, v, bias, sinks):
        s_BHTK = even_scores(q, k, scale=self.scale, position_bias=bias, softcap=self.softcap)
        masked = s_BHTK.detach().masked_fill(~self.visible, -torch.inf)
        if self.least is None:
            self.least = least_chosen(masked, self.topk)
        weights_BHTK = masked_softmax(s_BHTK, highest(masked, self.least, self.topk), sinks)
        weights_BHTK = torch.dropout(weights_BHTK, self.dropout, train=self.dropout > 0)
        return (weights_BHTK @ v.to(weights_BHTK.dtype)).to(v.dtype)
