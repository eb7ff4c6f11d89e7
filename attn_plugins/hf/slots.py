"""Build what goes into the slot of an attention module: with the module's head sizes, on its device, in its dtype."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.rules import Rule
from attn_plugins.hf import adapters, hidden_states
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.discovery.rotary import applies_rotary
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.parallel.sharding import refuse_split_heads


def build(rule: Rule, module: nn.Module, model: PreTrainedModel, path: str, layer: int | None = None) -> nn.Module:
    """The attention of a rule for a module, or the one that it has, where that is the same.

    Args:
        layer: number of the module's layer in its stack.

    Raises:
        ValueError: it cannot serve the module.
    """
    held = slot_of(module)
    if held is not None and (held.name, held.config, held.backend) == (rule.type, rule.config, rule.backend):
        return getattr(module, SLOT)
    config, module = getattr(module, "config", model.config), adapters.adapted(module)
    if (why := getattr(module, "cannot", None)) is not None:
        raise ValueError(f"{path} cannot be swapped: {why}; choose other modules with layers, roles or modules")
    device, dtype = _place(module, model)
    heads, slot, heads_error = None, None, None
    try:
        heads = dataclasses.replace(head_sizes.head_shape(module, config), layer=layer)
    except ValueError as error:
        heads_error = error
    try:
        with torch.device(device):
            slot = rule.attention(rule.config, heads, backend=rule.backend)
    except ValueError as error:
        raise heads_error or error from None
    if heads_error is not None and next(slot.parameters(), None) is not None:
        raise heads_error  # these weights need a head shape
    if slot.wants_rotary and not applies_rotary(module):
        raise ValueError(
            f"{rule.type}({slot.extra_repr()}) needs rotary positions, and {path} ({type(module).__name__}) has none "
            "that attn_plugins can find; leave that option at its default for this model"
        )
    if slot.wants_hidden:
        hidden_states.refuse_unnamed(module, path, rule.type)
    refuse_split_heads(model, path, module, slot)
    slot.to(dtype=dtype)
    if device.type != "meta":
        slot.reset_parameters()
    return slot.train(module.training)


def _place(module: nn.Module, model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Where a module computes, and in what: as its weights do, or as its model where they are quantised."""
    held = (x for part in (module, model) for x in (*part.parameters(), *part.buffers()))
    plain = (p for part in (module, model) for p in _not_quantised(part))
    device, dtype = next((x.device for x in held), torch.device("cpu")), torch.get_default_dtype()
    if device.type == "meta":  # accelerate may have offloaded the weights, and brings them here for each call
        hooks = (getattr(part, "_hf_hook", None) for part in module.modules())
        device = next((torch.device(d) for hook in hooks if (d := getattr(hook, "execution_device", None))), device)
    return device, next((p.dtype for p in plain), dtype)


def _not_quantised(part: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of modules that hold none of integers or of 8 bits, beside which there may be scales."""
    for module in part.modules():
        own = list(module.parameters(recurse=False))
        if all(p.is_floating_point() and p.element_size() > 1 for p in own):
            yield from own
