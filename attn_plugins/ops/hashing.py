"""Random numbers that are a function of where they are used, so that each can be had again alone."""

import torch


def mixed(number: torch.Tensor) -> torch.Tensor:
    """A hash of int64 numbers (the finaliser of splitmix64, with signed shifts), the same everywhere and always."""
    number = (number ^ (number >> 30)) * -4658895280553007687
    number = (number ^ (number >> 27)) * -7723592293110705685
    return number ^ (number >> 31)
