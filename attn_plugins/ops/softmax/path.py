"""Softmax attention whose keys are reflected by every token on the path to a query (PaTH), by halves.

A token t does ``k <- k - beta_t w_t (w_t . k)`` to all keys before it. In a chunk of a few tokens that is a triangular
system; what a chunk does as a whole is a D x D matrix. Then blocks are joined in pairs, 2, 4, 8, ... chunks of them:
queries of a second half, brought back to its start, meet keys of the first half, brought on to its end, in a product of
the usual kind, a softmax of which is merged with the others' by its log-sum-exp. So all pairs cost what they do without
a path, and the matrices O(N D^2 log N).

Letters beside the legend's: S query heads that share a key/value head, P pairs of blocks, R queries of a second half.
Gradients are those of autograd; scores are formed again in the backward.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops import sizes
from attn_plugins.ops.decode.gated_keys import GatedKeys
from attn_plugins.ops.recurrent.chunked import unit
from attn_plugins.ops.reference import (
    MASKED_SCORE,
    accumulation_dtype,
    dense_attention,
    expand_heads,
    with_dropout,
)
from attn_plugins.ops.softmax.forgetting import added_up, between, log_gates, of_tokens
from attn_plugins.ops.softmax.tile_engine import Tile, attend_tiles, slices, visible_tile

SCORES_OF_A_TILE = 2**20
"""Scores of a tile, over all heads, on a CPU."""
LARGEST_TILE = 128
"""Queries of a tile."""


class _Seen(NamedTuple):
    """Which of the earlier tokens one sees: marks of both, (B or 1, N), and what two of them say, which broadcast."""

    of_queries: torch.Tensor
    of_keys: torch.Tensor
    meet: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Steps(NamedTuple):
    """What each token does to the keys before it."""

    w_BGKD: torch.Tensor
    """A direction, of length 1 or less."""
    beta_BGK: torch.Tensor
    """How much of a key along it is taken away, 0 to 2."""
    log_gate_BHK: torch.Tensor | None
    """Logarithm of a forget gate, 0 or less, if there is one."""


def steps_of(
    x: torch.Tensor,
    direction_weight: torch.Tensor,
    beta: tuple[torch.Tensor, torch.Tensor],
    gate: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    paper: bool,
) -> Steps:
    """Steps of tokens, in at least float32.

    Args:
        x: (B, G, K, V), of which each head has its own, or (B, K, E), the same for all.
        direction_weight: (G, D, V) or (G, D, E).
        beta, gate: weight and bias, (G, V or E) and (G,), (H, V or E) and (H,).
        paper: whether beta is a sigmoid, times 2; else it is cut off at 0 and 2, as the logarithm of a gate is at 0.
    """
    dtype = accumulation_dtype(x)
    of_heads = x.to(dtype) if x.ndim == 4 else x.to(dtype).unsqueeze(1)
    w_BGKD = unit(of_heads @ direction_weight.to(dtype).mT)
    z_BGK = of_tokens(x, *beta, dtype)
    beta_BGK = 2 * (torch.sigmoid(z_BGK) if paper else z_BGK.clamp(0, 1))
    return Steps(w_BGKD, beta_BGK, None if gate is None else log_gates(of_tokens(x, *gate, dtype), paper=paper))


class _Merged(NamedTuple):
    """A part of a softmax attention, in groups of heads."""

    out_BGSNV: torch.Tensor
    lse_BGSN1: torch.Tensor
    """MASKED_SCORE or about that where a query sees nothing of this part."""


class _Scores(NamedTuple):
    scale: float
    softcap: float | None
    dropout: float

    def __call__(self, s: torch.Tensor) -> torch.Tensor:
        s = s * self.scale
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)


def check(mask: AttentionMask) -> None:
    """Raise a ValueError where keys after a query may be visible."""
    if not mask.causal:
        raise ValueError(f"a path leads from a key to a later query; it needs a causal mask, got {mask}")


def dense_path_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    steps: Steps,
    *,
    scale: float,
    softcap: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token: (out_BHQV in the dtype of v, weights_BHQK in at least float32)."""
    check(mask)
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    (heads, queries), keys = q_BHQD.shape[1:3], k_BGKD.shape[2]
    beta_BGK = steps.beta_BGK if mask.padding_BK is None else steps.beta_BGK * mask.padding_BK.unsqueeze(1)
    moved, rows = k_BGKD[:, :, :0].to(dtype), []
    for i in range(keys):
        w = steps.w_BGKD[:, :, i : i + 1]
        moved = moved - (moved @ w.mT) * (beta_BGK[:, :, i, None, None] * w)
        moved = torch.cat([moved, k_BGKD[:, :, i : i + 1].to(dtype)], dim=2)
        if i >= keys - queries:
            q = q_BHQD[:, :, i - (keys - queries)].unsqueeze(2).to(dtype)
            rows.append(pad(q @ expand_heads(moved, heads).mT, (0, keys - i - 1)))
    s_BHQK = _Scores(scale, softcap, 0.0)(torch.cat(rows, dim=2))
    if steps.log_gate_BHK is not None:
        decay_BHK = added_up(steps.log_gate_BHK, mask.padding_BK)
        s_BHQK = s_BHQK + between(decay_BHK, mask, slice(None), slice(None)).to(dtype)
    nothing = q_BHQD[..., :1] * 0
    zeros_BG = k_BGKD[..., :1] * 0
    return dense_attention(nothing, zeros_BG, v_BGKV, mask.dense(), scale=1.0, position_bias=s_BHQK, **options)


