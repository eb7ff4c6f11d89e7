"""Softmax over a window and linear attention over all that has left it, with one denominator: O(N (window + F)).

The linear part is causal linear attention whose keys lag behind the queries by the window. In decoding, a state holds
the keys of the window and sums over those that have left it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.attention import (
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
from attn_plugins.ops.linear.features import FEATURE_MAPS, Prepared
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype, expand_heads, scores
from attn_plugins.ops.softmax.batched import batched_pattern_attention
from attn_plugins.ops.softmax.patterns.band import Band
from attn_plugins.ops.softmax.tiles import tiled_attention

Prepare = Callable[[torch.Tensor, torch.Tensor], tuple[Prepared, dict[str, Any]]]
"""(queries, keys) -> what the linear part takes of them, and the other options of linear_window_attention."""


def dense_linear_window(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    prepared: Prepared,
    mask: AttentionMask,
    *,
    window_size: int,
    factor_H: torch.Tensor,
    branch: str,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, through the whole matrix of weights.

    Args:
        prepared: queries and keys for the linear part.
        factor_H: the window's weight.
        branch: "both", or the only one that takes part, "window" or "linear".

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    q_index = torch.arange(mask.q_length, device=q_BHQD.device).view(1, 1, -1, 1)
    k_index = torch.arange(mask.kv_length, device=q_BHQD.device)
    near = Band(window_size, window_size - 1).sees(mask, q_index, k_index)
    visible, heads = mask.dense(), q_BHQD.shape[1]
    a_BHQK = torch.zeros((), dtype=accumulation_dtype(q_BHQD, k_BGKD), device=q_BHQD.device)
    if branch != "linear":
        s_BHQK = scores(q_BHQD, k_BGKD, scale=scale).masked_fill(~(visible & near), -torch.inf)
        top = s_BHQK.max(dim=-1, keepdim=True).values
        a_BHQK = torch.exp(s_BHQK - torch.where(top == -torch.inf, 0.0, top)) * factor_H.view(-1, 1, 1)
    if branch != "window":
        phi = FEATURE_MAPS[prepared.options["feature_map"]].features
        fq_BHQF = phi(project(prepared.q_BHQD, prepared.options.get("query_projection")))
        fk_BGKF = phi(project(prepared.k_BGKD, prepared.options.get("key_projection")))
        a_BHQK = a_BHQK + (fq_BHQF @ expand_heads(fk_BGKF, heads).mT).masked_fill(~(visible & ~near), 0.0)
    total = a_BHQK.sum(dim=-1, keepdim=True)
    # The window's largest weight is the factor: only the linear part alone may add up to nothing.
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
    factor_H: torch.Tensor,
    branch: str,
    scale: float,
    chunk_size: int,
    sums: torch.Tensor | None = None,
    batched: bool = False,
) -> torch.Tensor:
    """The same in O(Q (window_size + F)) time and linear memory: out_BHQV in the dtype of v. Differentiable once.

    Args:
        sums: over keys that come before these and have left the window, (B, G, F, V + 1), if the mask is causal.
        batched: with all tiles of the window at once, and blocks as large as on devices that are not a CPU.

    Raises:
        ValueError: a packed segment goes on after another one began.
    """
    linear = (prepared.options["feature_map"], prepared.options.get("query_projection"))
    if sums is None and dense_is_cheaper(prepared.q_BHQD, v_BGKV, *linear):
        return dense_linear_window(
            q_BHQD,
            k_BGKD,
            v_BGKV,
            prepared,
            mask,
            window_size=window_size,
            factor_H=factor_H,
            branch=branch,
            scale=scale,
        )[0]
    dtype = accumulation_dtype(q_BHQD, k_BGKD, v_BGKV)
    near = None
    if branch != "linear":
        band, v = Band(window_size, window_size - 1), v_BGKV.to(dtype)
        attend = batched_pattern_attention if batched else tiled_attention
        near = attend(q_BHQD, k_BGKD, v, mask, band, scale=scale, return_lse=True)
        if branch == "window":
            return near.out_BHQV.to(v_BGKV.dtype)
    eps = prepared.options["eps"]
    far, total = _far(prepared, v_BGKV.to(dtype), mask, window_size, chunk_size, sums, batched)
    if near is None:
        return (far / (total + eps)).to(v_BGKV.dtype)
    weight = torch.exp(near.lse_BHQ1 - near.max_BHQ1) * factor_H.to(dtype).view(-1, 1, 1)
    whole = weight + total
    return (torch.addcmul(far, near.out_BHQV, weight) / whole.masked_fill(whole == 0, 1.0)).to(v_BGKV.dtype)


def _far(
    prepared: Prepared,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    window_size: int,
    chunk_size: int,
    sums: torch.Tensor | None,
    batched: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over the keys outside the window: of phi(q).phi(k) v, (B, H, Q, V), and without v, (B, H, Q, 1)."""
    padding_BK, segments_BK = padding_of(mask), contiguous_segments(mask)
    tokens = (prepared.q_BHQD, prepared.k_BGKD, v_BGKV)
    before, sizes = mask.q_offset - mask.kv_offset, (window_size, chunk_size, batched)
    far, total = _lagging(*tokens, padding_BK, segments_BK, prepared.options, before, *sizes, sums)
    if not mask.causal:
        q, k, v = (x.flip(2) for x in tokens)
        padding_BK, segments_BK = (None if x is None else x.flip(1) for x in (padding_BK, segments_BK))
        behind = mask.kv_length - before - mask.q_length
        after, total_after = _lagging(q, k, v, padding_BK, segments_BK, prepared.options, behind, *sizes)
        far, total = far + after.flip(2), total + total_after.flip(2)
    return far, total


