"""Put attentions into a model's slots, take them out, tell what is where. All is validated before anything changes."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from attn_plugins.core.rules import Flag, Rule, Target, assign, by_own_paths, parse_rules
from attn_plugins.hf import adapters, arguments, call, grids, recording
from attn_plugins.hf.caches import cache_layers, prefixes
from attn_plugins.hf.checkpoints import configs, live
from attn_plugins.hf.discovery import by_code as sources
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.masks import packing
from attn_plugins.hf.names import BASE, IMPLEMENTATION, ROLE, SLOT, slot_of
from attn_plugins.hf.parallel import sequence_parallel
from attn_plugins.hf.slots import build

logger = logging.get_logger("transformers.attn_plugins")  # among what transformers says of loading


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
    get the model's own attention back. The model gets a config of its own: neither other models that were built from
    the same one, nor those that will be, are swapped.

    Args:
        model: a transformers model, also under PEFT or torch.compile.
        rules: a name, a rule or a list of rules, as in ``config.attn_plugin``.
        options: options and rule keys, where ``rules`` is a name: ``swap_attention(model, "local", window_size=256)``.

    Returns:
        the model.

    Raises:
        ValueError: the rules do not fit the model; nothing has changed then.
    """
    inner = _unwrap(model)
    plan = _plan(inner, parse_rules(rules, **options))
    configs.refuse_part(inner)
    if configs.WRITTEN not in vars(inner) or configs.shared(inner, model):
        configs.own(inner, model)
    _attach(plan)
    return model


def restore_attention(model: nn.Module) -> nn.Module:
    """Give a model its own attention back, bit for bit, in place; learned weights of the slots are dropped.

    A model that was not swapped stays as it is.

    Returns:
        the model.
    """
    inner = _unwrap(model)
    configs.refuse_part(inner)
    if configs.shared(inner, model):
        configs.own(inner, model)
    _restore(inner)
    return model


def describe_attention(model: nn.Module) -> AttentionRows:
    """One row for each attention module that can be swapped, in the model's order: what a call would reach.

    Raises:
        ValueError: the model is not a transformers model.
    """
    inner = _unwrap(model)
    rows = AttentionRows()
    for target in discovery.targets(inner):
        module = inner.get_submodule(target.path)
        slot = slot_of(module)
        own = configs.configs_of(inner, target.path, module)[0]._attn_implementation or "eager"
        if own == IMPLEMENTATION:
            own = getattr(module, BASE, None)
        elif discovery.reached(module) == "interface":
            slot = None  # the config was edited, and goes past it
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

    Raises:
        ValueError: the rules do not fit the model, or would take slots away that a part of it has brought.
    """
    if model.config.attn_plugin is None and "attn_plugin" in vars(model.config):
        _reset(model)  # set to None on purpose: a swapped checkpoint with its original attention
        return
    missing: list[str] = []
    plans = [] if model.config.attn_plugin is None else _plan_saved(model, missing)
    if not plans:
        plans = [plan for part in _flagged_parts(model) for plan in _plan_saved(part, missing)]
    for plan in plans:
        _refuse_loss(plan)
    if plans or missing:
        configs.own(model)
    for plan in plans:
        _attach(plan)
    if missing:
        logger.warning("\n".join(missing))
    if not plans and model.config.attn_plugin is not None:
        configs.erase(model.config)
        _reset(model)
    if any(hasattr(module, SLOT) for module in model.modules()):
        _watch(model)  # around parts that have brought their own slots
    configs.mark(model)


def _plan_saved(model: PreTrainedModel, missing: list[str]) -> list["_Plan"]:
    """What to attach by the rules of a model's config, nothing where all are for parts that it does not have.

    Rules that another class of model has saved were right there, and what is not here is left out; ``missing`` gets a
    line on each of these.
    """
    rules, config = parse_rules(model.config.attn_plugin), model.config
    if not configs.from_file(config) or type(model).__name__ in (config.architectures or ()):
        return [_plan(model, rules)]
    absent: dict[int, str] = {}
    plan = _plan(model, rules, absent)
    missing.extend(f"{type(model).__name__} leaves out a rule of the saved model: {why}" for why in absent.values())
    return [plan] if plan.assigned else []


def attach_assigned(config: Any, flag: "Flag | None") -> bool:
    """Do what an assignment to ``config.attn_plugin`` asks for, where live models have that config; tell if any has.

    Their configs stay the objects that they are: who edits them once may do so again.

    Raises:
        ValueError: the rules do not fit a model; nothing has changed then.
    """
    models = live.holding(config)
    for model in models:
        configs.refuse_part(model)
    plans = [] if flag is None else [_plan(model, parse_rules(flag)) for model in models]
    for plan in plans:
        _attach(plan)
    for model in models if flag is None else []:
        _restore(model)
    return bool(models)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What :func:`_attach` is to do to a model, all of it checked and built."""

    model: PreTrainedModel
    rules: list[Rule]
    targets: list[Target]
    assigned: dict[str, Rule]
    slots: dict[str, nn.Module]
    modules: dict[str, nn.Module]
    bases: dict[str, str]


