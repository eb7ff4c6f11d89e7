"""Log-linear attention: a linear attention whose sums over the past are kept apart by how far back they lie.

Tokens of a text have positions 0, 1, 2, ... A key at j is of level 0 to the query at j, and of level l >= 1 to a query
at i > j where bit l - 1 is the highest in which i and j differ. So levels hold 1, 1, 2, 4, ... tokens, a Fenwick tree:

    out_t = 1 / n_t sum_l lambda_t^(l) sum_{j of level l to t} e^(g_{j+1} + ... + g_t) (q_t . k_j) v_j

with one log gate g <= 0 a token and n_t = e^g_t n_{t-1} + 1. What level l adds is a recurrence of its own, which starts
anew at multiples of 2^l, takes in keys whose bit l - 1 is 0 and is read by queries whose bit is 1:

    S_t^(l) = [t mod 2^l != 0] e^g_t S_{t-1}^(l) + [bit l - 1 of t is 0] k_t v_t^T

The L levels above 0 are so many times the features of a key, each level with its own gates, and go from chunk to chunk
as those of one linear attention do. Positions may be any: rows and packed texts need not begin where chunks do. Padding
has the position of the token after it, so that it changes nothing.

Letters beside the legend's: T tokens, M levels that have a lambda of their own, R query heads that share a key/value
head, X size of what gates are made of.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad, softplus

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import recorded
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.linear.attention import contiguous_segments
from attn_plugins.ops.recurrent.batched import carry_states
from attn_plugins.ops.recurrent.checkpointed_loop import Step, scan
from attn_plugins.ops.recurrent.chunked import OfKeys, from_chunks, reach, with_average
from attn_plugins.ops.recurrent.decays import shared_decays
from attn_plugins.ops.reference import accumulation_dtype, expand_heads
from attn_plugins.ops.sizes import scores_at_once

NUMBERS_A_SPAN = {"cpu": 1 << 20}
"""Features of all levels and query heads that a span has, by type of device: on CPU what the nearer caches hold."""


class LevelTokens(NamedTuple):
    """What log-linear attention takes in, in at least float32."""

    q: torch.Tensor
    """(B, H, T, F)"""
    k: torch.Tensor
    """(B, G, T, F)"""
    v: torch.Tensor
    """(B, G, T, V)"""
    log_gate: torch.Tensor
    """(B, G, T, 1), at most 0."""
    level_weight: torch.Tensor
    """(B, H, T, M): lambda of each level; levels from M on share the last."""


def level_tokens(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTV: torch.Tensor,
    *beside_and_weights: torch.Tensor,
    scale: float,
) -> LevelTokens:
    """A :data:`Prepare`, after ``scale``.

    Args:
        beside_and_weights: what gates are made of if not of values, (B, G or 1, T, X), and the weights: of scores and
            of averages (H,), of levels (H, M, X) with a bias (H, M), of gates (G, X), their bias and A_log (G,).
    """
    *beside, score_weight, average_weight, w_HMX, bias_HM, u_GX, dt_bias_G, a_log_G = beside_and_weights
    q, k = with_average(q_BHTD, k_BGTD, v_BGTV, score_weight, average_weight, scale=scale)
    v = v_BGTV.to(q.dtype)
    x = beside[0].to(q.dtype) if beside else v
    w_HMX, bias_HM, u_GX, dt_bias_G, a_log_G = (y.to(q.dtype) for y in (w_HMX, bias_HM, u_GX, dt_bias_G, a_log_G))
    by_group = w_HMX.unflatten(0, (k.shape[1], -1))
    levels = softplus((x.unsqueeze(2) @ by_group.mT).flatten(1, 2) + bias_HM.unsqueeze(1))
    log_gate = -a_log_G.exp().view(-1, 1, 1) * softplus(x @ u_GX.unsqueeze(2) + dt_bias_G.view(-1, 1, 1))
    return LevelTokens(q, k, v, log_gate, levels)


Prepare = Callable[..., LevelTokens]
"""(q_BHTD, *of_keys, *weights) -> LevelTokens, each token from its own query, key, value and hidden state."""


def level_sums(fixed_length: int | None) -> Sums:
    """A state at its beginning: a sum for each level, as many as the length so far has bits.

    Its ``tensors`` are those of :class:`Sums`, seen (B, 1), the tokens of each row that were no padding, and memory
    (B, G, L F + 1, V), the sums S of all levels and, in the last row, n.
    """
    return Sums(fixed_length, grows=True)


def num_levels(length: int) -> int:
    """Levels above 0 among as many tokens, 1 at least."""
    return max(1, (length - 1).bit_length())


def dense_log_linear_attention(
    q_BHQD: torch.Tensor, of_keys: OfKeys, mask: AttentionMask, prepare: Prepare, weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, by the level of each pair of tokens.

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    keys = of_keys[0].shape[2]
    with torch.autocast(q_BHQD.device.type, enabled=False):
        before, end = reach(q_BHQD, of_keys[0], mask)
        new = [x[:, :, :end] for x in of_keys]
        tokens, position = _tokens(pad(q_BHQD, (0, 0, before, 0)), new, *_rows(mask, end), prepare, weights)
        q_BHQF, lambda_BHQM = (x[:, :, before:] for x in (tokens.q, tokens.level_weight))
        between_BGQK = shared_decays(tokens.log_gate)[0][:, :, before:] * mask.dense()[..., :end]
        number_BGQ1 = between_BGQK.sum(-1, keepdim=True).clamp_min(1.0)
        position_BT = position[:, 0, :, 0]
        level_BQK = _level(position_BT[:, before:, None], position_BT[:, None, :], lambda_BHQM.shape[-1])
        lambda_BHQK = lambda_BHQM.gather(3, level_BQK.unsqueeze(1).expand(*q_BHQF.shape[:3], end))
        scores_BHQK = q_BHQF @ expand_heads(tokens.k, q_BHQF.shape[1]).mT
        weights_BHQK = scores_BHQK * lambda_BHQK * expand_heads(between_BGQK / number_BGQ1, q_BHQF.shape[1])
        out_BHQV = weights_BHQK @ expand_heads(tokens.v, q_BHQF.shape[1])
    return out_BHQV.to(of_keys[1].dtype), pad(weights_BHQK, (0, keys - end))


def log_linear_attention(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
    batched: bool,
) -> torch.Tensor:
    """The same in chunks: O(K F (chunk_size + V log K)) time; autograd keeps the arguments and a few states.

    Args:
        mask: causal and plain. Segments must be contiguous.
        chunk_size: a power of two.
        batched: join chunks in as many steps as their number has bits, not one after another.

    Returns:
        out_BHQV in the dtype of v.

    Raises:
        ValueError: a segment goes on after another one began, or queries lie outside the keys.
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        before, end = reach(q_BHQD, of_keys[0], mask)
        new = [x[:, :, :end] for x in of_keys]
        weights = [w.to(accumulation_dtype(q_BHQD, *new)) for w in weights]
        levels, rows = num_levels(end), _rows(mask, end)
        features, size = _sizes(q_BHQD, new, prepare, weights)
        state = weights[0].new_zeros(len(q_BHQD), new[0].shape[1], levels * features + 1, size)
        q = pad(q_BHQD, (0, 0, before, 0))
        return _run(state, q, new, *rows, prepare, weights, chunk_size, batched)[0][:, :, before:]