def path_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    steps: Steps,
    *,
    chunk_size: int,
    batched: bool,
    scale: float,
    dropout: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    state: GatedKeys | None = None,
) -> torch.Tensor:
    """The same by halves, for the last Q of K tokens.

    Args:
        chunk_size: tokens of a triangular system.
        batched: whether pairs of blocks are done together, for devices that are not a CPU, or a tile at a time.
        state: all earlier tokens, with their keys as the last of them has left these; ``mask`` is then of them too. It
            takes the new ones in.

    Returns:
        out_BHQV in the dtype of v. Sums are taken in at least float32.
    """
    check(mask)
    dtype, groups = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV), k_BGKD.shape[1]
    queries, keys = q_BHQD.shape[2], k_BGKD.shape[2]
    size = min(chunk_size, keys)
    padded, scores = -keys % size, _Scores(scale, softcap, dropout)
    q = pad(q_BHQD.to(dtype), (0, 0, keys - queries, padded)).unflatten(1, (groups, -1))
    k, v, w = (pad(x.to(dtype), (0, 0, 0, padded)) for x in (k_BGKD, v_BGKV, steps.w_BGKD))
    before: Any = 0 if state is None else state.position + 0  # a static cache's counter moves on
    beta_BGK, decay, real = steps.beta_BGK, None, mask.padding_BK
    if real is not None:
        real = real.index_select(1, torch.arange(keys, device=real.device) + before)
        beta_BGK = beta_BGK * real.unsqueeze(1)
    if steps.log_gate_BHK is not None:
        decay = pad(added_up(steps.log_gate_BHK, real), (0, padded)).unflatten(1, (groups, -1))
    beta = pad(beta_BGK.to(dtype), (0, padded))
    seen = _seen(mask, real, before, keys, padded)
    local, q, k_on, whole = _chunks(q, k, v, w, beta, decay, size, scores, seen)
    parts = [local]
    while size < q.shape[3]:
        level = _pairs if batched else _tiles
        parts.append(level(q, k_on, v, decay, size, scores, seen, keys - queries))
        q, k_on, whole = _joined(q, k_on, whole, size)
        size *= 2
    if state is not None:
        if state.begun:
            parts.append(_from_state(q[:, :, :, :keys], decay, mask, state, scores, keys - queries, padded))
            state.move(whole.squeeze(2))
        gates = v_BGKV.new_zeros(len(v), 0, keys, dtype=dtype) if steps.log_gate_BHK is None else steps.log_gate_BHK
        state.append(k_on[:, :, :keys], v_BGKV, gates, mask)
    out_BHNV = _merge(parts, sinks)
    return out_BHNV[:, :, keys - queries : keys].to(v_BGKV.dtype)


