"""Dense attention, the oracle that every other form of softmax attention is compared with."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])

MASKED_SCORE = -1e30
"""Score of a masked pair: its exponential is 0, and it is finite, so that a row that sees nothing has no NaN."""


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype in which sums are taken: float32, or float64 where an input is float64."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def outside_autocast(backward: F) -> F:
    """Decorator for the backward of an autograd function, whose products autocast must not lower to another dtype.

    The forward runs outside autocast already; a user may call ``loss.backward()`` inside. Some gradients may be None.
    """

    @functools.wraps(backward)
    def run(ctx, *grad_outputs):
        given = next(grad for grad in grad_outputs if grad is not None)
        with torch.autocast(given.device.type, enabled=False):
            return backward(ctx, *grad_outputs)

    return cast(F, run)


def expand_heads(x_BGKD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Key/value heads repeated to the query heads that share them, (B, H, K, D)."""
    group = num_heads // x_BGKD.shape[1]
    return x_BGKD if group == 1 else x_BGKD.repeat_interleave(group, dim=1)


def scores(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    *,
    scale: float,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Scaled dot products in at least float32, softcapped, then biased: (B, H, Q, K)."""
    dtype = accumulation_dtype(q_BHQD, k_BGKD)
    s_BHQK = q_BHQD.to(dtype) @ expand_heads(k_BGKD, q_BHQD.shape[1]).to(dtype).transpose(-1, -2) * scale
    if softcap is not None:
        s_BHQK = softcap * torch.tanh(s_BHQK / softcap)
    if position_bias is not None:
        s_BHQK = s_BHQK + position_bias.to(dtype)
    return s_BHQK


def masked_softmax(s_BHQK: torch.Tensor, visible: torch.Tensor, sinks_H: torch.Tensor | None = None) -> torch.Tensor:
    """Softmax over the visible keys; a row that sees nothing is zero.

    ``sinks_H`` are logits that take part in the denominator, one a head, and have no value of their own.
    """
    s_BHQK = s_BHQK.masked_fill(~visible, -torch.inf)
    top = s_BHQK.amax(dim=-1, keepdim=True)
    if sinks_H is not None:
        sinks = sinks_H.to(s_BHQK.dtype).view(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == -torch.inf, 0.0).detach()
    weights = torch.exp(s_BHQK - top)
    total = weights.sum(dim=-1, keepdim=True)
    if sinks_H is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.masked_fill(total == 0, 1.0)


def with_dropout(weights: torch.Tensor, dropout: float) -> torch.Tensor:
    """Weights, each left out with probability ``dropout`` and made up for by the others, as in training."""
    # Not by `train=`: a probability that changed between calls is symbolic in a compiled graph, and so would that be.
    return torch.dropout(weights, dropout, train=True) if dropout else weights


def dense_attention(
    q_BHQD: torch.Tensor,
    k_BGKD: torch.Tensor,
    v_BGKV: torch.Tensor,
    visible: torch.Tensor,
    *,
    scale: float,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention through the whole N x N matrix.

    Args:
        visible: bool, broadcastable to (B, H, Q, K).

    Returns:
        (out_BHQV in the dtype of v, weights_BHQK in at least float32).
    """
    s_BHQK = scores(q_BHQD, k_BGKD, scale=scale, position_bias=position_bias, softcap=softcap)
    weights_BHQK = with_dropout(masked_softmax(s_BHQK, visible, sinks), dropout)
    out_BHQV = weights_BHQK @ expand_heads(v_BGKV, q_BHQD.shape[1]).to(weights_BHQK.dtype)
    return out_BHQV.to(v_BGKV.dtype), weights_BHQK
