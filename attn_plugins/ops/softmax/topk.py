"""Attention that looks at every pair of query and key, a tile of queries at a time: time O(Q K), memory O(tile K).

Scores of a tile are never kept, and computed again in the backward. Both directions write into tensors made before the
first tile: what is made a tile is freed before the next, so that the heap stays as small as the largest tile needs.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import recorded
from attn_plugins.ops.reference import accumulation_dtype, outside_autocast, scores

SCORES_AT_ONCE = 2**21
"""Scores of a tile, over the query heads that are treated together."""
LARGEST_TILE = 128
"""Queries of a tile; more gain nothing."""
EVEN = 64
"""Keys of a matrix product are a multiple of it, lest its ragged end be summed in another order than the rest."""


def pieces(number: int, size: int) -> Iterator[slice]:
    """0..number in slices of ``size``."""
    for low in range(0, number, size):
        yield slice(low, min(low + size, number))


def round_up(seen: int, total: int) -> int:
    """``seen`` or somewhat more, one of 8 sizes up to ``total``.

    Tiles that grow one by one would each find what the last one freed too small, and the heap would grow with them.
    """
    step = -(-total // 8)
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
    k_BGKD = torch.nn.functional.pad(k_BGKD, (0, 0, 0, -keys % EVEN))
    s_BHQK = scores(q_BHQD, k_BGKD, scale=scale, softcap=softcap)[..., :keys]
    return s_BHQK if position_bias is None else s_BHQK + position_bias.to(s_BHQK.dtype)


def topk_threshold(s_BHQK: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, H, Q, 1): the ``topk``-th highest score of each query; -inf where fewer are visible, as the others are."""
    if topk >= s_BHQK.shape[-1]:
        return s_BHQK.new_full((*s_BHQK.shape[:-1], 1), -torch.inf)
    return s_BHQK.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def topk_mask(s_BHQK: torch.Tensor, least_BHQ1: torch.Tensor, topk: int) -> torch.Tensor:
    """(B, H, Q, K) bool: scores from :func:`topk_threshold` on up, ``topk`` at most, of equal ones the first."""
    # What is not a number comes first, as topk has it, so that it is read and not left out.
    s_BHQK, least_BHQ1 = (x.masked_fill(x.isnan(), torch.inf) for x in (s_BHQK, least_BHQ1))
    chosen = (s_BHQK >= least_BHQ1) & (s_BHQK > -torch.inf)
    if recorded(chosen) or bool((chosen.sum(dim=-1) > topk).any()):
        above = s_BHQK > least_BHQ1
        tied = chosen & ~above
        chosen = above | (tied & (tied.cumsum(dim=-1) <= topk - above.sum(dim=-1, keepdim=True)))
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

    The choice is made once: what the backward needs of it is one number a query. Where the mask is causal, most keys
    after a tile are left out.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    (batch, heads, queries), (groups, keys) = q_BHQD.shape[:3], k_BGKD.shape[1:3]
    shared, rows = heads // groups, [slice(0, batch)]
    # One row and a few heads at a time where there are many keys, so that a tile always has many queries.
    at_once = SCORES_AT_ONCE // (shared * keys * min(queries, LARGEST_TILE))
    if at_once < batch * groups:
        rows, at_once = list(pieces(batch, 1)), min(groups, max(1, at_once))
    else:
        at_once = groups
    size = min(LARGEST_TILE, max(1, SCORES_AT_ONCE // (rows[0].stop * shared * at_once * keys)))
    tiles = []
    for t in pieces(queries, size):
        seen = round_up(t.stop + mask.q_offset - mask.kv_offset, keys) if mask.causal else keys
        tiles += [Tile(b, g, t, seen) for b in rows for g in pieces(groups, at_once)]

    @functools.lru_cache(maxsize=1)  # for the rows and heads that have the same
    def visible(low: int, high: int, seen: int) -> torch.Tensor:
        i = torch.arange(low, high, device=q_BHQD.device).view(1, -1, 1)
        return mask.visible(i, torch.arange(seen, device=q_BHQD.device).view(1, 1, -1)).unsqueeze(1)

    return attention_by_tiles(
        q_BHQD,
        k_BGKD,
        v_BGKV,
        tiles,
        lambda tile: visible(tile.queries.start, tile.queries.stop, tile.keys),
        topk=topk,
        scale=scale,
        dropout=dropout,
        position_bias=position_bias,
        softcap=softcap,
        sinks=sinks,
    )


@dataclass(frozen=True)
class Tile:
    """Some queries of some heads, and how many keys are looked at for them. T queries in shape suffixes."""

    rows: slice
    """Of the batch: all of them; a single one where not all heads are in the tile."""
    groups: slice
    """Key/value heads, with all query heads that share them."""
    queries: slice
    keys: int
    """The first so many."""


def attention_by_tiles(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    tiles: list[Tile],
    visible: Callable[[Tile], torch.Tensor],
    *,
    scale: float,
    dropout: float,
    topk: int | None = None,
    look: Callable[[Tile, torch.Tensor], None] | None = None,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that are visible, or over those of them that have the ``topk`` highest scores.

    Args:
        tiles: every query of every head in just one of them.
        visible: (B or 1, 1, T, K) bool for the queries and keys of a tile, the same again in the backward.
        look: is shown the weights_BHTK of each tile before dropout; only in the forward.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    # The backward draws the same dropout again from this seed instead of keeping the masks of all tiles.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    options = (visible, topk, scale, softcap, dropout, seed)
    return _ByTiles.apply(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, look, options)


class _ByTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, look, options):
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options)
        out = torch.empty((*q_BHQD.shape[:3], v_BGKV.shape[3]), dtype=v_BGKV.dtype, device=v_BGKV.device)
        lse = torch.empty((*q_BHQD.shape[:3], 1), dtype=call.dtype, device=v_BGKV.device)
        least = None if call.topk is None else torch.empty_like(lse)
        for tile in tiles:
            at = call.at(tile)
            s_BHTK, _ = call.scores(call.queries(tile), tile)
            if least is not None:
                least[at] = topk_threshold(s_BHTK, call.topk)
                call.mask_others(s_BHTK, least[at])
            top = s_BHTK.amax(dim=-1, keepdim=True)
            if call.sinks is not None:
                top = torch.maximum(top, call.sinks[:, at[1]])
            top.masked_fill_(top == -torch.inf, 0.0)
            weights_BHTK = s_BHTK.sub_(top).exp_()
            total = weights_BHTK.sum(dim=-1, keepdim=True)
            if call.sinks is not None:
                total += torch.exp(call.sinks[:, at[1]] - top)
            lse[at] = (top + total.log()).masked_fill_(total == 0, torch.inf)
            weights_BHTK.div_(total.masked_fill_(total == 0, 1.0))
            if look is not None:
                look(tile, weights_BHTK)
            keep = call.keep(weights_BHTK)
            if keep is not None:
                weights_BHTK.mul_(keep)
            rows = torch.bmm(call.by_group(weights_BHTK, tile), call.columns(call.v, tile))
            out[at] = rows.view(*top.shape[:3], -1)
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, lse, least)
        ctx.tiles, ctx.options = tiles, options
        return out

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, lse, least = ctx.saved_tensors
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, ctx.options)
        dq = torch.empty(q_BHQD.shape, dtype=q_BHQD.dtype, device=q_BHQD.device)
        dk, dv = (x.new_zeros((len(x), k_BGKD.shape[2], x.shape[2])) for x in (call.k, call.v))
        d_bias: Any = None
        d_sinks: Any = None
        if ctx.needs_input_grad[3]:
            d_bias = torch.zeros_like(call.bias, dtype=call.dtype, memory_format=torch.contiguous_format)
        if ctx.needs_input_grad[4]:
            d_sinks = torch.zeros_like(call.sinks)
        for tile in ctx.tiles:
            at = call.at(tile)
            q, g = call.queries(tile), call.by_group(grad_BHQV[at].to(call.dtype), tile)
            s_BHTK, tanh = call.scores(q, tile)
            if least is not None:
                call.mask_others(s_BHTK, least[at])
            weights_BHTK = s_BHTK.sub_(lse[at]).exp_()
            ds = torch.bmm(g, call.columns(call.v, tile).mT).view(weights_BHTK.shape)
            keep, dropped = call.keep(weights_BHTK), weights_BHTK
            if keep is not None:
                ds.mul_(keep)
                dropped = keep.mul_(weights_BHTK)
            call.columns(dv, tile).baddbmm_(call.by_group(dropped, tile).mT, g)
            ds.mul_(weights_BHTK)
            total = ds.sum(dim=-1, keepdim=True)
            ds.addcmul_(weights_BHTK, total, value=-1)
            if d_sinks is not None:
                rest = torch.exp(call.sinks[:, at[1]] - lse[at]) * total
                d_sinks[:, at[1]] -= rest.sum(dim=(0, 2), keepdim=True)
            if d_bias is not None:
                part = call.bias_of(d_bias, tile)
                part += ds.sum_to_size(part.shape)
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            ds = call.by_group(ds, tile)
            dq[at] = torch.bmm(ds, call.columns(call.k, tile)).mul_(call.scale).view(dq[at].shape)
            call.columns(dk, tile).baddbmm_(ds.mT, q)
        # autograd casts each gradient to the dtype of its input.
        d_bias, d_sinks = (
            None if x is None else x.view(of.shape) for x, of in ((d_bias, position_bias), (d_sinks, sinks))
        )
        return dq, dk.view(k_BGKD.shape), dv.view(v_BGKV.shape), d_bias, d_sinks, None, None, None


