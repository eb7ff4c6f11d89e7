"""A cache changes in all of its layers or in none: what one of them refuses is undone, or not begun, in the others."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attn_plugins.hf.caches.state_layer import StateLayer

UNDO = "_attn_plugin_undo"
"""Attribute of a cache while a model runs: what puts each of its layers back."""


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
    layers = list(held.layers)
    undo = [undo for layer in layers if (undo := _undo(layer)) is not None]

    def put_back() -> None:
        held.layers[:] = layers

    setattr(cache, UNDO, [put_back, *undo])


def end(cache: Cache, *, failed: bool) -> None:
    """After it: put the layers back where it failed."""
    if torch.compiler.is_compiling():
        return
    for undo in vars(cache).pop(UNDO, ()):
        if failed:
            undo()


def _undo(layer: Any) -> Callable[[], None] | None:
    """What puts a layer back, at no cost in memory; None where there is nothing that would."""
    if isinstance(layer, StateLayer):
        return _undo_state(layer)
    if type(layer) is StaticLayer:
        seen = layer.cumulative_length.clone()
        return lambda: _put(layer.cumulative_length, seen)  # what was written beyond it will be written again
    if type(layer) is DynamicLayer:
        before = layer.get_seq_length()
        return lambda: layer.crop(min(0, before - layer.get_seq_length()))
    if type(layer) is DynamicSlidingWindowLayer:
        held = _shallow(layer)
        return lambda: vars(layer).update(held)
    return None


def _undo_state(layer: StateLayer) -> Callable[[], None]:
    seen = layer.state.seen

    def undo() -> None:
        layer.state.return_to(seen)  # where it cannot, the next call finds out that it is ahead of the others
        layer.first_tokens = None

    return undo


def _shallow(layer: Any) -> dict[str, Any]:
    """What a layer has, whose tensors stock layers exchange when they grow or are cropped."""
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(layer).items()}


def _put(held: torch.Tensor, x: torch.Tensor) -> None:
    held.copy_(x)
