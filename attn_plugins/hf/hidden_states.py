"""The hidden states that a module makes its queries of, for attentions that want them.

transformers gives an attention function queries, keys and values. The input of their module is noted by a hook on the
module, for a thread, for as long as its forward lasts: neither masks nor keyword arguments go along with every call.
"""

import inspect
import threading
from typing import Any, NamedTuple

import torch
from torch import nn

INPUT = "_attn_plugin_input"
"""Attribute of an attention module whose attention wants hidden states: the :class:`Argument` that holds them."""


class Argument(NamedTuple):
    """One of a forward's arguments."""

    name: str
    place: int


class Noted(NamedTuple):
    """A module whose forward is under way, and its input."""

    module: nn.Module
    hidden: Any
    around: "Noted | None"
    """The module that has called it, where that is noted too."""


class Calls:
    """Those under way."""

    innermost: Noted | None = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.calls = Calls()


_thread = _Thread()
"""An attribute of a thread's own object, not of this one, is what torch.compile keeps over the breaks of its graphs."""


def input_of(cls: type[nn.Module]) -> Argument | None:
    """The argument of a class's forward that holds the states of its queries, None where it names none.

    The first one is, of all that transformers has, but where they come after values and keys (CTRL).
    """
    _, *given = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    named = [Argument(one.name, place) for place, one in enumerate(given) if one.kind is one.POSITIONAL_OR_KEYWORD]
    return next((one for one in named if one.name == "q"), named[0] if named and named[0].place == 0 else None)


def refuse_unnamed(module: nn.Module, path: str, attention: str) -> None:
    """Raise a ValueError unless the forward of a module shows its input."""
    if input_of(type(module)) is None:
        raise ValueError(
            f"attention {attention!r} needs the hidden states of {path}, and the forward of {type(module).__name__} "
            "does not name its input; choose other modules with layers, roles or modules"
        )


def watch(module: nn.Module) -> None:
    """Have :func:`hidden_states_of` know the module's input, in every call."""
    setattr(module, INPUT, input_of(type(module)))
    module.register_forward_pre_hook(_note, with_kwargs=True)
    module.register_forward_hook(_forget, always_call=True)


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    vars(module).pop(INPUT, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _note:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    for key, hook in list(module._forward_hooks.items()):
        if hook is _forget:
            del module._forward_hooks[key], module._forward_hooks_always_called[key]


def hidden_states_of(module: nn.Module, query: torch.Tensor) -> torch.Tensor | None:
    """The input (B, Q, E) of which a module has made its queries; None where its attention does not want it.

    Args:
        query: (B, H, Q, D).

    Raises:
        ValueError: its forward has not been called with a tensor of these sizes.
    """
    if INPUT not in vars(module):
        return None
    noted, (rows, _, queries, _) = _thread.calls.innermost, query.shape
    hidden = noted.hidden if noted is not None and noted.module is module else None
    if (
        not isinstance(hidden, torch.Tensor)
        or hidden.ndim != 3
        or hidden.shape[:2] not in ((rows, queries), (1, queries))
    ):
        got = f"a tensor {tuple(hidden.shape)}" if isinstance(hidden, torch.Tensor) else type(hidden).__name__
        raise ValueError(
            f"the attention of {type(module).__name__} needs its input as a tensor ({rows}, {queries}, size), as many "
            f"as queries, got {got}; leave its modules out with layers, roles or modules"
        )
    return hidden.to(query.device).expand(rows, -1, -1)


def _note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    name, place = getattr(module, INPUT)
    hidden = args[place] if place < len(args) else kwargs.get(name)
    _thread.calls.innermost = Noted(module, hidden, _thread.calls.innermost)


def _forget(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    noted = _thread.calls.innermost
    _thread.calls.innermost = None if noted is None else noted.around