class _Call:
    """The inputs of one call, batch and key/value heads of keys and values as one dimension.

    The query heads that share a key/value head are rows of one matrix product.
    """

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options):
        self.visible, self.topk, self.scale, self.softcap, self.dropout, seed = options
        self.dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        self.q, self.groups = q_BHQD, k_BGKD.shape[1]
        self.shared = q_BHQD.shape[1] // self.groups
        self.k, self.v = k_BGKD.flatten(0, 1).to(self.dtype), v_BGKV.flatten(0, 1).to(self.dtype)
        ragged = -k_BGKD.shape[2] % EVEN
        self.even_k = torch.nn.functional.pad(self.k, (0, 0, 0, ragged)) if ragged else self.k
        self.bias: Any = None
        self.sinks: Any = None
        self.generator = None
        if position_bias is not None:
            self.bias = position_bias[(None,) * (4 - position_bias.ndim)]
        if sinks is not None:
            self.sinks = sinks.to(self.dtype).view(1, -1, 1, 1)
        if self.dropout:
            self.generator = torch.Generator(q_BHQD.device).manual_seed(seed)

    def at(self, tile):
        """Where a tile's queries are in a tensor of (B, H, Q, ...)."""
        heads = slice(tile.groups.start * self.shared, tile.groups.stop * self.shared)
        return tile.rows, heads, tile.queries

    def columns(self, x, tile, number=None):
        """A tile's keys, of (B * G, K, ...)."""
        low = tile.rows.start * self.groups + tile.groups.start
        high = (tile.rows.stop - 1) * self.groups + tile.groups.stop
        return x[low:high, : number or tile.keys]

    def by_group(self, x_BHTK, tile):
        """(rows * groups, heads that share * T, ...) of a tile's (rows, heads, T, ...)."""
        number = (tile.rows.stop - tile.rows.start) * (tile.groups.stop - tile.groups.start)
        return x_BHTK.reshape(number, -1, x_BHTK.shape[-1])

    def queries(self, tile):
        return self.by_group(self.q[self.at(tile)].to(self.dtype) * self.scale, tile)

    def scores(self, q, tile):
        """(scores_BHTK of a tile, -inf where invisible; tanh of the softcap or None)."""
        rows, heads, queries = self.at(tile)
        even_k = self.columns(self.even_k, tile, tile.keys + -tile.keys % EVEN)
        shape = (rows.stop - rows.start, heads.stop - heads.start, queries.stop - queries.start)
        scores, tanh = torch.bmm(q, even_k.mT).view(*shape, -1)[..., : tile.keys], None
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            scores = tanh * self.softcap
        if self.bias is not None:
            scores += self.bias_of(self.bias, tile)
        visible = self.visible(tile)
        return scores.masked_fill_(~(visible if len(visible) == 1 else visible[rows]), -torch.inf), tanh

    def mask_others(self, s_BHTK, least_BHT1):
        s_BHTK.masked_fill_(~topk_mask(s_BHTK, least_BHT1, self.topk), -torch.inf)

    def bias_of(self, bias, tile):
        """A tile's part of what broadcasts to (B, H, Q, K)."""
        where = (*self.at(tile), slice(0, tile.keys))
        return bias[tuple(part if size > 1 else slice(None) for part, size in zip(where, bias.shape, strict=True))]

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)
