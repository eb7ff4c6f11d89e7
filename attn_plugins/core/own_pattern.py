"""What a model's own sparse attention adds to its options at a call, for the attention that is the same pattern."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class OwnPattern:
    """Part of an :class:`~attn_plugins.core.mask.AttentionMask`: attentions of other patterns don't look at it."""

    marked_BK: torch.Tensor | None = None
    """True for tokens that all others see (Longformer's global attention). What these see themselves is none of it."""
    blocks: "OwnBlocks | None" = None
    """Blocks of a BigBird model."""

    def to(self, device: torch.device) -> "OwnPattern":
        marked_BK = None if self.marked_BK is None else self.marked_BK.to(device)
        return dataclasses.replace(self, marked_BK=marked_BK)


@dataclass(frozen=True)
class OwnBlocks:
    """Blocks that a BigBird model attends to: the first and the last, three around a query's own, and drawn ones.

    Queries of the first and of the last block see all.
    """

    block_size: int
    drawn: tuple[Any, ...] | None
    """For each head, or once for all, the blocks drawn for each block of queries but the first and the last. One that
    is seen anyway counts once more. None where the model attends to all of a row, since it is short."""
    num_random_blocks: int
    scale: float
    """By which the model multiplies its scores."""
