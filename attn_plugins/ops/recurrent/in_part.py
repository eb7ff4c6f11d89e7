"""Recurrences over rows of which each process has a part: the state before a part comes from those before it.

What a part does to a state is S -> A S + B. A and B are found without queries first, joined over the parts
(:func:`attn_plugins.ops.parts.states.carried_by`), and the part is run again from the state that it then knows. For
averages A is the product of the gates. For delta rules it is a whole matrix: the state that the part makes of the
identity, beside its values, with nothing written into it.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad

from attn_plugins.core.part import Part
from attn_plugins.ops.linear.attention import contiguous_segments
from attn_plugins.ops.parts.states import carried_by
from attn_plugins.ops.recurrent.checkpointed_loop import scan
from attn_plugins.ops.recurrent.chunked import OfKeys, Prepare, Rules, Tokens, hide, scan_from, state_shape, step_of
from attn_plugins.ops.reference import accumulation_dtype


def recurrent_attention_of_part(
    q_BHTD: torch.Tensor,
    of_keys: OfKeys,
    part: Part,
    prepare: Prepare,
    weights: Sequence[torch.Tensor],
    *,
    chunk_size: int,
    rules: Rules,
) -> torch.Tensor:
    """As :func:`attn_plugins.ops.recurrent.chunked.recurrent_attention`, for a part's own tokens: out_BHTV."""
    dtype = accumulation_dtype(q_BHTD, *of_keys)
    weights = [w.to(dtype) for w in weights]
    rows, span = _rows(part), rules.span(q_BHTD, chunk_size)
    shape = (len(q_BHTD), *state_shape(q_BHTD, of_keys, prepare, weights))

    def after(state: torch.Tensor, prepare: Prepare) -> torch.Tensor:
        step = step_of(prepare, chunk_size, rules, q_BHTD.shape[1])
        return scan(step, span, state, [None, *rows, *of_keys], weights)[1]

    tokens, _ = hide(prepare(q_BHTD[:, :, :0], *of_keys, *weights), *rows)
    gates = _product_of_gates(tokens)
    if tokens.beta is None:
        state = carried_by(part, gates, after(q_BHTD.new_zeros(shape, dtype=dtype), prepare), matrices=False)
    else:
        state = _corrected(part, prepare, after, shape, gates)
    return scan_from(state, q_BHTD, of_keys, *rows, prepare, weights, chunk_size, rules)[0]


def _corrected(
    part: Part,
    prepare: Prepare,
    after: Callable[[torch.Tensor, Prepare], torch.Tensor],
    shape: tuple[int, ...],
    gates: torch.Tensor,
) -> torch.Tensor:
    """The state before a part of a delta rule: S (F, V), and as its last row the sum of the values and their number.

    Args:
        after: (a state, what tokens are made by) -> the state after this part.
    """
    (batch, groups, rows, columns) = shape
    features, values = rows - 1, columns - 1

    def beside_identity(*tokens: torch.Tensor) -> Tokens:
        made = prepare(*tokens)
        return made._replace(v=pad(made.v, (0, features)))

    start = gates.new_zeros(batch, groups, rows, values + features + 1)
    start[:, :, :features, values:-1] = torch.eye(features, dtype=gates.dtype, device=gates.device)
    made = after(start, beside_identity)
    of_sums = pad(gates[:, :, -1:].expand(batch, groups, 1, 1), (features, 0))
    by = torch.cat([pad(made[:, :, :features, values:-1], (0, 1)), of_sums], dim=2)
    return carried_by(part, by, torch.cat([made[..., :values], made[..., -1:]], dim=3), matrices=True)


def _product_of_gates(tokens: Tokens) -> torch.Tensor:
    """Of all of a part's tokens, (B or 1, G or 1, F, F + 1 or 1, 1); 0 where a text begins in it."""
    if tokens.log_gate is None:
        return tokens.k.new_ones(1, tokens.k.shape[1], 1, 1)
    number = tokens.k.shape[2] if tokens.log_gate.shape[2] == 1 else 1
    return (tokens.log_gate.sum(dim=2, keepdim=True) * number).exp().mT


def _rows(part: Part) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Which of a part's tokens are real and which start a text, (B or 1, 1, T, 1) each; None for all and for none."""
    real_BT, segments_BN = part.own(part.mask.padding_BK), contiguous_segments(part.mask)
    real = None if real_BT is None else real_BT[:, None, :, None]
    if segments_BN is None:
        return real, None
    starts_BN = pad(segments_BN[:, 1:] != segments_BN[:, :-1], (1, 0), value=True)
    return real, starts_BN[:, None, part.start : part.stop, None]
