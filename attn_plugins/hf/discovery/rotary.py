"""Rotary positions of a module: whether it applies them to its queries, and by what."""

import inspect

from torch import nn

from attn_plugins.core.rotary import Rotary
from attn_plugins.hf.call import Call


def turns(module: nn.Module) -> bool:
    """Whether a module gives its queries rotary positions in a way that :func:`rotary_of` knows."""
    forward = inspect.unwrap(type(module).forward)
    return (
        "apply_rotary_pos_emb" in forward.__globals__ and "position_embeddings" in inspect.signature(forward).parameters
    )


def rotary_of(module: nn.Module, call: Call | None) -> Rotary | None:
    """What a module was told to turn its queries by, and its own function that does it, where it has both."""
    given = None if call is None else call.kwargs.get("position_embeddings")
    turn = inspect.unwrap(type(module).forward).__globals__.get("apply_rotary_pos_emb")
    if turn is None or not isinstance(given, tuple):
        return None
    return Rotary(given[0], given[1], lambda x, cos, sin: turn(x, x, cos, sin)[0])
