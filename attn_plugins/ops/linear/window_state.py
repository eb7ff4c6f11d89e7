"""Window and linear attention that goes on from a state: keys of the window, and sums over those that have left it."""

from collections.abc import Callable
from typing import Any

import torch

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.attention import absorb, projections, read_sums, sums_shapes
from attn_plugins.ops.linear.features import Prepared
from attn_plugins.ops.linear.window import linear_window_attention
from attn_plugins.ops.reference import MASKED_SCORE, accumulation_dtype

Prepare = Callable[[torch.Tensor, torch.Tensor], tuple[Prepared, dict[str, Any]]]
"""(queries, keys) -> what the linear part takes of them, and the other options of linear_window_attention."""


def linear_window_attention_from(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
    *,
    chunk_size: int,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.linear.window.linear_window_attention`, causal, for the last Q of K new tokens.

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
        out = linear_window_attention(q, k, v, prepared, near, chunk_size=chunk_size, sums=sums, **options)
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
