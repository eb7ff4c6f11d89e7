"""Attention over index tables, all tiles at once: a number of operations that the length does not change, no host sync.

As :mod:`attn_plugins.ops.softmax.tile_engine`, for devices where starting an operation costs more than running it.
Queries and keys of all tiles are gathered, and their scores are one product. Softmax is taken over several tables where
a query has keys in several: each gives its part with its log-sum-exp. The backward computes scores again, and what was
dropped from the same seed; given the log-sum-exp over all tables, weights are exact in each.

Operands of products keep the dtype of queries, keys and values, and weights are cast to that of values, as in flash
attention; scores, softmax and sums are in at least float32. So half precision runs in matrix units.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.dropout import draw_seed, dropped
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype
from attn_plugins.ops.softmax.tables import Tables, pieces, tables_for
from attn_plugins.ops.softmax.tile_engine import SoftmaxParts
from attn_plugins.ops.softmax.tiles import Pattern, tiled_attention

HALF = (torch.float16, torch.bfloat16)


def batched_pattern_attention(
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
    return_lse: bool = False,
) -> Any:
    """Softmax attention over the keys that ``mask`` and ``pattern`` show; may be traced.

    ``batched_pattern_attention(q, k, v, mask, pattern, scale=scale)`` equals
    :func:`attn_plugins.ops.softmax.tiles.tiled_attention` with the same arguments.

    Args:
        scale, dropout, position_bias, softcap, sinks: as in :meth:`attn_plugins.core.attention.Attention.forward`.
        return_lse: return :class:`attn_plugins.ops.softmax.tile_engine.SoftmaxParts`, each with a gradient.

    Returns:
        out_BHQV in the dtype of v, or SoftmaxParts. Differentiable once.
    """
    return attend_tables(
        q_BHQD, k_BGKD, v_BGKV, tables_for(mask, pattern),
        scale=scale, dropout=dropout, position_bias=position_bias, softcap=softcap, sinks=sinks, return_lse=return_lse,
    )  # fmt: skip


def pattern_attention(q_BHQD: torch.Tensor, *inputs: Any, **options: Any) -> Any:
    """:func:`batched_pattern_attention`, or on a CPU the same by tiles: where no form is asked for by name."""
    attend = tiled_attention if q_BHQD.device.type == "cpu" else batched_pattern_attention
    return attend(q_BHQD, *inputs, **options)


def attend_tables(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    tables: Sequence[Tables],
    *,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    label_bias: torch.Tensor | None = None,
    at_once: int = 0,
    return_lse: bool = False,
) -> Any:
    """The same over tables, in which every visible pair is visible just once.

    Args:
        label_bias: (H, labels), added to the scores of pairs by their label in the tables; nothing where that is -1.
        at_once: elements that are worked on at a time, 0 for what :mod:`attn_plugins.ops.sizes` says of the device.
    """
    seed = draw_seed(q_BHQD.device) if dropout else None
    flat = [table for part in tables for table in part]
    parts = attend_at_once(
        q_BHQD, k_BGKD, v_BGKV, position_bias, sinks, label_bias, seed, flat,
        scale, softcap, dropout, at_once, return_lse,
    )  # fmt: skip
    return SoftmaxParts(*parts) if return_lse else parts[0]


@torch.library.custom_op("attn_plugins::attend_at_once", mutates_args=())
def attend_at_once(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    label_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    scale: float,
    softcap: float | None,
    dropout: float,
    at_once: int,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`attend_tables` as one operation: out, lse and the highest scores, which are empty unless ``return_lse``.

    Args:
        seed: int64 of no dimension, of what is dropped.
        tables: the fields of each table, one after the other.
    """
    call = _Call(q, k, v, position_bias, seed, tables, scale, softcap, dropout, label_bias, at_once)
    out: Any = None
    lse: Any = None
    top: Any = None
    for part in call.parts:
        own_out, own_lse = call.zeros(call.queries + 1, call.v.shape[1]), call.minus_infinity()
        own_top = call.minus_infinity() if return_lse else None
        for piece in call.pieces(part):
            scores, _ = call.scores(piece)
            highest = scores.amax(dim=-1, keepdim=True)
            weights = torch.softmax(scores, dim=-1)
            total = highest - weights.amax(dim=-1, keepdim=True).log_()
            empty = highest <= MASKED_SCORE / 2
            left_out = call.dropped(piece)
            if left_out is not None:
                weights.masked_fill_(left_out, 0.0).mul_(call.made_up)
            rows = product(weights.to(v.dtype), piece.v, call.dtype).masked_fill_(empty, 0.0)
            own_out.index_copy_(0, piece.own, rows.flatten(0, 1))
            own_lse.index_copy_(0, piece.own, total.masked_fill_(empty, -torch.inf).flatten(0, 1))
            if own_top is not None:
                own_top.index_copy_(0, piece.own, highest.masked_fill_(empty, -torch.inf).flatten(0, 1))
        own_out, own_lse = own_out[:-1], own_lse[:-1]
        out, lse = (own_out, own_lse) if out is None else _merged(out, lse, own_out, own_lse)
        if own_top is not None:
            top = own_top[:-1] if top is None else torch.maximum(top, own_top[:-1])
    if sinks is not None:
        out, lse = _merged(out, lse, None, call.of_heads(sinks))
    shape = q.shape[:3]
    top = q.new_empty(0, dtype=call.dtype) if top is None else top.masked_fill(lse == -torch.inf, 0.0).view(*shape, 1)
    return out.to(v.dtype).view(*shape, -1), lse.view(*shape, 1), top


