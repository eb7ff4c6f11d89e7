"""Which weights dropout takes, as a function of a seed and of the numbers of query and key.

The backward finds the same again from the seed, whatever the order in which pairs are worked on, and nothing has a
state that a graph of torch.compile could not hold, as a torch.Generator has.
"""

import torch

MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""Odd numbers of 64 bits, those of splitmix64 (Steele et al. 2014), as signed integers."""


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of this device, which stays there."""
    return torch.randint(2**62, (), device=device)


def dropped(seed: torch.Tensor, query: torch.Tensor, key: torch.Tensor, probability: float) -> torch.Tensor:
    """bool of the shape that the integers ``query`` and ``key`` broadcast to: True with this probability."""
    of_query, of_key = _mixed(query.long() * 2 + seed), _mixed(key.long() * 2 + 1 + seed)
    return _mixed(of_query + of_key) < int(probability * 2**64) - 2**63


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer of each number."""
    first, second, third = MULTIPLIERS
    x = x * first
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * second
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * third
    return x ^ (x >> 31 & (1 << 33) - 1)
