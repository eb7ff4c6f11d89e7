"""Softmax over sinks and a window, linear attention over all else, with one denominator: O(N (sinks + window + F)).

The linear part is causal linear attention whose keys lag behind the queries by the window, and of which sinks are left
out as if they were padding. In decoding, a state holds the keys of the sinks and of the window, and sums over those
that have left it.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.attention import (
    Projection,
    absorb,
    contiguous_segments,
    dense_is_cheaper,
    last_queries,
    padding_of,
    project,
    projections,
    read_sums,
    sums_shapes,
)
from attn_plugins.ops.linear.features import FEATURE_MAPS, Prepared, moved
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, scores
from attn_plugins.ops.softmax.batched import batched_pattern_attention
from attn_plugins.ops.softmax.patterns.band import Band, in_row
from attn_plugins.ops.softmax.tile_engine import SoftmaxParts
from attn_plugins.ops.softmax.tiles import Pattern, dense_pattern, tiled_attention

BEFORE_SINKS = """write num_sink_tokens: 0 into the rule, and for each weight window_gate one of the name \
log_linear_factor with softplus(-window_gate); or load the model with attn_plugin=None and swap it anew"""
"""What to do with a model that was saved when the window had a factor and no sinks."""


class Forms(NamedTuple):
    """What computes the softmax and the sums that are joined."""

    over_pattern: Callable[..., SoftmaxParts]
    """With the arguments of :func:`attn_plugins.ops.softmax.tiles.tiled_attention`, ``return_lse`` among them."""
    over_sums: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """With those of :func:`causal_sums`."""
    few_queries: bool = False
    """Whether it computes few queries too, for which the definition in plain PyTorch costs less."""


Prepare = Callable[..., tuple[Prepared, dict[str, Any]]]
"""(queries, keys) -> what the linear part takes of them, and the other options of linear_window_attention. With
``since``, of one token, as :func:`attn_plugins.ops.linear.features.prepare`."""

WindowStep = Callable[..., tuple[torch.Tensor, torch.Tensor]]
"""(the query and the key that leaves the window, prepared by nothing but ``moves``, so that scores are of them too;
k_BG1D, v_BG1V; the state's tensors, without the token; what :func:`_places` says; options) -> (out_BH1V in the dtype of
v, new sums); the token is not written."""


def dense_linear_window(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    prepared: Prepared,
    mask: AttentionMask,
    *,
    window_size: int,
    num_sink_tokens: int,
    log_factor_H: torch.Tensor,
    branch: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix of weights.

    Args:
        prepared: queries and keys for the linear part.
        num_sink_tokens: first real tokens of a row or segment that belong to every window.
        log_factor_H: the logarithm of the linear part's factor.
        branch: "both", or the only one that takes part, "window" or "linear".

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    visible, heads = mask.dense(), q_BHQD.shape[1]
    near = dense_pattern(mask, Band(window_size, window_size - 1, num_first=num_sink_tokens))
    a_BHQK = torch.zeros((), dtype=accumulation_dtype(q_BHQD, k_BGKD), device=q_BHQD.device)
    if branch != "linear":
        s_BHQK = scores(q_BHQD, k_BGKD, scale=scale).masked_fill(~near, -torch.inf)
        top = s_BHQK.max(dim=-1, keepdim=True).values
        a_BHQK = torch.exp(s_BHQK - torch.where(top == -torch.inf, 0.0, top))
    if branch != "window":
        phi = FEATURE_MAPS[prepared.options["feature_map"]].features
        fq_BHQF = phi(project(prepared.q_BHQD, prepared.options.get("query_projection")))
        fk_BGKF = phi(project(prepared.k_BGKD, prepared.options.get("key_projection")))
        far_BHQK = (fq_BHQF @ expand_heads(fk_BGKF, heads).mT).masked_fill(~(visible & ~near), 0.0)
        factor = 1.0 if branch == "linear" else log_factor_H.to(far_BHQK.dtype).exp().view(-1, 1, 1)
        a_BHQK = a_BHQK + factor * far_BHQK
    total = a_BHQK.sum(dim=-1, keepdim=True)
    # The window's largest weight is 1: only the linear part alone may add up to nothing.
    total = total + prepared.options["eps"] if branch == "linear" else total.masked_fill(total == 0, 1.0)
    weights_BHQK = a_BHQK / total
    return (weights_BHQK @ expand_heads(v_BGKV, heads).to(weights_BHQK.dtype)).to(v_BGKV.dtype), weights_BHQK


def linear_window_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    prepared: Prepared,
    mask: AttentionMask,
    *,
    window_size: int,
    num_sink_tokens: int,
    log_factor_H: torch.Tensor,
    branch: str,
    scale: float,
    chunk_size: int,
    forms: Forms,
) -> torch.Tensor:
    """The same in O(Q (num_sink_tokens + window_size + F)) time and linear memory: out_BHQV in the dtype of v.
    Differentiable once.

    Args:
        forms: what computes both parts.

    Raises:
        ValueError: a packed segment goes on after another one began.
    """
    linear = (prepared.options["feature_map"], prepared.options.get("query_projection"))
    if not forms.few_queries and dense_is_cheaper(prepared.q_BHQD, v_BGKV, *linear):
        return dense_linear_window(
            q_BHQD,
            k_BGKD,
            v_BGKV,
            prepared,
            mask,
            window_size=window_size,
            num_sink_tokens=num_sink_tokens,
            log_factor_H=log_factor_H,
            branch=branch,
            scale=scale,
        )[0]
    near = far = None
    if branch != "linear":
        band = Band(window_size, window_size - 1, num_first=num_sink_tokens)
        near = near_parts(q_BHQD, k_BGKD, v_BGKV, mask, band, scale, forms)
    if branch != "window":
        enters_BK = padding_of(mask)
        if num_sink_tokens:
            no_sink_BK = mask.cached(("no sink", num_sink_tokens), lambda: _no_sink(mask, num_sink_tokens))
            enters_BK = no_sink_BK if enters_BK is None else enters_BK & no_sink_BK
        far = far_sums(prepared, v_BGKV, mask, enters_BK, window_size, chunk_size, None, forms)
    return joined(near, far, log_factor_H, prepared.options["eps"]).to(v_BGKV.dtype)


def causal_sums(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    w_q: Projection,
    w_k: Projection,
    seen_BK: torch.Tensor | None,
    segments_BK: torch.Tensor | None,
    *,
    feature_map: str,
    chunk_size: int,
    cached: Callable[[Hashable, Callable[[], Any]], Any],
    sums_BGFV: torch.Tensor | None = None,
    batched: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal linear attention without the division, for the last Q of K tokens.

    Args:
        seen_BK: the keys that count; None is all.
        segments_BK: as of :class:`attn_plugins.core.mask.AttentionMask`, in one piece each.
        cached: memoises under a name what follows from these two, for all layers of a forward pass.
        sums_BGFV: over tokens before them, which are of the first one's segment.

    Returns:
        (num_BHQV, den_BHQ): sums of phi(q).phi(k) v, and without v, in at least float32.
    """
    tokens = (q_BHQD, k_BGKD, v_BGKV, w_q, w_k, seen_BK, segments_BK)
    return last_queries(*tokens, feature_map, chunk_size, None, sums_BGFV, batched=batched)


