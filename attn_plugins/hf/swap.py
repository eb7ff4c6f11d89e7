"""Put attentions into a model's slots, take them out, tell what is where. All is validated before anything changes."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.hf import adapters, arguments, discovery, grids, sources
from attn_plugins.hf.caches import leave, make_tensor, serve
from attn_plugins.hf.dispatch import BASE, IMPLEMENTATION, ROLE, SLOT, slot_of, turns
from attn_plugins.rules import Flag, Rule, assign, parse_rules


@dataclass(frozen=True, kw_only=True)
class AttentionRow:
    """One attention module of a model, as :func:`describe_attention` tells it."""

    path: str
    layer: int
    role: str
    reached: str
    """"interface" where the module itself calls transformers' attention interface, "adapter" where its adapter does."""
    plugin: str | None
    """Name of the attention in the slot, or None where the model's own serves."""
    implementation: str | None
    """Backend of the attention in the slot, or the model's own implementation."""
    options: dict[str, Any]
    new_params: int
    """Number of parameters that the slot adds to the model."""


class AttentionRows(list[AttentionRow]):
    """Rows of :func:`describe_attention`; printing them gives a table."""

    def __str__(self) -> str:
        header = ("path", "layer", "role", "reached", "plugin", "options", "new params")
        lines = [header]
        for row in self:
            options = ", ".join(f"{key}={value!r}" for key, value in row.options.items())
            plugin = row.plugin or f"({row.implementation})"
            lines.append((row.path, str(row.layer), row.role, row.reached, plugin, options, str(row.new_params)))
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def swap_attention(model: nn.Module, rules: Flag, **options: Any) -> nn.Module:
    """Put other attentions into a live model, in place.

    A slot that already holds the same attention with the same options keeps its weights; modules that no rule matches
    get the model's own attention back.

    Args:
        model: a transformers model, also under PEFT or torch.compile.
        rules: a name, a rule or a list of rules, as in ``config.attn_plugin``.
        options: options and rule keys, where ``rules`` is a name: ``swap_attention(model, "local", window_size=256)``.

    Returns:
        the model.

    Raises:
        ValueError: the rules do not fit the model; nothing has changed then.
    """
    _attach(_unwrap(model), parse_rules(rules, **options))
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Give a model its own attention back, bit for bit, in place; learned weights of the slots are dropped.

    A model that was not swapped stays as it is.

    Returns:
        the model.
    """
    inner = _unwrap(model)
    grids.unwatch(inner)
    for path, module in discovery.attention_modules(inner):
        if getattr(module, BASE, None) is not None:
            for config in _configs_of(inner, path, module):
                _set_implementation(config, getattr(module, BASE))
    for path, module in discovery.attention_modules(inner):
        leave(discovery.owner(inner, path), [module])
        arguments.unwatch(module)
        adapters.take_off(module)
        for attribute in (SLOT, BASE, ROLE):
            if hasattr(module, attribute):
                delattr(module, attribute)
        for config in _configs_of(inner, path, module):
            _unflag(config)
    _unflag(inner.config)
    return model


def describe_attention(model: nn.Module) -> AttentionRows:
    """One row for each attention module that can be swapped, in the model's order.

    Raises:
        ValueError: the model is not a transformers model.
    """
    inner = _unwrap(model)
    rows = AttentionRows()
    for target in discovery.targets(inner):
        module = inner.get_submodule(target.path)
        slot, base = slot_of(module), getattr(module, BASE, None)
        own = base or getattr(getattr(module, "config", inner.config), "_attn_implementation", None)
        rows.append(
            AttentionRow(
                path=target.path,
                layer=target.layer,
                role=target.role,
                reached=discovery.reached(module) or "",
                plugin=None if slot is None else slot.name,
                implementation=own if slot is None else slot.chosen(),
                options={} if slot is None else dataclasses.asdict(slot.config),
                new_params=0 if slot is None else sum(p.numel() for p in slot.parameters()),
            )
        )
    return rows


def attach_from_config(model: PreTrainedModel) -> None:
    """Attach what ``model.config`` asks for, at the end of the model's construction.

    The flag of the outermost model holds. Where that has none, parts of a composite model may carry their own.
    """
    config = model.config
    if config.attn_plugin is not None:
        _attach(model, parse_rules(config.attn_plugin))
    elif "attn_plugin" in vars(config):  # set to None on purpose: a swapped checkpoint with its original attention
        _reset(model)
    else:
        for part in _flagged_parts(model):
            _attach(part, parse_rules(part.config.attn_plugin))


def _attach(model: PreTrainedModel, rules: list[Rule]) -> None:
    targets = discovery.targets(model)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be swapped: none of its modules dispatches through "
            "transformers' attention interface (ALL_ATTENTION_FUNCTIONS), and none is of a family with an adapter "
            f"({', '.join(adapters.families())})"
        )
    assigned = assign(rules, targets)
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    slots = {path: _build(rule, modules[path], model, path) for path, rule in assigned.items()}

    # From here on nothing can fail. A config that serves at least one slot dispatches to us, with all of its modules.
    ours = {id(config) for path in assigned for config in _configs_of(model, path, modules[path])}
    for target in targets:
        module = modules[target.path]
        configs = _configs_of(model, target.path, module)
        base = getattr(module, BASE, None) or _base_of(model, target.path, module)
        arguments.unwatch(module)
        if hasattr(module, SLOT):
            delattr(module, SLOT)
        if not any(id(config) in ours for config in configs):
            for config in configs:
                _set_implementation(config, base)
            adapters.take_off(module)
            for attribute in (BASE, ROLE):
                if hasattr(module, attribute):
                    delattr(module, attribute)
            continue
        adapters.put_on(module)
        setattr(module, BASE, base)
        setattr(module, ROLE, target.role)
        if target.path in slots:
            setattr(module, SLOT, slots[target.path])
            arguments.watch(module)
    for target in targets:
        for config in _configs_of(model, target.path, modules[target.path]):
            if id(config) in ours:
                _set_implementation(config, IMPLEMENTATION)
    grids.unwatch(model)
    grids.watch(
        model, {path: slot for path, module in modules.items() if (slot := slot_of(module)) and slot.wants_grid}
    )
    _serve_caches(model, modules)
    _flag(model, rules, assigned, modules)


def _serve_caches(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Where modules are causal and have a slot, caches hold what their attentions need."""
    held: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for path, module in modules.items():
        owner, served = held.setdefault(id(o := discovery.owner(model, path)), (o, []))
        leave(owner, [module])
        if hasattr(module, SLOT) and getattr(module, ROLE, None) == "decoder":
            served.append(module)
    classes: set[Any] = {type(module) for module in modules.values()}
    borrowed = any(sources.reads_caches(cls) for cls in classes)
    for owner, served in held.values():
        serve(owner, served, ordinary=borrowed)
    for module in modules.values():
        cls: Any = type(module)
        if hasattr(module, BASE) and sources.wants_tensor(cls):
            module.register_forward_pre_hook(make_tensor, with_kwargs=True)


