"""Feature maps of linear attention, each a function of one token with values that are never negative in sum.

A map is applied to what it is given in float32 (float64 stays); projections, biases and positions come before it, not
in it. Each has a second form for the fused kernel, which keeps no activations: the map again, made of cheaper
operations, and its gradient from its value alone.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import elu, relu

from attn_plugins.ops.reference import MASKED_SCORE

LOG2_E = 1.4426950408889634
SMALLEST_FEATURE = 1e-12


class FeatureMap(NamedTuple):
    """phi, and what the fused kernel needs of it. Shapes are (..., E) -> (..., F)."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """The definition."""
    fast_features: Callable[[torch.Tensor], torch.Tensor]
    """The same numbers, where autograd doesn't follow."""
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(features, gradient of the features) -> gradient of the input; may overwrite both."""
    size: Callable[[int], int]
    """F of E."""
    exponential: bool = False
    """phi is exp, taken of differences from a running maximum, which keeps it finite: see :func:`exp_minus_max`."""


def _same(size: int) -> int:
    return size


def _elu(x: torch.Tensor) -> torch.Tensor:
    return elu(x) + 1


def _elu_fast(x: torch.Tensor) -> torch.Tensor:
    # exp2 is vectorised to a third of exp's time on CPU, and elu goes through expm1, which is slower still.
    return x.clamp_max(0).mul_(LOG2_E).exp2_().add_(x.relu())


def _elu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.clamp_(max=1))


def _relu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.sign_())


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return relu(x).square()


def _relu2_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.sqrt_()).mul_(2)


def _hedgehog(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1).clamp(min=SMALLEST_FEATURE)


def _hedgehog_fast(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, -x], dim=-2).softmax(dim=-1).flatten(-2).clamp_(min=SMALLEST_FEATURE)


def _hedgehog_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    # What is clamped would have no gradient; here it has one of 1e-12, which spares a pass over the features.
    flow = gradient.mul_(features)
    (plus, minus), (flow_plus, flow_minus) = features.chunk(2, dim=-1), flow.chunk(2, dim=-1)
    flow_plus.addcmul_(plus, flow_plus.sum(dim=-1, keepdim=True), value=-1)
    flow_minus.addcmul_(minus, flow_minus.sum(dim=-1, keepdim=True), value=-1)
    return flow_plus - flow_minus


def _taylor_size(size: int) -> int:
    return (size + 1) * (size + 2) // 2


def _taylor(x: torch.Tensor) -> torch.Tensor:
    row, column, share = _pairs(x, x.shape[-1])
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * share], dim=-1)


def _pairs(x: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """i, j and factor of each product x_i x_j, i <= j: sqrt(1/2) for squares, 1 where it stands for two."""
    row, column = torch.triu_indices(size, size, device=x.device)
    return row, column, torch.ones_like(row, dtype=x.dtype).masked_fill_(row == column, math.sqrt(0.5))


def _taylor_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    size = (math.isqrt(8 * features.shape[-1] + 1) - 3) // 2
    x, straight, pairs = features[..., 1 : size + 1], gradient[..., 1 : size + 1], gradient[..., size + 1 :]
    row, column, share = _pairs(x, size)
    square = pairs.new_zeros(*pairs.shape[:-1], size * size)
    square[..., row * size + column] = pairs * share
    square = square.unflatten(-1, (size, size))
    return straight + ((square + square.mT) @ x.unsqueeze(-1)).squeeze(-1)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _identity_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


FEATURE_MAPS = {
    "elu": FeatureMap(_elu, _elu_fast, _elu_gradient, _same),
    "relu": FeatureMap(relu, relu, _relu_gradient, _same),
    "relu2": FeatureMap(_relu2, _relu2, _relu2_gradient, _same),
    "hedgehog": FeatureMap(_hedgehog, _hedgehog_fast, _hedgehog_gradient, lambda size: 2 * size),
    "taylor": FeatureMap(_taylor, _taylor, _taylor_gradient, _taylor_size),
    "exp": FeatureMap(torch.exp, torch.exp, torch.mul, _same, exponential=True),
    "identity": FeatureMap(_identity, _identity, _identity_gradient, _same),
}
"""elu: elu(x) + 1 (Katharopoulos 2020). relu: max(x, 0). relu2: its square. hedgehog: [softmax(x); softmax(-x)] (Zhang
2024), F = 2 E. taylor: [1, x, products x_i x_j], phi(x).phi(y) = 1 + x.y + (x.y)^2 / 2 (Arora 2024). exp: of exponents,
as FAVOR+ has them. identity: of features that were made before."""


def max_exponent(exponents_BGKF: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Largest exponent of each feature over the keys seen, (B, G, 1, F), at least MASKED_SCORE. Has no gradient.

    Args:
        seen: bool, broadcastable to (B, G, K, 1), or None for all.
    """
    u = exponents_BGKF.detach()
    if seen is not None:
        u = u.masked_fill(~seen, MASKED_SCORE)
    return u.amax(dim=2, keepdim=True).clamp(min=MASKED_SCORE)


def exp_minus_max(exponents: torch.Tensor, running_max: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of queries for keys' features that are ``exp(exponents - running_max)``.

    What a query reads is a sum over features of ``exp(its exponent + running_max) * (what the keys add up to)``. The
    largest of these exponents is taken out, which scales numerator and denominator alike.

    Returns:
        (features, the exponent (..., 1) that was taken out).
    """
    raised = exponents + running_max
    top = raised.detach().amax(dim=-1, keepdim=True)
    return torch.exp(raised - top), top