PLAIN = Forms(tiled_attention, causal_sums)
"""Plain PyTorch for CPUs."""
BATCHED = Forms(batched_pattern_attention, functools.partial(causal_sums, batched=True))
"""All tiles of the window at once, and blocks as large as on devices that are not a CPU."""


def _under(mask: AttentionMask, name: Hashable) -> Callable[[Hashable, Callable[[], Any]], Any]:
    return lambda key, compute: mask.cached((name, key), compute)


class _Sums(NamedTuple):
    """What one part adds to the output, before both are divided by their denominators together."""

    num_BHQV: torch.Tensor
    den_BHQ1: torch.Tensor


def _no_sink(mask: AttentionMask, num_sink_tokens: int) -> torch.Tensor:
    """Which keys are none of the first ones of their row or segment, (B, K)."""
    position_BK = in_row(mask, torch.arange(mask.kv_length, device=mask.device).unsqueeze(0))
    return (position_BK >= num_sink_tokens).expand(mask.batch_size, -1)


def near_parts(q, k, v, mask: AttentionMask, band: Pattern, scale: float, forms: Forms) -> SoftmaxParts:
    v = v.to(accumulation_dtype(q, k, v))
    return forms.over_pattern(q, k, v, mask, band, scale=scale, return_lse=True)


