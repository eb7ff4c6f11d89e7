"""Swap, restore and describe the attention of a model, as users or configs ask; all is checked before it changes."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from attn_plugins.core.attention import Attention
from attn_plugins.core.backend import usual
from attn_plugins.core.rules import Flag, parse_rules
from attn_plugins.hf.attach import attach, reset, restore, watch_calls
from attn_plugins.hf.checkpoints import configs, live
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import BASE, IMPLEMENTATION, SLOT, slot_of
from attn_plugins.hf.parallel.sharding import size_of
from attn_plugins.hf.plan import make_plan, make_saved_plans, refuse_loss
from attn_plugins.hf.split import parts_of

logger = logging.get_logger("transformers.attn_plugins")  # among what transformers says of loading


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One attention module of a model, or some of its heads, as :func:`describe_attention` tells it."""

    path: str
    layer: int
    role: str
    reached: str
    """"interface" where the module itself calls transformers' attention interface, "adapter" where its adapter does."""
    plugin: str | None
    """Name of the attention in the slot, or None where the model's own serves."""
    implementation: str | None
    """Form or backend of the attention in the slot, of ``auto`` what it tries first; or the model's own."""
    options: dict[str, Any]
    new_params: int
    """Number of parameters that the slot adds to the model."""
    kv_heads: tuple[int, ...] | None = None
    """Key/value heads of the module that it tells of, with the query heads that share them; None is all of them."""


