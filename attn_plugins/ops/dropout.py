"""Which weights dropout takes, as a function of a seed and of the numbers of query and key.

The backward finds the same again from the seed, whatever the order in which pairs are worked on, and nothing has a
state that a graph of torch.compile could not hold, as a torch.Generator has.
"""

import torch

from attn_plugins.ops.hashing import mixed

ROUNDS = ((16, 0x7FEB352D), (15, 0x846CA68B - (1 << 32)))
"""Shifts and odd factors of 32 bits that mix a pair's number (Wellons 2018), as signed integers."""


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of this device, which stays there."""
    return torch.randint(2**62, (), device=device)


def dropped(seed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, probability: float) -> torch.Tensor:
    """bool of the shape that the integers ``query`` and ``key`` broadcast to: True with this probability.

    Queries and keys are mixed in 64 bits, and pairs of them, of which there are many, in 32.
    """
    number = _half(mixed(mixed(seed) + query.long())) + _half(mixed(mixed(seed + 1) + key.long()))
    for shift, factor in ROUNDS:
        number = number.bitwise_xor_(number >> shift).mul_(factor)
    return number < round(probability * (1 << 32)) - (1 << 31)


def _half(number: torch.Tensor) -> torch.Tensor:
    """The lower 32 bits."""
    return (number % (1 << 32) - (1 << 31)).to(torch.int32)
