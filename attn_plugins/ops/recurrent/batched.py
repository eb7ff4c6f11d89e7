"""The same recurrences with all chunks at once, for devices where starting an operation costs more than running it.

States are carried from chunk to chunk in as many steps as the number of chunks has bits. For the delta rules a chunk's
effect on the state before it is a whole F x F matrix, which takes more work than going through the chunks in order.

Letters as in :mod:`attn_plugins.ops.recurrent.chunked`.
"""

from collections.abc import Callable, Sequence

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
from attn_plugins.ops.recurrent.decays import (
    BlockDecay,
    decay_by_blocks,
    decay_by_halves,
    products,
    read_by_keys_and_queries,
    shared_decays,
)
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


FEW = 32
"""Chunks that are joined by doubling alone."""


@torch.library.custom_op("attn_plugins::carry_states", mutates_args=())
def carry_states(by: torch.Tensor, added: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """States S_1 = state and S_{n+1} = A_n S_n + B_n of N gates or matrices A and additions B.

    An operator, so that autograd keeps its result and none of the steps between, in a compiled graph too.

    Args:
        by: from the state before a chunk to the state after it, gates (B or 1, G or 1, N, F or 1, 1) or matrices
            (B, G, N, F, F).
        added: what the chunks add, (B, G, N, F, V).
        state: (B, G, F, V).

    Returns:
        (the states before each chunk, (B, G, N, F, V), and that after the last).
    """
    with torch.autocast(by.device.type, enabled=False):
        times = _times(by)
        first = times(by[:, :, :1], state.unsqueeze(2)) + added[:, :, :1]
        after = _accumulate(by, torch.cat([first, added[:, :, 1:]], dim=2), backwards=False)
    before = torch.cat([state.unsqueeze(2), after[:, :, :-1]], dim=2)
    return before, after[:, :, -1].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("attn_plugins::carry_back", mutates_args=())
def carry_back(by: torch.Tensor, d_before: torch.Tensor, d_after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what chunks add and of the first state, from those of all states."""
    with torch.autocast(by.device.type, enabled=False):
        by, times = by.mT if by.shape[-1] > 1 else by, _times(by)
        d_states = torch.cat([d_before[:, :, 1:], d_after.unsqueeze(2)], dim=2)
        d_added = _accumulate(by.roll(-1, 2), d_states, backwards=True)
        d_state = times(by[:, :, 0], d_added[:, :, 0]).add_(d_before[:, :, 0])
        return d_added.contiguous(), d_state.contiguous()


@carry_states.register_fake
def _(by, added, state):
    return added.new_empty(added.shape), state.new_empty(state.shape)


@carry_back.register_fake
def _(by, d_before, d_after):
    return d_before.new_empty(d_before.shape), d_after.new_empty(d_after.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(True)


@outside_autocast
def _backward(ctx, d_before, d_after):
    by, before = ctx.saved_tensors
    d_added, d_state = carry_back(by, d_before, d_after)
    d_by = d_added @ before.mT if by.shape[-1] > 1 else d_added * before
    return d_by.sum_to_size(by.shape), d_added, d_state


carry_states.register_autograd(_backward, setup_context=_setup_context)


def _times(by: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.matmul if by.shape[-1] > 1 else torch.mul


def _accumulate(by: torch.Tensor, added: torch.Tensor, *, backwards: bool) -> torch.Tensor:
    """Sums T_n = by_n T_{n-1} + added_n from the first on, or T_n = by_n T_{n+1} + added_n from the last.

    Two neighbours make one of half as many, as long as there are many: doubling alone is less to start and more to do.
    """
    number, times = added.shape[2], _times(by)
    if number <= FEW or added.shape[-2] == 1:
        return _double(by, added, backwards=backwards)
    if number % 2:
        longer = (pad(x, (0, 0, 0, 0, 0, 1)) for x in (by, added))
        return _accumulate(*longer, backwards=backwards)[:, :, :number]
    order = -1 if backwards else 1
    (by_1, by_2), (added_1, added_2) = (x.unflatten(2, (-1, 2)).unbind(3)[::order] for x in (by, added))
    second = _accumulate(times(by_2, by_1), times(by_2, added_1).add_(added_2), backwards=backwards)
    none = torch.zeros_like(second[:, :, :1])
    before = torch.cat([second[:, :, 1:], none] if backwards else [none, second[:, :, :-1]], dim=2)
    first = times(by_1, before).add_(added_1)
    return torch.stack([first, second][::order], dim=3).flatten(2, 3)


def _double(by: torch.Tensor, added: torch.Tensor, *, backwards: bool) -> torch.Tensor:
    """The same: after d = 1, 2, 4, ... each sum is over the 2 d terms up to its own."""
    number, times, distance = added.shape[2], _times(by), 1
    total = added.clone(memory_format=torch.contiguous_format)
    own, other = (slice(1, None), slice(None, -1))[:: -1 if backwards else 1]
    by = by[:, :, own]
    while distance < number:
        # ``by`` leads over ``distance`` terms, to each that has as many on that side.
        total[:, :, own].add_(times(by, total[:, :, other]))
        if 2 * distance < number:
            by = times(by[:, :, own], by[:, :, other])
        distance *= 2
        own, other = (slice(distance, None), slice(None, -distance))[:: -1 if backwards else 1]
    return total


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
    states, after = carry_states(whole.expand(-1, -1, added.shape[2], -1, -1), added, state)
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
    between: torch.Tensor | BlockDecay
    if log_gate is None:
        between = sums_between = k.new_ones(size, size).tril()
        since = until = whole = sums_since = sums_until = sums_whole = k.new_ones(())
    else:
        between, since, until = sums_between, sums_since, sums_until = shared_decays(log_gate[..., -1:])
        if log_gate.shape[-1] > 1:
            between = decay_by_blocks(log_gate[..., :-1])
            since, until = between.since, between.until
        whole, sums_whole = (x[..., -1, :].unsqueeze(-1) for x in (since, sums_since))
    among_keys, weights = read_by_keys_and_queries(None if silent else q, k, between)
    # (I + strict lower triangle)^-1; the solver takes the diagonal for ones and doesn't read what is above.
    system = beta * among_keys
    right = beta * torch.cat([v, k * since], dim=-1)
    u, w = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [v.shape[-1], features], dim=-1
    )
    left = (k * until).mT
    by = whole * torch.eye(features, dtype=k.dtype, device=k.device) - left @ w
    memory, after = carry_states(by, left @ u, state[..., :-1, :-1])
    counted = pad(v, (0, 1), value=1.0)
    counted = counted if counts is None else counted * counts
    sums_whole = sums_whole.expand(*k.shape[:3], 1, 1)
    total, total_after = carry_states(sums_whole, (counted * sums_until).sum(-2, keepdim=True), state[..., -1:, :])
    after = torch.cat([pad(after, (0, 1)), total_after], dim=-2)
    if silent:
        return v.new_empty(v.shape[0], v.shape[1], 0, v.shape[-1]), after

    assert weights is not None
    q_since = q if log_gate is None else q * since.unsqueeze(-2)
    recalled = weights.flatten(3, 4) @ (u - w @ memory) + q_since.flatten(3, 4) @ memory
    sums = sums_between @ counted + sums_since * total
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
