"""Masks of modules that attend by themselves, in a model with swapped ones: those that they would have without these.

Some reshape a mask, or ask whether there is one (Informer), so that a lazy one would not do.
"""

from typing import Any

from torch import nn

from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.masks.mask_function import LazyMask
from attn_plugins.hf.names import BASE


def watch(module: nn.Module) -> None:
    """Have a module, whose BASE says what its model was told to attend by, get masks of that kind."""
    unwatch(module)
    module.register_forward_pre_hook(before_attention, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    remove_hooks(module, before_attention)


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward pre-hook."""
    base = getattr(module, BASE)

    def native(given: Any) -> Any:
        return given.native(base) if isinstance(given, LazyMask) else given

    return tuple(map(native, args)), {name: native(given) for name, given in kwargs.items()}
