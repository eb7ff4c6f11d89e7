"""What can be asked of a tiny model of a family with an adapter."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
import transformers as tf


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny model of a family, and what can be asked of it."""

    made: Callable[[], tuple[type, tf.PreTrainedConfig]]
    role: str = "decoder"
    """Of the modules that a rule without roles serves."""
    learned: dict[str, Any] = field(default_factory=lambda: {"type": "linear", "feature_map": "hedgehog"})
    """An attention with weights of its own that can serve it."""
    given: Callable[[], dict[str, torch.Tensor]] = lambda: tiny.inputs("llama")
    generates: bool = False
    narrow: dict[str, Any] = field(default_factory=lambda: {"type": "local", "window_size": 2})
    """An attention that sees less than all: not a window where there are fewer keys than queries."""
    weighs: bool = True
    """Whether the model puts out attention weights, as a tensor for each layer."""
    in_rows: bool = True
    """Whether the input of each attention module has a row for each of its queries."""
    states: bool = True
    """Whether caches can hold states: not where a model makes the masks of its decoder itself, or they are dense."""
    uncached: bool = True
    """Whether the model itself generates the same without a cache."""
    scores: bool = False
    """Whether what the model gives for weights are scores."""
    read: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor] = lambda made, given: tiny.numbers(made, given)
    """What of a model's output is compared."""