def _plan(model: PreTrainedModel, rules: list[Rule], absent: dict[int, str] | None = None) -> _Plan:
    """Check rules against a model and build their attentions; nothing changes.

    Args:
        absent: where given, the rules are those of a model of another class: see ``missing`` of rules.assign.

    Raises:
        ValueError: the rules do not fit.
    """
    targets = discovery.targets(model)
    if not targets:
        raise ValueError(
            f"{type(model).__name__} has no attention that can be swapped: none of its modules dispatches through "
            "transformers' attention interface (ALL_ATTENTION_FUNCTIONS), and none is of a family with an adapter "
            f"({', '.join(adapters.families())})"
        )
    if absent is not None and model.base_model is model and model.base_model_prefix:
        whole = model.base_model_prefix
        targets = [dataclasses.replace(target, path_in_whole=f"{whole}.{target.path}") for target in targets]
    assigned = assign(rules, targets, missing=absent)
    if absent is not None:  # what is written into the config is for this class
        served = [(rule, [path for path, held in assigned.items() if held is rule]) for rule in rules]
        rules = [by_own_paths(rule, paths) for rule, paths in served if paths]
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    layers = {target.path: target.layer for target in targets}
    slots = {path: build(rule, modules[path], model, path, layers[path]) for path, rule in assigned.items()}
    bases = {path: getattr(module, BASE, None) or _base_of(model, path, module) for path, module in modules.items()}
    discovery.warn_of_lost_dropout(assigned, modules)
    return _Plan(
        model=model, rules=rules, targets=targets, assigned=assigned, slots=slots, modules=modules, bases=bases
    )


def _refuse_loss(plan: _Plan) -> None:
    """Refuse to take away what parts have brought that were loaded or swapped before the model around them was built.

    Raises:
        ValueError: names the part and its attention.
    """
    for part, _ in configs.written(plan.model):
        if part is plan.model:
            continue
        inside = {id(module) for module in part.modules()}
        for path, module in plan.modules.items():
            held = slot_of(module)
            if id(module) in inside and held is not None and plan.slots.get(path) is not getattr(module, SLOT):
                raise ValueError(
                    f"the attn_plugin of {type(plan.model).__name__} would replace {held.name!r} at {path}, which its "
                    f"part {type(part).__name__} came with; give rules that say the same, or build that part with "
                    "attn_plugin=None"
                )


