"""Recurrences that go on from a state: one token by the recurrence itself, several in chunks."""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from attn_plugins.core.mask import AttentionMask
from attn_plugins.ops.decode.running_sums import Sums, chunked_prefill
from attn_plugins.ops.recurrent.chunked import OfKeys, Prepare, Rules, Tokens, hide, scan_from, state_shape
from attn_plugins.ops.reference import accumulation_dtype

RecurrentStep = Callable[[Tokens, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(one token of each row, hidden where it is padding; which rows' token is no padding, (B, 1), None for all; the state
without it) -> (out_BH1V in the dtype of the state, a new state with it)."""


def recurrent_attention_from(
    q_BHQD: torch.Tensor,
    of_keys: OfKeys,
    mask: AttentionMask,
    state: Sums,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
    rules: Rules,
    step: RecurrentStep | None = None,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.recurrent.chunked.recurrent_attention`, for the last Q of K new tokens.

    Args:
        mask: of all tokens, which may end with some that come later.
        state: ``memory`` is the recurrence's state, as the chunks carry it. It takes the new tokens in.
        step: what takes in one token, in place of PyTorch's operations.

    Returns:
        out_BHQV in the dtype of v.
    """
    weights = [w.to(accumulation_dtype(q_BHQD, *of_keys)) for w in weights]
    if not state.tensors:
        state.start(*of_keys[:2], memory=state_shape(q_BHQD, of_keys, prepare, weights))

    def attend_chunk(q: torch.Tensor, *new: torch.Tensor) -> torch.Tensor:
        memory, number = state.tensors["memory"], new[0].shape[2]
        not_padding_BK = state.not_padding(mask, number)
        not_padding = None if not_padding_BK is None else not_padding_BK[:, None, :, None]
        if number == 1:
            tokens, counts = hide(prepare(q, *new, *weights), not_padding, None)
            if step is not None:
                out, memory = step(tokens, not_padding_BK, memory)
            else:
                out, memory = (_average if tokens.beta is None else _delta)(tokens, counts, memory)
        else:
            out, memory = scan_from(memory, q, new, not_padding, None, prepare, weights, chunk_size, rules)
        state.commit(number, memory=memory)
        return out.to(new[1].dtype)

    return chunked_prefill(attend_chunk, q_BHQD, *of_keys)


def _average(tokens: Tokens, counts: torch.Tensor | None, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token. The state is S and, as its last column, n."""
    q, k, v, log_gate, _, _ = tokens
    assert log_gate is not None
    counted = torch.ones_like(k) if counts is None else counts.expand_as(k)
    added = torch.cat([k.mT * v, counted.mT], dim=3)
    state = torch.addcmul(added, log_gate.mT.exp(), state)
    count = state[..., -1].unsqueeze(2)
    out = (_by_group(q, k) / count.clamp_min(1.0)) @ state[..., :-1]
    return out.flatten(1, 2).unsqueeze(2), state


def _delta(tokens: Tokens, counts: torch.Tensor | None, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token. The state is S and, as its last row, the sum of the values and their number."""
    q, k, v, log_gate, beta, average_weight = tokens
    assert beta is not None
    assert average_weight is not None
    if log_gate is not None:
        state = state * log_gate.mT.exp()
    memory, total = state[..., :-1, :-1], state[..., -1:, :]
    memory = torch.addcmul(memory, (beta * k).mT, v - k @ memory)
    counted = pad(v, (0, 1), value=1.0)
    total = total + (counted if counts is None else counted * counts)
    average = total[..., :-1] / total[..., -1:].clamp_min(1.0)
    out = _by_group(q, k) @ memory + average_weight.view(k.shape[1], -1, 1) * average
    return out.flatten(1, 2).unsqueeze(2), torch.cat([pad(memory, (0, 1)), total], dim=2)


def _by_group(q_BH1F: torch.Tensor, k_BG1F: torch.Tensor) -> torch.Tensor:
    """(B, G, query heads that share a key, F)."""
    return q_BH1F.unflatten(1, (k_BG1F.shape[1], -1)).squeeze(3)
