"""Build what goes into the slot of an attention module: with the module's head sizes, on its device, in its dtype."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import Share, Target
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.rules import Rule
from attn_plugins.hf import adapters, hidden_states
from attn_plugins.hf.discovery import heads as head_sizes
from attn_plugins.hf.discovery.rotary import applies_rotary
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.parallel import tensor_parallel
from attn_plugins.hf.split import Heads, Part, SplitAttention, parts_of


def build(shares: Sequence[Share], module: nn.Module, model: PreTrainedModel, target: Target) -> nn.Module:
    """What serves a module by its rules, or what it has in its slot, where that is the same.

    Raises:
        ValueError: an attention cannot serve the module, or its heads.
    """
    held, wanted = slot_of(module), wanted_parts(shares, target)
    if held is not None and [part.rule for part in parts_of(held)] == [rule_of(*one) for one in wanted]:
        return getattr(module, SLOT)
    config, module = getattr(module, "config", model.config), adapters.adapted(module)
    if (why := getattr(module, "cannot", None)) is not None:
        raise ValueError(f"{target.path} cannot be swapped: {why}; choose other modules with layers, roles or modules")
    heads, heads_error = None, None
    try:
        heads = dataclasses.replace(
            head_sizes.head_shape(module, config),
            layer=target.layer,
            layers=target.layers,
            prefix_tokens=target.prefix_tokens,
        )
    except ValueError as error:
        heads_error = error
    parts = []
    for kv_heads, rule in wanted:
        same = next((part for part in parts_of(held) if part.rule == rule_of(kv_heads, rule)), None)
        if same is not None and getattr(module, SLOT) is held:
            parts.append(same)
            continue
        shape = heads if kv_heads is None else Heads(kv_heads, group_size(target)).shape(heads)
        attention = None if rule is None else _build(rule, module, model, target.path, shape, heads_error)
        parts.append(Part(kv_heads, attention))
    if len(parts) == 1:
        assert parts[0].attention is not None
        tensor_parallel.share(model, target.path, module, parts[0].attention)
        return parts[0].attention
    slot = SplitAttention(parts, group_size(target), heads)
    tensor_parallel.share(model, target.path, module, slot)
    return slot.train(module.training)


def wanted_parts(shares: Sequence[Share], target: Target) -> list[tuple[tuple[int, ...] | None, Rule | None]]:
    """(key/value heads, rule) of each part that a module is to have, last the heads that no rule matches."""
    wanted: list[tuple[tuple[int, ...] | None, Rule | None]] = []
    for share in shares:
        options = share.rule.config.settled(target.prefix_tokens, target.own_options)
        wanted.append((share.kv_heads, dataclasses.replace(share.rule, config=options)))
    named = {head for share in shares for head in share.kv_heads or ()}
    left = tuple(head for head in range(target.num_key_value_heads or 0) if head not in named)
    if left and shares[0].kv_heads is not None:
        wanted.append((left, None))
    return wanted


def group_size(target: Target) -> int:
    """Query heads of a key/value head."""
    assert target.num_heads is not None
    assert target.num_key_value_heads is not None
    return target.num_heads // target.num_key_value_heads


def rule_of(kv_heads: tuple[int, ...] | None, rule: Rule | None) -> tuple[Any, ...]:
    """As :attr:`Part.rule`."""
    return (kv_heads, *(() if rule is None else (rule.type, rule.config, rule.backend)))


def _build(
    rule: Rule,
    module: nn.Module,
    model: PreTrainedModel,
    path: str,
    heads: HeadShape | None,
    heads_error: ValueError | None,
) -> Attention:
    """The attention of a rule for heads of these sizes.

    Raises:
        ValueError: it cannot serve the module.
    """
    device, dtype = placed(module, model)
    try:
        with torch.device(device):
            attention = rule.attention(rule.config, heads, backend=rule.backend)
    except ValueError as error:
        raise heads_error or error from None
    if heads_error is not None and next(attention.parameters(), None) is not None:
        raise heads_error  # these weights need a head shape
    if attention.wants_rotary and not applies_rotary(module):
        raise ValueError(
            f"{rule.type}({attention.extra_repr()}) needs rotary positions, and {path} ({type(module).__name__}) has "
            "none that attn_plugins can find; leave that option at its default for this model"
        )
    if attention.wants_hidden:
        hidden_states.refuse_unnamed(module, path, rule.type)
    attention.to(dtype=dtype)
    if device.type != "meta":
        attention.reset_parameters()
    return attention.train(module.training)


def placed(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
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
