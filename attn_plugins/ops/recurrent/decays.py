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
