"""Softmax attention whose pattern is known before the scores, by tiles: cost and memory of the pattern, not of N x N.

A pattern is cut into tiles, each a few dozen queries and the keys that these see. Where the keys are slices nothing is
gathered; query heads that share a key/value head are rows of one matrix product. The scores of a tile stay in the CPU's
cache, are never saved, and are computed again in the backward.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, outside_autocast


@dataclass(frozen=True)
class Tile:
    """R queries, the C keys that they need, and which of these each query sees. Made by :func:`make_tile`."""

    queries: slice | torch.Tensor
    """A slice of the queries, or (B or 1, R) indices, each once in a row, -1 for no query."""
    keys: tuple[slice, ...]
    """Slices of the keys that do not overlap."""
    extra: torch.Tensor | None
    """(B or 1, S): indices of keys beside those, which come before them among the C columns."""
    hidden: torch.Tensor | None
    """(B or 1, 1, 1, R, C): 0 where visible, MASKED_SCORE elsewhere; None where all are visible."""
    empty: torch.Tensor | None
    """(B or 1, 1, 1, R, 1): True for a query that sees nothing; None where all see something."""


Sees = Callable[[AttentionMask, torch.Tensor, torch.Tensor], torch.Tensor]
"""As :meth:`Pattern.sees`."""


class Pattern(Protocol):
    """Who sees whom, as one rule and as the tiles that follow it. A frozen dataclass: it is the key of its tiles."""

    @property
    def merged(self) -> bool:
        """Whether a query may see keys in several tiles; partial results are then merged, which costs a little.

        If not, a query may still be in several tiles if it sees keys in none but the last of them."""

    def __hash__(self) -> int: ...

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        """Whether queries see keys as far as the pattern goes, for indices in range whose shapes broadcast."""

    def tiles(self, mask: AttentionMask) -> Iterable[Tile]:
        """Tiles in which every query occurs, and every pair that ``sees`` and the mask allow is visible just once."""


def dense_pattern(mask: AttentionMask, pattern: Pattern) -> torch.Tensor:
    """What mask and pattern show, (B or 1, 1, Q, K) bool: the definition, for the reference form."""
    q_index = torch.arange(mask.q_length, device=mask.device).view(1, -1, 1)
    k_index = torch.arange(mask.kv_length, device=mask.device).view(1, 1, -1)
    return mask.dense() & pattern.sees(mask, q_index, k_index).unsqueeze(1)


def make_tile(
    mask: AttentionMask,
    sees: Sees,
    queries: slice | torch.Tensor,
    keys: Sequence[slice] = (),
    extra: torch.Tensor | None = None,
) -> Tile:
    """The tile of these queries and keys, in which the pairs are visible that ``sees`` and the mask show.

    Args:
        sees: as :meth:`Pattern.sees`; a part of the pattern where other tiles have the rest of these pairs.
        queries: a slice or (B or 1, R) indices, -1 for no query.
        keys: slices that don't overlap.
        extra: (B or 1, S) indices, -1 for no key, each once in a row. Those that are in a slice already are left out.
    """
    q_index = _indices(queries, mask.device).unsqueeze(2)
    columns = [_indices(part, mask.device).unsqueeze(1) for part in keys]
    if extra is not None:
        apart = extra >= 0
        for part in keys:
            apart &= ~((extra >= part.start) & (extra < part.stop) & ((extra - part.start) % (part.step or 1) == 0))
        extra = extra.masked_fill(~apart, -1)
        seen_extra = _visible(mask, sees, q_index, extra.unsqueeze(1))
        needed = seen_extra.any(dim=1).any(dim=0)
        if not keys:
            needed[0] = True  # a tile without columns would be a case of its own
        extra = extra[:, needed] if bool(needed.any()) else None
    parts = []
    if columns:
        parts = [_visible(mask, sees, q_index, torch.cat(columns, dim=2))]
    if extra is not None:
        parts.insert(0, seen_extra[..., needed])
    batch = max(len(part) for part in parts)
    visible = torch.cat([part.expand(batch, -1, -1) for part in parts], dim=2)
    hidden = None
    if not bool(visible.all()):
        hidden = torch.zeros(visible.shape, device=visible.device).masked_fill_(~visible, MASKED_SCORE)[:, None, None]
    seen = visible.any(dim=2, keepdim=True)
    empty = None if bool(seen.all()) else ~seen[:, None, None]
    return Tile(queries, tuple(keys), None if extra is None else extra.clamp(min=0), hidden, empty)


def _indices(part: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    if isinstance(part, slice):
        return torch.arange(part.start, part.stop, part.step or 1, device=device).unsqueeze(0)
    return part


def _visible(mask: AttentionMask, sees: Sees, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
    shown = sees(mask, q_index.clamp(min=0), k_index.clamp(min=0))
    return mask.visible(q_index, k_index) & shown  # the mask hides the index -1


@torch.compiler.disable(reason="its loop over tiles would be unrolled into a graph of thousands of operations")
def tiled_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern,
    *,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that ``mask`` and ``pattern`` show.

    Args:
        scale, dropout, position_bias, softcap, sinks: as in :meth:`attn_plugins.core.attention.Attention.forward`.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32. Differentiable once.
    """
    tiles = mask.cached(pattern, lambda: tuple(pattern.tiles(mask)))
    # The backward draws the same dropout again from this seed instead of keeping the masks of all tiles.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    options = (accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), scale, softcap, dropout, seed)
    return _Tiled.apply(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, pattern.merged, options)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, tiles, merged, options):
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options)
        ctx.tiles, ctx.options = tiles, options
        if merged:
            out, lse = _merged_forward(call, tiles, v_BGKV.dtype)
            ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, out, lse)
            return out.view(*q_BHQD.shape[:3], -1)
        ctx.save_for_backward(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, None, None)
        out = _rows_to_fill(tiles, (*call.q.shape[:3], v_BGKV.shape[-1]), v_BGKV.dtype, v_BGKV.device)
        for tile in tiles:
            scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
            weights = call.softmax(scores)
            rows = torch.bmm(call.dropped(weights, call.keep(weights)), call.columns(call.v, tile))
            call.put_rows(out, call.unless_empty(rows.unflatten(1, (call.shared, -1)), tile), tile)
        return out.view(*q_BHQD.shape[:3], -1)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV):
        q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, out, lse = ctx.saved_tensors
        call = _Call(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, ctx.options)
        grad = grad_BHQV.reshape(*call.q.shape[:3], -1)
        if out is None:
            dq = _rows_to_fill(ctx.tiles, call.q.shape, call.q.dtype, call.q.device)
        else:
            dq = torch.zeros(call.q.shape, dtype=call.dtype, device=call.q.device)
        dk, dv = torch.zeros_like(call.k), torch.zeros_like(call.v)
        d_bias = d_sinks = delta = None
        if ctx.needs_input_grad[3]:
            batch = position_bias.shape[0] if position_bias.ndim == 4 else 1
            d_bias = dq.new_zeros(batch, call.groups, *call.q.shape[1:3], call.k.shape[1], dtype=call.dtype)
        if ctx.needs_input_grad[4]:
            d_sinks = torch.zeros_like(sinks, dtype=call.dtype)
        if out is not None:
            delta = torch.einsum("...v,...v->...", grad.to(call.dtype), out.to(call.dtype)).unsqueeze(-1)
            if d_sinks is not None:
                rest = call.by_head((call.sinks - lse.unflatten(0, (call.batch, -1))).exp().flatten(0, 1) * delta)
                d_sinks -= rest.sum(dim=(0, 3, 4)).flatten()
        for tile in ctx.tiles:
            q, k, v = call.queries(tile), call.columns(call.k, tile), call.columns(call.v, tile)
            g = call.unless_empty(call.rows(grad, tile).to(call.dtype), tile).flatten(1, 2)
            scores, tanh = call.scores(q, k, tile)
            if out is None:
                weights = call.softmax(scores)
            else:
                weights = scores.sub_(call.rows(lse, tile).flatten(1, 2)).exp_()
            keep = call.keep(weights)
            call.add_columns(dv, torch.bmm(call.dropped(weights, keep).transpose(1, 2), g), tile)
            ds = torch.bmm(g, v.transpose(1, 2))
            if keep is not None:
                ds.mul_(keep)
            if out is None:
                ds.mul_(weights)
                total = ds.sum(dim=-1, keepdim=True)
                ds.addcmul_(weights, total, value=-1)
                if d_sinks is not None:
                    # What the keys leave of 1 is the sink's weight, and its value is 0.
                    rest = (1 - weights.sum(dim=-1, keepdim=True)) * total
                    d_sinks -= call.by_head(rest).sum(dim=(0, 3, 4)).flatten()
            else:
                ds.sub_(call.rows(delta, tile).flatten(1, 2)).mul_(weights)
            if d_bias is not None:
                call.add_bias(d_bias, call.by_head(ds), tile)
            if tanh is not None:
                ds.mul_(1 - tanh.square())
            rows = torch.bmm(ds, k).mul_(call.scale).unflatten(1, (call.shared, -1))
            call.put_rows(dq, rows if out is None else rows.add_(call.rows(dq, tile)), tile)
            call.add_columns(dk, torch.bmm(ds.transpose(1, 2), q), tile)
        if d_bias is not None:
            d_bias = d_bias.flatten(1, 2).sum_to_size(position_bias.shape)
        # autograd casts each gradient to the dtype of its input.
        return dq.view(q_BHQD.shape), dk.view(k_BGKD.shape), dv.view(v_BGKV.shape), d_bias, d_sinks, None, None, None


