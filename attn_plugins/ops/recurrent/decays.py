"""Decays between the tokens of a chunk, from the log gates of each, all of them exponentials of at most 0.

Letters: C tokens of a chunk, R query heads that share a key/value head, F channels.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad


class Decay(NamedTuple):
    """Decays within chunks, each (..., C, F or 1)."""

    halves: list[tuple[torch.Tensor, torch.Tensor]]
    """For blocks of 2, 4, ..., C: from the middle to each token of the second half, from each of the first to it."""
    since: torch.Tensor
    """From the state before the chunk to each token."""
    until: torch.Tensor
    """From each token to the state after the chunk."""
    whole: torch.Tensor
    """From the state before to the state after, (..., F or 1)."""
    number: torch.Tensor
    """The decayed number of tokens of the chunk up to each."""


def decay_by_halves(log_gate: torch.Tensor, counts: torch.Tensor | None) -> Decay:
    since = log_gate.unsqueeze(-2)
    until = torch.zeros_like(since)
    count = torch.ones_like(since) if counts is None else counts.unsqueeze(-2) + torch.zeros_like(since)
    halves = []
    while since.shape[-3] > 1:
        (since_1, since_2), (until_1, until_2), (count_1, count_2) = (
            x.unflatten(-3, (-1, 2)).unbind(-3) for x in (since, until, count)
        )
        after, before = since_2.exp(), until_1.exp()
        halves.append((after, before))
        count = torch.cat([count_1, count_2 + after * count_1[..., -1:, :]], dim=-2)
        until = torch.cat([until_1 + since_2[..., -1:, :], until_2], dim=-2)
        since = torch.cat([since_1, since_1[..., -1:, :] + since_2], dim=-2)
    since, until, count = (x.squeeze(-3) for x in (since.exp(), until.exp(), count))
    return Decay(halves, since, until, since[..., -1, :], count)


def _triangle(diagonal: torch.Tensor, lower: list[torch.Tensor]) -> torch.Tensor:
    """A lower triangular matrix from its diagonal (..., C, R) and the squares below it.

    Args:
        lower: for h = 1, 2, 4, ..., C / 2 what second halves have to do with first halves, (..., C / 2 h, h, R, h).

    Returns:
        (..., C, R, C).
    """
    a = diagonal.unsqueeze(-2).unsqueeze(-1)
    for square in lower:
        first, second = a.unflatten(-4, (-1, 2)).unbind(-4)
        first = pad(first, (0, square.shape[-1]))
        a = torch.cat([first, torch.cat([square, second], dim=-1)], dim=-3)
    return a.squeeze(-4)


def between_tokens(decay: Decay) -> torch.Tensor:
    """Decays between tokens of a chunk where one gate serves all channels, (..., C, C), zero above the diagonal."""
    lower = [after.unsqueeze(-2) * before.squeeze(-1)[..., None, None, :] for after, before in decay.halves]
    return _triangle(torch.ones_like(decay.since), lower).squeeze(-2)


def products(q: torch.Tensor, k: torch.Tensor, decay: Decay) -> torch.Tensor:
    """Decayed products of the queries and keys of a chunk where each channel has its gate, (..., C, R, C)."""
    group, lower = q.shape[-2], []
    for after, before in decay.halves:
        half = after.shape[-2]
        queries = q.unflatten(-3, (-1, 2, half))[..., 1, :, :, :] * after.unsqueeze(-2)
        keys = k.unflatten(-2, (-1, 2, half))[..., 0, :, :] * before
        lower.append((queries.flatten(-3, -2) @ keys.mT).unflatten(-2, (half, group)))
    return _triangle((q * k.unsqueeze(-2)).sum(-1), lower)


def shared_decays(log_gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in a few operations where one gate (..., C, 1) serves all channels, by a sum for each pair of tokens.

    Returns:
        (between tokens (..., C, C), zero above the diagonal; from the state before to each token and from each token to
        the state after, (..., C, 1)).
    """
    size = log_gate.shape[-2]
    later = torch.ones(size, size, dtype=torch.bool, device=log_gate.device).tril(-1)
    between = torch.where(later, log_gate, 0.0).cumsum(-2).exp().tril()
    return between, log_gate.cumsum(-2).exp(), between[..., -1, :].unsqueeze(-1)


