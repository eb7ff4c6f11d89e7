"""Recurrences with decay: a state S of F x V numbers a head that forgets, and takes in one key and value a token.

Averages (retention, gated linear attention), with log gates g <= 0 for each channel of the key, or one for all:

    S_t = diag(e^g_t) S_{t-1} + k_t v_t^T,   n_t = e^g_t n_{t-1} + 1,   out_t = S_t^T (q_t / n_t)

Delta rules, with a rate beta_t; the state forgets, if at all, before it is read and corrected:

    S = diag(e^g_t) S_{t-1},   S_t = S - beta_t k_t (k_t^T S - v_t^T),   out_t = S_t^T q_t + b a_t

with a_t the decayed average of the values so far and a weight b of each query head. One log gate a token serves all
channels and the average, or each channel has its own and the average the last one, after these.

The chunked form treats chunks in parallel, then joins their states. Decays between tokens of a chunk are products of
e^(sum of log gates), the sums being taken over just the tokens between: by halves, the decay from j to t is that from
j to the middle times that from the middle to t. So no exponent is ever above 0, nothing cancels, and g = -inf (where a
packed segment starts) is as good as any other gate.

Letters beside the legend's: R query heads that share a key/value head, N chunks of C tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.linear.attention import contiguous_segments
from attn_plugins.ops.recurrent.checkpointed_loop import Step, scan
from attn_plugins.ops.recurrent.corrections import inverse_of_unit_lower, write
from attn_plugins.ops.recurrent.decays import (
    Decay,
    between_tokens,
    decay_by_halves,
    products,
    read_by_keys_and_queries,
    shared_decays,
)
from attn_plugins.ops.reference import accumulation_dtype, expand_heads

ROWS_A_SPAN = {"cpu": 1 << 12}
"""Tokens times rows times query heads of one span, by type of device: on CPU what the nearer caches hold."""
ROWS_A_SPAN_ELSEWHERE = 1 << 18


class Tokens(NamedTuple):
    """What a recurrence takes in, in at least float32. G may be the number of query heads."""

    q: torch.Tensor
    """(B, H, T, F)"""
    k: torch.Tensor
    """(B, G, T, F)"""
    v: torch.Tensor
    """(B, G, T, V)"""
    log_gate: torch.Tensor | None
    """(B or 1, G, T or 1, F or 1), at most 0, F + 1 in place of F for a delta rule; None where nothing is forgotten."""
    beta: torch.Tensor | None
    """(B, G, T, 1) for a delta rule, None for an average."""
    average_weight: torch.Tensor | None = None
    """(H,), b of a delta rule."""


Prepare = Callable[..., Tokens]
"""(q_BHTD, *of_keys, *weights) -> Tokens, each token from its own query, key, value and hidden state."""

OfKeys = Sequence[torch.Tensor]
"""(k_BGTD, v_BGTV), or (k_BGTD, v_BGTV, hidden_B1TE): what the keys' tokens bring."""


