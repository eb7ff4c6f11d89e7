"""Rotary positions of a module: whether it applies them to its queries, and by what."""

import inspect

from torch import nn

from attn_plugins.core.rotary import Rotary
from attn_plugins.hf.call import Call


def applies_rotary(module: nn.Module) -> bool:
    """Whether a module gives its queries rotary positions in a way that :func:`rotary_of` knows."""
    forward = inspect.unwrap(type(module).forward)
    return (
        "apply_rotary_pos_emb" in forward.__globals__ and "position_embeddings" in inspect.signature(forward).parameters
    )


def rotary_of(module: nn.Module, call: Call | None) -> Rotary | None:
    """The rotary positions in a module's call, and its own function that applies them, where it has both."""
    given = None if call is None else call.kwargs.get("position_embeddings")
    apply = inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")
    if apply is None or not isinstance(given, tuple):
        return None
    return Rotary(given[0], given[1], lambda x, cos, sin: apply(x, x, cos, sin)[0])