def _lagging(
    q_BHQD, k_BGKD, v_BGKV, padding_BK, segments_BK, options, before, window_size, chunk_size, batched, sums=None
):
    """:func:`_far` for the keys that are ``window_size`` or more before a query; query i is at key ``before + i``."""
    (batch, heads, queries, _), value_dim = q_BHQD.shape, v_BGKV.shape[3]
    keys = before + queries - window_size
    if keys <= 0:
        return v_BGKV.new_zeros(batch, heads, queries, value_dim), v_BGKV.new_zeros(batch, heads, queries, 1)
    alone = max(0, window_size - before)  # queries whose window holds all keys before them
    # Key j enters together with the query at j + window_size, if that is of its segment, and as one of that segment.
    seen = None if padding_BK is None else padding_BK[:, :keys]
    labels = None
    if segments_BK is not None:
        labels = segments_BK[:, window_size : window_size + keys]
        same = segments_BK[:, :keys] == labels
        seen = same if seen is None else seen & same
    dtype, eps = v_BGKV.dtype, options["eps"]
    projections = [options.get(name) for name in ("query_projection", "key_projection")]
    w_q, w_k = (None if w is None else w.to(dtype) for w in projections)
    q, k, v = q_BHQD[:, :, alone:], k_BGKD[:, :, :keys], v_BGKV[:, :, :keys]
    sizes = (options["feature_map"], chunk_size, eps)
    out, total = last_queries(q, k, v, w_q, w_k, seen, labels, *sizes, sums, batched=batched)
    far = out * (total + eps).unsqueeze(3)
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
    batched: bool = False,
) -> torch.Tensor:
    """As :func:`linear_window_attention`, causal, for the last Q of K new tokens.

    Args:
        mask: of all tokens, which may end with some that come later.
        state: its window is the attention's; ``sums`` are over the tokens before it, (B, G, F, V + 1). It takes the new
            tokens in.

    Returns:
        out_BHQV in the dtype of v.
    """

    def attend_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not state.tensors:
            state.start(k, v, **sums_shapes(prepare(q, k)[0], v))
        if k.shape[2] == 1:
            return _one_token(q, k, v, mask, state, prepare)
        number, before = k.shape[2], min(state.length, state.window)
        first, left = state.length - before, before + number - state.window
        position = torch.arange(first, state.length + number, device=k.device)
        if before:
            places = position[:before] % state.window
            k, v = (torch.cat([state.tensors[x].index_select(2, places), new], 2) for x, new in (("k", k), ("v", v)))
        near = mask.cached(("near", first, q.shape[2], len(position)), lambda: _last(mask, q.shape[2], position))
        prepared, options = prepare(q, k)
        sums = state.tensors["sums"]
        options |= {"chunk_size": chunk_size, "sums": sums, "batched": batched}
        out = linear_window_attention(q, k, v, prepared, near, **options)
        if left > 0:
            not_padding_BK = None if near.padding_BK is None else near.padding_BK[:, :left]
            feature_map = prepared.options["feature_map"]
            gone = (prepared.k_BGKD[:, :, :left], v[:, :, :left], projections(prepared)[1], feature_map, not_padding_BK)
            sums, _ = absorb(sums, None, *gone)
        last = slice(max(before, left), None)
        state.write("k", 2, position[last] % state.window, k[:, :, last])
        state.write("v", 2, position[last] % state.window, v[:, :, last])
        state.commit(number, sums=sums)
        return out

    return chunked_prefill(attend_chunk, q_BHQD, k_BGKD, v_BGKV)


