"""Masks of models whose own attention is sparse, made once for all layers of a forward pass."""

from collections.abc import Callable, Hashable

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from attn_plugins.core.mask import AttentionMask


def shared(given: torch.Tensor, key: Hashable, make: Callable[[], AttentionMask]) -> AttentionMask:
    """What ``make`` makes of a tensor that all layers are given, for as long as it lives and nobody writes to it.

    Args:
        key: what else the mask depends on.
    """
    key = (key, None if given.is_inference() else given._version)
    held = _made.get(given)
    if held is None or held[0] != key:
        held = _made[given] = (key, make())
    return held[1]


def bidirectional(real_BK: torch.Tensor) -> AttentionMask:
    """The mask of self-attention to all real tokens."""
    batch, length = real_BK.shape
    padding_BK = None if bool(real_BK.all()) else real_BK
    return AttentionMask(batch, length, length, causal=False, padding_BK=padding_BK, device=real_BK.device)


_made = WeakTensorKeyDictionary()