def _seen(mask: AttentionMask, real_BK: torch.Tensor | None, before: Any, keys: int, padded: int) -> _Seen | None:
    """None where all earlier tokens are visible."""
    if mask.plain and mask.segments_BK is None and real_BK is None:
        return None
    if not mask.plain:
        index, unasked = torch.arange(keys + padded, device=mask.device).unsqueeze(0), keys - mask.q_length
        return _Seen(index, index, lambda q_index, k_index: mask.visible(q_index - unasked, k_index + before))
    # Keys of the same text, of which padding is none: one comparison, of tables that are cut and not gathered from.
    text_BK = torch.zeros(1, keys, dtype=torch.long, device=mask.device)
    text_BK = pad(text_BK if mask.segments_BK is None else mask.segments_BK.long(), (0, padded))
    hidden = torch.iinfo(torch.long).min
    shown_BK = text_BK if real_BK is None else text_BK.masked_fill(~pad(real_BK, (0, padded)), hidden)
    return _Seen(text_BK, shown_BK, torch.eq)


def _chunks(q, k, v, w, beta, decay, size, scores, seen):
    """(Attention within chunks, queries brought back to the start of theirs, keys on to its end, what each chunk does).

    The last is a matrix for keys before the chunk, (B, G, chunks, D, D).
    """
    q, k, v, w = (x.unflatten(-2, (-1, size)) for x in (q, k, v, w))
    beta = beta.unflatten(-1, (-1, size)).unsqueeze(-1)
    by_w, by_k = (w @ w.mT).tril(-1), (w @ k.mT).tril(-1)
    system = torch.eye(size, dtype=w.dtype, device=w.device) + beta * by_w
    solved = torch.linalg.solve_triangular(system, beta * torch.cat([w, by_k], dim=-1), upper=False, unitriangular=True)
    taken, taken_of_keys = solved.split([w.shape[-1], size], dim=-1)
    along = (q @ w.mT.unsqueeze(2)).tril()
    s = scores(q @ k.mT.unsqueeze(2) - along @ taken_of_keys.unsqueeze(2))
    place = torch.arange(size, device=w.device)
    shown = (place <= place.unsqueeze(1))[None, None]
    if seen is not None:
        q_mark, k_mark = (x.unflatten(1, (-1, size)) for x in (seen.of_queries, seen.of_keys))
        shown = shown & seen.meet(q_mark.unsqueeze(3), k_mark.unsqueeze(2))
    if decay is not None:
        own = decay.unflatten(-1, (-1, size))
        s = s + (own.unsqueeze(-1) - own.unsqueeze(-2)).to(s.dtype)
    local = _softmax(s, v, shown, scores.dropout)
    back, on = q - along @ taken.unsqueeze(2), k - taken_of_keys.mT @ w
    whole = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device) - w.mT @ taken
    return _Merged(*(x.flatten(3, 4) for x in local)), back.flatten(3, 4), on.flatten(2, 3), whole


def _softmax(s, v, shown, dropout) -> _Merged:
    """Of scores (B, G, S, P, R, K) over values (B, G, P, K, V); ``shown`` is (B or 1, P, R, K)."""
    if shown is not None:
        s = s.masked_fill(~shown[:, None, None], MASKED_SCORE)
    lse = s.logsumexp(dim=-1, keepdim=True)
    weights = with_dropout((s - lse).exp(), dropout)
    return _Merged(weights @ v.unsqueeze(2), lse)


