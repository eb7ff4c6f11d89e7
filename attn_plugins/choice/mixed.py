"""A slot that attends by both: the rule's attention, and softmax attention as the model's own, mixed head by head."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from attn_plugins.choice.places import Place
from attn_plugins.core.registry import get_attention
from attn_plugins.hf.names import SLOT, slot_of


class Mixed(nn.Module):
    """``swapped + gate (own - swapped)``: a gate of 1 keeps the model's own attention, 0 is the attention of the rule.

    Args:
        slot: what has been in the slot.
        units: gates, each for as many heads in a row; 1 is for all.
    """

    def __init__(self, slot: nn.Module, units: int):
        super().__init__()
        self.swapped = slot  # first: what asks for a slot's attention takes the first one inside
        softmax = get_attention("softmax")
        self.own = softmax(softmax.Config())
        self.gates: torch.Tensor | list[float] = [1.0] * units

    def forward(self, q_BHQD: torch.Tensor, *given: Any, **options: Any) -> tuple[torch.Tensor, None]:
        def attended(by: nn.Module) -> torch.Tensor:
            return by(q_BHQD, *given, **options)[0]

        if isinstance(self.gates, list) and len(set(self.gates)) == 1 and self.gates[0] in (0.0, 1.0):
            return attended(self.own if self.gates[0] else self.swapped), None
        own_BQHV, swapped_BQHV = attended(self.own), attended(self.swapped)
        gates_U = torch.as_tensor(self.gates, device=own_BQHV.device)
        gates_H1 = gates_U.to(own_BQHV.dtype).repeat_interleave(own_BQHV.shape[2] // len(gates_U))[:, None]
        return swapped_BQHV + gates_H1 * (own_BQHV - swapped_BQHV), None


@contextlib.contextmanager
def mixed(model: nn.Module, places: Sequence[Place], units: Sequence[int]) -> Iterator[list[Mixed]]:
    """Put these into the slots of modules, one each with so many gates, all of them 1."""
    modules = [model.get_submodule(place.path) for place in places]
    slots = [module._modules[SLOT] for module in modules]
    made = []
    for module, slot, number in zip(modules, slots, units, strict=True):
        assert slot is not None
        one = Mixed(slot, number).eval()
        setattr(module, SLOT, one)
        assert slot_of(module) is not None
        made.append(one)
    try:
        yield made
    finally:
        for module, slot in zip(modules, slots, strict=True):
            setattr(module, SLOT, slot)
