"""How much memory a cache takes at a length, without running the model."""

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf import adapters
from attn_plugins.hf.caches.cache_layers import cache_bytes, layer_of, lent_its_keys
from attn_plugins.hf.caches.state_layer import StateLayer
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import SLOT, slot_of


def cache_bytes_at(model: PreTrainedModel, length: int) -> int | None:
    """Bytes of a row's cache after so many tokens: what its layers and states themselves hold then.

    Each kind of layer is given ``length`` tokens of zeros once, by itself.

    Returns:
        None where its modules do not tell: none is causal, or one has an input that zeros cannot stand for.
    """
    total, known = 0, {}
    for target in discovery.targets(model):
        module = model.get_submodule(target.path)
        if target.role != "decoder" or lent_its_keys(module):
            continue
        cache, slot = DynamicCache(config=model.config), slot_of(module)
        index: Any = getattr(module, "layer_idx", None)
        if not isinstance(index, int):
            return None
        if slot is not None and (slot.wants_hidden or slot.wants_rotary or slot.wants_grid):
            return None
        state = layer_of(module, cache)
        layer = cache.layers[index] if state is None else state
        shape = head_sizes.head_shape(adapters.adapted(module), getattr(module, "config", model.config))
        kind = (
            type(layer),
            repr(slot),
            getattr(layer, "sliding_window", None),
            shape.num_key_value_heads,
            shape.head_dim,
        )
        if kind not in known:
            known[kind] = _bytes(module, cache, layer, shape, length, model.dtype)
        total += known[kind]
    return total or None


def _bytes(module: nn.Module, cache: DynamicCache, layer: Any, shape: Any, length: int, dtype: torch.dtype) -> int:
    """Bytes of a cache in which one layer has so many tokens."""

    def zeros(heads: int, size: int, device: str) -> torch.Tensor:
        return torch.zeros(1, heads, length, size, dtype=dtype, device=device)

    groups = shape.num_key_value_heads
    if not isinstance(layer, StateLayer):
        layer.update(zeros(groups, shape.head_dim, "meta"), zeros(groups, shape.value_dim, "meta"))
        return cache_bytes(cache)
    slot: Any = module._modules[SLOT]
    given = (zeros(shape.num_heads, shape.head_dim, "cpu"), zeros(groups, shape.head_dim, "cpu"))
    mask = AttentionMask(1, length, length, causal=True, device="cpu")
    with torch.no_grad():
        slot(*given, zeros(groups, shape.value_dim, "cpu"), mask=mask, scale=1.0, state=layer.state)
    return cache_bytes(cache)
