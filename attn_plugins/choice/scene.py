"""What a score sees: a swapped copy of a model, the modules to choose among, and what to run it on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attn_plugins.choice.places import Level, Place, Places
from attn_plugins.choice.samples import Sample
from attn_plugins.choice.shared_copy import shared_copy

Table = list[list[float]]
"""A row for each module: a score for each key/value head, or one where layers are chosen. More is kept first."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A model that a score may swap, hook and run as it likes."""

    model: nn.Module
    """A copy, whose modules in ``places`` have the attention of the rule in their slots."""
    places: Places
    samples: Sequence[Sample]
    level: Level
    told: Callable[[str], None]
    """Takes a line on how far the score is."""

    def units(self, place: Place) -> int:
        """How many scores a module gets."""
        return place.groups if self.level == "heads" else 1

    def module(self, place: Place) -> nn.Module:
        return self.model.get_submodule(place.path)

    def swapped(self, swap: Callable[..., nn.Module], *rules: Any) -> nn.Module:
        """Another copy, swapped once more: one that caches serve as they will serve the model."""
        return swap(shared_copy(self.model), *rules)

    def run(self, sample: Sample) -> torch.Tensor | None:
        """Run the model without a cache: its logits, None where it has none."""
        takes_cache = hasattr(self.model.config, "use_cache")
        output = self.model(**sample.inputs, **({"use_cache": False} if takes_cache else {}))
        return getattr(output, "logits", None)