@torch.library.custom_op("attn_plugins::attend_at_once_backward", mutates_args=())
def attend_at_once_backward(
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    d_top: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    position_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    label_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    tables: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    top: torch.Tensor,
    learned_bias: bool,
    scale: float,
    softcap: float | None,
    dropout: float,
    at_once: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, position bias (empty unless ``learned_bias``), sinks and label bias (empty without)."""
    call = _Call(q, k, v, position_bias, seed, tables, scale, softcap, dropout, label_bias, at_once)
    d_out, lse = d_out.reshape(call.queries, -1), lse.reshape(-1, 1)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    delta = (d_out.to(call.dtype) * out.view(d_out.shape).to(call.dtype)).sum(dim=1, keepdim=True)
    d_bias, d_sinks, d_label = (q.new_empty(0) for _ in range(3))
    if label_bias is not None:
        d_label = call.zeros(call.heads * label_bias.shape[1] + 1)  # and of no label
    if sinks is not None:
        rest = (call.of_heads(sinks) - lse).exp_().mul_(delta)
        d_sinks = -rest.view(call.batch, call.heads, -1).sum(dim=(0, 2)).to(sinks.dtype)
    if d_lse is not None:
        delta = delta - d_lse.reshape(delta.shape).masked_fill(lse == torch.inf, 0.0)
    if d_top is not None:
        d_top = pad(d_top.reshape(delta.shape).masked_fill(lse == torch.inf, 0.0), (0, 0, 0, 1))  # and of no query
        top = top.reshape(delta.shape)
    if position_bias is not None and learned_bias:
        rows = call.batch if position_bias.ndim == 4 and position_bias.shape[0] > 1 else 1
        d_bias = call.zeros(rows * call.heads * call.q_length * call.k_length)
    dq = call.zeros(call.queries + 1, call.q.shape[1])
    dk, dv = call.zeros(*call.k.shape), call.zeros(*call.v.shape)
    with torch.autocast(q.device.type, enabled=False):
        for part in call.parts:
            for piece in call.pieces(part):
                g, lse_rows, delta_rows = (x.index_select(0, piece.taken) for x in (d_out, lse, delta))
                g, lse_rows, delta_rows = (
                    x.view(*piece.q.shape[:2], -1) for x in (g.to(v.dtype), lse_rows, delta_rows)
                )
                scores, tanh = call.scores(piece)
                if d_top is not None:
                    highest, largest = scores.max(dim=-1, keepdim=True)
                weights = scores.sub_(lse_rows).exp_()
                ds, kept, left_out = product(g, piece.v.mT, call.dtype), weights, call.dropped(piece)
                if left_out is not None:
                    ds.masked_fill_(left_out, 0.0).mul_(call.made_up)
                    kept = weights.masked_fill(left_out, 0.0).mul_(call.made_up)
                dv.index_add_(0, piece.keys, product(kept.to(v.dtype).mT, g, call.dtype).flatten(0, 1))
                ds.sub_(delta_rows).mul_(weights)
                if d_top is not None:
                    rows = d_top.index_select(0, piece.own).view(highest.shape)
                    if len(call.parts) > 1:  # the highest score is in one of the tables
                        rows = rows * (highest >= top.index_select(0, piece.taken).view(highest.shape))
                    ds.scatter_add_(-1, largest, rows)
                if learned_bias:
                    d_bias.index_add_(0, call.pairs(piece, len(d_bias)), ds.flatten())
                if label_bias is not None:
                    d_label.index_add_(0, call.labels(piece), ds.flatten())
                if tanh is not None:
                    ds.mul_(1 - tanh.square_())
                dq.index_add_(0, piece.own, product(ds.to(k.dtype), piece.k, call.dtype).flatten(0, 1))
                dk.index_add_(0, piece.keys, product(ds.to(q.dtype).mT, piece.q, call.dtype).flatten(0, 1))
    if position_bias is not None and learned_bias:
        d_bias = d_bias.view(-1, call.heads, call.q_length, call.k_length).sum_to_size(position_bias.shape)
        d_bias = d_bias.to(position_bias.dtype)
    if label_bias is not None:
        d_label = d_label[:-1].view(label_bias.shape).to(label_bias.dtype)
    dq = dq[:-1].mul_(scale)
    if not call.scaled:
        dk.mul_(scale)
    dq, dk, dv = (x.to(given.dtype).view(given.shape) for x, given in zip((dq, dk, dv), (q, k, v), strict=True))
    return dq, dk, dv, d_bias, d_sinks, d_label


@attend_at_once.register_fake
def _(q, k, v, position_bias, sinks, label_bias, seed, tables, scale, softcap, dropout, at_once, return_lse):
    dtype, shape = accumulation_dtype(q, k, v), q.shape[:3]
    top = q.new_empty((*shape, 1) if return_lse else 0, dtype=dtype)
    return v.new_empty(*shape, v.shape[3]), q.new_empty(*shape, 1, dtype=dtype), top


@attend_at_once_backward.register_fake
def _(d_out, d_lse, d_top, q, k, v, position_bias, sinks, label_bias, seed, tables, out, lse, top, learned, *options):
    d_bias = q.new_empty(0) if position_bias is None or not learned else position_bias.new_empty(position_bias.shape)
    d_sinks, d_label = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (sinks, label_bias))
    return *(x.new_empty(x.shape) for x in (q, k, v)), d_bias, d_sinks, d_label


def _setup_context(ctx, inputs, output):
    *tensors, tables, scale, softcap, dropout, at_once, return_lse = inputs
    options = (scale, softcap, dropout, at_once)
    ctx.save_for_backward(*tensors, *output, *tables)
    ctx.options, ctx.return_lse = options, return_lse
    ctx.set_materialize_grads(True)


def _backward(ctx, d_out, d_lse, d_top):
    saved = ctx.saved_tensors  # once: gradient checkpointing refuses a second look
    inputs, output, tables = saved[:7], saved[7:10], list(saved[10:])
    wanted = ctx.needs_input_grad[3:6]
    of_parts = (d_lse, d_top) if ctx.return_lse else (None, None)
    dq, dk, dv, *others = attend_at_once_backward(d_out, *of_parts, *inputs, tables, *output, wanted[0], *ctx.options)
    others = [grad if want else None for grad, want in zip(others, wanted, strict=True)]
    return dq, dk, dv, *others, None, [None] * len(tables), *[None] * 5


attend_at_once.register_autograd(_backward, setup_context=_setup_context)


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Batched matrix product in ``dtype``, in which its sums are taken too."""
    if a.is_cuda and torch.version.hip is None and a.dtype == b.dtype and a.dtype in HALF:
        return torch.bmm(a, b, out_dtype=dtype)
    return torch.bmm(a.to(dtype), b.to(dtype))


def _merged(out, lse, more, lse_of_more):
    """Softmax over the keys of both; ``more`` is None where these have no values."""
    both = torch.logaddexp(lse, lse_of_more)
    finite = both.masked_fill(both == -torch.inf, 0.0)
    out = out * (lse - finite).exp()
    return (out if more is None else out + more * (lse_of_more - finite).exp()), both


class _Piece(NamedTuple):
    """Some tiles of a table, with what is gathered for them; M is batch times key/value heads times tiles."""

    tables: Tables
    own: torch.Tensor
    """Where each row of these tiles is among all queries, one behind the last for none."""
    taken: torch.Tensor
    """The same, the first for none."""
    keys: torch.Tensor
    """Where each column is among all keys, a first one for none."""
    q: torch.Tensor
    """(M, heads that share times R, D)."""
    k: torch.Tensor
    """(M, C, D)."""
    v: torch.Tensor
    """(M, C, V)."""


class _Call:
    """The inputs of one call as tables of rows, and what both directions do to the tiles.

    Rows of a tile are the query heads that share a key/value head times the tile's queries.
    """

    def __init__(
        self, q_BHQD, k_BGKD, v_BGKV, position_bias, seed, tables, scale, softcap, dropout, label_bias=None, at_once=0
    ):
        self.scale, self.softcap, self.dropout = scale, softcap, dropout
        self.dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
        self.batch, self.heads, self.q_length = q_BHQD.shape[:3]
        self.groups, self.k_length = k_BGKD.shape[1:3]
        self.shared = self.heads // self.groups
        self.queries = self.batch * self.heads * self.q_length
        self.q, self.k, self.v = (x.reshape(-1, x.shape[-1]) for x in (q_BHQD, k_BGKD, v_BGKV))
        self.parts = [Tables(*tables[at : at + 4]) for at in range(0, len(tables), 4)]
        self.bias, self.label_bias, self.seed, self.at_once = position_bias, label_bias, seed, at_once
        # Scores are scaled with the queries where that rounds nothing.
        self.scaled = self.q.dtype not in HALF or math.frexp(self.scale)[0] == 0.5
        self.made_up = 1 / (1 - self.dropout)

    def zeros(self, *shape):
        return torch.zeros(shape, dtype=self.dtype, device=self.q.device)

    def minus_infinity(self):
        return torch.full((self.queries + 1, 1), -torch.inf, dtype=self.dtype, device=self.q.device)

    def of_heads(self, sinks):
        """(queries, 1) of (H,)."""
        return sinks.to(self.dtype).view(1, -1, 1).expand(self.batch, -1, self.q_length).reshape(-1, 1)

    def pieces(self, part):
        size = self.batch * max(
            self.heads * part.hidden_BTRC[0, 0].numel(),
            self.groups * part.k_BTC.shape[2] * max(self.k.shape[1], self.v.shape[1]),
        )
        for tiles in pieces(self.q.device, part.q_BTR.shape[1], size, self.at_once):
            yield self.gathered(Tables(*(table[:, tiles] for table in part)))

    def gathered(self, tables):
        q_index = self.by_head(self.heads, self.q_length) + tables.q_BTR[:, None, :, None]
        none = (tables.q_BTR < 0)[:, None, :, None]
        taken = q_index.masked_fill(none, 0).flatten()
        k_index = self.by_head(self.groups, self.k_length)[..., 0] + tables.k_BTC.clamp(min=0)[:, None]
        keys, size = k_index.flatten(), self.batch * self.groups * tables.q_BTR.shape[1]
        q, k, v = (
            x.index_select(0, index).view(size, -1, x.shape[1])
            for x, index in ((self.q, taken), (self.k, keys), (self.v, keys))
        )
        q = q * self.scale if self.scaled else q
        return _Piece(tables, q_index.masked_fill(none, self.queries).flatten(), taken, keys, q, k, v)

    def by_head(self, heads, length):
        """(B, G, 1, heads over G, 1): where a head of a row begins among all rows."""
        first = torch.arange(0, self.batch * heads * length, length, device=self.q.device)
        return first.view(self.batch, self.groups, 1, -1, 1)

    def scores(self, piece):
        """(scores of the tiles, MASKED_SCORE where invisible; tanh of the softcap or None)."""
        scores, tanh = product(piece.q, piece.k.mT, self.dtype), None
        if not self.scaled:
            scores.mul_(self.scale)
        if self.softcap is not None:
            tanh = scores.div_(self.softcap).tanh_()
            scores = tanh * self.softcap
        by_head = self.unflattened(scores)
        if self.bias is not None:
            by_head += self.bias_of(piece)
        if self.label_bias is not None:
            biases = pad(self.label_bias.to(self.dtype).flatten(), (0, 1))  # 0 of no label
            by_head += biases[self.labels(piece)].view(by_head.shape)
        by_head.masked_fill_(piece.tables.hidden_BTRC[:, None, :, None], MASKED_SCORE)
        return scores, tanh

    def unflattened(self, scores):
        """(B, G, T, heads that share, R, C)."""
        return scores.view(self.batch, self.groups, -1, self.shared, scores.shape[1] // self.shared, scores.shape[2])

    def bias_of(self, piece):
        shape = (self.batch, self.heads, self.q_length, self.k_length)
        bias = self.bias.expand(shape).unflatten(1, (self.groups, self.shared))
        device = self.q.device
        batch = torch.arange(self.batch, device=device).view(-1, 1, 1, 1, 1, 1)
        group = torch.arange(self.groups, device=device).view(-1, 1, 1, 1, 1)
        head = torch.arange(self.shared, device=device).view(-1, 1, 1)
        q_index, k_index = self.indices(piece)
        return bias[batch, group, head, q_index, k_index]

    @staticmethod
    def indices(piece):
        """(B or 1, 1, T, 1, R, 1) and (B or 1, 1, T, 1, 1, C), the first for none."""
        q_BTR, k_BTC = piece.tables.q_BTR.clamp(min=0), piece.tables.k_BTC.clamp(min=0)
        return q_BTR[:, None, :, None, :, None], k_BTC[:, None, :, None, None]

    def pairs(self, piece, size):
        """Where each score is in a bias of this many elements, all scores in their order."""
        q_index, k_index = self.indices(piece)
        first = self.by_head(self.heads, self.q_length * self.k_length).unsqueeze(5) % size
        return (first + q_index * self.k_length + k_index).flatten()

    def labels(self, piece):
        """Where the bias of each score is among those of all heads, behind the last for none, all scores in order."""
        number, label = self.label_bias.shape[1], piece.tables.label_BTRC[:, None, :, None]
        first = torch.arange(0, self.heads * number, number, device=self.q.device)
        first = first.view(1, self.groups, 1, self.shared, 1, 1)
        return (first + label).masked_fill(label < 0, self.heads * number).expand(self.batch, *[-1] * 5).flatten()

    def dropped(self, piece):
        """Which weights are dropped, or None; the same again in the backward, whatever the tiles."""
        if self.seed is None:
            return None
        rows, columns = piece.taken.view(*piece.q.shape[:2], 1), piece.tables.k_BTC.expand(self.batch, -1, -1)
        columns = columns.unsqueeze(1).expand(-1, self.groups, -1, -1).reshape(len(piece.k), 1, -1)
        return dropped(self.seed, rows, columns, self.dropout)
