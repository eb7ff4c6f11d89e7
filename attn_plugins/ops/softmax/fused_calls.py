"""Patterns as a few calls of a fused kernel that knows sequences and windows, merged through their logarithms of sums.

The kernel attends within sequences that lie end to end, in a window around the diagonal that ends where query and key
of a sequence do. A pattern that one call cannot express (a window and sink tokens) is cut into calls that share no
pair. Their outputs are merged by the logarithms of their sums, and the backward of each call is given the merged output
and the merged logarithm: its weights ``exp(s - lse)`` are then those of the whole, and so is ``<dout, out>``, which is
all that softmax's gradient needs of the other calls.

Letters beside the legend's: T tokens of all rows of a batch, end to end. L sequences of a call. R runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import distinct
from attn_plugins.ops.reference import outside_autocast
from attn_plugins.ops.softmax.patterns.band import Band, BlockBand
from attn_plugins.ops.softmax.patterns.with_first import WithFirst
from attn_plugins.ops.softmax.tiles import Pattern

PIECE = 1024
"""Queries of a sequence where all see the same few keys: a kernel's backward works through them one after another."""

WHOLE = (-1, -1)
CAUSAL = (-1, 0)


class Rows(NamedTuple):
    """The query or key side of a call."""

    tokens: slice | torch.Tensor
    """Which of the T, sequence after sequence: a slice, or (n,) indices."""
    bounds_L: torch.Tensor
    """Where sequences begin among them, and where the last one ends: (L + 1,) int32."""
    longest: int


class Call(NamedTuple):
    """One call of a kernel, in which every query sees a key. A sequence may be empty, of queries and of keys."""

    queries: Rows
    keys: Rows
    window: tuple[int, int]
    """How many keys a query sees before and after its own, -1 for all; its own is that of the same place counted from
    the end of the sequence."""