def _rows_to_fill(tiles, shape, dtype, device):
    """Zeros, or anything where slices of queries are sure to fill it."""
    sliced = all(isinstance(tile.queries, slice) for tile in tiles)
    return (torch.empty if sliced else torch.zeros)(shape, dtype=dtype, device=device)


def _merged_forward(call, tiles, dtype):
    """(out in ``dtype``, log of the sum of exponentials, infinite where nothing is seen)."""
    top = call.k.new_full((*call.q.shape[:3], 1), MASKED_SCORE)
    total, out = torch.zeros_like(top), top.new_zeros((*call.q.shape[:3], call.v.shape[-1]))
    for tile in tiles:
        scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
        part = torch.bmm(call.dropped(weights, call.keep(weights)), call.columns(call.v, tile))
        highest, part, sums = (
            x.unflatten(1, (call.shared, -1)) for x in (highest, part, weights.sum(dim=-1, keepdim=True))
        )
        before = call.rows(top, tile)
        after = torch.maximum(before, highest)
        old, new = (before - after).exp_(), call.unless_empty((highest - after).exp_(), tile)
        call.put_rows(top, after, tile)
        call.put_rows(total, call.rows(total, tile) * old + sums * new, tile)
        call.put_rows(out, call.rows(out, tile) * old + part * new, tile)
    if call.sinks is not None:
        sinks = call.sinks.expand(call.batch, -1, -1, -1, -1).flatten(0, 1)
        after = torch.maximum(top, sinks)
        old = (top - after).exp_()
        top, total, out = after, total * old + (sinks - after).exp_(), out * old
    lse = (top + total.log()).masked_fill_(total == 0, torch.inf)
    return out.div_(total.masked_fill(total == 0, 1.0)).to(dtype), lse


