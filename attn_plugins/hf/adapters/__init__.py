"""Attention classes that compute attention inline, made to call transformers' attention interface.

A file names in ``FAMILIES``, a literal, the packages under ``transformers.models`` whose classes it adapts; it is
imported when a model has a module of one of them. It holds *adapters*: subclasses of the families' own attention
classes, of the same name, whose ``forward`` is decorated with :func:`slotted`, computes queries, keys, values and
biases as the family's does, and gives them to :func:`attend`. A module becomes its adapter by an exchange of
``__class__``, which keeps its weights, hooks and place, and is exchanged back when the model is restored.

An adapter may state what its module's attributes don't, as class attributes or properties: ``is_causal`` (or
``is_causal_in(model, path)``, where that depends on the model that holds it), ``is_cross_in(model, path)``,
``adds_position_bias`` where it gives a ``position_bias``, ``makes_causal`` where it makes a causal mask of the one
that it is given, and ``cannot``: why its module cannot be swapped, or None. ``mask_given(mask)`` does what the model
does to a mask before its modules get it, for those that run the family's own ``forward``; ``bool_given(mask)`` does it
to a boolean tensor, where the model makes one of the mask that it has asked for. ``hidden_given(hidden)`` puts the
input of its forward into (B, N, size), where it arrives otherwise. ``missing_mask`` makes the mask that the model does
not make in some calls, of the module's arguments. ``own_options`` are those with which an attention of the registry is
the module's own, for rules that leave them None.
"""

import ast
import copy
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.names import BASE, IMPLEMENTATION, SLOT


@functools.cache
def families() -> dict[str, str]:
    """Each family that has adapters, and the name of the file that holds them.

    Read from the files without importing them, which would import the families' own.
    """
    found = {}
    for file in pkgutil.iter_modules(__path__):
        source = pkgutil.get_data(__name__, f"{file.name}.py")
        assert source is not None
        for node in ast.parse(source).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES":
                found.update(dict.fromkeys(ast.literal_eval(node.value), file.name))
    return dict(sorted(found.items()))