def joined(near: SoftmaxParts | None, far: _Sums | None, log_factor_H: torch.Tensor, eps: float) -> torch.Tensor:
    """Both parts under one denominator, or the one that there is."""
    if far is None:
        assert near is not None
        return near.out_BHQV
    if near is None:
        return far.num_BHQV / (far.den_BHQ1 + eps)
    weight, factor = torch.exp(near.lse_BHQ1 - near.max_BHQ1), log_factor_H.to(far.den_BHQ1.dtype).exp().view(-1, 1, 1)
    whole = torch.addcmul(weight, far.den_BHQ1, factor)
    num = torch.addcmul(near.out_BHQV * weight, far.num_BHQV, factor)
    return num / whole.masked_fill(whole == 0, 1.0)


def far_sums(
    prepared: Prepared,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    enters_BK: torch.Tensor | None,
    window_size: int,
    chunk_size: int,
    sums: torch.Tensor | None,
    forms: Forms,
) -> _Sums:
    """Sums over the keys outside the window, those that enter: of phi(q).phi(k) v, and without v."""
    segments_BK, v_BGKV = contiguous_segments(mask), v_BGKV.to(accumulation_dtype(*prepared[:2], v_BGKV))
    tokens = (prepared.q_BHQD, prepared.k_BGKD, v_BGKV)
    before, sizes = mask.q_offset - mask.kv_offset, (window_size, chunk_size, forms)
    cached = _under(mask, (window_size, False))
    far, total = _lagging(*tokens, enters_BK, segments_BK, prepared.options, before, *sizes, cached, sums)
    if not mask.causal:
        q, k, v = (x.flip(2) for x in tokens)
        enters_BK, segments_BK = (None if x is None else x.flip(1) for x in (enters_BK, segments_BK))
        behind = mask.kv_length - before - mask.q_length
        cached = _under(mask, (window_size, True))
        after, total_after = _lagging(q, k, v, enters_BK, segments_BK, prepared.options, behind, *sizes, cached)
        far, total = far + after.flip(2), total + total_after.flip(2)
    return _Sums(far, total)


def _lagging(
    q_BHQD, k_BGKD, v_BGKV, enters_BK, segments_BK, options, before, window_size, chunk_size, forms, cached, sums=None
):
    """:func:`far_sums` for keys that are ``window_size`` or more before a query; query i is at key ``before + i``."""
    (batch, heads, queries, _), value_dim = q_BHQD.shape, v_BGKV.shape[3]
    keys = before + queries - window_size
    if keys <= 0:
        return v_BGKV.new_zeros(batch, heads, queries, value_dim), v_BGKV.new_zeros(batch, heads, queries, 1)
    alone = max(0, window_size - before)  # queries whose window holds all keys before them
    # Key j enters together with the query at j + window_size, if that is of its segment, and as one of that segment.
    seen = None if enters_BK is None else enters_BK[:, :keys]
    labels = None
    if segments_BK is not None:
        labels = segments_BK[:, window_size : window_size + keys]
        same = segments_BK[:, :keys] == labels
        seen = same if seen is None else seen & same
    projections = [options.get(name) for name in ("query_projection", "key_projection")]
    w_q, w_k = (None if w is None else w.to(v_BGKV.dtype) for w in projections)
    q, k, v = q_BHQD[:, :, alone:], k_BGKD[:, :, :keys], v_BGKV[:, :, :keys]
    how = {"feature_map": options["feature_map"], "chunk_size": chunk_size, "cached": cached}
    if sums is not None:
        how["sums_BGFV"] = sums
    far, total = forms.over_sums(q, k, v, w_q, w_k, seen, labels, **how)
    return pad(far, (0, 0, alone, 0)), pad(total.unsqueeze(3), (0, 0, alone, 0))


