"""Attention by tiles, forward and backward: the scores of a tile stay in the CPU's cache and are never saved.

A tile is a few dozen queries and the keys that they need. Query heads that share a key/value head are rows of one
matrix product; keys that are slices are not copied. The backward computes a tile's scores again, and its dropout from
the same seed. Weights are a softmax over all keys of a query, which lie in one tile or are merged by their running
maximum, or a sigmoid of each score, which adds up in any order.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from attn_plugins.core.tracing import recorded
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, outside_autocast

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """R queries, the C keys that they need, and which of these each query sees."""

    queries: slice | torch.Tensor
    """A slice of the queries, or (B or 1, R) indices, each once in a row, -1 for no query."""
    keys: tuple[slice, ...]
    """Slices of the keys that do not overlap."""
    extra: torch.Tensor | None
    """(B or 1, S): indices of keys beside those, which come before them among the C columns."""
    hidden: torch.Tensor | None
    """(B or 1, 1, 1, R, C): bool, or to be added, 0 where visible and MASKED_SCORE elsewhere; None if all are visible.

    Adding is faster than filling, but a float mask takes longer to make: it is for tiles that are cached."""
    empty: torch.Tensor | None
    """(B or 1, 1, 1, R, 1): True for a query that sees nothing; None where all see something."""


Tiles = Callable[[], Iterable[Tile]]
"""The same tiles whenever it is called: a forward and a backward go through them."""


def visible_tile(visible: torch.Tensor, queries: slice, keys: slice) -> Tile:
    """The tile of these queries and keys in which ``visible`` (B or 1, R, C) says who sees whom."""
    seen = visible.any(dim=2, keepdim=True)
    hidden = None if bool(visible.all()) else ~visible[:, None, None]
    return Tile(queries, (keys,), None, hidden, None if bool(seen.all()) else ~seen[:, None, None])


def indices(part: slice | torch.Tensor, device: torch.device) -> torch.Tensor:
    """(B or 1, as many) of a tile's queries or keys."""
    if isinstance(part, slice):
        return torch.arange(part.start, part.stop, part.step or 1, device=device).unsqueeze(0)
    return part


def slices(number: int, size: int) -> Iterable[slice]:
    """0..number in slices of ``size``."""
    for low in range(0, number, size):
        yield slice(low, min(low + size, number))