class AttentionRows(list[AttentionRow]):
    """Rows of :func:`describe_attention`; printing them gives a table."""

    def __str__(self) -> str:
        split = any(row.kv_heads is not None for row in self)
        heads = ["kv_heads"] if split else []
        lines = [["path", "layer", "role", *heads, "reached", "plugin", "options", "new params"]]
        header = lines[0]
        for row in self:
            options = ", ".join(f"{key}={value!r}" for key, value in row.options.items())
            plugin = row.plugin or f"({row.implementation})"
            if split:
                heads = ["all" if row.kv_heads is None else ", ".join(map(str, row.kv_heads))]
            lines.append(
                [row.path, str(row.layer), row.role, *heads, row.reached, plugin, options, str(row.new_params)]
            )
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def swap_attention(model: nn.Module, rules: Flag, **options: Any) -> nn.Module:
    """Put other attentions into a live model, in place.

    A slot that already holds the same attention with the same options keeps its weights; modules that no rule matches
    get the model's own attention back. The model gets a config of its own: neither other models that were built from
    the same one, nor those that will be, are swapped.

    Args:
        model: a transformers model, also under PEFT or torch.compile, or in a SentenceTransformer.
        rules: a name, a rule or a list of rules, as in ``config.attn_plugin``.
        options: options and rule keys, where ``rules`` is a name: ``swap_attention(model, "local", window_size=256)``.

    Returns:
        the model.

    Raises:
        ValueError: the rules do not fit the model; nothing has changed then.
    """
    inner = unwrap(model)
    plan = make_plan(inner, parse_rules(rules, **options))
    configs.refuse_part(inner)
    if configs.WRITTEN not in vars(inner) or configs.shared(inner, model):
        configs.own(inner, model)
    attach(plan)
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Give a model its own attention back, bit for bit, in place; learned weights of the slots are dropped.

    A model that was not swapped stays as it is.

    Returns:
        the model.
    """
    inner = unwrap(model)
    configs.refuse_part(inner)
    if configs.shared(inner, model):
        configs.own(inner, model)
    restore(inner)
    return model


def describe_attention(model: nn.Module) -> AttentionRows:
    """What a call would reach: a row for each attention module that can be swapped, in the model's order.

    A module whose heads have several attentions has a row for each of these.

    Raises:
        ValueError: the model is not a transformers model.
    """
    inner = unwrap(model)
    rows = AttentionRows()
    for target in discovery.targets(inner):
        module = inner.get_submodule(target.path)
        slot = slot_of(module)
        own = configs.configs_of(inner, target.path, module)[0]._attn_implementation or "eager"
        if own == IMPLEMENTATION:
            own = getattr(module, BASE, None)
        elif discovery.reached(module) == "interface":
            slot = None  # the config was edited, and goes past it
        for part in parts_of(slot):
            attention = part.attention
            rows.append(
                AttentionRow(
                    path=target.path,
                    layer=target.layer,
                    role=target.role,
                    reached=discovery.reached(module) or "",
                    plugin=None if attention is None else attention.name,
                    implementation=own if attention is None else form_of(attention, module),
                    options={} if attention is None else dataclasses.asdict(attention.config),
                    new_params=0 if attention is None else size_of(attention.parameters()),
                    kv_heads=part.kv_heads,
                )
            )
    return rows


def form_of(slot: Attention, module: nn.Module) -> str:
    """The form or backend that a rule asked for, or that ``auto`` tries first where the module is."""
    if slot.backend != "auto":
        return slot.backend
    weight = next(module.parameters(), None)
    return usual(slot, torch.device("cpu") if weight is None or weight.is_meta else weight.device)


def attach_from_config(model: PreTrainedModel) -> None:
    """Attach what ``model.config`` asks for, at the end of the model's construction.

    The flag of the outermost model holds. Where that has none, parts of a composite model may carry their own.

    Raises:
        ValueError: the rules do not fit the model, or would take slots away that a part of it has brought.
    """
    if model.config.attn_plugin is None and "attn_plugin" in vars(model.config):
        reset(model)  # set to None on purpose: a swapped checkpoint with its original attention
        return
    missing: list[str] = []
    plans = [] if model.config.attn_plugin is None else make_saved_plans(model, missing)
    if not plans:
        plans = [plan for part in _flagged_parts(model) for plan in make_saved_plans(part, missing)]
    for plan in plans:
        refuse_loss(plan)
    if plans or missing:
        configs.own(model)
    for plan in plans:
        attach(plan)
    if missing:
        logger.warning("\n".join(missing))
    if not plans and model.config.attn_plugin is not None:
        configs.erase(model.config)
        reset(model)
    if any(hasattr(module, SLOT) for module in model.modules()):
        watch_calls(model)  # around parts that have brought their own slots
    configs.mark(model)


def attach_assigned(config: Any, flag: "Flag | None") -> bool:
    """Do what an assignment to ``config.attn_plugin`` asks for, where live models have that config; tell if any has.

    Their configs stay the objects that they are: who edits them once may do so again.

    Raises:
        ValueError: the rules do not fit a model; nothing has changed then.
    """
    models = live.holding(config)
    for model in models:
        configs.refuse_part(model)
    plans = [] if flag is None else [make_plan(model, parse_rules(flag)) for model in models]
    for plan in plans:
        attach(plan)
    for model in models if flag is None else []:
        restore(model)
    return bool(models)


def _flagged_parts(model: PreTrainedModel, module: nn.Module | None = None) -> Iterator[PreTrainedModel]:
    """The outermost models inside ``model`` whose own config carries the flag."""
    for child in (model if module is None else module).children():
        if isinstance(child, PreTrainedModel) and child.config is not model.config and child.config.attn_plugin:
            yield child
        else:
            yield from _flagged_parts(model, child)


def inside(model: Any) -> Any:
    """What torch.compile, PEFT or sentence-transformers have put something around; a bare model itself."""
    inner = getattr(model, "_orig_mod", model)
    inner = getattr(inner, "transformers_model", inner)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def unwrap(model: Any) -> PreTrainedModel:
    """The transformers model inside what torch.compile, PEFT or sentence-transformers have put around it.

    Raises:
        ValueError: there is none.
    """
    inner = inside(model)
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(
            f"got a {type(model).__name__}; allowed: a transformers PreTrainedModel (also under PEFT, or in a "
            "SentenceTransformer)"
        )
    return inner
