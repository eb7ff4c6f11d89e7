"""A recurrence over spans of a sequence that keeps the states between spans and computes the rest again in backward."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from attn_plugins.ops.reference import outside_autocast

Step = Callable[[torch.Tensor, list[Any], Sequence[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""(state, the span of each sequence, weights) -> (out of the span with time in dimension 2, state after it)."""


def scan(
    step: Step,
    span: int,
    state: torch.Tensor,
    sequences: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply ``step`` to one span after another. To be called outside autocast.

    Args:
        step: a function of its arguments alone; other tensors that it holds get no gradient.
        span: time steps a span; the last may be shorter.
        state: what the first span starts from.
        sequences: tensors with time in dimension 2, or None where there is none; at least one tensor.
        weights: tensors that every span gets whole.

    Returns:
        (the spans' outputs, joined; the last state). Autograd keeps the arguments and one state a span.
    """
    out, after = _Scan.apply(step, span, len(sequences), state, *sequences, *weights)
    return out, after


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step, span, count, state, *tensors):
        sequences, weights = tensors[:count], tensors[count:]
        length = next(x.shape[2] for x in sequences if x is not None)
        ctx.step, ctx.count = step, count
        ctx.spans = [slice(start, min(start + span, length)) for start in range(0, length, span)]
        outs, states = [], []
        for at in ctx.spans:
            states.append(state)
            out, state = step(state, _cut(sequences, at), weights)
            outs.append(out)
        ctx.save_for_backward(*tensors, *states)
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), state

    @staticmethod
    @outside_autocast
    def backward(ctx, d_out, d_state):
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
        tensors, states = saved[: len(needed)], saved[len(needed) :]
        gradients: list[torch.Tensor | None] = [None] * len(tensors)
        if len(ctx.spans) > 1:
            # Spans fill the sequences' gradients, and add to those of the weights.
            empty = [torch.empty_like] * ctx.count + [torch.zeros_like] * (len(tensors) - ctx.count)
            gradients = [make(x) if need else None for make, x, need in zip(empty, tensors, needed, strict=True)]
        done = d_out.shape[2]
        for at, state in zip(reversed(ctx.spans), reversed(states), strict=True):
            parts = [*_cut(tensors[: ctx.count], at), *tensors[ctx.count :]]
            with torch.enable_grad():
                state = state.detach().requires_grad_()
                leaves = [x.detach().requires_grad_() if need else x for x, need in zip(parts, needed, strict=True)]
                out, after = ctx.step(state, leaves[: ctx.count], leaves[ctx.count :])
            wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
            cotangents = (d_out[:, :, done - out.shape[2] : done], d_state)
            done -= out.shape[2]
            both = [(y, d) for y, d in zip((out, after), cotangents, strict=True) if y.requires_grad]
            outputs, cotangents = zip(*both, strict=True)
            found = iter(torch.autograd.grad(outputs, [state, *wanted], cotangents, allow_unused=True))
            d_state = next(found)
            if d_state is None:
                d_state = torch.zeros_like(state)
            for place, (total, need) in enumerate(zip(gradients, needed, strict=True)):
                part = next(found) if need else None
                if total is None:
                    gradients[place] = part
                elif place < ctx.count:
                    total[:, :, at] = 0.0 if part is None else part
                elif part is not None:
                    total.add_(part)
        return None, None, None, d_state if ctx.needs_input_grad[3] else None, *gradients


def _cut(sequences, at: slice) -> list:
    return [None if x is None else x[:, :, at] for x in sequences]