def _flag(model: PreTrainedModel, rules: list[Rule], assigned: dict[str, Rule], modules: dict[str, nn.Module]) -> None:
    """Write the rules where save_pretrained finds them: the model's config, and the configs of parts saved alone."""
    for path, module in modules.items():
        for config in _configs_of(model, path, module):
            if config is not model.config:
                _unflag(config)
    for path, rule in assigned.items():
        for config in _configs_of(model, path, modules[path]):
            if config is not model.config:
                held = config.attn_plugin or []
                config.attn_plugin = held if rule.to_dict() in held else [*held, rule.to_dict()]
                config.attn_implementation = IMPLEMENTATION
    model.config.attn_plugin = [rule.to_dict() for rule in rules]
    model.config.attn_implementation = IMPLEMENTATION


def _build(rule: Rule, module: nn.Module, model: PreTrainedModel, path: str) -> nn.Module:
    held = slot_of(module)
    if held is not None and (held.name, held.config, held.backend) == (rule.type, rule.config, rule.backend):
        return getattr(module, SLOT)
    config, module = getattr(module, "config", model.config), adapters.adapted(module)
    if (why := getattr(module, "cannot", None)) is not None:
        raise ValueError(f"{path} cannot be swapped: {why}; choose other modules with layers, roles or modules")
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if like is None else like.device
    dtype = torch.get_default_dtype() if like is None else like.dtype
    heads, slot, untold = None, None, None
    try:
        heads = discovery.head_shape(module, config)
    except ValueError as error:
        untold = error
    try:
        with torch.device(device):
            slot = rule.attention(rule.config, heads, backend=rule.backend)
    except ValueError as error:
        raise untold or error from None
    if untold is not None and next(slot.parameters(), None) is not None:
        raise untold  # these weights need a head shape
    if slot.wants_rotary and not turns(module):
        raise ValueError(
            f"{rule.type}({slot.extra_repr()}) needs rotary positions, and {path} ({type(module).__name__}) has none "
            "that attn_plugins can find; leave that option at its default for this model"
        )
    slot.to(dtype=dtype)
    if device.type != "meta":
        slot.reset_parameters()
    return slot.train(module.training)


def _base_of(model: PreTrainedModel, path: str, module: nn.Module) -> str:
    """The implementation that serves the module where no rule matches: the one asked for beside the flag, or sdpa."""
    holder = discovery.owner(model, path)
    current = getattr(module, "config", holder.config)._attn_implementation
    if current is None:
        return "eager"  # what serves a part whose config no model has taken as its own (fun_asr_nano's adaptor)
    return holder.get_correct_attn_implementation(None) if current == IMPLEMENTATION else current


def _configs_of(model: PreTrainedModel, path: str, module: nn.Module) -> list[Any]:
    """The configs that decide the module's attention function and its mask: its own, and its owner's."""
    own, holding = getattr(module, "config", None), discovery.owner(model, path).config
    return [holding] if own is None or own is holding else [own, holding]


def _set_implementation(config: Any, implementation: str) -> None:
    config._attn_implementation_internal = implementation  # the public setter would also change every part's config


def _unflag(config: Any) -> None:
    for attribute in ("attn_plugin", "attn_implementation"):
        vars(config).pop(attribute, None)


def _reset(model: PreTrainedModel) -> None:
    """Undo what config.json's attn_implementation did to configs whose modules have no slot."""
    for path, module in discovery.attention_modules(model):
        if getattr(module, BASE, None) is None:
            for config in _configs_of(model, path, module):
                if config._attn_implementation == IMPLEMENTATION:
                    _set_implementation(config, _base_of(model, path, module))
    if model.config._attn_implementation == IMPLEMENTATION and model.config.attn_plugin is None:
        _set_implementation(model.config, model.get_correct_attn_implementation(None))
    vars(model.config).pop("attn_implementation", None)


def _flagged_parts(model: PreTrainedModel, module: nn.Module | None = None) -> Iterator[PreTrainedModel]:
    """The outermost models inside ``model`` whose own config carries the flag."""
    for child in (model if module is None else module).children():
        if isinstance(child, PreTrainedModel) and child.config is not model.config and child.config.attn_plugin:
            yield child
        else:
            yield from _flagged_parts(model, child)


def _unwrap(model: Any) -> PreTrainedModel:
    inner = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if not isinstance(inner, PreTrainedModel):
        raise ValueError(f"got a {type(model).__name__}; allowed: a transformers PreTrainedModel (also under PEFT)")
    return inner
