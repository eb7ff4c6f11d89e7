"""Where a class of attention calls transformers' attention interface: in its forward, or in what its forward calls."""

import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

USUAL = "eager_attention_forward"
"""How transformers' files name their function for "eager"."""


class Call(NamedTuple):
    """What a class calls the interface by."""

    interface: AttentionInterface
    eager: Callable | None
    """What it gives as the function for "eager", which the interface does not hold."""


def call_of(cls: type[nn.Module]) -> Call | None:
    """How a class of modules calls the interface, under whatever name it knows it, or None where it does not."""
    if cls not in _calls:
        _calls[cls] = _call_of(cls)
    return _calls[cls]


_calls: dict[type[nn.Module], Call | None] = {}


def _call_of(cls: type[nn.Module]) -> Call | None:
    functions = functions_of(cls)
    used = [function.__globals__.get(name) for function in functions for name in _names(function.__code__)]
    interface = next((held for held in used if isinstance(held, AttentionInterface)), None)
    if interface is None:
        return None
    usual = next((f.__globals__[USUAL] for f in functions if USUAL in f.__globals__), None)
    others = (held for held in used if inspect.isfunction(held) and _attends(held))
    return Call(interface, usual or next(others, None))


def functions_of(cls: Any) -> list[types.FunctionType]:
    """The forward of a class and what it calls of the class and of its own file."""
    return list(_reached(cls, getattr(cls, "forward", None), set()))


def _reached(cls: type, function: Any, seen: set[Any]) -> Iterator[types.FunctionType]:
    """A function, what it decorates, the methods of the class and the functions of its own file that it names."""
    function = inspect.unwrap(function) if callable(function) else function
    if not inspect.isfunction(function) or function in seen:
        return
    seen.add(function)
    yield function
    for cell in function.__closure__ or ():
        try:
            yield from _reached(cls, cell.cell_contents, seen)
        except ValueError:  # a name that is not bound yet
            continue
    names = _names(function.__code__)
    own = cls.__mro__[: next(i for i, base in enumerate(cls.__mro__) if base in (PreTrainedModel, nn.Module))]
    for name in names:
        beside = function.__globals__.get(name)
        if getattr(beside, "__module__", None) == function.__module__:
            yield from _reached(cls, beside, seen)
        definitions = [vars(base)[name] for base in own if name in vars(base)]
        for definition in definitions if "super" in names else definitions[:1]:
            yield from _reached(cls, getattr(definition, "__func__", definition), seen)


def _names(code: types.CodeType) -> list[str]:
    """Names of globals and attributes in a function's code and in functions inside it."""
    inside = (name for held in code.co_consts if isinstance(held, types.CodeType) for name in _names(held))
    return [*code.co_names, *inside]


def _attends(function: Callable) -> bool:
    """Whether it can be called as attention functions are: (module, query, key, value, mask, ...)."""
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return len(names) >= 5 and names[0] == "module"
