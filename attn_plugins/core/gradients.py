"""A gradient for weights that a call has no use for."""

from collections.abc import Iterable
from typing import Any

import torch

from attn_plugins.core.tracing import recorded


def with_gradients_to(out: torch.Tensor, weights: Iterable[torch.Tensor]) -> torch.Tensor:
    """``out``, through which each of the weights gets a gradient: what it has anyway, plus zero.

    A call may leave weights out: those of the sum over far keys where all keys are near, for one. Without a gradient
    they would be an error or a hang of data-parallel training, which waits for all of them. It costs no pass over
    ``out``, and in the backward a zero for each element of the weights.

    Nothing is added where autograd does not follow, nor to a model that is exported or traced, which would keep it.
    """
    if not torch.is_grad_enabled() or recorded(out):
        return out
    weights = [weight for weight in weights if weight.requires_grad]
    if torch.compiler.is_compiling():  # Dynamo would instantiate the function below, which torch warns of
        for weight in weights:
            out = out + weight.flatten()[:0].sum().to(out.dtype)
        return out
    return _WithGradients.apply(out, *weights) if weights else out


class _WithGradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(out: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        return out.detach()  # what is no view of the input may be changed in place afterwards

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *(torch.zeros_like(weight) for weight in ctx.saved_tensors)
