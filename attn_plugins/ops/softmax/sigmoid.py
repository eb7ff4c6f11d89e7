"""Sigmoid attention, tile by tile: O(Q K D) time, and memory for the weights of one tile only.

A weight depends on no other, so tiles of queries and keys add up to the output in any order, without a running maximum.
The weights of a tile are never kept: they are computed again in the backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import accumulation_dtype, expand_heads, outside_autocast, scores

TILE = (128, 512)
"""Queries and keys whose weights are formed at a time: few enough for the CPU's cache, enough for its matrix units."""


@dataclass(frozen=True)
class Tile:
    """A slice of the queries and one of the keys."""

    queries: slice
    keys: slice
    invisible: torch.Tensor | None
    """(B or 1, 1, 1, queries, keys), or None where all is visible."""


def tiles_of(mask: AttentionMask) -> Iterator[Tile]:
    """The tiles in which something is visible, queries in the outer order.

    Which keys of a tile are visible is evaluated here, each time anew: kept for all tiles it would be a dense mask.
    """
    first = mask.q_offset - mask.kv_offset
    evaluated = not mask.plain or mask.padding_BK is not None or mask.segments_BK is not None
    for low in range(0, mask.q_length, TILE[0]):
        queries = slice(low, min(low + TILE[0], mask.q_length))
        q_index = torch.arange(queries.start, queries.stop, device=mask.device).view(1, -1, 1)
        last = min(mask.kv_length, first + queries.stop) if mask.causal else mask.kv_length
        for left in range(0, last, TILE[1]):
            keys = slice(left, min(left + TILE[1], last))
            if not evaluated and (not mask.causal or keys.stop <= first + queries.start + 1):
                yield Tile(queries, keys, None)
                continue
            k_index = torch.arange(keys.start, keys.stop, device=mask.device).view(1, 1, -1)
            visible = mask.visible(q_index, k_index)
            if evaluated and not visible.any():
                continue
            yield Tile(queries, keys, ~visible[:, None, None])


def log_count(mask: AttentionMask, dtype: torch.dtype) -> torch.Tensor:
    """(B, Q): logarithm of the number of keys that a query sees, 0 where it sees none; made once a forward pass."""

    def build() -> torch.Tensor:
        count = torch.zeros(mask.batch_size, mask.q_length, dtype=torch.long, device=mask.device)
        for tile in tiles_of(mask):
            if tile.invisible is None:
                count[:, tile.queries] += tile.keys.stop - tile.keys.start
            else:
                count[:, tile.queries] += (~tile.invisible).sum(dim=-1)[:, 0, 0]
        return count.clamp(min=1).to(dtype).log()

    return mask.cached(("log_count", dtype), build)


