"""What a module gives its attention function beside queries, keys and values: what of it is honoured, and what refused.

An argument of which nothing is known here may change what attention computes. Where a module makes one itself, that is
seen when it arrives, by what the module was given, so that no class needs to show its code.
"""

import inspect
from typing import Any

from torch import nn

from attn_plugins.hf.discovery.by_code import told
from attn_plugins.hf.discovery.interface import call_of

KNOWN = {
    *("query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "output_attentions"),
    *("position_bias", "softcap", "s_aux", "indices", "block_indices"),
    *("sliding_window", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    "deterministic",
}
"""Arguments of attention functions that are honoured, or that say what the mask says as well."""

NAMED = "_attn_plugin_named"
"""Attribute of an attention module: names of arguments that its code spells out and KNOWN lacks."""

OWN = "_attn_plugin_own"
"""Attribute of an attention module: names of the arguments that its forward takes by name."""

HANDED = "_attn_plugin_handed"
"""Keyword that goes along with a module's own ones: those of them that it may hand on without a look at them."""


def watch(module: nn.Module) -> None:
    """Have :func:`refuse_unknown` know what this module is given, in every call."""
    cls: Any = type(module)
    call = call_of(cls)
    own = [] if call is None or call.eager is None else list(inspect.signature(call.eager).parameters.values())[5:]
    spelled = {parameter.name for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    takes = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    setattr(module, NAMED, frozenset((told(cls) | spelled) - KNOWN))
    setattr(module, OWN, frozenset(parameter.name for parameter in takes))
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in takes):
        module.register_forward_pre_hook(before_attention, with_kwargs=True)


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    for attribute in (NAMED, OWN):
        vars(module).pop(attribute, None)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is before_attention:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


def before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Send along what the module is given and does not name: it can only hand that on."""
    known = KNOWN | getattr(module, OWN)
    handed = {name: value for name, value in kwargs.items() if name not in known and _says(value)}
    return args, {**kwargs, HANDED: handed}


def refuse_unknown(module: nn.Module, kwargs: dict[str, Any]) -> None:
    """Refuse what the module itself gives its attention function and nothing is known of; takes HANDED out.

    Raises:
        ValueError: an argument that is not in KNOWN has a value, and it is not one that the module was given.
    """
    handed, named = kwargs.pop(HANDED, {}), getattr(module, NAMED, ())
    for name, value in kwargs.items():
        if name in KNOWN or not _says(value):
            continue
        if name in named or name not in handed or not _same(value, handed[name]):
            raise ValueError(
                f"{type(module).__name__} gives {name}= to its attention, of which attn_plugins does not know what it "
                "would change; leave its modules out with layers, roles or modules"
            )


def _says(value: Any) -> bool:
    return value is not None and value is not False


def _same(value: Any, given: Any) -> bool:
    """Whether it is what was given, on another device or in another precision at most."""
    if value is given:
        return True
    kinds = [(getattr(x, "device", None), getattr(x, "dtype", None)) for x in (value, given)]
    return kinds[0] != kinds[1]
