"""Layers of transformers' caches that hold the state of an attention in place of all keys and values.

A stock cache is made before the model is called, from a config that does not know which module has which attention. So
layers are put into it when the model is called: at the beginning of the forward of the model that holds the swapped
modules, each of these exchanges its layer, if that is still empty, for one with its attention's state. Where the cache
is made inside the model, the modules themselves do it.
"""

import functools
import sys
import warnings
from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    STATIC_LAYER_TYPE_MAPPING,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from attn_plugins.core.attention import Attention
from attn_plugins.core.tracing import recorded
from attn_plugins.hf.caches import rollback
from attn_plugins.hf.caches.state_layer import StateLayer, description_of, rule_of
from attn_plugins.hf.call import Call, begin
from attn_plugins.hf.discovery.by_code import attends_repeatedly
from attn_plugins.hf.discovery.modules import biased
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.observe import observer_of
from attn_plugins.hf.recording import weights_wanted, weights_wanted_of
from attn_plugins.hf.under_way import thread

GENERATING = "_attn_plugin_generating"
"""Attribute of a model that holds swapped modules: those of them that a cache may serve, :class:`Served`."""

ORDINARY = "_attn_plugin_ordinary"
"""Attribute of a module whose keys and values have to stay in an ordinary layer of the cache."""

RECORDING = "_attn_plugin_recording"
"""Attribute of a cache: whether it was told to record the past."""

EXCHANGED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""Kinds of layers in whose place a state can be: keys and values are all that they hold."""


def watch(model: nn.Module, modules: Iterable[nn.Module], *, ordinary: bool = False) -> None:
    """Have caches hold the states of these modules of ``model``, which are all of its swapped causal ones.

    Args:
        ordinary: whether their keys and values have to stay in ordinary layers, because others read them.
    """
    modules = list(modules)
    unwatch(model, modules)
    layers = Counter(getattr(module, "layer_idx", None) for module in modules)
    for module in modules:
        # A stack that is run several times over keeps each pass in a layer of its own (HRM): one state cannot serve it.
        if ordinary or layers[getattr(module, "layer_idx", None)] > 1 or needs_all_keys(module):
            setattr(module, ORDINARY, True)
    watched = [module for module in modules if _needs_its_layer(slot_of(module))]
    for module in watched:  # one hook in the place of another, since every token goes through it in every layer
        remove_hooks(module, begin)
        module.register_forward_pre_hook(before_attention, with_kwargs=True)
    if modules:
        setattr(model, GENERATING, _served(model, watched))
        model.register_forward_pre_hook(before_model, with_kwargs=True)
        model.register_forward_hook(after_model, with_kwargs=True, always_call=True)


def unwatch(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Undo :func:`watch`."""
    vars(model).pop(GENERATING, None)
    for module in (model, *modules):
        vars(module).pop(ORDINARY, None)
        remove_hooks(module, before_model, after_model, before_attention, make_tensor)


def swapped_modules(model: nn.Module) -> Collection[nn.Module]:
    """The swapped modules of a model that caches serve: those that are still in it, where layers were cut off since."""
    held: Served = getattr(model, GENERATING)
    if not torch.compiler.is_compiling():
        for holder, name, module in held.links:
            if (model if holder is None else holder)._modules.get(name) is not module:
                held = _served(model, held.modules)
                setattr(model, GENERATING, held)
                break
    return held.modules


class Served(NamedTuple):
    """Modules of a model, and where they were found."""

    modules: list[nn.Module]
    links: list[tuple[nn.Module | None, str, nn.Module]]
    """Each module on the way to one of them, once: (what holds it, None for the model itself; its name there; it)."""


def _served(model: nn.Module, modules: Collection[nn.Module]) -> Served:
    """Those of the modules that are in the model."""
    wanted = {id(module) for module in modules}
    found: dict[str, nn.Module] = {path: module for path, module in model.named_modules() if id(module) in wanted}
    links: dict[str, tuple[nn.Module | None, str, nn.Module]] = {}
    for path in found:
        holder = model
        for end in (at for at in range(len(path) + 1) if at == len(path) or path[at] == "."):
            name = path[:end].rpartition(".")[2]
            module = holder.get_submodule(name)
            links[path[:end]] = None if holder is model else holder, name, module
            holder = module
    return Served(list(found.values()), list(links.values()))