def linear_window_attention_from(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
    *,
    chunk_size: int,
    forms: Forms,
    step: WindowStep | None = None,
) -> torch.Tensor:
    """As :func:`linear_window_attention`, causal, for the last Q of K new tokens.

    Args:
        mask: of all tokens, which may end with some that come later.
        state: its window and first keys are the attention's; ``sums`` are over the other tokens before the window,
            (B, G, F, V + 1). It takes the new tokens in.
        step: what computes with one token, in place of PyTorch's operations.

    Returns:
        out_BHQV in the dtype of v.
    """

    def attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not state.tensors:
            state.start(k, v, **sums_shapes(prepare(q, k)[0], v))
        state.keep_first(k, v, mask)
        if k.shape[2] == 1:
            return _one_token(q, k, v, mask, state, prepare, step)
        number, before = k.shape[2], min(state.length, state.window)
        first, left = state.length - before, before + number - state.window
        position = torch.arange(first, state.length + number, device=k.device)
        if before:
            places = position[:before] % state.window + state.num_first
            k, v = (torch.cat([state.tensors[x].index_select(2, places), new], 2) for x, new in (("k", k), ("v", v)))
        queries = q.shape[2]
        place = ("near", first, queries, len(position), state.num_first, state.window)
        near, enters_BK, seen_BQS = mask.cached(place, lambda: _around(mask, queries, position, state))
        prepared, options = prepare(q, k)
        branch, scale, window_size = options["branch"], options["scale"], options["window_size"]
        parts = far = None
        if branch != "linear":
            parts = near_parts(q, k, v, near, Band(window_size, window_size - 1), scale, forms)
            if sinks := seen_BQS.shape[2]:
                k_BGSD, v_BGSV = state.tensors["k"][:, :, :sinks], state.tensors["v"][:, :, :sinks]
                parts = _with_sinks(parts, q, k_BGSD, v_BGSV, seen_BQS, scale)
        sums = state.tensors["sums"]
        if branch != "window":
            far = far_sums(prepared, v, near, enters_BK, window_size, chunk_size, sums, forms)
        out = joined(parts, far, options["log_factor_H"], prepared.options["eps"]).to(v.dtype)
        if left > 0:
            gone = (prepared.k_BGKD[:, :, :left], v[:, :, :left], projections(prepared)[1])
            entering = None if enters_BK is None else enters_BK[:, :left]
            sums, _ = absorb(sums, None, *gone, prepared.options["feature_map"], entering)
        last = slice(max(before, left), None)
        ring = position[last] % state.window + state.num_first
        state.write("k", 2, ring, k[:, :, last])
        state.write("v", 2, ring, v[:, :, last])
        state.commit(number, sums=sums if left > 0 else None)
        return out

    return chunked_prefill(attend_chunk, q_BHQD, k_BGKD, v_BGKV)


def _around(
    mask: AttentionMask, queries: int, position: torch.Tensor, state: Sums
) -> tuple[AttentionMask, torch.Tensor | None, torch.Tensor]:
    """What holds for the tokens at these positions, which follow one another, the last of them queries.

    Returns:
        (their mask; which of them enter the sums when they leave the window, (B, K); which sinks that some window
        has left behind each query sees, (B or 1, Q, S)).
    """
    padding_BK = None if mask.padding_BK is None else mask.padding_BK.index_select(1, position)
    sizes = (mask.batch_size, queries, len(position))
    near = AttentionMask(*sizes, causal=True, padding_BK=padding_BK, device=mask.device)
    behind = max(0, state.length + len(position) - min(state.length, state.window) - state.window)
    enters_BK = padding_of(near)
    sink_BS, not_padding_BS = state.first_positions(mask, min(state.num_first, behind))
    if sink_BS.shape[1]:
        no_sink_BK = (position - sink_BS[:, :1] >= state.num_first).expand(mask.batch_size, -1)
        enters_BK = no_sink_BK if enters_BK is None else enters_BK & no_sink_BK
    behind_BQS = sink_BS.unsqueeze(1) <= (position[-queries:] - state.window).view(1, -1, 1)
    return near, enters_BK, behind_BQS & not_padding_BS.unsqueeze(1)