def _last(mask: AttentionMask, queries: int, position: torch.Tensor) -> AttentionMask:
    """The mask of the tokens at these positions, which follow one another, the last of them queries."""
    padding_BK = None if mask.padding_BK is None else mask.padding_BK.index_select(1, position)
    sizes = (mask.batch_size, queries, len(position))
    return AttentionMask(*sizes, causal=True, padding_BK=padding_BK, device=mask.device)


def _one_token(
    q_BH1D: torch.Tensor,
    k_BG1D: torch.Tensor,
    v_BG1V: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
) -> torch.Tensor:
    place, seen, leaves = mask.cached(("one", state.window), lambda: _places(mask, state))
    k, v = (state.tensors[name].index_select(2, place) for name in ("k", "v"))
    prepared, options = prepare(q_BH1D, k)
    (q, k, linear), (w_q, w_k) = prepared, projections(prepared)
    sums, _ = absorb(state.tensors["sums"], None, k, v, w_k, linear["feature_map"], leaves)
    state.write("k", 2, place, k_BG1D)
    state.write("v", 2, place, v_BG1V)
    state.commit(1, sums=sums)

    dtype, (batch, groups, _, value_dim), branch = accumulation_dtype(q, k, v), v.shape, options["branch"]
    total = sums.new_zeros(())
    if branch != "window":
        total = read_sums(q, w_q, linear["feature_map"], sums, None)
    if branch != "linear":
        k, v, hidden = state.tensors["k"].to(dtype), state.tensors["v"].to(dtype), ~seen[:, None, None]
        s = (q_BH1D.to(dtype).reshape(batch, groups, -1, k.shape[3]) * options["scale"]) @ k.mT
        s = s.masked_fill(hidden, MASKED_SCORE)
        e = torch.exp(s - s.amax(dim=3, keepdim=True)).masked_fill(hidden, 0.0)
        e = e * options["factor_H"].to(dtype).view(groups, -1, 1)
        total = total + torch.cat([e @ v, e.sum(dim=3, keepdim=True)], dim=3)
    num, den = total[..., :-1], total[..., -1:]
    den = den + linear["eps"] if branch == "linear" else den.masked_fill(den == 0, 1.0)
    return (num / den).view(batch, -1, 1, value_dim).to(v_BG1V.dtype)


def _places(mask: AttentionMask, state: Sums) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where the next token goes, (1,), and, each for B or 1 rows, which places then hold a key that is no padding,
    and whether the one there before was one, (., 1)."""
    window = state.window
    now = torch.arange(1, device=mask.device) + state.position
    place = torch.arange(window, device=mask.device)
    position = torch.cat([now - (now - place) % window, now - window])
    not_padding = (position >= 0).unsqueeze(0)
    if mask.padding_BK is not None:
        not_padding = not_padding & mask.padding_BK.index_select(1, position.clamp_min(0))
    return now % window, not_padding[:, :-1], not_padding[:, -1:]