def before_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Put states into the cache's empty layers, before masks are made and before any layer has changed.

    Raises:
        ValueError: the cache cannot serve the model, or has no room for its tokens.
    """
    cache = _find(Cache, args, kwargs)
    if cache is None:
        return
    rollback.begin(cache)
    need_weights = weights_wanted_of(model, kwargs)
    fixed = []
    for module in swapped_modules(model):
        slot: Any = module._modules.get(SLOT)
        slot = slot if isinstance(slot, Attention) else slot_of(module)
        layer = None if slot is None else _layer_of(module, slot, cache, need_weights)
        if layer is not None and layer.state.fixed_length is not None:
            fixed.append(layer.state)
    number = None if not fixed or torch.compiler.is_compiling() else _number(args, kwargs)
    for state in fixed:
        if number is not None:
            state.check_room(number)


def after_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Called without an output where the model has raised an error: the cache is to be as it was before the call."""
    cache = _find(Cache, args, kwargs)
    if cache is not None:
        rollback.end(cache, failed=output is None)


def _number(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many tokens a model is given, where it is given them in the usual way."""
    ids, embeddings = kwargs.get("input_ids", next(iter(args), None)), kwargs.get("inputs_embeds")
    if isinstance(embeddings, torch.Tensor) and embeddings.ndim == 3:
        return embeddings.shape[1]
    return ids.shape[1] if isinstance(ids, torch.Tensor) and ids.ndim == 2 else None


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


def _needs_its_layer(slot: Attention | None) -> bool:
    """Whether an attention may keep a state, or cannot follow every mask over a static layer."""
    return slot is not None and (type(slot).new_state is not Attention.new_state or not slot.unwritten_keys)


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Note the call, with the module's state and how to give it up; give it the mask that its adapter misses."""
    begin(module, args, kwargs)
    call: Call = thread.notes.call
    slot: Any = module._modules.get(SLOT)
    slot = slot if isinstance(slot, Attention) else slot_of(module)
    cache: Cache | None = None
    mask: LazyMask | None = None
    for given in (*kwargs.values(), *args):
        if cache is None and isinstance(given, Cache):
            cache = given
        elif mask is None and isinstance(given, LazyMask):
            mask = given
    if slot is None or cache is None:
        return None
    changed = None
    if mask is None and (make := getattr(module, "missing_mask", None)) is not None:
        mask = make(*args, **kwargs)
        if mask is not None:
            call.kwargs = {**kwargs, "attention_mask": mask}
            changed = args, call.kwargs
    layer = None if mask is None else _layer_of(module, slot, cache, given=kwargs)
    causal = mask is not None and (mask.causal or getattr(module, "makes_causal", False))
    if mask is None or not causal or mask.segments_BK is not None:
        give_up(module, cache)  # what a later token sees of the image, prefix or text before it, no state knows
        layer = None
    if layer is not None:
        call.state, call.awaiting_update = layer.state, True
        call.release = functools.partial(give_up, module, cache)
    elif not slot.unwritten_keys and static_room(module, cache) is not None:
        call.release = functools.partial(refuse_static, module, slot)
    return changed


def layer_of(module: nn.Module, cache: Cache, need_weights: bool = False) -> StateLayer | None:
    """The layer with the state of a module's attention, which takes the place of an empty ordinary layer.

    Args:
        need_weights: whether attention weights are wanted, which are those of all keys.

    Returns:
        None where keys and values are kept in an ordinary way: the attention needs all of them, other modules read
        them, the model computes with their number (T5's position bias), the layer was filled before the swap or by
        calls that wanted weights, or a graph is being recorded.

    Raises:
        ValueError: the cache cannot serve the module.
    """
    slot = slot_of(module)
    return None if slot is None else _layer_of(module, slot, cache, need_weights)


def _layer_of(
    module: nn.Module,
    slot: Attention,
    cache: Cache,
    need_weights: bool = False,
    given: dict[str, Any] | None = None,
) -> StateLayer | None:
    """As :func:`layer_of`, of a module with that slot.

    Args:
        given: arguments of the module, which may tell that weights are wanted.
    """
    index: Any = getattr(module, "layer_idx", None)
    if index is None:
        return None
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layers: Any = cache.layers
    if index >= len(layers):
        if lent_its_keys(module):
            return None
        raise ValueError(
            f"the cache has {len(layers)} layers and layer {index} needs one; it was made for another model"
        )
    layer = layers[index]
    if isinstance(layer, StateLayer):
        name, config, backend = layer.attention
        same = config is slot.config and backend == slot.backend and name == slot.name
        if not same and layer.attention != rule_of(slot):
            raise ValueError(
                f"layer {index} of the cache holds the state of {layer.owner}, not of {description_of(slot)}; "
                "use a new cache"
            )
        return layer
    need_weights = need_weights or (given is not None and weights_wanted(module, given))
    if lent_its_keys(module) or need_weights or recorded() or observer_of(module) is not None:
        return None  # a state is updated by code that is no part of a graph, and holds too little for others
    if type(layer) not in EXCHANGED:
        _warn_of_kind(type(layer), slot.name, None if hasattr(module, ORDINARY) else slot.new_state())
        return None
    if hasattr(module, ORDINARY):
        return None
    max_length, room = -1, None
    if isinstance(layer, StaticLayer):
        # A model's own sliding layer has room for its window and no limit.
        max_length = -1 if layer.is_sliding else layer.max_cache_len
        room = sys.maxsize if layer.is_sliding else layer.max_cache_len
    state = slot.new_state(room)
    if state is None or (room is not None and not state.supports_fixed_length):
        return None
    if layer.is_initialized and int(layer.get_seq_length()):
        return None
    if state.grows and layer.is_sliding and (room is not None or not slot.wants_hidden_of_keys):
        return None  # the model's own window keeps less, though not what gates of hidden states need
    state.record(getattr(cache, RECORDING, False))
    layers[index] = StateLayer(state, slot, max_length, layer)
    return layers[index]


def static_room(module: nn.Module, cache: Cache | None) -> int | None:
    """How many keys the static layer has that holds a module's; None where it is of another kind."""
    held: Any = getattr(cache, "self_attention_cache", cache)
    index = getattr(module, "layer_idx", None)
    if held is None or not isinstance(index, int) or index >= len(held.layers):
        return None  # a module that is lent its keys may have no layer (Gemma 3n on transformers 5.17)
    layer = held.layers[index]
    return layer.max_cache_len if isinstance(layer, StaticLayer) else None


def check_ends(module: nn.Module, call: Call, slot: Attention) -> None:
    """Refuse to attend over a static layer with a mask of the model's own that this attention cannot follow, or none.

    Raises:
        ValueError: names the module and its attention.
    """
    room = None if call.find(LazyMask) is not None else static_room(module, call.find(Cache))
    if room is not None:
        tensors = (x for x in (*call.args, *call.kwargs.values()) if isinstance(x, torch.Tensor) and x.ndim == 4)
        if not slot.unwritten_keys or not any(x.shape[-1] == room for x in tensors):
            refuse_static(module, slot)


def refuse_static(module: nn.Module, slot: Attention) -> None:
    """Raise the ValueError of a module whose mask does not tell which keys of a static layer are written."""
    raise ValueError(
        f"{type(module).__name__} attends with a mask of its own over all keys that a static cache has room for, and "
        f"attention {slot.name!r} cannot tell from it where the text ends; use the default cache"
    )


def _warn_of_kind(kind: type, name: str, state: Any) -> None:
    """Say once that layers which a user chose hold more than the attention needs; a model's own have their reasons."""
    chosen = kind not in (*DYNAMIC_LAYER_TYPE_MAPPING.values(), *STATIC_LAYER_TYPE_MAPPING.values())
    if chosen and state is not None and (kind, name) not in _warned and not torch.compiler.is_compiling():
        _warned.add((kind, name))
        warnings.warn(
            f"{kind.__name__} keeps the keys and values of all tokens, in its own way, and attention {name!r} attends "
            "to them there; use the default cache to keep only what it needs",
            stacklevel=2,
        )


_warned: set[tuple[type, str]] = set()


def lent_its_keys(module: nn.Module) -> bool:
    """Whether a module attends to keys that another one has put into the cache (Gemma 3n)."""
    return getattr(module, "is_kv_shared_layer", False)


def needs_all_keys(module: nn.Module) -> bool:
    """Whether a module computes with what its cache returns, lends it to others, or attends to it twice (DiffLlama)."""
    lends = getattr(module, "store_full_length_kv", False)
    return lends or biased(module) or attends_repeatedly(type(module))  # type: ignore[arg-type]


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
    given = [reference() for reference in layer.first_tokens or ()]
    taken = layer.is_initialized or any(tensor is None for tensor in given)
    if taken or layer.replaced is None or isinstance(layer.replaced, StaticLayer):
        raise ValueError(
            f"layer {index} of the cache holds the state of {layer.owner}, and {type(module).__name__} computes with "
            "its mask over the keys of all tokens; use a new cache, of the default kind"
        )
    held.layers[index] = layer.replaced
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