def dense_sigmoid_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    offset: float | None,
    dropout: float,
    **options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    s_BHQK, visible = scores(q_BHQD, k_BGKD, **options), mask.dense()
    if offset is None:
        s_BHQK = s_BHQK - visible.sum(dim=-1, keepdim=True).clamp(min=1).to(s_BHQK.dtype).log()
    else:
        s_BHQK = s_BHQK + offset
    weights_BHQK = torch.dropout(torch.where(visible, torch.sigmoid(s_BHQK), 0.0), dropout, train=dropout > 0)
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def sigmoid_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    offset: float | None,
    scale: float,
    dropout: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """``out_i = sum_j sigmoid(s_ij + offset) v_j`` over the visible keys.

    Args:
        offset: None for minus the logarithm of the number of keys that the query sees.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    if offset is None:
        offset_BQ = -log_count(mask, dtype)
    else:
        offset_BQ = torch.full((1, mask.q_length), float(offset), dtype=dtype, device=q_BHQD.device)
    # The backward draws the same dropout again from this seed instead of keeping the masks of all tiles.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _Sigmoid.apply(q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ, mask, (scale, softcap, dropout, seed))


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ, mask, options):
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ)
        ctx.mask, ctx.options = mask, options
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ, options)
        out = torch.zeros(*call.q.shape[:3], v_BGKV.shape[-1], dtype=call.dtype, device=v_BGKV.device)
        for tile in tiles_of(mask):
            weights, _ = call.weights(call.queries(tile), tile)
            keep = call.keep(weights)
            if keep is not None:
                weights *= keep
            out[:, :, tile.queries] += torch.bmm(weights, call.v[:, tile.keys]).unflatten(1, (call.shared, -1))
        return out.view(*q_BHQD.shape[:3], -1).to(v_BGKV.dtype)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ = ctx.saved_tensors
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ, ctx.options)
        grad = grad_BHQV.reshape(*call.q.shape[:3], -1)
        dq = torch.zeros_like(call.q, dtype=call.dtype, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(call.k), torch.zeros_like(call.v)
        d_bias = None
        if ctx.needs_input_grad[3]:
            d_bias = dq.new_zeros(call.batch, call.groups, *call.q.shape[1:3], call.k.shape[1])
        for tile in tiles_of(ctx.mask):
            q, k, v = call.queries(tile), call.k[:, tile.keys], call.v[:, tile.keys]
            g = grad[:, :, tile.queries].to(call.dtype).flatten(1, 2)
            weights, tanh = call.weights(q, tile)
            keep = call.keep(weights)
            ds = torch.bmm(g, v.transpose(1, 2))
            dropped = weights
            if keep is not None:
                ds, dropped = ds.mul_(keep), weights * keep
            dv[:, tile.keys] += torch.bmm(dropped.transpose(1, 2), g)
            ds.mul_(weights).addcmul_(ds, weights, value=-1)
            if d_bias is not None:
                d_bias[..., tile.queries, tile.keys] += call.by_head(ds)
            if tanh is not None:
                ds.mul_(1 - tanh.square())
            dq[:, :, tile.queries] += torch.bmm(ds, k).mul_(call.scale).unflatten(1, (call.shared, -1))
            dk[:, tile.keys] += torch.bmm(ds.transpose(1, 2), q)
        if d_bias is not None:
            d_bias = d_bias.flatten(1, 2).sum_to_size(position_bias.shape)
        # autograd casts each gradient to the dtype of its input.
        return dq.view(q_BHQD.shape), dk.view(k_BGKD.shape), dv.view(v_BGKV.shape), d_bias, None, None, None


class _Call:
    """The inputs of one call, batch and key/value heads as one dimension, and what both directions do to a tile.

    Rows of a tile are the query heads that share a key/value head times the tile's queries.
    """

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, position_bias, offset_BQ, options):
        self.scale, self.softcap, self.dropout, seed = options
        self.dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        self.batch, self.groups = k_BGKD.shape[:2]
        self.shared = q_BHQD.shape[1] // self.groups
        self.q = q_BHQD.reshape(self.batch * self.groups, self.shared, *q_BHQD.shape[2:])
        self.k, self.v = k_BGKD.flatten(0, 1).to(self.dtype), v_BGKV.flatten(0, 1).to(self.dtype)
        self.offset = offset_BQ[:, None, None, :, None]
        self.bias = self.generator = None
        if position_bias is not None:
            shape = (self.batch, *q_BHQD.shape[1:3], k_BGKD.shape[2])
            self.bias = position_bias.expand(shape).unflatten(1, (self.groups, self.shared))
        if self.dropout:
            self.generator = torch.Generator(q_BHQD.device).manual_seed(seed)

    def queries(self, tile):
        return self.q[:, :, tile.queries].flatten(1, 2).to(self.dtype) * self.scale

    def weights(self, q, tile):
        """(sigmoid of the tile's scores, 0 where invisible; tanh of the softcap or None)."""
        s, tanh = torch.bmm(q, self.k[:, tile.keys].transpose(1, 2)), None
        if self.softcap is not None:
            tanh = s.div_(self.softcap).tanh_()
            s = tanh * self.softcap
        by_head = self.by_head(s)
        by_head += self.offset[..., tile.queries, :]
        if self.bias is not None:
            by_head += self.bias[..., tile.queries, tile.keys]
        s.sigmoid_()
        if tile.invisible is not None:
            by_head.masked_fill_(tile.invisible, 0.0)
        return s, tanh

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    def by_head(self, rows):
        """(B, G, heads that share, queries, keys) of a tile's rows."""
        return rows.view(self.batch, self.groups, self.shared, -1, rows.shape[-1])
