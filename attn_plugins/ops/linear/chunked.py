"""Chunked causal linear attention as one operator: no features and no weights are kept.

The sequence is treated in blocks of chunks, a block being what fits a cache. Within a chunk the weights are formed
outright; before a chunk all keys are summed up in a state. States of a block's chunks come from one product with a
triangular matrix whose entries also say across which chunks a packed segment goes on. They are kept, F (V + 1) numbers
a chunk and key/value head: as much as keys for F = chunk_size. Backward forms the features and the weights again, block
by block from the end, and carries the states' gradients the other way.

Letters beside the legend's: P (row of the batch, key/value head) pairs of a block, R query heads that share a
key/value head, L tokens of a block, N its chunks, C tokens of a chunk; a tile is (P N, R C, D).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.ops.linear.chunk_sums import sums_by_chunk
from attn_plugins.ops.linear.features import FEATURE_MAPS, FeatureMap
from attn_plugins.ops.linear.running_max import exp_minus_max, rescale
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype
from attn_plugins.ops.sizes import scores_at_once

ROWS_A_BLOCK = {"cpu": 1 << 11}
"""Tokens times query heads of a block that is to fit a cache, by type of device, or up to twice that if it is all."""
LEAST_CHUNKS = 4
"""Of each head in such a block, as far as the text has them."""
CHUNKS_A_BLOCK = 512
"""Most chunks of one block: states are summed up over all pairs of them."""


class _Place(NamedTuple):
    """Where a block lies."""

    batch: slice
    heads: slice
    span: int
    tokens: slice
    chunks: int
    first_chunk: int

    @property
    def chunk_slice(self) -> slice:
        return slice(self.first_chunk, self.first_chunk + self.chunks)


class _Block(NamedTuple):
    """What a block's forward and backward both need; fk has zeros where keys are padding.

    Of exponents, fk is the exponential of what is left above ``running_max`` (P, F), and fq that of what is left above
    ``top``, see :func:`attn_plugins.ops.linear.running_max.exp_minus_max`; None for other maps.
    """

    q_in: torch.Tensor
    k_in: torch.Tensor
    fq: torch.Tensor
    fk: torch.Tensor
    v: torch.Tensor
    not_padding: torch.Tensor | None
    link: torch.Tensor
    same: torch.Tensor | None
    query_goes_on: torch.Tensor | None
    key_goes_on: torch.Tensor | None
    running_max: torch.Tensor | None
    top: torch.Tensor | None


class _Problem(NamedTuple):
    """The operator's arguments, with query heads grouped: q (B, G, R, T, D), k (B, G, 1, T, D), v (B, G, 1, T, V)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    w_q: torch.Tensor | None
    w_k: torch.Tensor | None
    padding: torch.Tensor | None
    segments: torch.Tensor | None
    feature_map: str
    chunk_size: int
    diagonal: int
    batched: bool

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.q, self.k, self.v)

    @property
    def phi(self) -> FeatureMap:
        return FEATURE_MAPS[self.feature_map]


