"""The only list of attentions: name -> class. Ours register on import, others' through the entry point group."""

import difflib
import importlib
import pkgutil
import threading
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import TypeVar

from attn_plugins.core.attention import Attention
from attn_plugins.core.options import shown

A = TypeVar("A", bound=type[Attention])

ENTRY_POINT_GROUP = "attn_plugins"

_attentions: dict[str, type[Attention]] = {}
_loading = threading.RLock()
_loaded = False


def register_attention(name: str) -> Callable[[A], A]:
    """Class decorator that puts an :class:`~attn_plugins.core.attention.Attention` into the registry under ``name``.

    Raises:
        ValueError: the name is taken, or the class is not a complete attention.
    """

    def register(cls: A) -> A:
        taken = _attentions.get(name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"attention {name!r} is already registered by {taken.__module__}.{taken.__qualname__}")
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"attention name {name!r} is not an identifier such as 'local' or 'my_attention'")
        if not (isinstance(cls, type) and issubclass(cls, Attention)):
            raise ValueError(f"{cls!r} is not a subclass of attn_plugins.core.attention.Attention")
        missing = [what for what in ("cost", "paper", "__doc__") if not getattr(cls, what, None)]
        missing += [form for form in ("reference", "attend") if getattr(cls, form) is getattr(Attention, form)]
        if not (cls.causal or cls.bidirectional or cls.cross):
            missing.append("one of causal, bidirectional, cross")
        if missing:
            raise ValueError(f"attention {name!r} ({cls.__qualname__}) lacks: {', '.join(missing)}")
        cls.name = name
        _attentions[name] = cls
        return cls

    return register


def list_attentions() -> list[str]:
    """Names of all attentions, sorted: the package's own, installed plug-ins', and those registered by hand."""
    _load()
    return sorted(_attentions)


def get_attention(name: str) -> type[Attention]:
    """The class registered under ``name``.

    Raises:
        ValueError: no attention has that name; the message lists those that exist and the nearest one.
    """
    _load()
    if not isinstance(name, str) or name not in _attentions:
        raise ValueError(
            f"unknown attention {shown(name)}{did_you_mean(name, _attentions)}; known: {', '.join(sorted(_attentions))}"
        )
    return _attentions[name]


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the nearest known name, or '' where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1, cutoff=0.5) if isinstance(got, str) else []
    return f" (did you mean {near[0]}?)" if near else ""


def _load() -> None:
    """Import the package's attentions and the installed plug-ins', once."""
    global _loaded
    if _loaded:
        return
    with _loading:
        if _loaded:
            return
        import attn_plugins.attentions as own

        for module in pkgutil.iter_modules(own.__path__):
            importlib.import_module(f"{own.__name__}.{module.name}")
        for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
            try:
                entry.load()
            except Exception as error:  # one broken plug-in must not take the others down; it is named, with its reason
                warnings.warn(f"plug-in {entry.name!r} ({entry.value}) could not be loaded: {error!r}", stacklevel=2)
        _loaded = True
