"""Names under which the bridge is known, and attributes of modules that it reads and writes."""

from torch import nn

from attn_plugins.core.attention import Attention, AttentionConfig

IMPLEMENTATION = AttentionConfig._attn_implementation
"""The name under which both functions are registered, and which config.json carries."""


SLOT = "attn_plugin"
"""Name of the *slot* of an attention module: the submodule that holds the Attention which attends in its place."""


BASE = "_attn_plugin_base"
"""Attribute of an attention module: the implementation that serves it where it has no slot."""


ROLE = "_attn_plugin_role"
"""Attribute of an attention module: encoder, decoder or cross."""


def slot_of(module: nn.Module) -> Attention | None:
    """The attention in a module's slot, also where PEFT has put its own module around it."""
    slot = module._modules.get(SLOT)
    if slot is None or isinstance(slot, Attention):
        return slot
    return next((inner for inner in slot.modules() if isinstance(inner, Attention)), None)