def _attach(plan: _Plan) -> None:
    """Do what was planned; from here on nothing can fail.

    A config that serves at least one slot dispatches to us, with all of its modules.
    """
    model, modules = plan.model, plan.modules
    ours = {id(config) for path in plan.assigned for config in configs.configs_of(model, path, modules[path])}
    for target in plan.targets:
        module = modules[target.path]
        held = configs.configs_of(model, target.path, module)
        arguments.unwatch(module)
        prefixes.unwatch(module)
        call.unwatch(module)
        if hasattr(module, SLOT):
            delattr(module, SLOT)
        if not any(id(config) in ours for config in held):
            for config in held:
                configs.set_implementation(config, plan.bases[target.path])
            adapters.to_own_class(module)
            for attribute in (BASE, ROLE):
                if hasattr(module, attribute):
                    delattr(module, attribute)
            continue
        adapters.to_adapter(module)
        setattr(module, BASE, plan.bases[target.path])
        setattr(module, ROLE, target.role)
        if target.path in plan.slots:
            setattr(module, SLOT, plan.slots[target.path])
            arguments.watch(module)
            call.watch(module)
            if target.role == "encoder":
                prefixes.watch(module)
    for target in plan.targets:
        for config in configs.configs_of(model, target.path, modules[target.path]):
            if id(config) in ours:
                configs.set_implementation(config, IMPLEMENTATION)
    recording.unwatch(model)
    recording.watch(model, modules)
    grids.unwatch(model)
    grids.watch(
        model, {path: slot for path, module in modules.items() if (slot := slot_of(module)) and slot.wants_grid}
    )
    _serve_caches(model, modules)
    _watch(model)
    configs.write_rules(model, plan.rules, plan.assigned, modules)
    for outer in live.around(model):
        configs.mark(outer)


def _restore(model: PreTrainedModel) -> None:
    grids.unwatch(model)
    recording.unwatch(model)
    for path, module in discovery.attention_modules(model):
        if getattr(module, BASE, None) is not None:
            for config in configs.configs_of(model, path, module):
                configs.set_implementation(config, getattr(module, BASE))
    for path, module in discovery.attention_modules(model):
        cache_layers.unwatch(discovery.owner(model, path), [module])
        arguments.unwatch(module)
        prefixes.unwatch(module)
        call.unwatch(module)
        adapters.to_own_class(module)
        for attribute in (SLOT, BASE, ROLE):
            if hasattr(module, attribute):
                delattr(module, attribute)
        for config in configs.configs_of(model, path, module):
            configs.erase(config)
    _watch(model)
    configs.erase(model.config)
    configs.forget(model)
    for outer in live.around(model):
        configs.mark(outer)


def _serve_caches(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Where modules are causal and have a slot, caches hold what their attentions need."""
    held: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for path, module in modules.items():
        owner, served = held.setdefault(id(o := discovery.owner(model, path)), (o, []))
        cache_layers.unwatch(owner, [module])
        if hasattr(module, SLOT) and getattr(module, ROLE, None) == "decoder":
            served.append(module)
    classes: set[Any] = {type(module) for module in modules.values()}
    keys_read_elsewhere = any(sources.reads_caches(cls) for cls in classes)
    for owner, served in held.values():
        cache_layers.watch(owner, served, ordinary=keys_read_elsewhere)
    for module in modules.values():
        cls: Any = type(module)
        if hasattr(module, BASE) and sources.wants_tensor(cls):
            module.register_forward_pre_hook(cache_layers.make_tensor, with_kwargs=True)


def _watch(model: PreTrainedModel) -> None:
    """See how the models that hold slots are called: one of them or another makes the masks."""
    parts = {part for part in model.modules() if isinstance(part, PreTrainedModel)}
    for part in parts.union(live.around(model)):
        packing.unwatch(part)
        sequence_parallel.unguard(part)
        if any(hasattr(module, SLOT) for module in part.modules()):
            sequence_parallel.guard(part)
            packing.watch(part)


def _base_of(model: PreTrainedModel, path: str, module: nn.Module) -> str:
    """The implementation that serves the module where no rule matches: the one asked for beside the flag, or sdpa."""
    holder = discovery.owner(model, path)
    current = getattr(module, "config", holder.config)._attn_implementation
    if current is None:
        return "eager"  # what serves a part whose config no model has taken as its own (fun_asr_nano's adaptor)
    return holder.get_correct_attn_implementation(None) if current == IMPLEMENTATION else current


def _reset(model: PreTrainedModel) -> None:
    """Undo what config.json's attn_implementation did to configs whose modules have no slot."""
    for path, module in discovery.attention_modules(model):
        if getattr(module, BASE, None) is None:
            for config in configs.configs_of(model, path, module):
                if config._attn_implementation == IMPLEMENTATION:
                    configs.set_implementation(config, _base_of(model, path, module))
    if model.config._attn_implementation == IMPLEMENTATION and model.config.attn_plugin is None:
        configs.set_implementation(model.config, model.get_correct_attn_implementation(None))
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
