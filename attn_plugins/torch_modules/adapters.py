"""Which modules can have a slot, and what they are while they have one.

A module gets the forward of an adapter by an exchange of its class for a subclass of it, and its own class back when
it is restored: weights, hooks, ``isinstance`` checks and the place in the model stay as they are.
"""

import copyreg
from typing import Any

from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attn_plugins.hf.adapters import exchange
from attn_plugins.hf.discovery import by_code
from attn_plugins.torch_modules.fused import FusedAttention
from attn_plugins.torch_modules.layer import AttentionLayer
from attn_plugins.torch_modules.multihead import MultiheadAttention
from attn_plugins.torch_modules.shifted_windows import ShiftedWindowAttention, attends_in_windows

ADAPTERS = (MultiheadAttention, FusedAttention, ShiftedWindowAttention)

USES_FUSED = "fused_attn"
"""Attribute by which timm's modules choose between torch's fused attention and their own products."""

HELD = "_attn_plugin_held"
"""Attribute of a module with a slot: what USES_FUSED was before."""


def adapter_of(cls: type[nn.Module]) -> type | None:
    """What gives modules of a class a slot, or None where nothing does."""
    if issubclass(cls, AttentionLayer):
        return AttentionLayer
    for adapter in ADAPTERS:
        if issubclass(cls, adapter):
            return adapter
    if attends_in_windows(cls):
        return ShiftedWindowAttention
    if cls.forward is nn.MultiheadAttention.forward:
        return MultiheadAttention
    if cls.__module__.startswith("torch.") or not by_code.calls(cls, scaled_dot_product_attention):
        return None
    return FusedAttention


def with_slot(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of modules of this one while they have a slot."""
    if cls not in _made:
        _made[cls] = _make(cls)
    return _made[cls]


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _make(cls: type[nn.Module]) -> type[nn.Module]:
    adapter: Any = adapter_of(cls)
    if issubclass(cls, adapter):
        return cls

    def reduce(self: Any, protocol: Any) -> Any:
        made = super(held, self).__reduce_ex__(protocol)  # a class that is made here cannot be found by its name
        return (_empty, (cls,), *made[2:]) if made[0] is copyreg.__newobj__ else made  # type: ignore[attr-defined]

    names = {"__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    held: Any = type(cls.__name__, (adapter, cls), {**names, "__doc__": cls.__doc__})
    return held


def _empty(cls: type[nn.Module]) -> nn.Module:
    swapped = with_slot(cls)
    return swapped.__new__(swapped)


def adapted(module: nn.Module) -> Any:
    """A module as its adapter sees it, without a change to it."""
    view = object.__new__(with_slot(type(module)))
    view.__dict__ = module.__dict__
    return view


def to_adapter(module: nn.Module) -> None:
    """Make a module what it is while it has a slot."""
    cls = with_slot(type(module))
    if cls is type(module):
        return
    exchange(module, cls)
    if isinstance(module, FusedAttention) and USES_FUSED in vars(module):
        vars(module)[HELD] = vars(module)[USES_FUSED]
        vars(module)[USES_FUSED] = True


def to_own_class(module: nn.Module) -> None:
    """Undo :func:`to_adapter`."""
    adapter = adapter_of(type(module))
    if adapter in ADAPTERS and isinstance(module, adapter):
        exchange(module, type(module).__mro__[2])
        if HELD in vars(module):
            vars(module)[USES_FUSED] = vars(module).pop(HELD)
