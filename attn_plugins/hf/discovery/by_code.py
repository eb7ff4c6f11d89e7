"""What the code of a model's classes tells: where attention is called and with what, and which masks are made.

Attributes have many names for the same thing, or none; what a class calls is the same in every family. Where a class
has no source, what is not read here is met when it is called: a state that is attended from twice is refused, and so is
an argument that the module makes (``hf/arguments.py``).
"""

import ast
import functools
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from attn_plugins.hf.discovery.declared import EAGER_NAME, Dispatch, declared_dispatch

OUTSIDE = ("torch.", "builtins", "transformers.modeling_utils", "transformers.utils", "transformers.generation")
"""Where code is that tells nothing of a single model."""

LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

GENERAL = {*sys.stdlib_module_names, "torch", "numpy"}
"""Packages whose functions call no attention of a model."""


def dispatch_of(cls: type[nn.Module]) -> Dispatch | None:
    """How a class of modules calls the interface, under whatever name it knows it, or None where it does not.

    What transformers declares is read first, code only where that does not say it.
    """
    if cls not in _dispatches:
        _dispatches[cls] = declared_dispatch(cls) or _find_dispatch(cls)
    return _dispatches[cls]


_dispatches: dict[type[nn.Module], Dispatch | None] = {}


def _find_dispatch(cls: type[nn.Module]) -> Dispatch | None:
    functions = functions_of(cls)
    used = {function: _held(cls, function) for function in functions}
    asking = [f for f in functions if any(isinstance(held, AttentionInterface) for held in used[f])]
    if not asking:
        return None
    interface = next(held for held in used[asking[0]] if isinstance(held, AttentionInterface))
    for near in (asking, functions):  # a function of another file that it calls has another eager attention beside it
        usual = next((f.__globals__[EAGER_NAME] for f in near if EAGER_NAME in f.__globals__), None)
        others = (held for f in near for held in used[f] if inspect.isfunction(held) and _is_attention_function(held))
        if (eager := usual or next(others, None)) is not None:
            return Dispatch(interface, eager)
    return Dispatch(interface, None)


def functions_of(cls: Any) -> list[types.FunctionType]:
    """The forward of a class and what it calls of the class and of files beside its own."""
    return list(_reached(cls, getattr(cls, "forward", None), set()))


def calls(cls: type[nn.Module], function: Callable) -> bool:
    """Whether the forward of a class, or what it calls, has a function in its hands, by whatever name."""
    if (cls, function) not in _called:
        _called[cls, function] = any(held is function for called in functions_of(cls) for held in _held(cls, called))
    return _called[cls, function]


_called: dict[tuple[type[nn.Module], Callable], bool] = {}


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
    names = _global_names(function.__code__)
    for name in names:
        definitions = [vars(base)[name] for base in _own(cls) if name in vars(base)]
        for definition in definitions if "super" in names else definitions[:1]:
            yield from _reached(cls, getattr(definition, "__func__", definition), seen)


def _held(cls: type, function: types.FunctionType) -> list[Any]:
    """What a function may have in its hands: globals, defaults, what its closure and its class hold, in its own words.

    Of modules and classes among these also what they hold under names that the function says somewhere, so that it
    makes no difference whether a name stands alone, after a dot, in a getattr or in an import of its own.
    """
    names = _global_names(function.__code__)
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


def _global_names(code: types.CodeType) -> list[str]:
    """Names of globals and attributes in a function's code and in functions inside it."""
    return [name for part in _parts(code) for name in part.co_names]


def _strings(code: types.CodeType) -> list[str]:
    return [held for part in _parts(code) for held in part.co_consts if isinstance(held, str)]


