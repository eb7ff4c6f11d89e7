"""Swap, restore and describe the attention of any model: transformers' by the bridge, torch modules here.

Of a plain module no config carries the rules: slots are in the modules, their weights in the state dict, and who loads
that swaps first. As for transformers, all is checked before anything changes.
"""

import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import Share, Target, assign, settled
from attn_plugins.core.attention import Attention, HeadShape
from attn_plugins.core.rules import Flag, Rule, parse_rules
from attn_plugins.hf import swap as bridge
from attn_plugins.hf.names import ROLE, SLOT, slot_of
from attn_plugins.hf.parallel.sharding import size_of
from attn_plugins.hf.slots import group_size, placed, rule_of, wanted_parts
from attn_plugins.hf.split import Heads, Part, SplitAttention, parts_of
from attn_plugins.hf.swap import AttentionRow, AttentionRows
from attn_plugins.torch_modules import discovery
from attn_plugins.torch_modules.adapters import adapted, to_adapter, to_own_class
from attn_plugins.torch_modules.multihead import SELF


def swap_attention(model: nn.Module, rules: Flag, **options: Any) -> nn.Module:
    """Put other attentions into a live model, in place.

    A slot that already holds the same attention with the same options keeps its weights; modules that no rule matches
    get the model's own attention back. A transformers model gets a config of its own: neither other models that were
    built from the same one, nor those that will be, are swapped. Another model keeps no rules: swap it the same way
    before its state dict is loaded.

    Args:
        model: a transformers model, also under PEFT or torch.compile, or in a SentenceTransformer; or any module that
            holds torch.nn.MultiheadAttention, :class:`attn_plugins.AttentionLayer`, or modules that call
            torch.nn.functional.scaled_dot_product_attention.
        rules: a name, a rule or a list of rules, as in ``config.attn_plugin``.
        options: options and rule keys, where ``rules`` is a name: ``swap_attention(model, "local", window_size=256)``.

    Returns:
        the model.

    Raises:
        ValueError: the rules do not fit the model; nothing has changed then.
    """
    inner = _checked(model)
    if isinstance(inner, PreTrainedModel):
        return bridge.swap_attention(model, rules, **options)
    swap_modules(inner, rules, **options)
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Give a model its own attention back, bit for bit, in place; learned weights of the slots are dropped.

    A model that was not swapped stays as it is.

    Returns:
        the model.
    """
    inner = _checked(model)
    if isinstance(inner, PreTrainedModel):
        return bridge.restore_attention(model)
    for _, module in discovery.attention_modules(inner):
        _restore(module)
    return model


def describe_attention(model: nn.Module) -> AttentionRows:
    """What a call would reach: a row for each attention module that can be swapped, in the model's order.

    A module whose heads have several attentions has a row for each of these.
    """
    inner = _checked(model)
    if isinstance(inner, PreTrainedModel):
        return bridge.describe_attention(model)
    rows = AttentionRows()
    for target in discovery.targets(inner):
        module = inner.get_submodule(target.path)
        for part in parts_of(slot_of(module)):
            attention = part.attention
            rows.append(
                AttentionRow(
                    path=target.path,
                    layer=target.layer,
                    role=target.role,
                    reached="adapter",
                    plugin=None if attention is None else attention.name,
                    implementation="sdpa" if attention is None else bridge.form_of(attention, module),
                    options={} if attention is None else dataclasses.asdict(attention.config),
                    new_params=0 if attention is None else size_of(attention.parameters()),
                    kv_heads=part.kv_heads,
                )
            )
    return rows


def swap_modules(model: nn.Module, rules: Flag, **options: Any) -> None:
    """As :func:`swap_attention`, of a model that is none of transformers'."""
    parsed, targets = parse_rules(rules, **options), discovery.targets(model)
    if not targets:
        raise ValueError(_nothing(model))
    assigned = settled(assign(parsed, targets), targets)
    slots = {target.path: _build(assigned[target.path], model, target) for target in targets if target.path in assigned}
    for target in targets:  # from here on nothing can fail
        module = model.get_submodule(target.path)
        if target.path not in slots:
            _restore(module)
            continue
        to_adapter(module)
        setattr(module, SLOT, slots[target.path])
        setattr(module, ROLE, target.role)
        setattr(module, SELF, discovery.one_sequence(model, target.path))


def _restore(module: nn.Module) -> None:
    to_own_class(module)
    for attribute in (SLOT, ROLE, SELF):
        if hasattr(module, attribute):
            delattr(module, attribute)


def _build(shares: list[Share], model: nn.Module, target: Target) -> nn.Module:
    """What serves a module by its rules, or what it has in its slot, where that is the same.

    Raises:
        ValueError: an attention cannot serve the module, or its heads.
    """
    module = model.get_submodule(target.path)
    where = target.path or type(module).__name__
    held, wanted = slot_of(module), wanted_parts(shares, target)
    if held is not None and [part.rule for part in parts_of(held)] == [rule_of(*one) for one in wanted]:
        return getattr(module, SLOT)
    if (why := adapted(module).cannot) is not None:
        raise ValueError(f"{where} cannot be swapped: {why}; choose other modules with layers, roles or modules")
    sizes = discovery.head_shape(module)
    whole = discovery.of_model(sizes, model, target) if isinstance(sizes, HeadShape) else None
    parts = []
    for kv_heads, rule in wanted:
        same = next((part for part in parts_of(held) if part.rule == rule_of(kv_heads, rule)), None)
        if same is not None and getattr(module, SLOT, None) is held:
            parts.append(same)
            continue
        shape = whole if kv_heads is None else Heads(kv_heads, group_size(target)).shape(whole)
        attention = None if rule is None else _attention(rule, model, module, where, shape, sizes)
        parts.append(Part(kv_heads, attention))
    if len(parts) == 1:
        assert parts[0].attention is not None
        return parts[0].attention
    return SplitAttention(parts, group_size(target), whole).train(module.training)


def _attention(
    rule: Rule,
    model: nn.Module,
    module: nn.Module,
    path: str,
    heads: HeadShape | None,
    sizes: HeadShape | ValueError,
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
        raise (sizes if isinstance(sizes, ValueError) else error) from None
    if isinstance(sizes, ValueError) and next(attention.parameters(), None) is not None:
        raise sizes  # these weights need a head shape
    if attention.wants_rotary:
        raise ValueError(
            f"{rule.type}({attention.extra_repr()}) needs rotary positions, and {path} ({type(module).__name__}) has "
            "none that attn_plugins can find; leave that option at its default for this model"
        )
    attention.to(dtype=dtype)
    if device.type != "meta":
        attention.reset_parameters()
    return attention.train(module.training)


def _checked(model: Any) -> nn.Module:
    inner = bridge.inside(model)
    if not isinstance(inner, nn.Module):
        raise ValueError(f"got a {type(model).__name__}; allowed: {_ALLOWED}")
    return inner


_ALLOWED = (
    "a transformers PreTrainedModel (also under PEFT, or in a SentenceTransformer), or another torch module that holds "
    "a torch.nn.MultiheadAttention, an attn_plugins.AttentionLayer, or a module that calls "
    "torch.nn.functional.scaled_dot_product_attention"
)


def _nothing(model: nn.Module) -> str:
    said = f"got a {type(model).__name__}; allowed: {_ALLOWED}"
    parts = discovery.of_transformers(model)
    if parts:
        path, part = parts[0]
        said += f"; its part {path} ({type(part).__name__}) is a model of transformers: swap that one by itself"
    return said
