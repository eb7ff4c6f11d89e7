"""Softmax attention inside a band of keys around each query, plus the first keys of its row: O(N window).

The queries are cut into tiles of a few dozen rows. A tile sees one contiguous slice of the keys, so nothing is gathered
or repeated; query heads that share a key/value head are rows of one matrix product. The scores of a tile stay in the
CPU's cache, are never saved, and are computed again in the backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.mask import AttentionMask
from attn_plugins.ops.dense import outside_autocast, wide

HIDDEN = -1e30
"""Added to the score of an invisible key. Finite, so that a row that sees nothing is no NaN before it is zeroed."""


@dataclass(frozen=True)
class Tile:
    """A slice of the queries, the keys that it needs, and which of them each query sees."""

    queries: slice
    keys: slice
    sinks: torch.Tensor | None
    """(B or 1, S): indices of sink keys before the slice, or None where there are none to see."""
    hidden: torch.Tensor
    """(B or 1, 1, 1, queries, S + keys): 0 where visible, HIDDEN elsewhere."""
    empty: torch.Tensor | None
    """(B or 1, 1, 1, queries, 1): True for a query that sees nothing; None where all see something."""


def in_window(mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor, window_size: int) -> torch.Tensor:
    """Whether keys are less than ``window_size`` positions from the query, for indices that broadcast."""
    distance = q_index + (mask.q_offset - mask.kv_offset) - k_index
    return (distance if mask.causal else distance.abs()) < window_size


def is_sink(mask: AttentionMask, k_index: torch.Tensor, num_sink_tokens: int) -> torch.Tensor:
    """Whether keys are among the first ``num_sink_tokens`` from the first real token of their row or segment on.

    ``k_index`` is (B or 1, ...) within 0..K-1.
    """
    if not mask.row_starts:
        return k_index < num_sink_tokens
    starts = mask.starts_BK()
    rows = torch.arange(starts.shape[0], device=starts.device).view(-1, *[1] * (k_index.ndim - 1))
    return k_index - starts[rows, k_index] < num_sink_tokens


def band_tiles(mask: AttentionMask, window_size: int, num_sink_tokens: int, dtype: torch.dtype) -> Sequence[Tile]:
    """The tiles of a mask, made once a forward pass and shared by the layers."""

    def build() -> list[Tile]:
        # A tile of r rows costs (window + r) keys a row, so r stays small beside the window, yet large enough for the
        # matrix products to dominate: 64 was the fastest of 32 to 256 for windows of 256 on CPU.
        rows = 64 if window_size < 1024 else 128
        first = mask.q_offset - mask.kv_offset
        # Sinks of a sequence that starts inside a tile must be inside it too, see _tile.
        ahead = 0 if mask.causal else max(window_size, num_sink_tokens) - 1
        tiles: list[Tile] = []
        known: dict[tuple[int, ...], Tile] = {}
        for low in range(0, mask.q_length, rows):
            high = min(low + rows, mask.q_length)
            keys = slice(max(0, first + low - window_size + 1), min(mask.kv_length, first + high + ahead))
            # Without padding or rules only distances matter: almost all tiles look the same, and so do their masks.
            alike = (high - low, keys.start - low, keys.stop - low, min(keys.start, num_sink_tokens))
            if mask.plain and not mask.row_starts and alike in known:
                like = known[alike]
                tiles.append(Tile(slice(low, high), keys, like.sinks, like.hidden, like.empty))
            else:
                known[alike] = _tile(mask, slice(low, high), keys, window_size, num_sink_tokens, dtype)
                tiles.append(known[alike])
        return tiles

    return mask.once(("band", window_size, num_sink_tokens, dtype), build)


def _tile(
    mask: AttentionMask, queries: slice, keys: slice, window_size: int, num_sink_tokens: int, dtype: torch.dtype
) -> Tile:
    q_index = torch.arange(queries.start, queries.stop, device=mask.device).view(1, -1, 1)
    k_index = torch.arange(keys.start, keys.stop, device=mask.device).view(1, 1, -1)
    near = in_window(mask, q_index, k_index, window_size)
    if num_sink_tokens:
        near = near | is_sink(mask, k_index, num_sink_tokens)
    visible = mask.visible(q_index, k_index) & near
    sinks = None
    if num_sink_tokens and keys.start > 0:
        # A sequence that starts inside the tile has its sinks inside. At most one starts before it and reaches into it,
        # the one of the first query: its sinks become columns of their own.
        here = queries.start + mask.q_offset - mask.kv_offset
        sinks = mask.starts_BK()[:, here : here + 1] + torch.arange(num_sink_tokens, device=mask.device)
        held = (sinks >= 0) & (sinks < mask.kv_length)  # a sliding cache may have dropped some
        outside = held & (sinks < keys.start)
        sinks = sinks.clamp(0, mask.kv_length - 1)
        apart = (outside & is_sink(mask, sinks, num_sink_tokens)).unsqueeze(1)
        apart = apart & mask.visible(q_index, sinks.unsqueeze(1))
        if apart.any():
            batch = max(apart.shape[0], visible.shape[0])
            visible = torch.cat([apart.expand(batch, -1, -1), visible.expand(batch, -1, -1)], dim=-1)
        else:
            sinks = None
    seen = visible.any(dim=-1, keepdim=True)
    hidden = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, HIDDEN)
    return Tile(queries, keys, sinks, hidden[:, None, None], None if bool(seen.all()) else ~seen[:, None, None])


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def banded_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    *,
    window_size: int,
    num_sink_tokens: int = 0,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that ``mask`` shows and that are in the window or among the first tokens.

    Args:
        window_size: keys less than this many positions away are seen, before the query and, where the mask is not
            causal, after it.
        num_sink_tokens: this many keys from the first real one of a row or segment on are seen from everywhere.
        scale, dropout, position_bias, softcap, sinks: as in :meth:`attn_plugins.attention.Attention.forward`.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    dtype = wide(q_BHQD, k_BGKD, v_BGKV)
    tiles = band_tiles(mask, window_size, num_sink_tokens, dtype)
    # The backward draws the same dropout again from this seed instead of keeping the masks of all tiles.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    return _Banded.apply(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, (dtype, scale, softcap, dropout, seed))


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, options):
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks)
        ctx.tiles, ctx.options = tiles, options
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options)
        out = v_BGKV.new_empty((*call.q.shape[:3], v_BGKV.shape[-1]))
        for tile in tiles:
            weights, _ = call.weights(call.queries(tile), call.columns(call.k, tile), tile)
            keep = call.keep(weights)
            rows = torch.bmm(weights if keep is None else weights * keep, call.columns(call.v, tile))
            out[:, :, tile.queries] = call.unless_empty(rows.unflatten(1, (call.shared, -1)), tile)
        return out.view(*q_BHQD.shape[:3], -1)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, position_bias, sinks = ctx.saved_tensors
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, ctx.options)
        grad = grad_BHQV.reshape(*call.q.shape[:3], -1)
        dq = torch.empty_like(call.q, memory_format=torch.contiguous_format)
        dk, dv = torch.zeros_like(call.k), torch.zeros_like(call.v)
        d_bias = None
        if ctx.needs_input_grad[3]:
            batch = position_bias.shape[0] if position_bias.ndim == 4 else 1
            d_bias = dq.new_zeros(batch, call.groups, *call.q.shape[1:3], call.k.shape[1], dtype=call.dtype)
        d_sinks = torch.zeros_like(sinks, dtype=call.dtype) if ctx.needs_input_grad[4] else None
        for tile in ctx.tiles:
            q, k, v = call.queries(tile), call.columns(call.k, tile), call.columns(call.v, tile)
            g = call.unless_empty(grad[:, :, tile.queries].to(call.dtype), tile).flatten(1, 2)
            weights, tanh = call.weights(q, k, tile)
            keep = call.keep(weights)
            call.add_columns(dv, torch.bmm((weights if keep is None else weights * keep).transpose(1, 2), g), tile)
            ds = torch.bmm(g, v.transpose(1, 2))
            ds = ds.mul_(weights) if keep is None else ds.mul_(keep).mul_(weights)
            total = ds.sum(dim=-1, keepdim=True)
            ds.addcmul_(weights, total, value=-1)
            if d_sinks is not None:
                # What the keys leave of 1 is the sink's weight, and its value is 0.
                rest = (1 - weights.sum(dim=-1, keepdim=True)) * total
                d_sinks -= call.by_head(rest).sum(dim=(0, 3, 4)).flatten()
            if d_bias is not None:
                call.add_bias(d_bias, call.by_head(ds), tile)
            if tanh is not None:
                ds.mul_(1 - tanh.square())
            dq[:, :, tile.queries] = torch.bmm(ds, k).mul_(call.scale).unflatten(1, (call.shared, -1))
            call.add_columns(dk, torch.bmm(ds.transpose(1, 2), q), tile)
        if d_bias is not None:
            d_bias = d_bias.flatten(1, 2).sum_to_size(position_bias.shape)
        # autograd casts each gradient to the dtype of its input.
        return dq.view(q_BHQD.shape), dk.view(k_BGKD.shape), dv.view(v_BGKV.shape), d_bias, d_sinks, None, None


class _Call:
    """The inputs of one call, batch and key/value heads as one dimension, and what both directions do to a tile.

    Rows of a tile are the query heads that share a key/value head times the tile's queries; its columns are the sinks
    that are apart and the slice of keys.
    """

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options):
        self.dtype, self.scale, self.softcap, self.dropout, seed = options
        self.batch, self.groups = k_BGKD.shape[:2]
        self.shared = q_BHQD.shape[1] // self.groups
        self.q = q_BHQD.reshape(self.batch * self.groups, self.shared, *q_BHQD.shape[2:])
        self.k, self.v = k_BGKD.flatten(0, 1).to(self.dtype), v_BGKV.flatten(0, 1).to(self.dtype)
        self.bias = self.sinks = self.generator = None
        if position_bias is not None:
            shape = (self.batch, *q_BHQD.shape[1:3], k_BGKD.shape[2])
            self.bias = position_bias.expand(shape).unflatten(1, (self.groups, self.shared))
        if sinks is not None:
            self.sinks = sinks.to(self.dtype).view(self.groups, self.shared, 1, 1)
        if self.dropout:
            self.generator = torch.Generator(q_BHQD.device).manual_seed(seed)

    def queries(self, tile):
        return self.q[:, :, tile.queries].flatten(1, 2).to(self.dtype) * self.scale

    def columns(self, x, tile):
        band = x[:, tile.keys]
        return band if tile.sinks is None else torch.cat([x.gather(1, self._sink_index(x, tile)), band], dim=1)

    def add_columns(self, x, columns, tile):
        apart = 0 if tile.sinks is None else tile.sinks.shape[1]
        x[:, tile.keys] += columns[:, apart:]
        if apart:
            x.scatter_add_(1, self._sink_index(x, tile), columns[:, :apart])

    def weights(self, q, k, tile):
        """(softmax over the tile's columns, tanh of the softcap or None)."""
        scores, tanh = torch.bmm(q, k.transpose(1, 2)), None
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            scores = tanh * self.softcap
        by_head = self.by_head(scores)
        by_head += tile.hidden
        if self.bias is not None:
            by_head += self.bias_columns(self.bias[..., tile.queries, :], tile)
        if self.sinks is None:
            return torch.softmax(scores, dim=-1), tanh
        both = torch.cat([by_head, self.sinks.expand(*by_head.shape[:-1], 1)], dim=-1)
        return torch.softmax(both, dim=-1)[..., :-1].reshape(scores.shape), tanh

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    def by_head(self, rows):
        """(B, G, heads that share, queries, columns) of a tile's rows."""
        return rows.view(self.batch, self.groups, self.shared, -1, rows.shape[-1])

    def unless_empty(self, rows, tile):
        """Zero where a query sees nothing, for (B * G, heads that share, queries, ...)."""
        if tile.empty is None:
            return rows
        return rows.unflatten(0, (self.batch, self.groups)).masked_fill(tile.empty, 0.0).flatten(0, 1)

    def add_bias(self, x, ds, tile):
        apart = 0 if tile.sinks is None else tile.sinks.shape[1]
        band = ds[..., apart:]
        x[..., tile.queries, tile.keys] += band if len(x) == len(band) else band.sum(dim=0, keepdim=True)
        for row in range(self.batch if apart else 0):
            index = tile.sinks[row % len(tile.sinks)].expand(*ds.shape[1:-1], -1)
            x[row % len(x)][..., tile.queries, :].scatter_add_(-1, index, ds[row, ..., :apart])

    def bias_columns(self, bias, tile):
        if tile.sinks is None:
            return bias[..., tile.keys]
        index = tile.sinks[:, None, None, None].expand(*bias.shape[:-1], -1)
        return torch.cat([bias.gather(-1, index), bias[..., tile.keys]], dim=-1)

    def _sink_index(self, x, tile):
        index = tile.sinks[:, None, :, None].expand(self.batch, self.groups, -1, x.shape[-1])
        return index.flatten(0, 1)