def _joined(q, k, whole, size):
    """Queries, keys and matrices of blocks of twice the size."""
    length = q.shape[3]
    full = length // (2 * size)
    end = full * 2 * size
    joined = []
    for low, high, blocks, number in ((0, end, size, full), (end, length, size, 1)):
        first = 0 if low == 0 else 2 * full
        q_here, k_here = q[:, :, :, low:high], k[:, :, low:high]
        if high - low > blocks:
            one, other = (whole[:, :, at : at + 2 * number : 2] for at in (first, first + 1))
            rest = (high - low) // number - blocks
            q1, q2 = q_here.unflatten(3, (number, -1)).split([blocks, rest], dim=4)
            k1, k2 = k_here.unflatten(2, (number, -1)).split([blocks, rest], dim=3)
            q_here = torch.cat([q1, q2 @ one.unsqueeze(2)], dim=4).flatten(3, 4)
            k_here = torch.cat([k1 @ other.mT, k2], dim=3).flatten(2, 3)
            joined.append((q_here, k_here, other @ one))
        elif high > low:
            joined.append((q_here, k_here, whole[:, :, first:]))
    if len(joined) == 1:
        return joined[0]
    return tuple(torch.cat(both, dim=dim) for both, dim in zip(zip(*joined, strict=True), (3, 2, 2), strict=True))


