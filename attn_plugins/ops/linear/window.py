"""Softmax over a window and linear attention over all that has left it, with one denominator: O(N (window + F)).

The window's part is computed for a few dozen queries at a time, which see one slice of the keys, and again in the
backward. The linear part is causal linear attention whose keys lag behind the queries by the window.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import contiguous_segments, dense_is_cheaper, last_queries, padding_of, project
from attn_plugins.ops.linear.feature_maps import FEATURE_MAPS
from attn_plugins.ops.linear.features import Prepared
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, outside_autocast, scores

ROWS_A_TILE = 64
"""Queries of a tile: it computes (window + rows) scores a query, so few, yet enough for the products to dominate."""


class _Tile(NamedTuple):
    """A slice of the queries, the keys that they need, and which of them each query sees."""

    queries: slice
    keys: slice
    hidden: torch.Tensor
    """(B or 1, 1, 1, queries, keys): 0 where visible, MASKED_SCORE elsewhere."""
    empty: torch.Tensor | None
    """(B or 1, 1, 1, queries, 1): True for a query that sees nothing; None where all see something."""


def _in_window(mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor, window_size: int) -> torch.Tensor:
    distance = q_index + (mask.q_offset - mask.kv_offset) - k_index
    return (distance if mask.causal else distance.abs()) < window_size


def _tiles(mask: AttentionMask, window_size: int, dtype: torch.dtype) -> list[_Tile]:
    """The tiles of a mask, made once a forward pass and shared by the layers."""

    def tile(queries: slice, keys: slice) -> _Tile:
        q_index = torch.arange(queries.start, queries.stop, device=mask.device).view(1, -1, 1)
        k_index = torch.arange(keys.start, keys.stop, device=mask.device).view(1, 1, -1)
        visible = mask.visible(q_index, k_index) & _in_window(mask, q_index, k_index, window_size)
        seen = visible.any(dim=-1, keepdim=True)
        hidden = torch.zeros(visible.shape, dtype=dtype, device=mask.device).masked_fill_(~visible, MASKED_SCORE)
        return _Tile(queries, keys, hidden[:, None, None], None if bool(seen.all()) else ~seen[:, None, None])

    def build() -> list[_Tile]:
        first, tiles, known = mask.q_offset - mask.kv_offset, [], {}
        ahead = 0 if mask.causal else window_size - 1
        for low in range(0, mask.q_length, ROWS_A_TILE):
            queries = slice(low, min(low + ROWS_A_TILE, mask.q_length))
            keys = slice(max(0, first + low - window_size + 1), min(mask.kv_length, first + queries.stop + ahead))
            # Without padding or segments only distances matter: almost all tiles look the same.
            same_shape = (queries.stop - low, keys.start - low, keys.stop - low)
            if mask.row_starts or same_shape not in known:
                known[same_shape] = tile(queries, keys)
            tiles.append(known[same_shape]._replace(queries=queries, keys=keys))
        return tiles

    return mask.cached(("linear window", window_size, dtype), build)


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
    near = top_total = None
    if branch != "linear":
        near, top_total = _Window.apply(q_BHQD, k_BGKD, v_BGKV, _tiles(mask, window_size, dtype), scale)
        if branch == "window":
            return near.to(v_BGKV.dtype)
    eps = prepared.options["eps"]
    far, total = _far(prepared, v_BGKV.to(dtype), mask, window_size, chunk_size, sums)
    if near is None or top_total is None:
        return (far / (total + eps)).to(v_BGKV.dtype)
    weight = top_total * factor_H.to(dtype).view(-1, 1, 1)
    whole = weight + total
    return (torch.addcmul(far, near, weight) / whole.masked_fill(whole == 0, 1.0)).to(v_BGKV.dtype)


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


class _Window(torch.autograd.Function):
    """Softmax over the window, (B, H, Q, V), and the sum of exp(score - largest score), (B, H, Q, 1), 0 for no keys."""

    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, tiles: list[_Tile], scale: float):
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV)
        ctx.tiles, ctx.scale = tiles, scale
        q, k, v = _by_group(q_BHQD, k_BGKD, v_BGKV)
        batch, groups, shared, queries, _ = q.shape
        dtype = accumulation_dtype(q, k, v)
        out = q.new_empty(batch, queries, groups, shared, v.shape[-1], dtype=dtype).permute(0, 2, 3, 1, 4)
        totals = q.new_empty(batch, groups, shared, queries, 1, dtype=dtype)
        for tile in tiles:
            e, _ = _exponentials(q, k, tile, scale)
            total = e.sum(dim=-1, keepdim=True)
            part = torch.bmm(e, v[:, :, tile.keys].flatten(0, 1).to(dtype)).div_(total)
            shape = (batch, groups, shared, tile.queries.stop - tile.queries.start, -1)
            part, total = part.view(shape), total.view(shape)
            if tile.empty is not None:
                part, total = part.masked_fill(tile.empty, 0.0), total.masked_fill(tile.empty, 0.0)
            out[..., tile.queries, :], totals[..., tile.queries, :] = part, total
        return out.flatten(1, 2), totals.flatten(1, 2)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_out, grad_total):
        q_BHQD, k_BGKD, v_BGKV = ctx.saved_tensors
        q, k, v = _by_group(q_BHQD, k_BGKD, v_BGKV)
        dtype, groups = accumulation_dtype(q, k, v), (k.shape[1], -1)
        g_out, g_total = grad_out.unflatten(1, groups), grad_total.unflatten(1, groups)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format, dtype=dtype)
        dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format, dtype=dtype) for x in (k, v))
        for tile in ctx.tiles:
            e, largest = _exponentials(q, k, tile, ctx.scale)
            g, of_total = g_out[..., tile.queries, :].to(dtype), g_total[..., tile.queries, :].to(dtype)
            if tile.empty is not None:
                g, of_total = g.masked_fill(tile.empty, 0.0), of_total.masked_fill(tile.empty, 0.0)
            g, of_total = g.flatten(2, 3).flatten(0, 1), of_total.flatten(2, 3).flatten(0, 1)
            q_tile, k_tile, v_tile = _rows(q, tile), *(x[:, :, tile.keys].flatten(0, 1).to(dtype) for x in (k, v))
            total = e.sum(dim=-1, keepdim=True)
            p = e.div_(total)
            of_total = of_total * total
            dv[:, :, tile.keys] += torch.bmm(p.mT, g).view_as(dv[:, :, tile.keys])
            ds = torch.bmm(g, v_tile.mT)
            mean = (ds * p).sum(dim=-1, keepdim=True)
            ds = ds.sub_(mean - of_total).mul_(p)
            ds.scatter_add_(-1, largest, -of_total)  # the sum is relative to the largest score
            d_rows = torch.bmm(ds, k_tile).mul_(ctx.scale)
            dq[..., tile.queries, :] = d_rows.view(dq[..., tile.queries, :].shape)
            dk[:, :, tile.keys] += torch.bmm(ds.mT, q_tile).mul_(ctx.scale).view_as(dk[:, :, tile.keys])
        # autograd casts each gradient to the dtype of its input.
        return dq.flatten(1, 2), dk, dv, None, None


def _by_group(q_BHQD, k_BGKD, v_BGKV):
    return q_BHQD.unflatten(1, (k_BGKD.shape[1], -1)), k_BGKD, v_BGKV


def _rows(q, tile):
    """(B G, heads that share x queries, D)."""
    return q[..., tile.queries, :].flatten(2, 3).flatten(0, 1).to(accumulation_dtype(q))


def _exponentials(q, k, tile, scale):
    """exp(score - largest score of the row) over a tile's keys, 0 where hidden, and where the largest is."""
    rows, columns = _rows(q, tile) * scale, k[:, :, tile.keys].flatten(0, 1)
    s = torch.bmm(rows.to(accumulation_dtype(q, k)), columns.to(accumulation_dtype(q, k)).mT)
    by_head = s.view(*q.shape[:3], -1, s.shape[-1])
    by_head += tile.hidden
    top, largest = s.max(dim=-1, keepdim=True)
    return s.sub_(top).exp_(), largest