BLOCK = 8
"""Tokens of a chunk whose decays in each channel are formed pair by pair."""


class BlockDecay(NamedTuple):
    """Decays within chunks where each channel has its gate, in a few operations: S blocks of c tokens a chunk."""

    within: torch.Tensor
    """Between the tokens of a block, (..., S, c, c, F), zero for what comes later."""
    from_start: torch.Tensor
    """From the start of its block to each token, (..., S, c, F)."""
    to_start: torch.Tensor
    """To the start of each block from the tokens of those before it, (..., S, C, F), zero for others."""
    since: torch.Tensor
    """From the state before the chunk to each token, (..., C, F)."""
    until: torch.Tensor
    """From each token to the state after the chunk, (..., C, F)."""


def decay_by_blocks(log_gate: torch.Tensor) -> BlockDecay:
    """Decays of a chunk from log gates (..., C, F). Each exponent is a sum over just the tokens between."""
    size = min(BLOCK, log_gate.shape[-2])
    gate = log_gate.unflatten(-2, (-1, size))
    number = gate.shape[-3]

    def sums_between(x: torch.Tensor) -> torch.Tensor:
        """[t, j]: the sum of x after j up to t, 0 where there is none; of dimension -2."""
        return torch.where(_below(x.shape[-2], -1, x.device), x.unsqueeze(-2), 0.0).cumsum(-3)

    in_block, begun = sums_between(gate), gate.cumsum(-2)
    # Of whole blocks, after one without any before the first: [i, b + 1] is what lies between block b and block i.
    of_blocks = sums_between(pad(begun[..., -1, :], (0, 0, 1, 0)))
    to_start = in_block[..., -1, :, :].unsqueeze(-4) + of_blocks[..., 1:, :].unsqueeze(-2)
    reached = _below(number + 1, 0, gate.device)[:, 1:, None]
    to_start = torch.where(reached, to_start.exp(), 0.0).flatten(-3, -2)
    since = (begun + of_blocks[..., :-1, :1, :]).exp().flatten(-3, -2)
    within = torch.where(_below(size, 0, gate.device), in_block.exp(), 0.0)
    return BlockDecay(within, begun.exp(), to_start[..., :-1, :, :], since, to_start[..., -1, :, :])


def _below(size: int, diagonal: int, device: torch.device) -> torch.Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal).unsqueeze(-1)


def products_by_blocks(q: torch.Tensor, k: torch.Tensor, decay: BlockDecay) -> torch.Tensor:
    """As :func:`products`: (..., C, R, C)."""
    number, size = decay.within.shape[-4:-2]
    q = q.unflatten(-3, (number, size))
    before = (q * decay.from_start.unsqueeze(-2)).flatten(-3, -2) @ (k.unsqueeze(-3) * decay.to_start).mT
    own = q @ (k.unflatten(-2, (number, 1, size)) * decay.within).mT
    own = own.unsqueeze(-2) * torch.eye(number, dtype=q.dtype, device=q.device).view(number, 1, 1, number, 1)
    return (before.view(own.shape) + own).flatten(-5, -4).flatten(-2)


def read_by_keys_and_queries(
    q: torch.Tensor | None, k: torch.Tensor, between: torch.Tensor | Decay | BlockDecay
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decayed products of the keys of a chunk with one another and with its queries: (..., C, C) and (..., C, R, C).

    Args:
        q: None where there are no queries.
        between: the decays (..., C, C) that all channels share, or those of each channel.
    """
    if isinstance(between, torch.Tensor):
        of_keys = k @ k.mT * between
        if q is None:
            return of_keys, None
        return of_keys, (q.flatten(-3, -2) @ k.mT).unflatten(-2, q.shape[-3:-1]) * between.unsqueeze(-2)
    readers = k.unsqueeze(-2) if q is None else torch.cat([k.unsqueeze(-2), q], dim=-2)
    both = products(readers, k, between) if isinstance(between, Decay) else products_by_blocks(readers, k, between)
    return both[..., 0, :], None if q is None else both[..., 1:, :]
