"""Feature maps of linear attention, each a function of one token with values that are never negative.

A map is applied to what it is given in float32 (float64 stays); a learned projection comes before it, not in it. Each
has a second form for the fused kernel, which keeps no activations: the map again, made of cheaper operations, and its
gradient from its value alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import elu, relu

LOG2_E = 1.4426950408889634
SMALLEST_FEATURE = 1e-12


class FeatureMap(NamedTuple):
    """phi, and what the fused kernel needs of it. Shapes are (..., D) -> (..., F)."""

    features: Callable[[torch.Tensor], torch.Tensor]
    """The definition."""
    fast_features: Callable[[torch.Tensor], torch.Tensor]
    """The same numbers; autograd can follow it too."""
    gradient: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """(features, gradient of the features) -> gradient of the input; may overwrite both."""
    factor: int
    """F = factor * D."""


def _elu(x: torch.Tensor) -> torch.Tensor:
    return elu(x) + 1


def _elu_fast(x: torch.Tensor) -> torch.Tensor:
    # exp2 is vectorised to a third of exp's time on CPU, and elu goes through expm1, which is slower still.
    return x.clamp(max=0).mul_(LOG2_E).exp2_() + x.relu()


def _elu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.clamp_(max=1))


def _relu_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.mul_(features.sign_())


def _hedgehog(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.softmax(dim=-1), (-x).softmax(dim=-1)], dim=-1).clamp(min=SMALLEST_FEATURE)


def _hedgehog_fast(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, -x], dim=-2).softmax(dim=-1).flatten(-2).clamp(min=SMALLEST_FEATURE)


def _hedgehog_gradient(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    # What is clamped would have no gradient; here it has one of 1e-12, which spares a pass over the features.
    flow = gradient.mul_(features)
    (plus, minus), (flow_plus, flow_minus) = features.chunk(2, dim=-1), flow.chunk(2, dim=-1)
    flow_plus.addcmul_(plus, flow_plus.sum(dim=-1, keepdim=True), value=-1)
    flow_minus.addcmul_(minus, flow_minus.sum(dim=-1, keepdim=True), value=-1)
    return flow_plus - flow_minus


FEATURE_MAPS = {
    "elu": FeatureMap(_elu, _elu_fast, _elu_gradient, 1),
    "relu": FeatureMap(relu, relu, _relu_gradient, 1),
    "hedgehog": FeatureMap(_hedgehog, _hedgehog_fast, _hedgehog_gradient, 2),
}
"""elu: elu(x) + 1 (Katharopoulos 2020). relu: max(x, 0). hedgehog: [softmax(x); softmax(-x)] (Zhang 2024), F = 2 D."""
