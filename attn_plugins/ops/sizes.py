"""How much is worked on at a time on devices that are not a CPU, by type of device.

There a piece is large, so that there are few: what an operation costs by itself is then small beside what it does. It
is bounded all the same, so that memory is. The forms for CPUs have sizes of their own, beside what needs them.
"""

import torch

SCORES_AT_ONCE = {"cuda": 1 << 27}
"""Scores, or elements of another intermediate result, that are formed at a time: 512 MB in float32."""
SCORES_AT_ONCE_ELSEWHERE = 1 << 27


def scores_at_once(device: torch.device) -> int:
    """Elements of a piece on this device."""
    return SCORES_AT_ONCE.get(device.type, SCORES_AT_ONCE_ELSEWHERE)
