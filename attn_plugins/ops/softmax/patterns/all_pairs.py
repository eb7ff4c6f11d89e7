"""The rule of attention to everything."""

from dataclasses import dataclass

import torch

from attn_plugins.core.mask import AttentionMask


@dataclass(frozen=True)
class AllPairs:
    """Every key, as far as the mask shows it."""

    def sees(self, mask: AttentionMask, q_index: torch.Tensor, k_index: torch.Tensor) -> torch.Tensor:
        return k_index >= 0
