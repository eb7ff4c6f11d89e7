"""A cache changes in all of its layers or in none: what one of them refuses is undone, or not begun, in the others."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attn_plugins.hf.caches.state_layer import StateLayer

UNDO = "_attn_plugin_undo"
"""Attribute of a cache while a model runs: its layers, each with what puts it back."""


def crop(original: Callable[[Cache, int], None], cache: Cache, tokens_to_remove: int) -> None:
    """As :meth:`Cache.crop`, where layers hold states: those are asked first, and cropped last, when nothing can fail.

    Raises:
        ValueError, RuntimeError: a layer cannot go back; all are as they were.
    """
    layers: list[Any] = cache.layers
    states = [layer for layer in layers if isinstance(layer, StateLayer)]
    if not states:
        return original(cache, tokens_to_remove)
    for layer in states:
        layer.check_crop(tokens_to_remove)
    others = [layer for layer in layers if not isinstance(layer, StateLayer)]
    before = [_shallow(layer) for layer in others]
    try:
        for layer in others:
            layer.crop(tokens_to_remove)
    except Exception:
        for layer, held in zip(others, before, strict=True):
            vars(layer).update(held)
        raise
    for layer in states:
        layer.crop(tokens_to_remove)


def begin(cache: Cache) -> None:
    """Before a model's forward, and before layers are exchanged: remember how to put them back."""
    if torch.compiler.is_compiling():
        return
    held: Any = getattr(cache, "self_attention_cache", cache)
    undo = []
    for layer in held.layers:  # with no call for each of the kinds that most are
        if type(layer) is DynamicLayer:
            undo.append((layer, layer.get_seq_length()))
        else:
            undo.append((layer, layer.state.seen if type(layer) is StateLayer else _before(layer)))
    setattr(cache, UNDO, undo)


def end(cache: Cache, *, failed: bool) -> None:
    """After it: put the layers back where it failed."""
    if torch.compiler.is_compiling():
        return
    before = vars(cache).pop(UNDO, None)
    if not failed or before is None:
        return
    held: Any = getattr(cache, "self_attention_cache", cache)
    held.layers[:] = [layer for layer, _ in before]
    for layer, was in before:
        _put_back(layer, was)


def _before(layer: Any) -> Any:
    """What puts a layer back, at no cost in memory; None where there is nothing that would."""
    if type(layer) is DynamicLayer:
        return layer.get_seq_length()
    if isinstance(layer, StateLayer):
        return layer.state.seen
    if type(layer) is StaticLayer:
        return layer.cumulative_length.clone()
    return _shallow(layer) if type(layer) is DynamicSlidingWindowLayer else None


def _put_back(layer: Any, before: Any) -> None:
    """Have a layer as it was.

    Args:
        before: what :func:`_before` has said of it.
    """
    if type(layer) is DynamicLayer:
        layer.crop(min(0, before - layer.get_seq_length()))
    elif isinstance(layer, StateLayer):
        layer.state.return_to(before)  # where it cannot, the next call finds out that it is ahead of the others
        layer.first_tokens = None
    elif type(layer) is StaticLayer:
        layer.cumulative_length.copy_(before)  # what was written beyond it will be written again
    elif type(layer) is DynamicSlidingWindowLayer:
        vars(layer).update(before)


def _shallow(layer: Any) -> dict[str, Any]:
    """What a layer has, whose tensors stock layers exchange when they grow or are cropped."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}
