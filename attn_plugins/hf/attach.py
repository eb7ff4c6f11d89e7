"""Put attentions into the slots of a model's modules, with the hooks that they need, and take them out."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attn_plugins.hf import adapters, arguments, call, grids, recording
from attn_plugins.hf.caches import cache_layers, prefixes
from attn_plugins.hf.checkpoints import configs, live
from attn_plugins.hf.discovery import by_code, inline
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.masks import native_masks, packing
from attn_plugins.hf.names import BASE, IMPLEMENTATION, ROLE, SLOT, slot_of
from attn_plugins.hf.parallel import sequence_parallel
from attn_plugins.hf.plan import Plan, base_of


def attach(plan: Plan) -> None:
    """Do what was planned; from here on nothing can fail.

    A config that serves at least one slot dispatches to us, with all of its modules.
    """
    model, modules = plan.model, plan.modules
    for path, module in inline.modules(model):
        if not hasattr(module, BASE):
            setattr(module, BASE, base_of(model, path, module))
        native_masks.watch(module)
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
    _watch_caches(model, modules)
    watch_calls(model)
    configs.write_rules(model, plan.rules, plan.assigned, modules)
    for outer in live.around(model):
        configs.mark(outer)


def restore(model: PreTrainedModel) -> None:
    grids.unwatch(model)
    recording.unwatch(model)
    for _, module in inline.modules(model):
        native_masks.unwatch(module)
        vars(module).pop(BASE, None)
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
    watch_calls(model)
    configs.erase(model.config)
    configs.forget(model)
    for outer in live.around(model):
        configs.mark(outer)


def _watch_caches(model: PreTrainedModel, modules: dict[str, nn.Module]) -> None:
    """Where modules are causal and have a slot, caches hold what their attentions need."""
    held: dict[int, tuple[nn.Module, list[nn.Module]]] = {}
    for path, module in modules.items():
        owner, served = held.setdefault(id(o := discovery.owner(model, path)), (o, []))
        cache_layers.unwatch(owner, [module])
        if hasattr(module, SLOT) and getattr(module, ROLE, None) == "decoder":
            served.append(module)
    classes: set[Any] = {type(module) for module in modules.values()}
    keys_read_elsewhere = any(by_code.reads_caches(cls) for cls in classes)
    for owner, served in held.values():
        cache_layers.watch(owner, served, ordinary=keys_read_elsewhere)
    for module in modules.values():
        cls: Any = type(module)
        if hasattr(module, BASE) and by_code.wants_tensor(cls):
            module.register_forward_pre_hook(cache_layers.make_tensor, with_kwargs=True)


def watch_calls(model: PreTrainedModel) -> None:
    """See how the models that hold slots are called: one of them or another makes the masks."""
    parts = {part for part in model.modules() if isinstance(part, PreTrainedModel)}
    for part in parts.union(live.around(model)):
        packing.unwatch(part)
        sequence_parallel.unguard(part)
        if any(hasattr(module, SLOT) for module in part.modules()):
            sequence_parallel.guard(part)
            packing.watch(part)


def reset(model: PreTrainedModel) -> None:
    """Undo what config.json's attn_implementation did to configs whose modules have no slot."""
    for path, module in discovery.attention_modules(model):
        if getattr(module, BASE, None) is None:
            for config in configs.configs_of(model, path, module):
                if config._attn_implementation == IMPLEMENTATION:
                    configs.set_implementation(config, base_of(model, path, module))
    if model.config._attn_implementation == IMPLEMENTATION and model.config.attn_plugin is None:
        configs.set_implementation(model.config, model.get_correct_attn_implementation(None))
    vars(model.config).pop("attn_implementation", None)
