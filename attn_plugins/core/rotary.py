"""Rotary positions: what a model rotated its queries by."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Rotary(NamedTuple):
    """What a model rotated its queries by, and how it does that: which entries go together is its own affair."""

    cos_BQR: torch.Tensor
    """Of the queries' positions, (B or 1, Q, R)."""
    sin_BQR: torch.Tensor
    apply: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    """(x_BHQD, cos_BQR, sin_BQR) -> x rotated."""