def _block_size(p: _Problem) -> tuple[int, int]:
    """(tokens of a block, whole chunks; pairs of a row and a key/value head that make one)."""
    group, length, size = p.q.shape[2:]
    rows = ROWS_A_BLOCK.get(p.q.device.type)
    fits_cache = rows is not None and not p.batched
    if rows is None or p.batched:
        features = p.phi.size(size if p.w_q is None else p.w_q.shape[-2])
        rows = scores_at_once(p.q.device) // (4 * max(features, p.chunk_size))
    elif p.q[..., 0].numel() <= 2 * rows:
        rows *= 2
    chunks = max(1, rows // (group * p.chunk_size))
    # Heads side by side: all of a token lies together in memory, and a block that is long in one head reads and writes
    # a little everywhere.
    side = min(p.k.shape[1], max(1, chunks // LEAST_CHUNKS)) if fits_cache else 1
    span = max(1, min(chunks // side, CHUNKS_A_BLOCK, -(-length // p.chunk_size)))
    # Where a whole sequence is less than a block, several heads, then several rows, make one.
    return span * p.chunk_size, max(1, chunks // span)


def _places(p: _Problem) -> Iterator[list[_Place]]:
    """For each set of heads, its blocks from first to last."""
    batch, heads, _, length, _ = p.q.shape
    span, pairs = _block_size(p)
    spans = [slice(start, min(start + span, length)) for start in range(0, length, span)]
    head_step = min(heads, pairs)
    batch_step = max(1, pairs // heads)
    for b in range(0, batch, batch_step):
        for h in range(0, heads, head_step):
            at = slice(b, b + batch_step), slice(h, h + head_step)
            yield [
                _Place(*at, i, s, -(-(s.stop - s.start) // p.chunk_size), s.start // p.chunk_size)
                for i, s in enumerate(spans)
            ]


def _chunks(x: torch.Tensor, at: _Place, p: _Problem) -> torch.Tensor:
    """(b, g, R, L, D) -> (b, g, N, R, C, D); zeros after the end, where no query sees them."""
    rest = at.chunks * p.chunk_size - x.shape[3]
    if rest:
        x = pad(x, (0, 0, 0, rest))
    return x.unflatten(3, (at.chunks, p.chunk_size)).transpose(2, 3)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """(b, g, N, R, C, D) -> (P N, R C, D)."""
    return x.flatten(3, 4).flatten(0, 2)


def _chunk_rows(x: torch.Tensor, w: torch.Tensor | None, at: _Place, p: _Problem) -> torch.Tensor:
    """(b, g, R, L, D), projected if w is given, as a tile that may be overwritten."""
    if w is not None:
        return _flat(_chunks(x.to(p.dtype) @ w[at.heads].mT, at, p))
    chunks = _chunks(x, at, p)
    return _flat(torch.empty(chunks.shape, dtype=p.dtype, device=x.device).copy_(chunks))


def _from_chunk_rows(tile: torch.Tensor, like: torch.Tensor, at: _Place, p: _Problem) -> torch.Tensor:
    """(P N, R C, any) -> (b, g, R, L, any), for a target of the shape of ``like``."""
    b, g, group, length, _ = like.shape
    x = tile.view(b, g, at.chunks, group, p.chunk_size, -1).transpose(2, 3)
    return x.reshape(b, g, group, at.chunks * p.chunk_size, -1)[:, :, :, :length]


def _part(x: torch.Tensor, at: _Place) -> torch.Tensor:
    return x[at.batch, at.heads, :, at.tokens]


def _over_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(b, N or 1, ...) -> (P N, ...), the same for each head."""
    return x.unsqueeze(1).expand(-1, heads, *x.shape[1:]).flatten(0, 2)


def _load(p: _Problem, at: _Place, running_max: torch.Tensor | None) -> _Block:
    """A block; ``running_max`` is that of the exponents of all keys before it, (P, F)."""
    q_in, k_in = _part(p.q, at), _part(p.k, at)
    fq, fk, top = _chunk_rows(q_in, p.w_q, at, p), _chunk_rows(k_in, p.w_k, at, p), None
    v_in = _chunks(_part(p.v, at), at, p)
    v = v_in.new_empty(*v_in.shape[:-1], v_in.shape[-1] + 1, dtype=p.dtype)
    v[..., :-1] = v_in
    v[..., -1] = 1  # sums up the denominator
    v = _flat(v)
    b, heads, _, length, _ = k_in.shape
    rest = at.chunks * p.chunk_size - length

    not_padding = None
    if p.padding is not None or (rest and running_max is not None):
        own = k_in.new_ones(b, length, dtype=torch.bool) if p.padding is None else p.padding[at.batch, at.tokens]
        not_padding = _over_heads(pad(own, (0, rest)).view(b, at.chunks, p.chunk_size, 1), heads)
    if running_max is None:
        fq, fk = p.phi.fast_features(fq), _only(p.phi.fast_features(fk), not_padding)
    else:
        if not_padding is not None:
            fk = fk.masked_fill(~not_padding, -torch.inf)
        running_max = torch.maximum(running_max, fk.reshape(b * heads, -1, fk.shape[-1]).amax(dim=1))
        each = running_max.repeat_interleave(at.chunks, dim=0).unsqueeze(1)
        fq, top = exp_minus_max(fq, each)
        fk = torch.exp(fk - each)

    link = torch.ones(at.chunks + 1, at.chunks + 1, dtype=p.dtype, device=fk.device).tril_()
    same = query_goes_on = key_goes_on = None
    if p.segments is None:
        link = link.expand(b * heads, -1, -1)
    else:
        own = p.segments[at.batch, at.tokens]
        if at.tokens.start:
            before = p.segments[at.batch, at.tokens.start - 1 : at.tokens.start]
        else:
            before = own[:, :1]
        own = torch.cat([own, own[:, -1:].expand(-1, rest)], dim=1).view(b, at.chunks, p.chunk_size)
        last = torch.cat([before, own[:, :, -1]], dim=1)  # the segment that a state, before and after chunks, is of
        link = link * (last.unsqueeze(2) == last.unsqueeze(1))
        link = link.unsqueeze(1).expand(-1, heads, -1, -1).flatten(0, 1)
        same = _over_heads(own.unsqueeze(3) == own.unsqueeze(2), heads).unsqueeze(1)
        group = q_in.shape[2]
        query_goes_on = _over_heads((own == last[:, :-1].unsqueeze(2)).repeat(1, 1, group).unsqueeze(3), heads)
        key_goes_on = _over_heads((own == last[:, 1:].unsqueeze(2)).unsqueeze(3), heads)
    return _Block(q_in, k_in, fq, fk, v, not_padding, link, same, query_goes_on, key_goes_on, running_max, top)


def _only(x: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    return x if where is None else x * where


def _limit(a: torch.Tensor, block: _Block, p: _Problem) -> torch.Tensor:
    """Zero, in place, the weights within chunks that go forwards or to another segment."""
    square = a.view(a.shape[0], -1, p.chunk_size, p.chunk_size).tril_(p.diagonal)
    if block.same is not None:
        square.mul_(block.same)
    return a


def _initial_max(p: _Problem, at: _Place, running_max: torch.Tensor | None) -> torch.Tensor | None:
    """Level of the exponents before the first block, (P, F), or None where phi has none."""
    if not p.phi.exponential:
        return None
    if running_max is not None:
        return running_max[at.batch, at.heads].flatten(0, 1)
    k = _part(p.k, at)
    features = p.phi.size(k.shape[-1] if p.w_k is None else p.w_k.shape[-2])
    return k.new_full((k.shape[0] * k.shape[1], features), MASKED_SCORE, dtype=p.dtype)


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: torch.Tensor | None,
    w_k: torch.Tensor | None,
    padding: torch.Tensor | None,
    segments: torch.Tensor | None,
    feature_map: str,
    chunk_size: int,
    diagonal: int,
    batched: bool,
) -> _Problem:
    groups = (k.shape[1], -1)
    w_q = None if w_q is None else w_q.unflatten(0, groups)
    w_k = None if w_k is None else w_k.unsqueeze(1)
    # A text shorter than a chunk is one chunk of its own length: it costs what it has, and nothing is made longer.
    chunk_size = max(1, min(chunk_size, q.shape[2]))
    tokens = q.unflatten(1, groups), k.unsqueeze(2), v.unsqueeze(2)
    return _Problem(*tokens, w_q, w_k, padding, segments, feature_map, chunk_size, diagonal, batched)


def _empty_outputs(
    p: _Problem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (batch, heads, length, head_dim), groups, value_dim = q.shape, k.shape[1], v.shape[3]
    features = p.phi.size(head_dim if p.w_q is None else p.w_q.shape[-2])
    out = v.new_empty(batch, length, heads, value_dim).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=accumulation_dtype(q, k, v))
    states = den.new_empty(batch, groups, -(-length // p.chunk_size), features, value_dim + 1)
    blocks = -(-length // _block_size(p)[0]) if p.phi.exponential else 0
    return out, den, states, den.new_empty(batch, groups, blocks, features)


def _empty_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: torch.Tensor | None,
    w_k: torch.Tensor | None,
    states: torch.Tensor,
    learned: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dw_q, dw_k = (torch.zeros_like(w) if w is not None and learned else states.new_empty(0) for w in (w_q, w_k))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dw_q, dw_k, torch.empty_like(states[:, :, 0])


@torch.library.custom_op("attn_plugins::causal_linear", mutates_args=())
def causal_linear(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: torch.Tensor | None,
    w_k: torch.Tensor | None,
    padding: torch.Tensor | None,
    segments: torch.Tensor | None,
    state: torch.Tensor | None,
    running_max: torch.Tensor | None,
    feature_map: str,
    chunk_size: int,
    eps: float | None,
    diagonal: int,
    batched: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal linear attention of T queries and T keys that start from a state.

    Exponents are taken as they are above the largest one of each feature among all keys up to the end of the block: a
    level that rises from block to block, and the state with it. It cancels in the result, and keeps it finite; a key
    more than 87 (float32) below the level counts as nothing.

    Args:
        q, k, v: (B, H, T, D), (B, G, T, D), (B, G, T, V).
        w_q, w_k: (H, E, D) and (G, E, D) that come before the feature map, in float32 or float64, or None.
        padding, segments: (B, T), of the keys; segments in one piece each.
        state: (B, G, F, V + 1) sums over earlier keys, of the first token's segment, of phi(k) [v, 1]^T, or None.
        level: (B, G, F), where phi is exp, that of the state.
        eps: added to denominators before sums are divided by them; None leaves sums as they are, of maps that are
            no exponentials.
        diagonal: 0 if a query sees its own key, -1 if only those before.
        batched: take blocks as large as on devices that are not a CPU.

    Returns:
        out (B, H, T, V) in the dtype of v, laid out as (B, T, H, V); the denominators without ``eps``, (B, H, T), or
        where phi is exp the logarithm of those with ``eps``; and, for the backward, the state that each chunk starts
        from, and the level of each block.
    """
    p = _problem(q, k, v, w_q, w_k, padding, segments, feature_map, chunk_size, diagonal, batched)
    out, den, states, block_max = _empty_outputs(p, q, k, v)
    out_BGRTV, den_BGRT1 = out.unflatten(1, (k.shape[1], -1)), den.unflatten(1, (k.shape[1], -1)).unsqueeze(4)
    with torch.autocast(q.device.type, enabled=False):
        for places in _places(p):
            carried = None if state is None else state[places[0].batch, places[0].heads].flatten(0, 1)
            current_max = _initial_max(p, places[0], running_max)
            for at in places:
                block = _load(p, at, current_max)
                carried = rescale(carried, current_max, block.running_max)
                link, sums = sums_by_chunk(_only(block.fk, block.key_goes_on), block.v, carried, block.link, end=0)
                before = states[at.batch, at.heads, at.chunk_slice].view(len(sums), at.chunks, -1)
                torch.bmm(link[:, :-1], sums, out=before)
                before = before.reshape(-1, block.fk.shape[2], block.v.shape[2])
                if at is not places[-1]:
                    carried = torch.bmm(link[:, -1:], sums).view(len(sums), *before.shape[1:])
                weights = _limit(torch.bmm(block.fq, block.fk.mT), block, p)
                totals = torch.bmm(weights, block.v).baddbmm_(_only(block.fq, block.query_goes_on), before)
                totals = _from_chunk_rows(totals, block.q_in, at, p)
                num, total = totals[..., :-1], totals[..., -1:]
                total_eps = total if eps is None else total + eps
                here = _part(out_BGRTV, at)
                here.copy_(num) if eps is None else torch.div(num, total_eps, out=here)
                if block.running_max is not None and block.top is not None:
                    stored = block_max[at.batch, at.heads, at.span]
                    stored.copy_(block.running_max.view(stored.shape))
                    total = total_eps.log_() + _from_chunk_rows(block.top, block.q_in, at, p)
                _part(den_BGRT1, at).copy_(total)
                current_max = block.running_max
    return out, den, states, block_max


@torch.library.custom_op("attn_plugins::causal_linear_backward", mutates_args=())
def causal_linear_backward(
    d_out: torch.Tensor,
    d_den: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    w_q: torch.Tensor | None,
    w_k: torch.Tensor | None,
    padding: torch.Tensor | None,
    segments: torch.Tensor | None,
    running_max: torch.Tensor | None,
    out: torch.Tensor,
    den: torch.Tensor,
    states: torch.Tensor,
    block_max: torch.Tensor,
    learned: bool,
    feature_map: str,
    chunk_size: int,
    eps: float | None,
    diagonal: int,
    batched: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, w_q, w_k (empty where there is none, or not ``learned``) and of the state.

    ``d_den`` is None where nothing follows from the denominators that are returned.
    """
    p = _problem(q, k, v, w_q, w_k, padding, segments, feature_map, chunk_size, diagonal, batched)
    dq, dk, dv, dw_q, dw_k, d_state = _empty_gradients(q, k, v, w_q, w_k, states, learned)
    groups = (k.shape[1], -1)
    dq_BGRTD, dk_BG1TD, dv_BG1TV = dq.unflatten(1, groups), dk.unsqueeze(2), dv.unsqueeze(2)
    dw_q_GRED = dw_q.unflatten(0, groups) if dw_q.numel() else dw_q
    d_out, out = d_out.unflatten(1, groups), out.unflatten(1, groups)
    den = den.unflatten(1, groups).unsqueeze(4)
    d_den = None if d_den is None else d_den.unflatten(1, groups).unsqueeze(4)
    gradient_of = p.phi.gradient
    with torch.autocast(q.device.type, enabled=False):
        for places in _places(p):
            brought = None
            for at in reversed(places):
                current_max = None
                if p.phi.exponential:
                    current_max = block_max[at.batch, at.heads, at.span].flatten(0, 1)
                block = _load(p, at, current_max)
                fq, fk, v_one = block.fq, block.fk, block.v
                fq_on, fk_on = _only(fq, block.query_goes_on), _only(fk, block.key_goes_on)
                before = states[at.batch, at.heads, at.chunk_slice].flatten(0, 2)

                g, below = (_chunks(_part(x, at), at, p) for x in (d_out, den))
                d_below = None if d_den is None else _chunks(_part(d_den, at), at, p)
                d_totals = below.new_empty(*g.shape[:-1], g.shape[-1] + 1)
                d_num, d_total = d_totals[..., :-1], d_totals[..., -1:]
                if eps is None:
                    d_num.copy_(g)
                    d_total.zero_()
                else:
                    if block.top is None:
                        below = below + eps
                    else:
                        below = torch.exp(below - block.top.view(below.shape))
                        d_below = None if d_below is None else d_below / below
                    torch.div(g, below, out=d_num)
                    pulled = (_chunks(_part(out, at), at, p) * d_num).sum(dim=-1, keepdim=True)
                    torch.neg(pulled, out=d_total)
                if d_below is not None:
                    d_total += d_below
                d_totals = _flat(d_totals)

                d_sums = torch.bmm(*sums_by_chunk(fq_on, d_totals, brought, block.link.mT, end=-1))
                d_sums = d_sums.view(*d_sums.shape[:2], *before.shape[1:])
                d_after, brought = d_sums[:, 1:].flatten(0, 1), d_sums[:, 0]
                weights = _limit(torch.bmm(fq, fk.mT), block, p)
                d_v = torch.bmm(weights.mT, d_totals[..., :-1]).baddbmm_(fk_on, d_after[..., :-1])
                _part(dv_BG1TV, at).copy_(_from_chunk_rows(d_v, block.k_in, at, p))
                d_weights = _limit(torch.bmm(d_totals, v_one.mT), block, p)
                d_fq = torch.bmm(d_weights, fk)
                d_fk = torch.bmm(d_weights.mT, fq)
                d_fq = d_fq.baddbmm_(_only(d_totals, block.query_goes_on), before.mT)
                d_fk = d_fk.baddbmm_(_only(v_one, block.key_goes_on), d_after.mT)
                d_q = _from_chunk_rows(gradient_of(fq, d_fq), block.q_in, at, p)
                d_k = _from_chunk_rows(gradient_of(fk, _only(d_fk, block.not_padding)), block.k_in, at, p)
                if p.w_q is not None:
                    if learned:
                        dw_q_GRED[at.heads] += (d_q.mT @ block.q_in.to(p.dtype)).sum(0)
                    d_q = d_q @ p.w_q[at.heads]
                if p.w_k is not None:
                    if learned:
                        dw_k[at.heads] += (d_k.mT @ block.k_in.to(p.dtype)).sum((0, 2))
                    d_k = d_k @ p.w_k[at.heads]
                _part(dq_BGRTD, at).copy_(d_q)
                _part(dk_BG1TD, at).copy_(d_k)
                if p.phi.exponential and at.span:
                    brought = rescale(brought, block_max[at.batch, at.heads, at.span - 1].flatten(0, 1), current_max)
            at = places[0]
            brought = rescale(brought, _initial_max(p, at, running_max), current_max)
            if brought is not None:
                d_state[at.batch, at.heads] = brought.view(d_state[at.batch, at.heads].shape)
    return dq, dk, dv, dw_q, dw_k, d_state


@causal_linear.register_fake
def _(q, k, v, w_q, w_k, padding, segments, state, running_max, feature_map, chunk_size, eps, diagonal, batched=False):
    p = _problem(q, k, v, w_q, w_k, padding, segments, feature_map, chunk_size, diagonal, batched)
    return _empty_outputs(p, q, k, v)


@causal_linear_backward.register_fake
def _(d_out, d_den, q, k, v, w_q, w_k, padding, segments, running_max, out, den, states, block_max, learned, *options):
    return _empty_gradients(q, k, v, w_q, w_k, states, learned)


def _setup_context(ctx, inputs, output):
    q, k, v, w_q, w_k, padding, segments, state, running_max, *options = inputs
    ctx.save_for_backward(q, k, v, w_q, w_k, padding, segments, running_max, *output)
    ctx.options, ctx.from_state = options, state is not None
    # Zeros for the states, which nobody uses but the backward, would be as many numbers as those.
    ctx.set_materialize_grads(False)


def _backward(ctx, d_out, d_den, d_states, d_levels):
    saved = ctx.saved_tensors  # once: gradient checkpointing refuses a second look
    if d_out is None:
        d_out = torch.zeros_like(saved[8])
    learned = any(ctx.needs_input_grad[3:5])
    dq, dk, dv, dw_q, dw_k, d_state = causal_linear_backward(d_out, d_den, *saved, learned, *ctx.options)
    w_q, w_k = (w if learned else None for w in saved[3:5])
    return (
        *(dq, dk, dv, None if w_q is None else dw_q, None if w_k is None else dw_k),
        *(None, None, d_state if ctx.from_state else None, None),
        *(None, None, None, None, None),
    )


causal_linear.register_autograd(_backward, setup_context=_setup_context)