def adapter_of(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The adapter that serves modules of exactly this class: itself where it is one, or None."""
    if cls not in _adapters:
        _adapters[cls] = _find(cls)
    return _adapters[cls]


_adapters: dict[type[nn.Module], type[nn.Module] | None] = {}


def _find(cls: type[nn.Module]) -> type[nn.Module] | None:
    for held in cls.__mro__:
        if held.__module__.startswith(f"{__name__}."):
            return held
    package = re.match(r"transformers\.models\.(\w+)\.", cls.__module__)
    if package is None or package[1] not in families():
        return None
    file = importlib.import_module(f"{__name__}.{families()[package[1]]}")
    own = (c for c in vars(file).values() if isinstance(c, type) and c.__module__ == file.__name__)
    return next((c for c in own if c.__base__ is cls), None)


def adapted(module: nn.Module) -> nn.Module:
    """A module as its adapter sees it: an object of the adapter's class with the module's state, or the module itself.

    What rules need to know of a module can be asked of it before the module has changed.
    """
    adapter = adapter_of(type(module))
    if adapter is None or isinstance(module, adapter):
        return module
    view = object.__new__(adapter)
    view.__dict__ = module.__dict__
    return view


def to_adapter(module: nn.Module) -> None:
    """Make a module its adapter, where it has one."""
    adapter = adapter_of(type(module))
    if adapter is not None and not isinstance(module, adapter):
        exchange(module, adapter)


def to_own_class(module: nn.Module) -> None:
    """Undo :func:`to_adapter`."""
    if adapter_of(type(module)) is type(module):
        exchange(module, own_class(type(module)))


def exchange(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make a module one of another class, with all that it holds."""
    old = type(module).forward
    module.__class__ = cls
    for name, value in list(vars(module).items()):  # accelerate's hooks keep the bound forward in the module
        if inspect.ismethod(value) and value.__self__ is module and value.__func__ is old:
            setattr(module, name, cls.forward.__get__(module))


def own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The family's own class below an adapter."""
    adapter = adapter_of(cls)
    assert adapter is not None
    return adapter.__mro__[1]


def slotted(forward: Callable) -> Callable:
    """Decorates an adapter's forward, which then runs where the module has a slot.

    Where it has none, the family's own forward does, with the mask of the implementation that served it before; but
    not with a part of the rows, which it would take for all of them.
    """

    @functools.wraps(forward)
    def chosen(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        in_part = any(isinstance(x, LazyMask) and x.rows is not None for x in (*args, *kwargs.values()))
        if hasattr(self, SLOT) or in_part:
            return forward(self, *args, **kwargs)

        def native(given: Any) -> Any:
            if isinstance(given, torch.Tensor) and given.dtype == torch.bool:
                change = getattr(self, "bool_given", None)
                return given if change is None else change(given)
            if not isinstance(given, LazyMask):
                return given
            mask, change = given.native(getattr(self, BASE)), getattr(self, "mask_given", None)
            return mask if mask is None or change is None else change(mask)

        args, kwargs = tuple(native(x) for x in args), {name: native(x) for name, x in kwargs.items()}
        return own_class(type(self)).forward(_as_it_was(self), *args, **kwargs)

    return chosen


Heads = torch.Tensor
"""(B, heads, N, D)."""


def cached(
    cache: Any, layer_idx: int | None, cross: bool, made: Callable[[], tuple[Heads, Heads]]
) -> tuple[Heads, Heads]:
    """The keys and values of tokens that were ``made`` after those that a cache holds; of an encoder, made once."""
    updated: dict[Any, bool] = {}
    if isinstance(cache, EncoderDecoderCache):
        updated = cache.is_updated
        cache = cache.cross_attention_cache if cross else cache.self_attention_cache
    if cross and updated.get(layer_idx):
        return cache.layers[layer_idx].keys, cache.layers[layer_idx].values
    key, value = made()
    if cache is not None:
        key, value = cache.update(key, value, layer_idx)
    if cross:
        updated[layer_idx] = True
    return key, value


def attend(
    module: Any, query: Heads, key: Heads, value: Heads, mask: Any, *, dropout: float, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the attention interface: (out (B, N, heads, D), weights).

    Args:
        dropout: probability in training.
        kwargs: for the attention function, such as ``scaling``, ``position_bias`` and ``output_attentions``.
    """
    dropout = dropout if module.training else 0.0
    return ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](module, query, key, value, mask, dropout=dropout, **kwargs)


def attend_as_bert(
    module: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any,
    *,
    source: torch.Tensor | None = None,
    cache: Any = None,
    rotate: Callable[..., tuple[Heads, ...]] | None = None,
    position_bias: torch.Tensor | None = None,
    dropout: float | None = None,
    output_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention (B, N, heads * D), and its weights, of a module that names its parts as BERT's does.

    Args:
        source: the states of an encoder, where keys and values are of these.
        dropout: probability in training, where it is not the module's ``dropout``.
        rotate: gives queries, keys and values their rotary positions, where these are not of an encoder.
    """

    def heads(project: nn.Module, states: torch.Tensor) -> Heads:
        return project(states).unflatten(-1, (-1, module.attention_head_size)).transpose(1, 2)

    states, query = hidden_states if source is None else source, heads(module.query, hidden_states)

    def made() -> tuple[Heads, Heads]:
        nonlocal query
        key, value = heads(module.key, states), heads(module.value, states)
        if rotate is not None and source is None:
            query, key, value = rotate(query, key, value)
        return key, value

    key, value = cached(cache, getattr(module, "layer_idx", None), source is not None, made)
    out, weights = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=(module.dropout.p if dropout is None else dropout) if module.training else 0.0,
        position_bias=position_bias,
        output_attentions=output_attentions,
    )
    return out.flatten(2), weights


def attend_as_bart(
    module: Any,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None,
    cache: Any,
    attention_mask: Any,
    *,
    prompt: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The output (B, N, width), and the weights, of a module that names its parts as BART's does.

    Args:
        key_value_states: the states of an encoder, where keys and values are of these.
        prompt: keys and values (2, heads, P, D) that stand before the others, in the mask too.
        kwargs: for the attention function, such as ``output_attentions``.
    """

    def heads(x: torch.Tensor) -> Heads:
        return x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)

    cross = key_value_states is not None
    source = key_value_states if cross else hidden_states
    key, value = cached(
        cache, module.layer_idx, cross, lambda: (heads(module.k_proj(source)), heads(module.v_proj(source)))
    )
    if prompt is not None:
        before = [part.expand(len(key), -1, -1, -1) for part in prompt]
        key, value = torch.cat([before[0], key], dim=2), torch.cat([before[1], value], dim=2)
    out, weights = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION](
        module,
        heads(module.q_proj(hidden_states)),
        key,
        value,
        attention_mask,
        scaling=module.scaling,
        dropout=module.dropout if module.training else 0.0,
        **kwargs,
    )
    return module.out_proj(out.flatten(2)), weights


def padding_of(square: torch.Tensor) -> torch.Tensor:
    """The padding (B, N) of a mask (B, 1, N, N) that hides padding from all and all from padding; else the mask."""
    allowed = square.bool()
    real = allowed.diagonal(dim1=-2, dim2=-1)[:, 0]
    outer = real[:, None, :, None] & real[:, None, None, :]
    return real if torch.equal(outer, allowed) else allowed


def _as_it_was(module: nn.Module) -> Any:
    """A module with a config that names the implementation which served it before: some read it (Falcon)."""
    if "config" not in vars(module):
        return module
    view, config = object.__new__(own_class(type(module))), copy.copy(vars(module)["config"])
    config._attn_implementation_internal = getattr(module, BASE)
    view.__dict__ = {**vars(module), "config": config}
    return view
