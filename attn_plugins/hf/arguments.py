"""Refuse keyword arguments of which nothing is known that a module gives its attention function.

Such an argument may change what attention computes. Where a module makes one itself, that is
seen when it arrives, by what the module was given, so that no class needs to show its code.
"""

import inspect
from typing import Any, NamedTuple

import torch
from torch import nn

from attn_plugins.hf.call import Call
from attn_plugins.hf.discovery.by_code import dispatch_of, keyword_arguments

SUPPORTED = {
    *("query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "output_attentions"),
    *("position_bias", "softcap", "s_aux", "sinks", "indices", "block_indices"),
    *("sliding_window", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    *("deterministic", "use_cache"),
}
"""Keyword arguments of attention functions that are supported, or that say what the mask says as well."""

WITHOUT_EFFECT = frozenset(SUPPORTED - {"output_attentions", "sinks", "indices", "block_indices"})
"""Those of which the attention function takes no notice."""

SIGNATURE = "_attn_plugin_signature"
"""Attribute of an attention module with a slot: its :class:`Signature`."""


class Argument(NamedTuple):
    """One of a forward's arguments."""

    name: str
    place: int


class Signature(NamedTuple):
    """Arguments of a class of attention modules, by name."""

    parameters: frozenset[str]
    """Those that its forward spells out."""
    unsupported: frozenset[str]
    """Those that its code, or its function for "eager", gives to attention, and SUPPORTED lacks."""
    hidden: Argument | None
    """The one that holds the states of its queries, None where the forward names none.

    The first one is, of all that transformers has, but where they come after values and keys (CTRL)."""


def watch(module: nn.Module) -> None:
    """Note what the class of a module names, for :func:`refuse_unsupported` and hidden states."""
    cls: Any = type(module)
    call = dispatch_of(cls)
    eager = [] if call is None or call.eager is None else list(inspect.signature(call.eager).parameters.values())[5:]
    spelled = {parameter.name for parameter in eager if parameter.kind is not inspect.Parameter.VAR_KEYWORD}
    forward = list(inspect.signature(inspect.unwrap(cls.forward)).parameters.values())
    names = frozenset(parameter.name for parameter in forward)
    unsupported = frozenset((keyword_arguments(cls) | spelled) - SUPPORTED)
    setattr(module, SIGNATURE, Signature(names, unsupported, hidden_argument(cls)))


def unwatch(module: nn.Module) -> None:
    """Undo :func:`watch`."""
    vars(module).pop(SIGNATURE, None)


def hidden_argument(cls: type[nn.Module]) -> Argument | None:
    """As :attr:`Signature.hidden`."""
    _, *forward = inspect.signature(inspect.unwrap(cls.forward)).parameters.values()
    named = [Argument(one.name, place) for place, one in enumerate(forward) if one.kind is one.POSITIONAL_OR_KEYWORD]
    return next((one for one in named if one.name == "q"), named[0] if named and named[0].place == 0 else None)


def refuse_unsupported(
    module: nn.Module, call: Call | None, kwargs: dict[str, Any], given: dict[str, Any] | None = None
) -> None:
    """Refuse keyword arguments that a module itself gives its attention function and that SUPPORTED lacks.

    Args:
        call: of the module; what it was given and does not name, it can only hand on.
        given: what the model around a module without a slot was given, which has no call.

    Raises:
        ValueError: such an argument has a value.
    """
    for name, value in kwargs.items():
        if name in SUPPORTED or value is None or value is False:
            continue
        signature: Signature | None = getattr(module, SIGNATURE, None)
        handed_on = (
            signature is not None
            and call is not None
            and name not in signature.unsupported
            and name not in signature.parameters
            and name in call.kwargs
            and _same(value, call.kwargs[name])
        )
        if not handed_on and not (given is not None and name in given and _same(value, given[name])):
            raise ValueError(
                f"{type(module).__name__} gives {name}= to its attention, of which attn_plugins does not know what it "
                "would change; leave its modules out with layers, roles or modules"
            )


def _same(value: Any, given: Any) -> bool:
    """Whether it is what was given, on another device or in another precision at most."""
    if value is given:
        return True
    kinds = [(getattr(x, "device", None), getattr(x, "dtype", None)) for x in (value, given)]
    return kinds[0] != kinds[1]


def sinks_of_queries(
    logits: torch.Tensor, position_bias: torch.Tensor | None, kv_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is added to scores, and the sink of each head, that do what a sink logit of each query does (Inkling 2).

    Softmax is the same where the scores of a query and its sink are less by as much: less by that logit, which leaves a
    sink of 0.

    Args:
        logits: (B, H, Q, 1).
        position_bias: (B or 1, H or 1, Q or 1, K) that is added anyway.

    Returns:
        (position bias (B, H, Q, K), sinks (H,)).
    """
    less = -logits.expand(*logits.shape[:3], kv_length) if position_bias is None else position_bias - logits
    return less, logits.new_zeros(logits.shape[1])