def topk_threshold(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """(..., 1): the ``topk``-th highest of (..., K) scores; -inf where there are fewer."""
    if topk >= scores.shape[-1]:
        return scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    return scores.topk(topk, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def topk_mask(scores: torch.Tensor, threshold: torch.Tensor, topk: int) -> torch.Tensor:
    """(..., K) bool: unmasked scores from :func:`topk_threshold` on up, ``topk`` at most, of ties the first."""
    # What is not a number comes first, as topk has it, so that it is read and not left out.
    scores, threshold = (x.masked_fill(x.isnan(), torch.inf) for x in (scores, threshold))
    chosen = (scores >= threshold) & (scores > MASKED_SCORE / 2)
    if recorded(chosen) or bool((chosen.sum(dim=-1) > topk).any()):
        above = scores > threshold
        tied = chosen & ~above
        chosen = above & chosen | (tied & (tied.cumsum(dim=-1) <= topk - above.sum(dim=-1, keepdim=True)))
    return chosen


class SoftmaxParts(NamedTuple):
    """Softmax attention, and what merges it with another: its log-sum-exp and its row maximum."""

    out_BHQV: torch.Tensor
    lse_BHQ1: torch.Tensor
    """Log-sum-exp of the scores, -inf for a query that sees nothing."""
    max_BHQ1: torch.Tensor
    """The highest score, 0 for a query that sees nothing."""


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    dropout: float
    seed: int
    weights: Literal["softmax", "sigmoid"]
    merged: bool
    topk: int | None
    return_lse: bool


def attend_tiles(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    tiles: Tiles,
    *,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    weights: Literal["softmax", "sigmoid"] = "softmax",
    offset_BQ: torch.Tensor | None = None,
    decay_BHK: torch.Tensor | None = None,
    merged: bool = False,
    topk: int | None = None,
    look: Callable[[Any, torch.Tensor], None] | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention over the visible pairs of tiles.

    Args:
        scale, dropout, position_bias, softcap, sinks: as in :meth:`attn_plugins.core.attention.Attention.forward`.
        weights: softmax over a query's keys, or the sigmoid of each score.
        offset_BQ: (B or 1, Q), added to the scores of a query. It gets no gradient.
        decay_BHK: log gates, added up over the tokens. Between its value at a query's token and that at a key lies what
            is added to their score, after softcap. Queries are the last Q of the K tokens; of the keys of a tile it
            takes one slice.
        merged: whether a query may see keys in several tiles. A softmax that is not merged is faster; a query may then
            be in several tiles still, if it sees keys in none but the last of them.
        topk: mask all but this many keys of highest score, after softcap and bias. The selection has no gradient; it is
            saved for the backward as one threshold a query. Not merged.
        look: is shown each tile's queries and their softmax weights, (B, H, R, C), before dropout; only in the forward.
            Not merged.
        return_lse: return :class:`SoftmaxParts`, each with a gradient. Not merged.

    Returns:
        out_BHQV in the dtype of v, or SoftmaxParts. Sums are taken in at least float32. Differentiable once.
    """
    seed = int(torch.randint(2**62, ())) if dropout else 0
    options = _Options(scale, softcap, dropout, seed, weights, merged, topk, return_lse)
    out = _AttendTiles.apply(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK, tiles, look, options)
    return SoftmaxParts(*out) if return_lse else out


class _AttendTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK, tiles, look, options):
        inputs = q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK
        call = _Inputs(*inputs, options)
        ctx.tiles, ctx.options = tiles, options
        forward = _sum_forward if options.weights == "sigmoid" else _softmax_forward
        if options.merged and options.weights == "softmax":
            forward = _merged_forward
        elif options.return_lse:
            forward = _lse_forward
        out, lse, top, threshold = forward(call, tiles, look)
        out = out.to(v_BGKV.dtype)
        kept = out if lse is not None else None
        ctx.save_for_backward(*inputs, kept, lse, threshold)
        shape = (*q_BHQD.shape[:3], -1)
        if not options.return_lse:
            return out.view(shape)
        empty = lse == torch.inf
        return out.view(shape), lse.masked_fill(empty, -torch.inf).view(shape), top.masked_fill_(empty, 0.0).view(shape)

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, grad_BHQV, grad_lse=None, grad_max=None):
        q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK, out, lse, threshold = ctx.saved_tensors
        options = ctx.options
        call = _Inputs(q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK, options)
        shape = (*call.q.shape[:3], -1)
        grad = grad_BHQV.reshape(shape)
        one_tile = not options.merged and options.weights == "softmax"  # every row of dq comes from one tile
        dq = torch.zeros(call.q.shape, dtype=call.q.dtype if one_tile else call.dtype, device=call.q.device)
        dk, dv = torch.zeros_like(call.k), torch.zeros_like(call.v)
        d_bias = d_sinks = d_decay = delta = None
        if ctx.needs_input_grad[3]:
            batch = position_bias.shape[0] if position_bias.ndim == 4 else 1
            d_bias = dq.new_zeros(batch, call.groups, *call.q.shape[1:3], call.k.shape[1], dtype=call.dtype)
        if ctx.needs_input_grad[4]:
            d_sinks = torch.zeros_like(sinks, dtype=call.dtype)
        if ctx.needs_input_grad[6]:
            d_decay = torch.zeros_like(call.decay, dtype=call.dtype)
        if out is not None:
            delta = torch.einsum("...v,...v->...", grad.to(call.dtype), out.to(call.dtype)).unsqueeze(-1)
            if d_sinks is not None:
                rest = call.by_head((call.sinks - lse.unflatten(0, (call.batch, -1))).exp().flatten(0, 1) * delta)
                d_sinks -= rest.sum(dim=(0, 3, 4)).flatten()
            if grad_lse is not None:
                delta -= grad_lse.reshape(shape)
        for tile in ctx.tiles():
            q, k, v = call.queries(tile), call.columns(call.k, tile), call.columns(call.v, tile)
            g = call.unless_empty(call.rows(grad, tile).to(call.dtype), tile).flatten(1, 2)
            scores, tanh = call.scores(q, k, tile)
            if threshold is not None:
                call.keep_topk(scores, call.rows(threshold, tile).flatten(1, 2))
            largest: Any = None if grad_max is None else scores.argmax(dim=-1, keepdim=True)
            if options.weights == "sigmoid":
                weights = scores.sigmoid_()
            elif lse is None:
                weights = call.softmax(scores)
            else:
                weights = _exp_(scores.sub_(call.rows(lse, tile).flatten(1, 2)))
            keep = call.keep(weights)
            call.add_product(dv, call.dropped(weights, keep), g, tile)
            ds = torch.bmm(g, v.transpose(1, 2))
            if keep is not None:
                ds.mul_(keep)
            if options.weights == "sigmoid":
                ds.mul_(weights).addcmul_(ds, weights, value=-1)
            elif lse is None:
                ds.mul_(weights)
                total = ds.sum(dim=-1, keepdim=True)
                ds.addcmul_(weights, total, value=-1)
                if d_sinks is not None:
                    # What the keys leave of 1 is the sink's weight, and its value is 0.
                    rest = (1 - weights.sum(dim=-1, keepdim=True)) * total
                    d_sinks -= call.by_head(rest).sum(dim=(0, 3, 4)).flatten()
            else:
                ds.sub_(call.rows(delta, tile).flatten(1, 2)).mul_(weights)
            if grad_max is not None:
                rows = call.unless_empty(call.rows(grad_max.reshape(shape), tile), tile)
                ds.scatter_add_(-1, largest, rows.flatten(1, 2).to(ds.dtype))
            if d_bias is not None:
                call.add_bias(d_bias, call.by_head(ds), tile)
            if d_decay is not None:
                call.add_decay(d_decay, call.by_head(ds), tile)
            if tanh is not None:
                ds.mul_(1 - tanh.square())
            rows = torch.bmm(ds, k).mul_(call.scale).unflatten(1, (call.shared, -1))
            call.put_rows(dq, rows if one_tile else rows.add_(call.rows(dq, tile)), tile)
            call.add_product(dk, ds, q, tile)
        if d_bias is not None:
            d_bias = d_bias.flatten(1, 2).sum_to_size(position_bias.shape)
        # autograd casts each gradient to the dtype of its input.
        dq, dk, dv = dq.view(q_BHQD.shape), dk.view(k_BGKD.shape), dv.view(v_BGKV.shape)
        d_decay = None if d_decay is None else d_decay.view(decay_BHK.shape)
        return dq, dk, dv, d_bias, d_sinks, None, d_decay, None, None, None


def _exp_(x: torch.Tensor) -> torch.Tensor:
    """exp in place: on a CPU exp2 takes a third of exp's time, and a twentieth where what is hidden underflows."""
    return x.mul_(LOG2_E).exp2_()


def _softmax_forward(call, tiles, look):
    """Softmax of the whole row of a tile. As the other forms: (out, lse, max, threshold), None for what is not kept."""
    out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[-1]), dtype=call.out_dtype)
    threshold = None if call.topk is None else out.new_zeros((*call.q.shape[:3], 1), dtype=call.dtype)
    for tile in tiles():
        scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
        if threshold is not None:
            lowest = topk_threshold(scores, call.topk)
            call.put_rows(threshold, lowest.unflatten(1, (call.shared, -1)), tile)
            call.keep_topk(scores, lowest)
        weights = call.softmax(scores)
        if look is not None:
            by_head = call.by_head(weights)
            look(tile.queries, (by_head if tile.empty is None else by_head.masked_fill(tile.empty, 0.0)).flatten(1, 2))
        rows = torch.bmm(call.dropped(weights, call.keep(weights)), call.columns(call.v, tile))
        call.put_rows(out, call.unless_empty(rows.unflatten(1, (call.shared, -1)), tile), tile)
    return out, None, None, threshold


def _lse_forward(call, tiles, look):
    out = call.q.new_zeros((*call.q.shape[:3], call.v.shape[-1]), dtype=call.out_dtype)
    top = out.new_full((*call.q.shape[:3], 1), MASKED_SCORE, dtype=call.dtype)
    lse = torch.full_like(top, torch.inf)
    for tile in tiles():
        scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = _exp_(scores.sub_(highest))
        total = weights.sum(dim=-1, keepdim=True)
        rows = torch.bmm(call.dropped(weights, call.keep(weights)), call.columns(call.v, tile)).div_(total)
        rows, highest, total = (x.unflatten(1, (call.shared, -1)) for x in (rows, highest, total.log_().add_(highest)))
        call.put_rows(out, call.unless_empty(rows, tile), tile)
        call.put_rows(top, highest, tile)
        call.put_rows(lse, call.unless_empty(total, tile, torch.inf), tile)
    return out, lse, top, None


def _merged_forward(call, tiles, look):
    """Softmax whose rows lie in several tiles, by a running maximum; lse is infinite where nothing is seen."""
    top = call.k.new_full((*call.q.shape[:3], 1), MASKED_SCORE)
    total, out = torch.zeros_like(top), top.new_zeros((*call.q.shape[:3], call.v.shape[-1]))
    for tile in tiles():
        scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = _exp_(scores.sub_(highest))
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
    return out.div_(total.masked_fill(total == 0, 1.0)), lse, top, None


def _sum_forward(call, tiles, look):
    """Sigmoids: tiles add up."""
    out = call.k.new_zeros((*call.q.shape[:3], call.v.shape[-1]))
    for tile in tiles():
        scores, _ = call.scores(call.queries(tile), call.columns(call.k, tile), tile)
        weights = scores.sigmoid_()
        part = torch.bmm(call.dropped(weights, call.keep(weights)), call.columns(call.v, tile))
        call.put_rows(out, part.unflatten(1, (call.shared, -1)).add_(call.rows(out, tile)), tile)
    return out, None, None, None


class _Inputs:
    """The inputs of one call, batch and key/value heads as one dimension, and what both directions do to a tile.

    Rows of a tile are the query heads that share a key/value head times the tile's queries.
    """

    def __init__(self, q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, offset_BQ, decay_BHK, options):
        self.scale, self.softcap, self.dropout, seed, *_ = options
        self.topk = options.topk
        self.dtype, self.out_dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), v_BGKV.dtype
        self.batch, self.groups = k_BGKD.shape[:2]
        self.shared = q_BHQD.shape[1] // self.groups
        self.q = q_BHQD.reshape(self.batch * self.groups, self.shared, *q_BHQD.shape[2:])
        self.k, self.v = k_BGKD.flatten(0, 1).to(self.dtype), v_BGKV.flatten(0, 1).to(self.dtype)
        self.offset = None if offset_BQ is None else offset_BQ[:, None, None, :, None]
        self.decay: Any = None if decay_BHK is None else decay_BHK.unflatten(1, (self.groups, self.shared))
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

    def add_product(self, x, a, b, tile):
        """Add a^T b of a tile's rows to the tile's columns of x: the transpose of :meth:`columns`."""
        if tile.extra is None and len(tile.keys) == 1:
            x[:, tile.keys[0]].baddbmm_(a.transpose(1, 2), b)
            return
        columns, at = torch.bmm(a.transpose(1, 2), b), 0
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
        if self.offset is not None:
            by_head += self.offset[..., tile.queries, :]
        if self.bias is not None:
            by_head += self.bias_of(tile)
        if self.decay is not None:
            own, keys = self._decay_slices(tile)
            # From the first of these queries on: what is added up over a long text has few digits left.
            first = self.decay[..., own][..., :1]
            by_head += (self.decay[..., own] - first).to(self.dtype).unsqueeze(-1)
            by_head += (first - self.decay[..., keys]).to(self.dtype).unsqueeze(-2)
        if tile.hidden is not None and tile.hidden.dtype == torch.bool:
            by_head.masked_fill_(tile.hidden, MASKED_SCORE)
        elif tile.hidden is not None:
            by_head += tile.hidden
        return scores, tanh

    def keep_topk(self, scores, threshold):
        scores.masked_fill_(~topk_mask(scores, threshold, self.topk), MASKED_SCORE)

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

    def unless_empty(self, rows, tile, value=0.0):
        """``value`` where a query sees nothing, for (B * G, heads that share, R, ...)."""
        if tile.empty is None:
            return rows
        return rows.unflatten(0, (self.batch, self.groups)).masked_fill(tile.empty, value).flatten(0, 1)

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

    def _decay_slices(self, tile):
        """The tokens of a tile's queries, and those of its keys."""
        (keys,), before = tile.keys, self.k.shape[1] - self.q.shape[2]
        return slice(tile.queries.start + before, tile.queries.stop + before), keys

    def add_decay(self, x, ds, tile):
        own, keys = self._decay_slices(tile)
        x[..., own] += ds.sum(dim=-1)
        x[..., keys] -= ds.sum(dim=-2)

    @staticmethod
    def _is_plain(tile):
        return isinstance(tile.queries, slice) and tile.extra is None and len(tile.keys) == 1

    def _pairs(self, tile):
        """Indices (B, 1, 1), (B or 1, R, 1) and (B or 1, 1, C) of a tile's pairs."""
        device = self.k.device
        columns = [indices(keys, device) for keys in tile.keys]
        if tile.extra is not None:
            columns = [tile.extra, *(part.expand(len(tile.extra), -1) for part in columns)]
        batch = torch.arange(self.batch, device=device).view(-1, 1, 1)
        q_index = indices(tile.queries, device).clamp(min=0)
        return batch, q_index.unsqueeze(2), torch.cat(columns, dim=1).unsqueeze(1)

    def _by_row(self, indices):
        """What of the first dimension each row of the indices is for, and that row."""
        if len(indices) == 1:
            return [(slice(None), indices[0])]
        return [(slice(row * self.groups, (row + 1) * self.groups), index) for row, index in enumerate(indices)]
