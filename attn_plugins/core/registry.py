"""The registry of attentions, the only list of them; third parties join through the entry point group."""

from collections.abc import Callable
from typing import Any

from attn_plugins.core.attention import Attention
from attn_plugins.core.catalogue import ENTRY_POINT_GROUP
from attn_plugins.core.class_registry import C, Registry


def _lacks(cls: Any) -> list[str]:
    if not (isinstance(cls, type) and issubclass(cls, Attention)):
        raise ValueError(f"{cls!r} is not a subclass of {Attention.__module__}.{Attention.__qualname__}")
    missing = [what for what in ("cost", "paper", "__doc__") if not getattr(cls, what, None)]
    missing += [form for form in ("reference", "attend") if getattr(cls, form) is getattr(Attention, form)]
    if not (cls.causal or cls.bidirectional or cls.cross):
        missing.append("one of causal, bidirectional, cross")
    return missing


ATTENTIONS: Registry[Attention] = Registry("attention", "attn_plugins.attentions", _lacks, ENTRY_POINT_GROUP)


def register_attention(name: str) -> Callable[[C], C]:
    """Class decorator that puts an :class:`~attn_plugins.core.attention.Attention` into the registry under ``name``.

    Raises:
        ValueError: the name is taken, or the class is not a complete attention.
    """
    return ATTENTIONS.register(name)


def list_attentions() -> list[str]:
    """Names of all attentions, sorted: the package's own, installed plug-ins', and those registered by hand."""
    return ATTENTIONS.names()


def get_attention(name: str) -> type[Attention]:
    """The class registered under ``name``.

    Raises:
        ValueError: no attention has that name; the message lists those that exist and the nearest one.
    """
    return ATTENTIONS.get(name)