def log_linear_attention_from(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
    batched: bool,
) -> torch.Tensor:
    """As :func:`log_linear_attention`, for the last Q of K new tokens; the state takes all of them in.

    Args:
        mask: of all tokens, which may end with some that come later.
    """
    weights = [w.to(accumulation_dtype(q_BHQD, *of_keys)) for w in weights]
    features, size = _sizes(q_BHQD, of_keys, prepare, weights)
    fixed, groups = state.fixed_length, of_keys[0].shape[1]

    def attend_chunk(q: torch.Tensor, *new: torch.Tensor) -> torch.Tensor:
        number = new[0].shape[2]
        # One level more than can be read yet: it holds all tokens so far, which further ones begin with.
        levels = num_levels(fixed) if fixed is not None else (state.length + number - 1).bit_length() + 1
        if not state.tensors:
            state.start(*of_keys[:2], memory=(groups, levels * features + 1, size), seen=(1,))
        memory, seen = state.tensors["memory"], state.tensors["seen"]
        missing = levels - (memory.shape[2] - 1) // features
        if missing > 0:
            top = memory[:, :, -1 - features : -1].repeat(1, 1, missing, 1)
            memory = torch.cat([memory[:, :, :-1], top, memory[:, :, -1:]], dim=2)
        real = state.not_padding(mask, number)
        real_BT = seen.new_ones(1, number) if real is None else real.to(seen.dtype)
        position = (seen + real_BT.cumsum(1) - real_BT).long()[:, None, :, None]
        rows = None if real is None else real[:, None, :, None], position
        q = pad(q, (0, 0, number - q.shape[2], 0)) if number > q.shape[2] else q
        out, memory = _run(memory, q, list(new), *rows, prepare, weights, chunk_size, batched)
        state.commit(number, memory=memory, seen=seen + real_BT.sum(1, keepdim=True))
        return out

    return chunked_prefill(lambda q, *new: attend_chunk(q, *new)[:, :, -q.shape[2] :], q_BHQD, *of_keys)


