"""Layers of transformers' caches that hold the state of an attention in place of all keys and values.

A stock cache is made before the model is called, from a config that does not know which module has which attention. So
layers are put into it when the model is called: at the beginning of the forward of the model that holds the swapped
modules, each of these exchanges its layer, if that is still empty, for one with its attention's state. Where the cache
is made inside the model, the modules themselves do it.
"""

import functools
import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

from attn_plugins.attention import Attention
from attn_plugins.hf.discovery import biased
from attn_plugins.hf.dispatch import LazyMask, rotary_of, slot_of
from attn_plugins.hf.sources import attends_repeatedly
from attn_plugins.state import State
from attn_plugins.tracing import recorded

GENERATING = "_attn_plugin_generating"
"""Attribute of a model that holds swapped modules: those of them that a cache may serve."""

ORDINARY = "_attn_plugin_ordinary"
"""Attribute of a module whose keys and values have to stay in an ordinary layer of the cache."""

RECORDING = "_attn_plugin_recording"
"""Attribute of a cache: whether it was told to record the past."""


class StateLayer(CacheLayerMixin):
    """One layer of a cache, with the state of the attention that it was made for."""

    is_croppable = True
    supports_early_init = False

    def __init__(self, state: State, slot: Attention, max_length: int = -1, instead: CacheLayerMixin | None = None):
        super().__init__()
        self.state, self.max_length, self.instead = state, max_length, instead
        self.given: tuple[weakref.ref, weakref.ref] | None = None
        """The first keys and values, for as long as the module that brought them holds them."""
        self.attention = rule_of(slot)
        """What has to be the same in every call."""
        self.owner = spell(slot)
        """The same for people."""
        self.expected = False
        """Whether the module about to update the layer is one that has this attention."""
        self.is_compileable = state.fixed_length is not None
        self.is_sliding = getattr(instead, "is_sliding", False)
        """As the layer in whose place it is: models size their masks by the first layer of a kind, for all of them."""

    def __repr__(self) -> str:
        return f"StateLayer({self.owner}, {self.state.seen} tokens, {self.num_bytes} bytes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "given": None}

    @property
    def num_bytes(self) -> int:
        return self.state.num_bytes

    @property
    def is_initialized(self) -> bool:
        return self.state.seen > 0

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        """The base class sets it; a state knows by itself."""

    @property
    def keys(self) -> torch.Tensor | None:
        """No keys, in the shapes that they would have: some models take caches apart row by row (Whisper)."""
        like = self.state.like()
        return None if like is None else like[0][:, :, :0]

    @keys.setter
    def keys(self, value: Any) -> None:
        """The base class sets it; a state has its own tensors."""

    @property
    def values(self) -> torch.Tensor | None:
        """As ``keys``."""
        like = self.state.like()
        return None if like is None else like[1][:, :, :0]

    @values.setter
    def values(self, value: Any) -> None:
        """As for ``keys``."""

    @property
    def record_past(self) -> bool:
        return self.state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.recording = value
        if not value:
            self.state.history = []

    def activate_past_recording(self) -> None:
        self.state.recording = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the state makes its tensors when the first tokens come."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values as they are; the attention takes them in."""
        if not self.expected:
            raise ValueError(
                f"this layer of the cache holds the state of {self.owner}, which the module that is to use it does not "
                "have; use a new cache"
            )
        self.expected = False
        if not (self.is_initialized or isinstance(self.instead, StaticLayer) or torch.compiler.is_compiling()):
            self.given = weakref.ref(key_states), weakref.ref(value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the layer in whose place it is: other modules' keys lie in layers of its kind."""
        if self.is_sliding and self.instead is not None:
            for counter in ("cumulative_length", "cumulative_length_int"):
                if isinstance(getattr(self.instead, counter, None), int):
                    setattr(self.instead, counter, self.state.seen)
            return self.instead.get_mask_sizes(query_length)
        return (self.state.seen + query_length if self.max_length < 0 else self.max_length), 0

    def get_seq_length(self) -> int:
        return self.state.seen

    def get_max_length(self) -> int:
        return self.max_length

    def offload(self) -> None:
        """Move what is held to the CPU; it comes back with the next tokens."""
        self.state.apply(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Nothing to do: the state comes back when it is used."""

    def reset(self) -> None:
        self.state.reset()
        self.given = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.state.apply(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state.apply(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.state.apply(lambda tensor: tensor[indices.to(tensor.device)])

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}); allowed: a negative number, of tokens to remove")
        self.state.crop(-int(tokens_to_remove))  # transformers 5.17 counts the tokens of a draft in a tensor
        self.given = None


def serve(model: nn.Module, modules: Iterable[nn.Module], *, ordinary: bool = False) -> None:
    """Have caches hold the states of these modules of ``model``, which are all of its swapped causal ones.

    Args:
        ordinary: whether their keys and values have to stay in ordinary layers, because others read them.
    """
    modules = list(modules)
    leave(model, modules)
    layers = Counter(getattr(module, "layer_idx", None) for module in modules)
    for module in modules:
        # A stack that is run several times over keeps each pass in a layer of its own (HRM): one state cannot serve it.
        if ordinary or layers[getattr(module, "layer_idx", None)] > 1:
            setattr(module, ORDINARY, True)
    if modules:
        setattr(model, GENERATING, modules)
        model.register_forward_pre_hook(before_model, with_kwargs=True)
    for module in modules:
        module.register_forward_pre_hook(before_attention, with_kwargs=True)


def leave(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo :func:`serve`."""
    vars(model).pop(GENERATING, None)
    for module in (model, *modules):
        vars(module).pop(ORDINARY, None)
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (before_model, before_attention, make_tensor):
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put states into the cache's empty layers, before masks are made and before any layer has changed."""
    cache = _find(Cache, args, kwargs)
    if cache is not None:
        for module in getattr(model, GENERATING):
            layer_of(module, cache)


def make_tensor(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Hand a mask on as the tensor that a module asks for: of no other object would it know that it is a mask."""
    mask = _find(LazyMask, args, kwargs)
    if mask is None:
        return None
    # Of the hidden states, not of the weights, which may be of 8 bits.
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.is_floating_point())
    made = mask.as_additive(next(given).dtype)
    args = tuple(made if x is mask else x for x in args)
    return args, {name: made if x is mask else x for name, x in kwargs.items()}


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Send the state, and what else the attention wants to know, along with the mask: it is given nothing of it."""
    cache, mask, slot = _find(Cache, args, kwargs), _find(LazyMask, args, kwargs), slot_of(module)
    layer = None if cache is None or mask is None else layer_of(module, cache)
    if cache is not None and (mask is None or not mask.causal):
        give_up(module, cache)  # what a later token sees of the image or prefix before it, no state knows
        layer = None
    if mask is None or slot is None or (layer is None and not slot.wants_rotary):
        return None
    sent = mask
    if layer is not None:
        sent = sent.with_state(layer.state).sent(release=functools.partial(give_up, module, cache))
        layer.expected = True
    if slot.wants_rotary:
        sent = sent.sent(rotary=rotary_of(module, kwargs))
    args = tuple(sent if x is mask else x for x in args)
    return args, {name: sent if x is mask else x for name, x in kwargs.items()}


def layer_of(module: nn.Module, cache: Cache) -> StateLayer | None:
    """The layer with the state of a module's attention, which takes the place of an empty ordinary layer.

    Returns:
        None where keys and values are kept in an ordinary way: the attention needs all of them, other modules read
        them, the model computes with their number (T5's position bias), the layer was filled before the swap, or a
        graph is being recorded.

    Raises:
        ValueError: the cache cannot serve the module.
    """
    slot, index = slot_of(module), getattr(module, "layer_idx", None)
    if slot is None or index is None or getattr(module, "is_kv_shared_layer", False):
        return None  # the last reads what another module lends it (Gemma 3n)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    if index >= len(cache.layers):
        raise ValueError(
            f"the cache has {len(cache.layers)} layers and layer {index} needs one; it was made for another model"
        )
    layer = cache.layers[index]
    if isinstance(layer, StateLayer):
        if layer.attention != rule_of(slot):
            raise ValueError(
                f"layer {index} of the cache holds the state of {layer.owner}, not of {spell(slot)}; use a new cache"
            )
        return layer
    if recorded():
        return None  # a state is updated by code that is no part of a graph
    max_length = -1
    if isinstance(layer, StaticLayer):
        # A model's own sliding layer has room for its window and no limit.
        max_length = -1 if layer.is_sliding else layer.max_cache_len
        room = sys.maxsize if layer.is_sliding else layer.max_cache_len
        state = None if needs_all_keys(module) else slot.new_state(room)
        if state is None or not state.serves_fixed_length or int(layer.get_seq_length()):
            raise ValueError(
                f"attention {slot.name!r} cannot be served from this static cache: what it keeps grows with the text, "
                "or the cache was filled before the swap; use the default cache"
            )
    elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length():
        return None
    else:
        state = None if needs_all_keys(module) else slot.new_state()
    if state is None:
        return None
    state.recording = getattr(cache, RECORDING, False)
    cache.layers[index] = StateLayer(state, slot, max_length, layer)
    return cache.layers[index]


def rule_of(slot: Attention) -> tuple[Any, ...]:
    """What tells one attention's state from another's; compared at every token."""
    return slot.name, slot.config, slot.backend


def spell(slot: Attention) -> str:
    return f"{slot.name}({slot.extra_repr()})"


def needs_all_keys(module: nn.Module) -> bool:
    """Whether a module computes with what its cache returns, lends it to others, or attends to it twice (DiffLlama)."""
    lends = getattr(module, "store_full_length_kv", False)
    return lends or biased(module) or attends_repeatedly(type(module)) or hasattr(module, ORDINARY)  # type: ignore[arg-type]


def give_up(module: nn.Module, cache: Cache) -> None:
    """Put the ordinary layer back for a module that computes with its mask, over the keys of all tokens.

    Raises:
        ValueError: the state has taken tokens in, or the cache is static.
    """
    held: Any = getattr(cache, "self_attention_cache", cache)
    index = getattr(module, "layer_idx", None)
    layer = held.layers[index] if isinstance(index, int) and index < len(held.layers) else None
    if not isinstance(layer, StateLayer):
        return
    given = [reference() for reference in layer.given or ()]
    taken = layer.is_initialized or any(tensor is None for tensor in given)
    if taken or layer.instead is None or isinstance(layer.instead, StaticLayer):
        raise ValueError(
            f"layer {index} of the cache holds the state of {layer.owner}, and {type(module).__name__} computes with "
            "its mask over the keys of all tokens; use a new cache, of the default kind"
        )
    held.layers[index] = layer.instead
    if given:
        held.layers[index].update(*given)


def _find(kind: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return next((x for x in (*kwargs.values(), *args) if isinstance(x, kind)), None)


def cache_bytes(cache: Cache) -> int:
    """Memory of the tensors that a cache holds, of whatever kind its layers are, in bytes."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StateLayer):
            total += layer.num_bytes
        else:
            held = {id(t): t for t in vars(layer).values() if isinstance(t, torch.Tensor) and t.ndim > 0}
            total += sum(t.numel() * t.element_size() for t in held.values())
    return total