def _tiles(q, k, v, decay, size, scores, seen, unasked) -> _Merged:
    """Second halves of pairs of blocks to the first ones, a tile at a time."""
    length = q.shape[3]
    heads = q.shape[0] * q.shape[1] * q.shape[2]
    rows = max(1, min(LARGEST_TILE, SCORES_OF_A_TILE // (heads * size)))

    def tiles() -> Iterator[Tile]:
        for low in range(0, length - size, 2 * size):
            keys = slice(low, low + size)
            middle = max(keys.stop, unasked)
            for part in slices(max(0, min(low + 2 * size, length) - middle), rows):
                queries = slice(part.start + middle, part.stop + middle)
                if seen is None:
                    yield Tile(queries, (keys,), None, None, None)
                    continue
                shown = seen.meet(seen.of_queries[:, queries].unsqueeze(2), seen.of_keys[:, keys].unsqueeze(1))
                if bool(shown.any()):
                    yield visible_tile(shown, queries, keys)

    decay_BHK = None if decay is None else decay.flatten(1, 2)
    made = attend_tiles(
        q.flatten(1, 2), k, v, tiles, decay_BHK=decay_BHK, return_lse=True, **scores._asdict()
    )  # fmt: skip
    # A query that is in no tile has seen nothing.
    lse = made.lse_BHQ1.clamp(min=MASKED_SCORE)
    return _Merged(*(x.unflatten(1, q.shape[1:3]) for x in (made.out_BHQV, lse)))


def _pairs(q, k, v, decay, size, scores, seen, unasked) -> _Merged:
    """The same for all pairs of blocks together."""
    length = q.shape[3]
    full = length // (2 * size)
    end = full * 2 * size
    parts = []
    for low, high, number in ((0, end, full), (end, length, 1)):
        if high - low <= size:
            if high > low:
                parts.append(_nothing(q, v, high - low))
            continue
        q2 = q[:, :, :, low:high].unflatten(3, (number, -1))[..., size:, :]
        k1, v1 = (x[:, :, low:high].unflatten(2, (number, -1))[..., :size, :] for x in (k, v))
        c1 = c2 = None
        if decay is not None:
            c = decay[..., low:high].unflatten(-1, (number, -1))
            c1, c2 = c[..., :size], c[..., size:]
        here = None
        if seen is not None:
            q_mark, k_mark = (x[:, low:high].unflatten(1, (number, -1)) for x in (seen.of_queries, seen.of_keys))
            here = _Seen(q_mark[..., size:], k_mark[..., :size], seen.meet)
        made = _in_pieces(q2, k1, v1, c2, c1, here, scores)
        empty = _nothing(q, v, number * size)
        both = [
            torch.cat([a.unflatten(3, (number, size)), b], dim=4).flatten(3, 4)
            for a, b in zip(empty, made, strict=True)
        ]
        parts.append(_Merged(*both))
    return parts[0] if len(parts) == 1 else _Merged(*(torch.cat(both, dim=3) for both in zip(*parts, strict=True)))


def _nothing(q, v, number) -> _Merged:
    shape = (*q.shape[:3], number)
    return _Merged(q.new_zeros(*shape, v.shape[-1]), q.new_full((*shape, 1), MASKED_SCORE))


def _in_pieces(q, k, v, c_q, c_k, seen, scores) -> _Merged:
    """Softmax attention of (B, G, S, P, R, D) to (B, G, P, K, D), in few large pieces.

    Args:
        c_q, c_k: log gates added up, (B, G, S, P, R) and (B, G, S, P, K), or None.
        seen: with marks (B or 1, P, R) and (B or 1, P, K); None where all are visible.
    """
    pairs, rows = q.shape[3:5]
    copies = 2 if c_q is None else 4
    scores_of_a_row = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[3] * copies
    at_once = max(1, sizes.scores_at_once(q.device) // max(1, scores_of_a_row))

    def attend(some: slice, own: slice) -> torch.Tensor:
        s = scores(q[:, :, :, some, own] @ k[:, :, some].mT.unsqueeze(2))
        if c_q is not None:
            s = s + (c_q[..., some, own].unsqueeze(-1) - c_k[..., some, :].unsqueeze(-2)).to(s.dtype)
        shown = None
        if seen is not None:
            shown = seen.meet(seen.of_queries[:, some, own].unsqueeze(3), seen.of_keys[:, some].unsqueeze(2))
        return torch.cat(_softmax(s, v[:, :, some], shown, scores.dropout), dim=-1)

    def piece(some: slice, own: slice) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return attend(some, own)
        return checkpoint(attend, some, own, use_reentrant=False, preserve_rng_state=scores.dropout > 0)

    if pairs * rows <= at_once or rows <= at_once:
        outs = [piece(some, slice(0, rows)) for some in slices(pairs, max(1, at_once // rows))]
    else:
        outs = [torch.cat([piece(some, own) for own in slices(rows, at_once)], dim=4) for some in slices(pairs, 1)]
    made = outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)
    return _Merged(*made.split([v.shape[-1], 1], dim=-1))


def _from_state(q, decay, mask, state, scores, unasked, padded) -> _Merged:
    """To the keys of earlier tokens, which are at the start of the new ones."""
    k, v, gate, held = state.seen_by(mask)
    c_q = c_k = None
    if decay is not None:
        not_padding = state.tensors["not_padding"][:, : k.shape[2]]
        c_k = added_up(gate, not_padding).unflatten(1, q.shape[1:3]).unsqueeze(3)
        c_q = (decay[..., : q.shape[3]] + c_k[..., 0, -1:]).unsqueeze(3)
    index = torch.arange(q.shape[3], device=q.device).view(1, 1, -1) - unasked
    keys = torch.arange(k.shape[2], device=q.device).view(1, 1, -1)
    k, v = (x.to(q.dtype).unsqueeze(2) for x in (k, v))
    made = _in_pieces(q.unsqueeze(3), k, v, c_q, c_k, _Seen(index, keys, held.visible), scores)
    return _Merged(*(pad(x.squeeze(3), (0, 0, 0, padded)) for x in made))  # rows beyond the end are left out


def _merge(parts, sinks) -> torch.Tensor:
    """out_BHNV of all parts; zeros where a query sees nothing."""
    lse = torch.stack([part.lse_BGSN1 for part in parts])
    top = lse.detach().amax(dim=0)
    nothing = top < MASKED_SCORE / 2
    if sinks is not None:
        sinks = sinks.to(lse.dtype).view(1, *lse.shape[2:4], 1, 1)
        top = torch.maximum(top, sinks.detach())
    shares = (lse - top).exp()
    total = shares.sum(dim=0)
    if sinks is not None:
        total = total + (sinks - top).exp()
    out = sum(share * part.out_BGSNV for share, part in zip(shares, parts, strict=True)) / total
    return out.masked_fill(nothing, 0.0).flatten(1, 2)