def _parts(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            yield from _parts(held)


def _is_attention_function(function: Callable) -> bool:
    """Whether it can be called as attention functions are: (module, query, key, value, mask, ...)."""
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return len(names) >= 5 and names[0] == "module"


@functools.cache
def names_of(cls: type) -> frozenset[str]:
    """Global names and attributes that the methods of a class use, and those of its model-specific bases."""
    found: set[str] = set()
    for held in cls.__mro__:
        if not held.__module__.startswith(OUTSIDE):
            for member in vars(held).values():
                code = getattr(inspect.unwrap(member) if callable(member) else None, "__code__", None)
                found.update(code.co_names if code is not None else ())
    return frozenset(found)


def makes_masks(classes: Iterable[type]) -> set[str]:
    """Which masks these classes make: any of "causal" and "bidirectional"."""
    names = set().union(*map(names_of, classes))
    kinds = {"causal": r"causal\w*mask", "bidirectional": "bidirectional"}
    return {kind for kind, pattern in kinds.items() if any(re.search(pattern, name) for name in names)}


@functools.cache
def keyword_arguments(cls: type) -> frozenset[str]:
    """Keywords that a class of attention modules gives to the attention function by name."""
    return frozenset(keyword.arg for call in _calls(cls) for keyword in call.keywords if keyword.arg)


@functools.cache
def dropout_names(cls: type) -> frozenset[str]:
    """Attributes of a module, such as "attention_dropout" or "dropout.p", that its class gives on as ``dropout=``."""
    given = [keyword.value for call in _calls(cls) for keyword in call.keywords if keyword.arg == "dropout"]
    read = {ast.unparse(node) for value in given for node in ast.walk(value) if isinstance(node, ast.Attribute)}
    return frozenset(name.removeprefix("self.") for name in read if name.startswith("self."))


@functools.cache
def attends_repeatedly(cls: type) -> bool:
    """Whether a forward pass of a class may call the attention function more than once: in a row, or in a loop."""
    defined = [node for function in _functions(cls) for node in ast.walk(function) if isinstance(node, ast.FunctionDef)]

    def calls_in(part: Any, within: list[ast.FunctionDef]) -> int:
        if isinstance(part, list):
            return sum(calls_in(node, within) for node in part)
        if isinstance(part, (ast.FunctionDef, ast.Lambda)):
            return 0  # counts where it is called
        if isinstance(part, (ast.If, ast.IfExp)):
            return max(calls_in(part.body, within), calls_in(part.orelse, within))
        name = _own_name(part)
        inner = [f for f in defined if f.name == name and f not in within]
        total = _attends(part) + max((calls_in(f.body, [*within, f]) for f in inner), default=0)
        total += calls_in(list(ast.iter_child_nodes(part)), within)
        return 2 * total if isinstance(part, LOOPS) else total

    return any(calls_in(function.body, [function]) > 1 for function in defined)


@functools.cache
def reads_caches(cls: type) -> bool:
    """Whether a class reads keys that other modules have put into a cache, and puts none there (DiffusionGemma)."""
    names = names_of(cls)
    return {"layers", "keys"} <= names and "update" not in names


@functools.cache
def wants_tensor(cls: type) -> bool:
    """Whether the forward of a class asks if its mask is a tensor, to go on with it as one (DeepSeek V4).

    Where the source cannot be had, asking that of anything counts: a dense mask is right in any case.
    """
    if any({"isinstance", "Tensor"} <= set(function.__code__.co_names) for function in _unreadable(cls)):
        return True
    asked = [
        [ast.unparse(argument) for argument in node.args]
        for function in _functions(cls)
        for node in ast.walk(function)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
    ]
    return any("mask" in what and kind == "torch.Tensor" for what, kind in asked)


def _own_name(node: ast.AST) -> str | None:
    """What is called, where that may be of the class or its file: name(...), self.name(...), super().name(...)."""
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Attribute):
        return called.attr if ast.unparse(called.value) in ("self", "super()") else None
    return called.id if isinstance(called, ast.Name) else None


def _calls(cls: type) -> Iterator[ast.Call]:
    for function in _functions(cls):
        yield from (node for node in ast.walk(function) if isinstance(node, ast.Call) and _attends(node))


def _attends(node: Any) -> bool:
    """Whether this is the call of an attention function: of a local name, with the module first and a scale."""
    return (
        isinstance(node, ast.Call)
        and bool(node.args)
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id == "self"
        and any(keyword.arg in ("scaling", "dropout") for keyword in node.keywords)
    )


def _functions(cls: Any) -> Iterator[ast.FunctionDef]:
    """The syntax of the forward of a class and of what it calls; nothing of those whose source cannot be had."""
    yield from filter(None, map(_syntax, functions_of(cls)))


def _unreadable(cls: Any) -> Iterator[types.FunctionType]:
    """The others: made by exec, or installed without their files."""
    return (function for function in functions_of(cls) if _syntax(function) is None)


def _syntax(function: types.FunctionType) -> ast.FunctionDef | None:
    try:
        source = inspect.getsource(function)
        # A method is parsed as the body of something: a string in it may begin at the margin, which stops dedent.
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, SyntaxError):
        return None
    return next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