def _sizes(q: torch.Tensor, of_keys: OfKeys, prepare: Prepare, weights: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Sizes of a key's features and of a value, found with no tokens at all."""
    none = prepare(*(x[:, :, :0] for x in (q, *of_keys)), *weights)
    return none.k.shape[3], none.v.shape[3]


def _rows(mask: AttentionMask, end: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Which of the first ``end`` keys are real, None for all, and the position of each in its text, (B or 1, 1, T, 1).

    The position is the number of real tokens before it.
    """
    segments_BK, padding_BK = contiguous_segments(mask), mask.padding_BK

    def positions() -> torch.Tensor:
        if padding_BK is None:
            position_BK = torch.arange(end, device=mask.device).unsqueeze(0)
        else:
            position_BK = padding_BK[:, :end].long().cumsum(1) - padding_BK[:, :end].long()
        if segments_BK is not None:
            own = segments_BK[:, :end]
            starts_BK = pad(own[:, 1:] != own[:, :-1], (1, 0), value=True)
            position_BK = position_BK - torch.where(starts_BK, position_BK, 0).cummax(1).values
        return position_BK[:, None, :, None]

    real = None if padding_BK is None else padding_BK[:, None, :end, None]
    return real, mask.cached(("positions in texts", end), positions)


def _tokens(
    q: torch.Tensor,
    of_keys: Sequence[torch.Tensor],
    real: torch.Tensor | None,
    position: torch.Tensor,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
) -> tuple[LevelTokens, torch.Tensor]:
    """Tokens of which padding neither enters the sums nor decays them, and their positions."""
    tokens = prepare(q, *of_keys, *weights)
    if real is not None:
        tokens = tokens._replace(k=tokens.k * real, log_gate=tokens.log_gate.masked_fill(~real, 0.0))
    return tokens, position


def _level(query: torch.Tensor, key: torch.Tensor, number: int) -> torch.Tensor:
    """Index of the lambda of pairs of positions: the bits of what differs, at most ``number`` - 1."""
    powers = 1 << torch.arange(number - 1, device=query.device)
    return torch.bucketize(query ^ key, powers, right=True)


def _run(
    state: torch.Tensor,
    q: torch.Tensor,
    of_keys: Sequence[torch.Tensor],
    real: torch.Tensor | None,
    position: torch.Tensor,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    chunk_size: int,
    batched: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All tokens from a state, with as many queries: (out_BHTV in the dtype of v, the state after them)."""
    step, sequences = _step_of(prepare, chunk_size, batched), [q, real, position, *of_keys]
    if batched and (torch.compiler.is_compiling() or recorded(q)):
        return step(state, sequences, weights)
    numbers = len(q) * q.shape[1] * max(state.shape[2], 4 * chunk_size, state.shape[2] * state.shape[3] // chunk_size)
    most = scores_at_once(q.device) if batched else NUMBERS_A_SPAN.get(q.device.type, scores_at_once(q.device))
    span = max(1, most // (2 * numbers * chunk_size)) * chunk_size
    return _scan(step, span, state, sequences, weights)


@torch.compiler.disable(reason="the loops over spans and chunks would be unrolled")
def _scan(
    step: Step, span: int, state: torch.Tensor, sequences: list[Any], weights: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    return scan(step, span, state, sequences, weights)


def _step_of(prepare: Prepare, chunk_size: int, batched: bool) -> Step:
    """One span of (q_BHTD, real, position, *of_keys)."""

    def step(state, parts, weights):
        q, real, position, *of_keys = parts
        tokens, position = _tokens(q, of_keys, real, position, prepare, weights)
        length, groups = tokens.k.shape[2], tokens.k.shape[1]
        size = min(chunk_size, 1 << (length - 1).bit_length())
        rest = -length % size

        def tile(x: torch.Tensor) -> torch.Tensor:
            return (pad(x, (0, 0, 0, rest)) if rest else x).unflatten(2, (-1, size))

        def of_queries(x: torch.Tensor) -> torch.Tensor:
            return tile(x).unflatten(1, (groups, -1)).permute(0, 1, 3, 4, 2, 5)

        # After the end no position is 0 or the multiple of a power: sums go on unchanged.
        filled = pad(position, (0, 0, 0, rest), value=-1) if rest else position
        counts = position.new_ones(1, 1, length, 1, dtype=torch.bool) if real is None else real
        counts, filled = tile(counts.to(tokens.k.dtype)), filled.unflatten(2, (-1, size))
        k, v, log_gate = (tile(x) for x in (tokens.k, tokens.v, tokens.log_gate))
        chunks = LevelTokens(of_queries(tokens.q), k, v, log_gate, of_queries(tokens.level_weight))
        out, after = _chunks(chunks, counts, filled, state, batched)
        return out[:, :, :length].to(of_keys[1].dtype), after

    return step


def _chunks(
    chunks: LevelTokens, counts: torch.Tensor, position: torch.Tensor, state: torch.Tensor, batched: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One span. q and lambda (B, G, N, C, R, .), the rest (B, G, N, C, .); counts and positions of B or 1 rows."""
    q, k, v, log_gate, weight = chunks
    features, size, own_weights = k.shape[4], k.shape[3], weight.shape[-1]
    levels = (state.shape[2] - 1) // features
    level = torch.arange(levels, device=k.device)
    bit = (position >> level & 1).to(k.dtype)  # (B or 1, 1, N, C, L)
    # A last column, for n, that starts anew with a text alone.
    new_text = position == 0
    begins = torch.cat([position & ((2 << level) - 1) == 0, new_text], dim=-1)
    begun = begins.long().cumsum(3)
    between, since, until = shared_decays(log_gate)
    since = since * (begun == 0)
    until = until * (begun == begun[..., -1:, :])
    texts = begun[..., -1]
    between = between * (texts.unsqueeze(-1) == texts.unsqueeze(-2))

    # What chunks add to each level, and how they fade what was there.
    k_levels = (k.unsqueeze(-2) * (until[..., :-1] * (1 - bit)).unsqueeze(-1)).flatten(-2)
    counted = (until[..., -1:] * counts).sum(-2, keepdim=True)
    added = torch.cat([k_levels.mT @ v, counted.expand(*k.shape[:3], 1, v.shape[-1])], dim=-2)
    whole = since[..., -1, :]
    by = torch.cat([whole[..., :-1].repeat_interleave(features, dim=-1), whole[..., -1:]], dim=-1).unsqueeze(-1)
    if batched:
        before, after = carry_states(by, added, state)
    else:
        states = [state]
        for gate, more in zip(by.unbind(2), added.unbind(2), strict=True):
            states.append(gate * states[-1] + more)
        before, after = torch.stack(states[:-1], dim=2), states[-1]

    number = between @ counts + since[..., -1:] * before[..., -1:, :1]
    q = q / number.clamp_min(1.0).unsqueeze(-2)
    index = _level(position, position.mT, own_weights).unsqueeze(-2)
    of_pairs = weight.gather(-1, index.expand(*weight.shape[:-1], size))
    scores = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * of_pairs * between.unsqueeze(-2)
    of_levels = weight[..., (level + 1).clamp_max(own_weights - 1)] * (since[..., :-1] * bit).unsqueeze(-2)
    q_levels = (q.unsqueeze(-2) * of_levels.unsqueeze(-1)).flatten(-2)
    out = scores.flatten(3, 4) @ v + q_levels.flatten(3, 4) @ before[..., :-1, :]
    return from_chunks(out.unflatten(3, q.shape[3:5])), after
