"""What goes along with a call of a swapped module: transformers gives an attention function none of it.

Hooks around the module's forward note the call for its thread, and for as long as that lasts. Neither masks nor keyword
arguments reach an attention function in every call, and threads may share a model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attn_plugins.core.decode_state import State
from attn_plugins.core.tracing import exporting
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.under_way import thread


class Call:
    """The forward of an attention module, under way."""

    state: State | None = None
    """What a cache holds for the module's attention in place of keys and values."""
    awaiting_update = False
    """Whether the cache's layer with the state is still to be given the new keys and values."""
    consumed = False
    """Whether the state has taken the new tokens in."""
    release: Callable[[], None] | None = None
    """Gives the state up for an ordinary layer: a dense mask would be read beside the keys of all tokens."""

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outer: "Call | None"):
        self.module, self.args, self.kwargs = module, args, kwargs
        self.outer = outer
        """The call of the module that has called this one, where that is swapped too."""
        self.exported = torch.compiler._is_exporting_flag and exporting()

    def find(self, kind: type) -> Any:
        """The first of the module's arguments of a type, or None."""
        return next((x for x in (*self.kwargs.values(), *self.args) if isinstance(x, kind)), None)

    def give_up_state(self) -> None:
        """To be called before the module's mask is used as a tensor."""
        if self.release is not None:
            self.release()
            self.state = self.release = None


def innermost() -> Call | None:
    """The innermost call under way in this thread. Those of a failed export are over, without a hook."""
    notes = thread.notes
    while notes.call is not None and notes.call.exported and not torch.compiler.is_exporting():
        notes.call = notes.call.outer
    return notes.call


def call_of(module: nn.Module) -> Call | None:
    """The call of this module, None where its forward was not called as a module's."""
    call: Call | None = thread.notes.call
    return call if call is not None and call.module is module else None


def watch(module: nn.Module) -> None:
    """Note the calls of a module."""
    module.register_forward_pre_hook(begin, with_kwargs=True)
    module.register_forward_hook(_end, always_call=True)


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    remove_hooks(module, begin, _end)


def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook."""
    notes = thread.notes
    notes.call = Call(module, args, kwargs, None if notes.call is None else innermost())


def _end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    notes = thread.notes
    notes.call = None if notes.call is None else notes.call.outer