class Kernel(NamedTuple):
    """A fused kernel and its backward."""

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Call, float], tuple[torch.Tensor, torch.Tensor, Any]]
    """(q_THD, k_TGD, v_TGD, call, scale) -> (out_THD, lse_HT in float32 or more, what its backward wants to know)."""
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(dout_THD, q_THD, k_TGD, v_TGD, out_THD, lse_HT, known, call, scale) -> (dq, dk, dv), of weights exp(s - lse)."""


@dataclass(frozen=True)
class Runs:
    """Tokens that follow one another in a row and belong together: a whole row, its padding, or a packed sequence."""

    starts_R: torch.Tensor
    """Where each begins, among the T tokens of all rows. On the CPU where the mask needs no values to know it."""
    lengths_R: torch.Tensor
    longest: int
    tokens: int
    """T."""
    whole: bool
    """Whether each sequence is one run: all of it in one piece, no padding within."""


def runs_of(mask: AttentionMask) -> Runs:
    """The runs of a mask of as many queries as keys; made once a forward pass, with one look at values."""
    return mask.cached("runs", lambda: _runs(mask))


def _runs(mask: AttentionMask) -> Runs:
    batch, keys = mask.batch_size, mask.kv_length
    if mask.padding_BK is None and mask.segments_BK is None:
        return Runs(torch.arange(batch) * keys, torch.full((batch,), keys), keys, batch * keys, True)
    index = torch.arange(keys, device=mask.device).expand(batch, -1)
    new = torch.zeros_like(index, dtype=torch.bool)
    segments, padding = mask.segments_BK, mask.padding_BK
    for table in (segments, padding):
        if table is not None:
            new = new | pad(table[:, 1:] != table[:, :-1], (1, 0))
    first = torch.cat([torch.ones_like(new[:, :1]), new[:, 1:]], dim=1)
    of_sequences = first if padding is None else first & padding
    if segments is None:
        sequences = of_sequences.any(dim=1).long()
    else:
        sequences = distinct(segments.expand(batch, -1), padding)
    whole = (of_sequences.sum(dim=1) == sequences).all()
    longest = (index - torch.where(first, index, 0).cummax(dim=1).values).amax() + 1
    number, longest, whole = torch.stack([first.sum(), longest, whole.long()]).tolist()
    tokens = batch * keys
    every = torch.arange(tokens, device=mask.device)
    starts = every.new_full((number,), tokens).scatter_reduce(0, first.flatten().cumsum(0) - 1, every, "amin")
    return Runs(starts, pad(starts[1:], (0, 1), value=tokens) - starts, longest, tokens, bool(whole))


def not_in_calls(mask: AttentionMask, pattern: Pattern) -> str | None:
    """Why mask and pattern cannot be cut into calls, or None. Values of the mask are looked at once a forward pass."""
    if mask.cross or not mask.plain:
        return f"it serves causality, padding and packed sequences, got {mask!r}"
    if mask.q_length != mask.kv_length or mask.q_offset or mask.kv_offset or mask.positions_BK is not None:
        return f"it serves whole sequences, as many queries as keys, got {mask!r}"
    if isinstance(pattern, Band):
        if pattern.dilation > 1 and pattern.num_first:
            return "a dilated window beside tokens that are seen from everywhere is not served"
    elif isinstance(blocks := _without_first(pattern), BlockBand):
        if blocks.look_backward or (blocks.look_forward and not mask.causal):
            return "blocks that see other blocks are not served"
        if isinstance(pattern, WithFirst) and pattern.number > blocks.block_size - blocks.shift:
            return "more tokens that are seen from everywhere than the first block has are not served"
    elif isinstance(pattern, WithFirst):
        beside = type(pattern.pattern).__name__
        return f"tokens that are seen from everywhere, beside the pattern {beside}, are not served"
    else:
        return f"the pattern {type(pattern).__name__} is not served"
    if not runs_of(mask).whole:
        return "a row has padding within a sequence, or a sequence in several pieces"
    return None


def _without_first(pattern: Pattern) -> Pattern:
    return pattern.pattern if isinstance(pattern, WithFirst) else pattern


def calls_of(mask: AttentionMask, pattern: Pattern) -> tuple[Call, ...]:
    """The calls of a pattern, every pair in one of them, the first one with every query; made once a forward pass."""

    def build() -> tuple[Call, ...]:
        runs = runs_of(mask)
        if isinstance(blocks := _without_first(pattern), BlockBand):
            first = _first(blocks, pattern.number, runs, mask) if isinstance(pattern, WithFirst) else ()
            return (_blocks(blocks, runs, mask), *first)
        assert isinstance(pattern, Band)
        if pattern.dilation > 1:
            return (_phases(pattern, runs, mask),)
        return _band(pattern, runs, mask)

    return mask.cached(("calls", pattern), build)


def _blocks(pattern: BlockBand, runs: Runs, mask: AttentionMask) -> Call:
    """One call, in which blocks are sequences."""
    number = runs.tokens // pattern.block_size + 2 * len(runs.lengths_R)
    _, lengths = _pieces(runs.lengths_R, pattern.block_size, pattern.shift, number)
    rows = Rows(slice(None), _bounds(lengths, mask), min(pattern.block_size, runs.longest))
    return Call(rows, rows, CAUSAL if mask.causal else WHOLE)


def _first(blocks: BlockBand, number: int, runs: Runs, mask: AttentionMask) -> tuple[Call, ...]:
    """The first keys, for queries behind the first block, which holds them."""
    keys = torch.full_like(runs.lengths_R, number)
    return _calls([_Span(blocks.block_size - blocks.shift, runs.lengths_R, 0, keys, WHOLE, pieces=True)], runs, mask)


def _phases(pattern: Band, runs: Runs, mask: AttentionMask) -> Call:
    """One call, in which each phase of a dilated window is a sequence."""
    step = pattern.dilation
    phase = torch.arange(step, device=runs.starts_R.device)
    starts = (runs.starts_R.unsqueeze(1) + phase).flatten()
    lengths = ((runs.lengths_R.unsqueeze(1) + (step - 1 - phase)) // step).flatten()
    index = _tokens(starts, lengths, runs.tokens, mask, step)
    rows = Rows(index, _bounds(lengths, mask), -(-runs.longest // step))
    return Call(rows, rows, (pattern.window_size - 1, 0 if mask.causal else pattern.look_forward))


class _Span(NamedTuple):
    """Of each run, the queries and the keys of a call, counted from its start."""

    query: int
    query_end_R: torch.Tensor
    key: int
    key_end_R: torch.Tensor
    window: tuple[int, int]
    pieces: bool = False
    """Whether queries may be cut into shorter sequences, each with all of the keys."""


def _band(pattern: Band, runs: Runs, mask: AttentionMask) -> tuple[Call, ...]:
    """The window; then the first keys, for queries whose window lies behind them.

    The window of query x begins at key x - W + 1, so that x sees the first keys up to x - W beside it: for W queries
    a triangle, for those that follow all S of them.
    """
    size, first, length = pattern.window_size, pattern.num_first, runs.lengths_R
    ahead = 0 if mask.causal else pattern.look_forward
    spans = [_Span(0, length, 0, length, (size - 1, ahead))]
    if first:
        begin = size
        if pattern.first_see_all and not mask.causal:
            begin = max(size, first)
            spans[0] = _Span(first, length, 0, length, (size - 1, ahead))
            spans.append(_Span(0, length.clamp(max=first), 0, length, WHOLE))
        elif not mask.causal and first - 1 > ahead:
            # Those of the first keys that lie behind the window of a query that is one of the first itself.
            after = length.clamp(max=first) - ahead - 1
            spans.append(_Span(0, after, ahead + 1, after + ahead + 1, (0, -1)))
        spans.append(_Span(begin, length.clamp(max=size + first), 0, (length - size).clamp(max=first), CAUSAL))
        spans.append(_Span(size + first, length, 0, torch.full_like(length, first), WHOLE, pieces=True))
    return _calls(spans, runs, mask)


def _calls(spans: Sequence[_Span], runs: Runs, mask: AttentionMask) -> tuple[Call, ...]:
    """The calls of those spans in which a run has queries."""
    sides = []
    for span in spans:
        queries = (torch.minimum(span.query_end_R, runs.lengths_R) - span.query).clamp(min=0)
        keys = torch.minimum(span.key_end_R, runs.lengths_R) - span.key
        keys = torch.where(queries > 0, keys.clamp(min=0), 0)
        run_L, pieces = None, queries
        if span.pieces and runs.longest > PIECE:
            run_L, pieces = _pieces(queries, PIECE, 0, runs.tokens // PIECE + len(queries))
            keys = torch.where(pieces > 0, keys[run_L], 0)
        sides.append((queries, pieces, keys, run_L))
    sizes = [torch.stack([x.sum(), x.amax(), y.sum(), y.amax()]) for _, x, y, _ in sides]
    calls = []
    for span, (queries, pieces, keys, run_L), size in zip(spans, sides, torch.stack(sizes).tolist(), strict=True):
        number, longest, number_of_keys, longest_key = size
        if number:
            tokens = _index(runs, span.query, None, queries, number, mask)
            key_tokens = _index(runs, span.key, run_L, keys, number_of_keys, mask)
            of_queries = Rows(tokens, _bounds(pieces, mask), longest)
            calls.append(Call(of_queries, Rows(key_tokens, _bounds(keys, mask), longest_key), span.window))
    return tuple(calls)


def _index(
    runs: Runs, begin: int, run_L: torch.Tensor | None, lengths_L: torch.Tensor, total: int, mask: AttentionMask
) -> slice | torch.Tensor:
    """Which tokens sequences hold that begin ``begin`` tokens after their run."""
    if run_L is None and total == runs.tokens:
        return slice(None)
    if run_L is None and len(runs.starts_R) == 1:
        return slice(begin, begin + total)
    starts = runs.starts_R if run_L is None else runs.starts_R[run_L]
    return _tokens(starts + begin, lengths_L, total, mask)


def _tokens(
    starts_L: torch.Tensor, lengths_L: torch.Tensor, total: int, mask: AttentionMask, step: int = 1
) -> torch.Tensor:
    """Every ``step``-th token from each start on, (total,)."""
    starts, lengths = starts_L.to(mask.device), lengths_L.to(mask.device)
    offset = starts - (lengths.cumsum(0) - lengths) * step
    of = torch.repeat_interleave(offset, lengths, output_size=total)
    return of + torch.arange(total, device=mask.device) * step


def _bounds(lengths_L: torch.Tensor, mask: AttentionMask) -> torch.Tensor:
    return pad(lengths_L.cumsum(0), (1, 0)).to(mask.device, torch.int32)


def _pieces(lengths_R: torch.Tensor, size: int, shift: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences cut into ``number`` pieces of ``size``, the first ``shift`` shorter: (which sequence, how long) each.

    Those after the last one have no length.
    """
    count = torch.where(lengths_R > 0, (lengths_R - 1 + shift) // size + 1, 0)
    ends = count.cumsum(0)
    piece = torch.arange(number, device=lengths_R.device)
    of = torch.searchsorted(ends, piece, right=True).clamp(max=len(lengths_R) - 1)
    begin = (piece - (ends - count)[of]) * size - shift
    return of, (torch.minimum(begin + size, lengths_R[of]) - begin.clamp(min=0)).clamp(min=0)


def fused_attention(
    q_BHND: torch.Tensor,
    k_BGND: torch.Tensor,
    v_BGNV: torch.Tensor,
    mask: AttentionMask,
    pattern: Pattern,
    *,
    kernel: Kernel,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention over the keys that mask and pattern show, of those that :func:`not_in_calls` allows.

    Returns:
        out_BHNV. Differentiable once.
    """
    batch, size = q_BHND.shape[0], v_BGNV.shape[3]
    wide = max(q_BHND.shape[3], size)
    wide += -wide % 8
    flat = (pad(x, (0, wide - x.shape[3])).transpose(1, 2).flatten(0, 1) for x in (q_BHND, k_BGND, v_BGNV))
    out_THD = _Merged.apply(*flat, sinks, calls_of(mask, pattern), kernel, scale)
    return out_THD.unflatten(0, (batch, -1)).transpose(1, 2)[..., :size]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THD, k_TGD, v_TGD, sinks_H, calls, kernel, scale):
        known: list[Any] = []
        out_THD: Any = None
        for call in calls:
            at, keys = call.queries.tokens, call.keys.tokens
            out, lse, known_here = kernel.forward(q_THD[at], k_TGD[keys], v_TGD[keys], call, scale)
            known.append(known_here)
            if out_THD is None and _is_all(at):
                out_THD, lse_HT = out if len(calls) == 1 and sinks_H is None else out.to(lse.dtype), lse
                continue
            if out_THD is None:
                out_THD = torch.zeros(q_THD.shape, dtype=lse.dtype, device=lse.device)
                lse_HT = lse.new_full(q_THD.shape[1::-1], -torch.inf)
            out_THD[at], lse_HT[:, at] = _merge(out_THD[at], lse_HT[:, at], out, lse)
        if sinks_H is not None:
            logits_H1 = sinks_H.to(lse_HT.dtype).unsqueeze(1).expand_as(lse_HT)
            out_THD, lse_HT = _merge(out_THD, lse_HT, torch.zeros_like(out_THD), logits_H1)
        out_THD = out_THD.to(v_TGD.dtype)
        ctx.save_for_backward(q_THD, k_TGD, v_TGD, sinks_H, out_THD, lse_HT)
        ctx.calls, ctx.kernel, ctx.scale, ctx.known = calls, kernel, scale, known
        return out_THD

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dout_THD):
        q_THD, k_TGD, v_TGD, sinks_H, out_THD, lse_HT = ctx.saved_tensors
        sums: Any = None
        for call, known in zip(ctx.calls, ctx.known, strict=True):
            at, keys = call.queries.tokens, call.keys.tokens
            of_queries = (dout_THD[at].contiguous(), q_THD[at])
            merged = (out_THD[at].contiguous(), lse_HT[:, at].contiguous())
            parts = ctx.kernel.backward(*of_queries, k_TGD[keys], v_TGD[keys], *merged, known, call, ctx.scale)
            if len(ctx.calls) == 1 and _is_all(at) and _is_all(keys):
                sums = parts
                break
            if sums is None:
                # Keys that all queries see are in many sequences: what these add up to would be rounded each time.
                sums = [torch.zeros(x.shape, dtype=lse_HT.dtype, device=x.device) for x in (q_THD, k_TGD, v_TGD)]
            for total, part, where in zip(sums, parts, (at, keys, keys), strict=True):
                if isinstance(where, slice):
                    total[where] += part
                else:
                    total.index_add_(0, where, part.to(total.dtype))
        dsinks_H = None
        if sinks_H is not None:
            delta_HT = (dout_THD.to(lse_HT.dtype) * out_THD.to(lse_HT.dtype)).sum(dim=2).T
            dsinks_H = -(torch.exp(sinks_H.to(lse_HT.dtype).unsqueeze(1) - lse_HT) * delta_HT).sum(dim=1)
            dsinks_H = dsinks_H.to(sinks_H.dtype)
        dq, dk, dv = (total.to(q_THD.dtype) for total in sums)
        return dq, dk, dv, dsinks_H, None, None, None


def _merge(
    one_THD: torch.Tensor, lse_one_HT: torch.Tensor, other_THD: torch.Tensor, lse_other_HT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithm of the sums over the keys of both."""
    lse_HT = torch.logaddexp(lse_one_HT, lse_other_HT)
    one, other = (torch.exp(x - lse_HT).T.unsqueeze(2) for x in (lse_one_HT, lse_other_HT))
    return one_THD * one + other_THD * other, lse_HT


def _is_all(index: slice | torch.Tensor) -> bool:
    return isinstance(index, slice) and index == slice(None)
