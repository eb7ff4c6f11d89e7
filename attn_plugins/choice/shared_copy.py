"""A second model over the same weights, to be swapped and run while the first one stays exactly as it is."""

import copy
from typing import Any

from torch import nn


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules, hooks and configs that has the weights in common with it, in eval mode.

    Nothing that is swapped, hooked or run there reaches the model, in no thread, whatever fails. Its weights take no
    gradients; those of other kinds than torch's own (quantised ones) are the very same objects.
    """
    held: dict[int, Any] = {}
    for weight in model.parameters():
        plain = type(weight) is nn.Parameter
        held[id(weight)] = nn.Parameter(weight.detach(), requires_grad=False) if plain else weight
    held.update((id(buffer), buffer) for buffer in model.buffers())
    return copy.deepcopy(getattr(model, "_orig_mod", model), held).eval()
