"""The same recurrences with all chunks at once, for devices where starting an operation costs more than running it.

States are carried from chunk to chunk by doubling: after d = 1, 2, 4, ... the state before a chunk knows of the 2 d
chunks before it. So there are as many steps as the number of chunks has bits. For the delta rules a chunk's effect on
the state before it is a whole F x F matrix, which takes more work than going through the chunks in order.

Letters as in :mod:`attn_plugins.ops.recurrent.chunked`.
"""

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.core.tracing import recorded
from attn_plugins.ops.recurrent.chunked import (
    Chunks,
    OfKeys,
    Prepare,
    Rules,
    beginning,
    from_chunks,
    scan_from,
    step_of,
)
from attn_plugins.ops.recurrent.decays import decay_by_halves, products, shared_decays
from attn_plugins.ops.reference import outside_autocast
from attn_plugins.ops.sizes import scores_at_once


def recurrent_attention_batched(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.recurrent.chunked.recurrent_attention`: out_BHQV in the dtype of v.

    Autograd keeps the arguments. In a graph that is being recorded, or compiled, what is kept is left to others.
    """
    with torch.autocast(q_BHQD.device.type, enabled=False):
        start, weights = beginning(q_BHQD, of_keys, mask, prepare, weights)
        if not (torch.compiler.is_compiling() or recorded(q_BHQD)):
            return scan_from(*start, prepare, weights, chunk_size, ALL_AT_ONCE)[0]
        state, _, new, *rows = start
        before = new[0].shape[2] - q_BHQD.shape[2]
        step = step_of(prepare, chunk_size, ALL_AT_ONCE, q_BHQD.shape[1])
        out, _ = step(state, [pad(q_BHQD, (0, 0, before, 0)), *rows, *new], weights)
        return out[:, :, before:]


@torch.library.custom_op("attn_plugins::carry_states", mutates_args=())
def carry_states(by: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """States S_0 = state and S_{n+1} = A_n S_n + B_n, (N + 1, ...), of N gates or matrices A and additions B.

    An operator, so that autograd keeps its result and none of the steps between, in a compiled graph too.
    """
    states = torch.cat([state.unsqueeze(0), added])
    with torch.autocast(by.device.type, enabled=False):
        _double(by.contiguous(), states)
    return states


@torch.library.custom_op("attn_plugins::carry_back", mutates_args=())
def carry_back(by: torch.Tensor, d_states: torch.Tensor) -> torch.Tensor:
    """The gradient of each state, what comes to it from the states after it included."""
    by, d_states = by.contiguous(), d_states.clone(memory_format=torch.contiguous_format)
    with torch.autocast(by.device.type, enabled=False):
        _double(by.mT if by.shape[-1] > 1 else by, d_states, backwards=True)
    return d_states


@carry_states.register_fake
def _(by, added, state):
    return added.new_empty(len(added) + 1, *state.shape)


@carry_back.register_fake
def _(by, d_states):
    return torch.empty_like(d_states, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output)


@outside_autocast
def _backward(ctx, d_states):
    by, states = ctx.saved_tensors
    d_states = carry_back(by, d_states)
    d_added, before = d_states[1:], states[:-1]
    d_by = d_added @ before.mT if by.shape[-1] > 1 else d_added * before
    return d_by.sum_to_size(by.shape), d_added, d_states[0]


carry_states.register_autograd(_backward, setup_context=_setup_context)


def _double(by: torch.Tensor, states: torch.Tensor, *, backwards: bool = False) -> None:
    """Add to each of N + 1 states, in place, what comes to it from those before, or after, by N steps."""
    matrix, distance = by.shape[-1] > 1, 1
    while True:
        # ``by`` leads over ``distance`` steps, from or to each place that has as many before or after it.
        near, far = (slice(None, -distance), slice(distance, None))[:: -1 if backwards else 1]
        states[far].add_(by @ states[near] if matrix else by * states[near])
        if 2 * distance >= len(states):
            return
        by = by[far] @ by[near] if matrix else by[far] * by[near]
        distance *= 2


def _carry(by: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Go through all chunks.

    Args:
        by: from the state before a chunk to the state after it, gates (B or 1, G or 1, N or 1, F or 1, 1) or matrices
            (B, G, N, F, F).
        added: what the chunks add, (B, G, N, F, V).
        state: (B, G, F, V).

    Returns:
        (the states before each chunk, (B, G, N, F, V), and that after the last).
    """
    chunks = added.shape[2]
    states = carry_states(by.movedim(2, 0).expand(chunks, -1, -1, -1, -1), added.movedim(2, 0), state)
    return states[:-1].movedim(0, 2), states[-1].clone()


def _average(chunks: Chunks, state: torch.Tensor, silent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One span. The state is S and, as its last column, n."""
    q, k, v, log_gate, _, counts, _ = chunks
    assert log_gate is not None
    shared = log_gate.shape[-1] == 1
    if shared:
        between, since, until = shared_decays(log_gate)
        number = (between if counts is None else between * counts.mT).sum(-1, keepdim=True)
        counted = number[..., -1:, :]
    else:
        decay = decay_by_halves(log_gate, counts)
        since, until, number = decay.since, decay.until, decay.number
        counted = (until if counts is None else until * counts).sum(-2).unsqueeze(-1)
    whole = since[..., -1, :].unsqueeze(-1)
    added = torch.cat([(k * until).mT @ v, counted.expand(*k.shape[:3], k.shape[-1], 1)], dim=-1)
    states, after = _carry(whole, added, state)
    if silent:
        return v.new_empty(v.shape[0], v.shape[1], 0, v.shape[-1]), after

    met = states[..., : since.shape[-1], -1]
    q = q / (number + since * met.unsqueeze(-2)).clamp_min(1.0).unsqueeze(-2)
    if shared:
        weights = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * between.unsqueeze(-2)
    else:
        weights = products(q, k, decay)
    q = q * since.unsqueeze(-2)
    out = weights.flatten(3, 4) @ v + q.flatten(3, 4) @ states[..., :-1]
    return from_chunks(out.unflatten(3, q.shape[3:5])), after


def _delta(chunks: Chunks, state: torch.Tensor, silent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """One span. A chunk writes U - W S, with S the state before it, so that it leaves (gate - K^T W) S + K^T U.

    The state is S and, as its last row, the sum of the values and their number.
    """
    q, k, v, log_gate, beta, counts, average_weight = chunks
    assert beta is not None
    assert average_weight is not None
    size, features = k.shape[3:]
    if log_gate is None:
        between = k.new_ones(size, size).tril()
        since = until = whole = k.new_ones(())
    else:
        between, since, until = shared_decays(log_gate)
        whole = since[..., -1, :].unsqueeze(-1)
    # (I + strict lower triangle)^-1; the solver takes the diagonal for ones and doesn't read what is above.
    system = beta * (k @ k.mT) * between
    right = beta * torch.cat([v, k * since], dim=-1)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[-1], features], dim=-1
    )
    left = (k * until).mT
    whole = whole.expand(*k.shape[:3], 1, 1)
    by = whole * torch.eye(features, dtype=k.dtype, device=k.device) - left @ w
    memory, after = _carry(by, left @ u, state[..., :-1, :-1])
    counted = pad(v, (0, 1), value=1.0)
    counted = counted if counts is None else counted * counts
    total, total_after = _carry(whole, (counted * until).sum(dim=-2, keepdim=True), state[..., -1:, :])
    after = torch.cat([pad(after, (0, 1)), total_after], dim=-2)
    if silent:
        return v.new_empty(v.shape[0], v.shape[1], 0, v.shape[-1]), after

    weights = (q.flatten(3, 4) @ k.mT).unflatten(3, q.shape[3:5]) * between.unsqueeze(-2)
    q_since = q if log_gate is None else q * since.unsqueeze(-2)
    recalled = weights.flatten(3, 4) @ (u - w @ memory) + q_since.flatten(3, 4) @ memory
    sums = between @ counted + since * total
    average = sums[..., :-1] / sums[..., -1:].clamp_min(1.0)
    out = recalled.unflatten(3, q.shape[3:5]) + average_weight[:, None, None, :, None] * average.unsqueeze(-2)
    return from_chunks(out), after


def _span(q_BHQD: torch.Tensor, chunk_size: int) -> int:
    """As many tokens as have four numbers for each score of a piece."""
    batch, heads, _, size = q_BHQD.shape
    return (
        max(1, scores_at_once(q_BHQD.device) // (4 * batch * heads * max(size, chunk_size) * chunk_size)) * chunk_size
    )


ALL_AT_ONCE = Rules(_average, _delta, _span)
"""All chunks of a span together: few operations."""