def _with_sinks(
    near: SoftmaxParts,
    q_BHQD: torch.Tensor,
    k_BGSD: torch.Tensor,
    v_BGSV: torch.Tensor,
    seen_BQS: torch.Tensor,
    scale: float,
) -> SoftmaxParts:
    """The same softmax over these keys too."""
    hidden = ~seen_BQS.unsqueeze(1)
    s_BHQS = scores(q_BHQD, k_BGSD, scale=scale).masked_fill(hidden, MASKED_SCORE)
    own_max = near.max_BHQ1.masked_fill(near.lse_BHQ1 == -torch.inf, MASKED_SCORE)
    top = torch.maximum(own_max, s_BHQS.amax(dim=-1, keepdim=True))
    e_BHQS, weight = torch.exp(s_BHQS - top).masked_fill(hidden, 0.0), torch.exp(near.lse_BHQ1 - top)
    total = weight + e_BHQS.sum(dim=-1, keepdim=True)
    v_BHSV, nothing = expand_heads(v_BGSV, q_BHQD.shape[1]).to(e_BHQS.dtype), total == 0
    total = total.masked_fill(nothing, 1.0)
    out_BHQV = (near.out_BHQV * weight + e_BHQS @ v_BHSV) / total
    return SoftmaxParts(out_BHQV, (top + total.log()).masked_fill(nothing, -torch.inf), top)


def _one_token(
    q_BH1D: torch.Tensor,
    k_BG1D: torch.Tensor,
    v_BG1V: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
    step: WindowStep | None,
) -> torch.Tensor:
    places = mask.cached(("one", state.window, state.num_first), lambda: _places(mask, state))
    place, seen, leaves = places
    k = state.tensors["k"].index_select(2, place)
    prepared, options = prepare(q_BH1D, k, since=state.position)
    as_given = prepared.q_BHQD is q_BH1D and prepared.k_BGKD is k and "query_projection" not in prepared.options
    if step is not None and as_given:
        out, sums = step(prepared, k_BG1D, v_BG1V, state.tensors, places, options)
        state.write("k", 2, place, k_BG1D)
        state.write("v", 2, place, v_BG1V)
        state.commit(1, sums=sums)
        return out
    prepared, v = moved(prepared), state.tensors["v"].index_select(2, place)
    (q, k, linear), (w_q, w_k) = prepared, projections(prepared)
    sums, _ = absorb(state.tensors["sums"], None, k, v, w_k, linear["feature_map"], leaves)
    state.write("k", 2, place, k_BG1D)
    state.write("v", 2, place, v_BG1V)
    state.commit(1, sums=sums)

    dtype, (batch, groups, _, value_dim), branch = accumulation_dtype(q, k, v), v.shape, options["branch"]
    total = sums.new_zeros(())
    if branch != "window":
        total = read_sums(q, w_q, linear["feature_map"], sums, None)
        if branch == "both":
            total = total * options["log_factor_H"].to(dtype).exp().view(groups, -1, 1)
    if branch != "linear":
        k, v, hidden = state.tensors["k"].to(dtype), state.tensors["v"].to(dtype), ~seen[:, None, None]
        s = (q_BH1D.to(dtype).reshape(batch, groups, -1, k.shape[3]) * options["scale"]) @ k.mT
        s = s.masked_fill(hidden, MASKED_SCORE)
        e = torch.exp(s - s.amax(dim=3, keepdim=True)).masked_fill(hidden, 0.0)
        total = total + torch.cat([e @ v, e.sum(dim=3, keepdim=True)], dim=3)
    num, den = total[..., :-1], total[..., -1:]
    den = den + linear["eps"] if branch == "linear" else den.masked_fill(den == 0, 1.0)
    return (num / den).view(batch, -1, 1, value_dim).to(v_BG1V.dtype)


def _places(mask: AttentionMask, state: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the next token goes, (1,), and, each for B or 1 rows, which places then hold a key that it sees, and
    whether the one there before enters the sums, (., 1)."""
    window = state.window
    now = torch.arange(1, device=mask.device) + state.position
    place = torch.arange(window, device=mask.device)
    position = torch.cat([now - (now - place) % window, now - window])
    not_padding = (position >= 0).unsqueeze(0)
    if mask.padding_BK is not None:
        not_padding = not_padding & mask.padding_BK.index_select(1, position.clamp_min(0))
    seen, leaves = not_padding[:, :-1], not_padding[:, -1:]
    if state.num_first:
        sink_BS, not_padding_BS = state.first_positions(mask, state.num_first)
        seen = torch.cat([not_padding_BS & (sink_BS <= now - window), seen], dim=1)
        leaves = leaves & (now - window - sink_BS[:, :1] >= state.num_first)
    return now % window + state.num_first, seen, leaves
