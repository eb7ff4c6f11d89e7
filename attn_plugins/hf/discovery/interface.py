"""Where a class of attention calls transformers' attention interface: in its forward, or in what its forward calls."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

USUAL = "eager_attention_forward"
"""How transformers' files name their function for "eager"."""


GENERAL = {*sys.stdlib_module_names, "torch", "numpy"}
"""Packages whose functions call no attention of a model."""


class Dispatch(NamedTuple):
    """What a class calls the interface by."""

    interface: AttentionInterface
    eager: Callable | None
    """What it gives as the function for "eager", which the interface does not hold."""


def dispatch_of(cls: type[nn.Module]) -> Dispatch | None:
    """How a class of modules calls the interface, under whatever name it knows it, or None where it does not."""
    if cls not in _dispatches:
        _dispatches[cls] = _dispatch_of(cls)
    return _dispatches[cls]


_dispatches: dict[type[nn.Module], Dispatch | None] = {}


def _dispatch_of(cls: type[nn.Module]) -> Dispatch | None:
    functions = functions_of(cls)
    used = {function: _held(cls, function) for function in functions}
    asking = [f for f in functions if any(isinstance(held, AttentionInterface) for held in used[f])]
    if not asking:
        return None
    interface = next(held for held in used[asking[0]] if isinstance(held, AttentionInterface))
    for near in (asking, functions):  # a function of another file that it calls has another eager attention beside it
        usual = next((f.__globals__[USUAL] for f in near if USUAL in f.__globals__), None)
        others = (held for f in near for held in used[f] if inspect.isfunction(held) and _attends(held))
        if (eager := usual or next(others, None)) is not None:
            return Dispatch(interface, eager)
    return Dispatch(interface, None)


def functions_of(cls: Any) -> list[types.FunctionType]:
    """The forward of a class and what it calls of the class and of files beside its own."""
    return list(_reached(cls, getattr(cls, "forward", None), set()))


def _reached(cls: type, function: Any, seen: set[Any]) -> Iterator[types.FunctionType]:
    """A function, what it decorates, the methods of the class and the functions that it names."""
    function = inspect.unwrap(function) if callable(function) else function
    if not inspect.isfunction(function) or function in seen:
        return
    seen.add(function)
    yield function
    for held in _held(cls, function):
        if inspect.isfunction(held) and (held.__module__ == function.__module__ or not _general(held)):
            yield from _reached(cls, held, seen)
    names = _names(function.__code__)
    for name in names:
        definitions = [vars(base)[name] for base in _own(cls) if name in vars(base)]
        for definition in definitions if "super" in names else definitions[:1]:
            yield from _reached(cls, getattr(definition, "__func__", definition), seen)


def _held(cls: type, function: types.FunctionType) -> list[Any]:
    """What a function may have in its hands: globals, defaults, what its closure and its class hold, in its own words.

    Of modules and classes among these also what they hold under names that the function says somewhere, so that it
    makes no difference whether a name stands alone, after a dot, in a getattr or in an import of its own.
    """
    names = _names(function.__code__)
    found = [function.__globals__.get(name) for name in names]
    found += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # a name that is not bound yet
            continue
    found += [sys.modules.get(name) for name in names if "." in name or name in sys.modules]
    found += [next((vars(base)[name] for base in _own(cls) if name in vars(base)), None) for name in names]
    said = {*names, *_strings(function.__code__)}
    seen: set[int] = set()
    for holder in found:  # which grows
        if isinstance(holder, (types.ModuleType, type)) and id(holder) not in seen:
            seen.add(id(holder))
            found += [vars(holder)[name] for name in said if name in vars(holder)]
        elif isinstance(holder, functools.partial):
            found.append(holder.func)
    return found


def _own(cls: type) -> tuple[type, ...]:
    """A class and its bases, up to what all models have."""
    return cls.__mro__[: next(i for i, base in enumerate(cls.__mro__) if base in (PreTrainedModel, nn.Module))]


def _general(function: types.FunctionType) -> bool:
    """Whether a function is of a library that knows no single model."""
    top, _, rest = (function.__module__ or "").partition(".")  # exec may give none
    return top in GENERAL or (top == "transformers" and not rest.startswith("models."))


def _names(code: types.CodeType) -> list[str]:
    """Names of globals and attributes in a function's code and in functions inside it."""
    return [name for part in _parts(code) for name in part.co_names]


def _strings(code: types.CodeType) -> list[str]:
    return [held for part in _parts(code) for held in part.co_consts if isinstance(held, str)]


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            yield from _parts(held)


def _attends(function: Callable) -> bool:
    """Whether it can be called as attention functions are: (module, query, key, value, mask, ...)."""
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return len(names) >= 5 and names[0] == "module"