def with_average(
    q_BHTD: torch.Tensor,
    k_BGTD: torch.Tensor,
    v_BGTV: torch.Tensor,
    score_weight_H: torch.Tensor,
    average_weight_H: torch.Tensor,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with one more channel, so that q.k becomes score_weight scale q.k + average_weight."""
    dtype = accumulation_dtype(q_BHTD, k_BGTD, v_BGTV)
    q = q_BHTD.to(dtype) * (scale * score_weight_H.to(dtype)).view(-1, 1, 1)
    average = average_weight_H.to(dtype).view(-1, 1, 1).expand(*q.shape[:3], 1)
    return torch.cat([q, average], dim=3), pad(k_BGTD.to(dtype), (0, 1), value=1.0)


def by_token(x_BGTX: torch.Tensor, w_GX: torch.Tensor) -> torch.Tensor:
    """w . x of each token, (B, G, T, 1)."""
    if x_BGTX.device.type == "cpu":  # where a matrix times a column takes five times as long
        return (x_BGTX * w_GX.unsqueeze(1)).sum(-1, keepdim=True)
    return x_BGTX @ w_GX.unsqueeze(2)


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| in at least float32; next to nothing where |x| is."""
    x = x.to(accumulation_dtype(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def dense_recurrent_attention(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, token by token. The state holds a coefficient for each value instead of their sum.

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    k_BGKD, v_BGKV = of_keys[:2]
    with torch.autocast(q_BHQD.device.type, enabled=False):
        before, end = reach(q_BHQD, k_BGKD, mask)
        not_padding, segment_start = _rows(mask)
        q = pad(q_BHQD, (0, 0, before, 0))
        new = [x[:, :, :end] for x in of_keys]
        not_padding, segment_start = (None if x is None else x[:, :, :end] for x in (not_padding, segment_start))
        tokens, counts = hide(prepare(q, *new, *weights), not_padding, segment_start)
        batch, heads, length, features = tokens.k.shape
        state_BGFK = tokens.k.new_zeros(batch, heads, features, k_BGKD.shape[2])
        count_BGF = tokens.k.new_zeros(batch, heads, features if tokens.beta is None else 1)
        last = slice(None) if tokens.beta is None else slice(-1, None)
        total_BGK = state_BGFK[:, :, 0]
        rows = []
        for t in range(length):
            k_BGF1 = tokens.k[:, :, t].unsqueeze(3)
            value_K = pad(k_BGF1.new_ones(1), (t, k_BGKD.shape[2] - t - 1))
            if tokens.log_gate is not None:
                gate_BGF = tokens.log_gate[:, :, t if tokens.log_gate.shape[2] > 1 else 0].exp()
                state_BGFK = gate_BGF[:, :, :features].unsqueeze(3) * state_BGFK
                count_BGF = gate_BGF[:, :, last] * count_BGF
                total_BGK = gate_BGF[:, :, last] * total_BGK if tokens.beta is not None else total_BGK
            counts_BG1 = torch.ones_like(count_BGF[:, :, :1]) if counts is None else counts[:, :, t]
            count_BGF = count_BGF + counts_BG1
            if tokens.beta is None:
                state_BGFK = state_BGFK + k_BGF1 * value_K
            else:
                error_BG1K = k_BGF1.mT @ state_BGFK - value_K
                state_BGFK = state_BGFK - tokens.beta[:, :, t].unsqueeze(3) * k_BGF1 * error_BG1K
                total_BGK = total_BGK + counts_BG1 * value_K
            if t >= before:
                q_BGRF, n_BG1F = tokens.q[:, :, t].unflatten(1, (heads, -1)), count_BGF.clamp_min(1.0).unsqueeze(2)
                if tokens.beta is None:
                    row_BGRK = (q_BGRF / n_BG1F) @ state_BGFK
                else:
                    assert tokens.average_weight is not None
                    b_GR1 = tokens.average_weight.view(heads, -1, 1)
                    row_BGRK = q_BGRF @ state_BGFK + b_GR1 * total_BGK.unsqueeze(2) / n_BG1F
                rows.append(row_BGRK.flatten(1, 2))
        weights_BHQK = torch.stack(rows, dim=2)
        out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK


class Rules(NamedTuple):
    """How the chunks of a span are joined, and how long spans are."""

    average: Callable[["Chunks", torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]
    """(chunks, state before them, whether their output is not wanted) -> (out_BHTV, state after them)."""
    delta: Callable[["Chunks", torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor]]
    """The same."""
    span: Callable[[torch.Tensor, int], int]
    """(q_BHQD, chunk_size) -> tokens, a multiple of chunk_size."""


@torch.compiler.disable(reason="the loops over spans and chunks would be unrolled")
def recurrent_attention(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
) -> torch.Tensor:
    """The same in chunks: O((Q + K) F (chunk_size + V)) time; autograd keeps the arguments and a few states.

    Keys before the first query go through the state without output.

    Args:
        mask: causal and plain. Segments must be contiguous.
        chunk_size: a power of two.

    Returns:
        out_BHQV in the dtype of v.

    Raises:
        ValueError: a segment goes on after another one began, or queries lie outside the keys.
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        start, weights = beginning(q_BHQD, of_keys, mask, prepare, weights)
        return scan_from(*start, prepare, weights, chunk_size, IN_ORDER)[0]


def beginning(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """What :func:`scan_from` begins with where nothing came before, and the weights in at least float32.

    Returns:
        ((an empty state, q_BHQD, of_keys up to the last query, which are no padding, which start a segment), weights).
    """
    _, end = reach(q_BHQD, of_keys[0], mask)
    new = [x[:, :, :end] for x in of_keys]
    rows = [None if x is None else x[:, :, :end] for x in _rows(mask)]
    dtype = accumulation_dtype(q_BHQD, *new)
    weights = [w.to(dtype) for w in weights]
    state = q_BHQD.new_zeros(len(new[0]), *state_shape(q_BHQD, new, prepare, weights), dtype=dtype)
    return (state, q_BHQD, new, *rows), weights


def state_shape(
    q: torch.Tensor, of_keys: OfKeys, prepare: Prepare, weights: Sequence[torch.Tensor]
) -> tuple[int, int, int]:
    """Of one row's state, found with no tokens at all."""
    none = prepare(*(x[:, :, :0] for x in (q, *of_keys)), *weights)
    return none.k.shape[1], none.k.shape[3] + (0 if none.beta is None else 1), none.v.shape[3] + 1


@torch.compiler.disable(reason="the loops over spans and chunks would be unrolled")
def scan_from(
    state: torch.Tensor,
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    not_padding: torch.Tensor | None,
    segment_start: torch.Tensor | None,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    chunk_size: int,
    rules: Rules,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last Q of K tokens in chunks, from a state: (out_BHQV, the state after them). Outside autocast."""
    before = of_keys[0].shape[2] - q_BHQD.shape[2]
    span, step = rules.span(q_BHQD, chunk_size), step_of(prepare, chunk_size, rules, q_BHQD.shape[1])
    sequences = [None, not_padding, segment_start, *of_keys]
    if before:
        _, state = scan(step, span, state, [None if x is None else x[:, :, :before] for x in sequences], weights)
    new = [None if x is None else x[:, :, before:] for x in sequences]
    return scan(step, span, state, [q_BHQD, *new[1:]], weights)


def step_of(prepare: Prepare, chunk_size: int, rules: Rules, num_heads: int) -> Step:
    """One span of (q_BHTD, not_padding, segment_start, *of_keys); without output where q is None."""

    def step(state, parts, weights):
        q, not_padding, segment_start, k, v, *hidden = parts
        silent = q is None
        if silent:
            q = k.new_empty(len(k), num_heads, 0, k.shape[3])
        tokens, counts = hide(prepare(q, k, v, *hidden, *weights), not_padding, segment_start)
        rule = rules.average if tokens.beta is None else rules.delta
        # A short span, such as one token in decoding, makes one chunk no longer than it has to be.
        size = min(chunk_size, 1 << (k.shape[2] - 1).bit_length())
        out, after = rule(_to_chunks(tokens, counts, size), state, silent)
        return out[:, :, : 0 if silent else v.shape[2]].to(v.dtype), after

    return step


def reach(q_BHQD: torch.Tensor, k_BGKD: torch.Tensor, mask: AttentionMask) -> tuple[int, int]:
    """Keys before the first query, and keys up to the last: a cache of fixed length has room for keys to come."""
    queries, keys, before = q_BHQD.shape[2], k_BGKD.shape[2], mask.q_offset - mask.kv_offset
    if not 0 <= before <= keys - queries:
        raise ValueError(f"{queries} queries from key {before} on; allowed: queries within {keys} keys")
    return before, before + queries


def _rows(mask: AttentionMask) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which keys are real and which start a segment, (B or 1, 1, K, 1) each; None for all and for none."""
    segments_BK = contiguous_segments(mask)
    not_padding = None if mask.padding_BK is None else mask.padding_BK[:, None, :, None]
    if segments_BK is None:
        return not_padding, None

    def starts() -> torch.Tensor:
        return pad(segments_BK[:, 1:] != segments_BK[:, :-1], (1, 0), value=True)[:, None, :, None]

    return not_padding, mask.cached("segment starts", starts)


def hide(
    tokens: Tokens, not_padding: torch.Tensor | None, segment_start: torch.Tensor | None
) -> tuple[Tokens, torch.Tensor | None]:
    """Padding neither enters the state nor decays it; a new segment starts from an empty one.

    Returns:
        (tokens, 1 for each token that counts and 0 for padding, or None where all count).
    """
    k, log_gate, beta = tokens.k, tokens.log_gate, tokens.beta
    if not_padding is not None:
        k = k * not_padding
        beta = None if beta is None else beta * not_padding
        log_gate = None if log_gate is None else log_gate.masked_fill(~not_padding, 0.0)
    if segment_start is not None:
        log_gate = k.new_zeros(1, 1, 1, 1) if log_gate is None else log_gate
        log_gate = log_gate.masked_fill(segment_start, -torch.inf)
    tokens = tokens._replace(k=k, log_gate=log_gate, beta=beta)
    return tokens, None if not_padding is None else not_padding.to(k.dtype)


class Chunks(NamedTuple):
    """Tokens of a span by chunks; zeros after the end, which like padding neither enter nor decay."""

    q: torch.Tensor
    """(B, G, N, C, R, F)"""
    k: torch.Tensor
    """(B, G, N, C, F)"""
    v: torch.Tensor
    """(B, G, N, C, V)"""
    log_gate: torch.Tensor | None
    """(B or 1, G or 1, N or 1, C, F or 1), F + 1 in place of F for a delta rule."""
    beta: torch.Tensor | None
    """(B, G, N, C, 1)"""
    counts: torch.Tensor | None
    """(B or 1, 1, N, C, 1), 1 where a token counts and 0 where not; None where all count."""
    average_weight: torch.Tensor | None
    """(G, R)"""


def _to_chunks(tokens: Tokens, counts: torch.Tensor | None, chunk_size: int) -> Chunks:
    length = tokens.k.shape[2]
    rest = -length % chunk_size

    def tile(x: torch.Tensor) -> torch.Tensor:
        return (pad(x, (0, 0, 0, rest)) if rest else x).unflatten(2, (-1, chunk_size))

    log_gate = tokens.log_gate
    if log_gate is not None and log_gate.shape[2] == 1:
        log_gate = log_gate.expand(-1, -1, length if rest else chunk_size, -1)
    if counts is None and rest:
        counts = tokens.k.new_ones(1, 1, length, 1)
    queries = tokens.q.shape[2]
    missing = length + rest - queries if queries else 0
    q = pad(tokens.q, (0, 0, 0, missing)) if missing else tokens.q
    q = q.unflatten(1, (tokens.k.shape[1], -1)).unflatten(3, (-1, chunk_size)).permute(0, 1, 3, 4, 2, 5)
    b = tokens.average_weight
    b = None if b is None else b.view(tokens.k.shape[1], -1)
    log_gate, beta, counts = (None if x is None else tile(x) for x in (log_gate, tokens.beta, counts))
    q, k, v = (x.contiguous() for x in (q, tile(tokens.k), tile(tokens.v)))
    return Chunks(q, k, v, log_gate, beta, counts, b)


def from_chunks(out_BGNCRV: torch.Tensor) -> torch.Tensor:
    """(B, H, N C, V), laid out as (B, N C, H, V)."""
    return out_BGNCRV.permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2).transpose(1, 2)


def _average(tiles: Chunks, state: torch.Tensor, silent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One span. The state is S and, as its last column, n."""
    q, k, v, log_gate, _, counts, _ = tiles
    assert log_gate is not None
    decay = decay_by_halves(log_gate, counts)
    chunks = k.shape[2]
    added = (k * decay.until).mT @ v
    counted = (decay.until if counts is None else decay.until * counts).sum(-2).unsqueeze(-1)
    added = torch.cat([added, counted.expand(*added.shape[:-1], 1)], dim=-1)
    whole = decay.whole.unsqueeze(-1).expand(-1, -1, chunks, -1, -1)
    before = []
    for gate, more in zip(whole.unbind(2), added.unbind(2), strict=True):
        before.append(state)
        state = gate * state + more
    if silent:
        return v.new_empty(v.shape[0], v.shape[1], 0, v.shape[-1]), state
    states = torch.stack(before, dim=2)

    shared = log_gate.shape[-1] == 1
    met = states[..., :1, -1] if shared else states[..., -1]
    count = decay.number + decay.since * met.unsqueeze(-2)
    q = q / count.clamp_min(1.0).unsqueeze(-2)
    if shared:
        weights = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * between_tokens(decay).unsqueeze(-2)
    else:
        weights = products(q, k, decay)
    q = q * decay.since.unsqueeze(-2)
    out = weights.flatten(3, 4) @ v + q.flatten(3, 4) @ states[..., :-1]
    return from_chunks(out.unflatten(3, q.shape[3:5])), state


def _delta(tiles: Chunks, state: torch.Tensor, silent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One span. What a chunk writes depends on the state before it: values U - W S, with U and W known beforehand.

    The state is S and, as its last row, the sum of the values and their number.
    """
    q, k, v, log_gate, beta, counts, average_weight = tiles
    assert beta is not None
    assert average_weight is not None
    sums = _sums(v, log_gate, counts, state[..., -1:, :])
    between: torch.Tensor | Decay = sums.between
    since = until = whole = None
    if log_gate is not None:
        since, until = sums.since, sums.until
        if log_gate.shape[-1] > 1:
            between = decay_by_halves(log_gate[..., :-1], None)
            since, until = between.since, between.until
        whole = since[..., -1, :].unsqueeze(-1)
    among_keys, weights = read_by_keys_and_queries(None if silent else q, k, between)
    solved = inverse_of_unit_lower(beta * among_keys) * beta.mT
    u, w = solved @ v, solved @ _times(k, since)
    written, memories, memory = write(u, w, _times(k, until), whole, state[..., :-1, :-1])
    state = torch.cat([pad(memory, (0, 1)), sums.after], dim=-2)
    if silent:
        return v.new_empty(v.shape[0], v.shape[1], 0, v.shape[-1]), state

    assert weights is not None
    q_since = _times(q, None if since is None else since.unsqueeze(-2))
    recalled = weights.flatten(3, 4) @ written + q_since.flatten(3, 4) @ memories
    average = sums.average(v)
    out = recalled.unflatten(3, q.shape[3:5]) + average_weight[:, None, None, :, None] * average.unsqueeze(-2)
    return from_chunks(out), state


def _times(x: torch.Tensor, decay: torch.Tensor | None) -> torch.Tensor:
    return x if decay is None else x * decay


class _Sums(NamedTuple):
    """Beside the memory of a delta rule: decayed sums of values, and the numbers of them, in the last column."""

    between: torch.Tensor
    """Decays between the tokens of a chunk, (..., C, C), zero above the diagonal."""
    counted: torch.Tensor
    """The same, zero too for what is padding."""
    since: torch.Tensor
    """(..., C, 1)"""
    until: torch.Tensor
    """(..., C, 1)"""
    before: torch.Tensor
    """(B, G, N, 1, V + 1), the sums before each chunk."""
    after: torch.Tensor
    """(B, G, 1, V + 1)"""

    def average(self, v: torch.Tensor) -> torch.Tensor:
        """(B, G, N, C, V): of all values up to each."""
        number = self.counted.sum(-1, keepdim=True) + self.since * self.before[..., -1:]
        share = number.clamp_min(1.0).reciprocal()
        return (self.counted * share) @ v + (self.since * share) * self.before[..., :-1]


def _sums(v: torch.Tensor, log_gate: torch.Tensor | None, counts: torch.Tensor | None, before: torch.Tensor) -> _Sums:
    chunks, size = v.shape[2:4]
    if log_gate is None:
        log_gate = v.new_zeros(1, 1, 1, size, 1)
    between, since, until = shared_decays(log_gate[..., -1:])
    counted = between if counts is None else between * counts.mT
    last = counted[..., -1:, :].expand(-1, -1, chunks, -1, -1)
    added = torch.cat([last @ v, last.sum(-1, keepdim=True).expand(*v.shape[:3], 1, 1)], dim=-1).squeeze(-2)
    # From chunk to chunk as from token to token.
    of_chunks = log_gate[..., -1:].sum(-2).expand(-1, -1, chunks, -1)
    between_chunks, since_first, _ = shared_decays(of_chunks)
    sums = torch.cat([before, between_chunks @ added + since_first * before], dim=2)
    return _Sums(between, counted, since, until, sums[:, :, :-1].unsqueeze(-2), sums[:, :, -1:])


def _span(q_BHQD: torch.Tensor, chunk_size: int) -> int:
    rows = ROWS_A_SPAN.get(q_BHQD.device.type, ROWS_A_SPAN_ELSEWHERE)
    return max(1, rows // (q_BHQD.shape[0] * q_BHQD.shape[1] * chunk_size)) * chunk_size


IN_ORDER = Rules(_average, _delta, _span)
"""One chunk after another: the least work, for devices where starting an operation costs little."""