class _Call:
    """The inputs of one call, batch and key/value heads as one dimension, and what both directions do to a tile.

    Rows of a tile are the query heads that share a key/value head times the tile's queries.
    """

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, options):
        self.dtype, self.scale, self.softcap, self.dropout, seed = options
        self.batch, self.groups = k_BGKD.shape[:2]
        self.shared = q_BHQD.shape[1] // self.groups
        self.q = q_BHQD.reshape(self.batch * self.groups, self.shared, *q_BHQD.shape[2:])
        self.k, self.v = k_BGKD.flatten(0, 1).to(self.dtype), v_BGKV.flatten(0, 1).to(self.dtype)
        self.bias: Any = None
        self.sinks = self.generator = None
        if position_bias is not None:
            shape = (self.batch, *q_BHQD.shape[1:3], k_BGKD.shape[2])
            self.bias = position_bias.expand(shape).unflatten(1, (self.groups, self.shared))
        if sinks is not None:
            self.sinks = sinks.to(self.dtype).view(self.groups, self.shared, 1, 1)
        if self.dropout:
            self.generator = torch.Generator(q_BHQD.device).manual_seed(seed)

    def queries(self, tile):
        return self.rows(self.q, tile).flatten(1, 2).to(self.dtype) * self.scale

    def rows(self, x, tile):
        """(B * G, heads that share, R, ...) of (B * G, heads that share, Q, ...)."""
        if isinstance(tile.queries, slice):
            return x[:, :, tile.queries]
        # Indexed, since index_select copies the whole of a tensor that is not contiguous.
        return torch.cat([x[here][:, :, index] for here, index in self._by_row(tile.queries.clamp(min=0))])

    def put_rows(self, x, rows, tile):
        """The reverse of :meth:`rows`."""
        if isinstance(tile.queries, slice):
            x[:, :, tile.queries] = rows
            return
        for here, index in self._by_row(tile.queries):
            some = index >= 0
            x[here].index_copy_(2, index[some], rows[here][:, :, some].to(x.dtype))

    def columns(self, x, tile):
        """(B * G, C, ...) of (B * G, K, ...)."""
        parts = [x[:, keys] for keys in tile.keys]
        if tile.extra is not None:
            parts.insert(0, torch.cat([x[here][:, index] for here, index in self._by_row(tile.extra)]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def add_columns(self, x, columns, tile):
        """The transpose of :meth:`columns`."""
        at = 0
        if tile.extra is not None:
            at = tile.extra.shape[1]
            for here, index in self._by_row(tile.extra):
                x[here].index_add_(1, index, columns[here, :at])
        for keys in tile.keys:
            here = x[:, keys]
            here += columns[:, at : at + here.shape[1]]
            at += here.shape[1]

    def scores(self, q, k, tile):
        """(scores of the tile, MASKED_SCORE where invisible; tanh of the softcap or None)."""
        scores, tanh = torch.bmm(q, k.transpose(1, 2)), None
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            scores = tanh * self.softcap
        by_head = self.by_head(scores)
        if self.bias is not None:
            by_head += self.bias_of(tile)
        if tile.hidden is not None:
            by_head += tile.hidden
        return scores, tanh

    def softmax(self, scores):
        """Over the tile's columns and the learned sinks."""
        if self.sinks is None:
            return torch.softmax(scores, dim=-1)
        by_head = self.by_head(scores)
        both = torch.cat([by_head, self.sinks.expand(*by_head.shape[:-1], 1)], dim=-1)
        return torch.softmax(both, dim=-1)[..., :-1].reshape(scores.shape)

    def keep(self, weights):
        """What dropout multiplies the weights with, or None; the same again in the backward."""
        if self.generator is None:
            return None
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=self.generator).div_(1 - self.dropout)

    @staticmethod
    def dropped(weights, keep):
        return weights if keep is None else weights * keep

    def by_head(self, rows):
        """(B, G, heads that share, R, C) of a tile's rows."""
        return rows.view(self.batch, self.groups, self.shared, -1, rows.shape[-1])

    def unless_empty(self, rows, tile):
        """Zero where a query sees nothing, for (B * G, heads that share, R, ...)."""
        if tile.empty is None:
            return rows
        return rows.unflatten(0, (self.batch, self.groups)).masked_fill(tile.empty, 0.0).flatten(0, 1)

    def bias_of(self, tile):
        if self._is_plain(tile):
            return self.bias[..., tile.queries, tile.keys[0]]
        return self.bias.permute(0, 3, 4, 1, 2)[self._pairs(tile)].permute(0, 3, 4, 1, 2)

    def add_bias(self, x, ds, tile):
        if self._is_plain(tile):
            x[..., tile.queries, tile.keys[0]] += ds if len(x) == len(ds) else ds.sum(dim=0, keepdim=True)
            return
        batch, q_index, k_index = self._pairs(tile)
        pairs = (batch % len(x), q_index, k_index)
        x.permute(0, 3, 4, 1, 2).index_put_(pairs, ds.permute(0, 3, 4, 1, 2), accumulate=True)

    @staticmethod
    def _is_plain(tile):
        return isinstance(tile.queries, slice) and tile.extra is None and len(tile.keys) == 1

    def _pairs(self, tile):
        """Indices (B, 1, 1), (B or 1, R, 1) and (B or 1, 1, C) of a tile's pairs."""
        device = self.k.device
        columns = [_indices(keys, device) for keys in tile.keys]
        if tile.extra is not None:
            columns = [tile.extra, *(part.expand(len(tile.extra), -1) for part in columns)]
        batch = torch.arange(self.batch, device=device).view(-1, 1, 1)
        q_index = _indices(tile.queries, device).clamp(min=0)
        return batch, q_index.unsqueeze(2), torch.cat(columns, dim=1).unsqueeze(1)

    def _by_row(self, indices):
        """What of the first dimension each row of the indices is for, and that row."""
        if len(indices) == 1:
            return [(slice(None), indices[0])]
        return [(slice(row * self.groups, (row + 1) * self.groups), index) for row, index in enumerate(indices)]
