"""What the configs of a model say of its attention: whose they are, what is written there, and that it is what runs."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from attn_plugins.core.assignment import Share, for_paths, named_heads, rules_that_serve, served_by
from attn_plugins.core.rules import Rule
from attn_plugins.hf.checkpoints import live
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.names import IMPLEMENTATION, slot_of

WRITTEN = "_attn_plugin_written"
"""Attribute of a swapped model: each config of its attention, the flag written there, and what it dispatches to."""


def configs_of(model: PreTrainedModel, path: str, module: nn.Module) -> list[Any]:
    """The configs that decide the module's attention function and its mask: its own, and its owner's."""
    own, holding = getattr(module, "config", None), discovery.owner(model, path).config
    return [holding] if own is None or own is holding else [own, holding]


def set_implementation(config: Any, implementation: str) -> None:
    config._attn_implementation_internal = implementation  # the public setter would also change every part's config


def from_file(config: Any) -> bool:
    """Whether a config's rules are those that a swapped model wrote, rather than what a user has asked for."""
    return vars(config).get("attn_implementation") == IMPLEMENTATION


def mark_saved(config: PreTrainedConfig, saved: dict[str, Any]) -> None:
    """Tell :func:`from_file` of the rules that a file's dictionary holds beside the name of our implementation."""
    for key, value in saved.items():
        if isinstance(part := vars(config).get(key), PreTrainedConfig) and isinstance(value, dict):
            mark_saved(part, value)
    if saved.get("attn_implementation") == IMPLEMENTATION and vars(config).get("attn_plugin") is not None:
        vars(config)["attn_implementation"] = IMPLEMENTATION


def is_flagged(config: PreTrainedConfig) -> bool:
    """Whether a config, or a config of a part in it, says something of the flag."""
    return any("attn_plugin" in vars(held) for held in (config, *live.configs_in(config)))


def write(config: Any, rules: list[dict[str, Any]]) -> None:
    """Put rules where save_pretrained finds them; the name beside them is what other processes refuse to load."""
    vars(config).update(attn_plugin=rules, attn_implementation=IMPLEMENTATION)


def write_rules(
    model: PreTrainedModel, rules: list[Rule], assigned: dict[str, list[Share]], modules: dict[str, nn.Module]
) -> None:
    """Write the rules of a model into its config, and those that hold in a part into the config of the part.

    A part may be saved alone. There the rules that go by paths name those of its modules within the part.
    """
    held = {id(config): config for path, module in modules.items() for config in configs_of(model, path, module)}
    parts: dict[int, list[Rule]] = {}
    for rule in rules_that_serve(assigned):
        within: dict[int, dict[str, tuple[int, ...] | None]] = {}
        for path, kv_heads in served_by(rule, assigned).items():
            owner = discovery.owner(model, path)
            name = next(name for name, module in owner.named_modules() if module is modules[path])
            for config in configs_of(model, path, modules[path]):
                within.setdefault(id(config), {})[name] = kv_heads
        for key, served in within.items():
            by_path = rule.modules is not None or isinstance(getattr(rule, named_heads(rule) or "", None), dict)
            parts.setdefault(key, []).extend(for_paths(rule, served) if by_path else [rule])
    for key, config in held.items():
        if config is not model.config:
            erase(config)
            if key in parts:
                write(config, [rule.to_dict() for rule in parts[key]])
    write(model.config, [rule.to_dict() for rule in rules])
    record(model, held.values())


def erase(config: Any) -> None:
    """Undo :func:`write`."""
    for attribute in ("attn_plugin", "attn_implementation"):
        vars(config).pop(attribute, None)


def own(model: PreTrainedModel, *wrappers: nn.Module) -> None:
    """Give a model configs that no other model has, and that nobody holds who will build another one from them.

    Each config of its modules is copied, and every module that held it gets the copy. Which of them are one and the
    same, and which are parts of which, stays as it was, also for the models and wrappers around this one.
    """
    modules = {module for root in (model, *wrappers, *live.around(model)) for module in root.modules()}
    held = [(module, name, value) for module in modules for name, value in vars(module).items()]
    held = [(module, name, value) for module, name, value in held if isinstance(value, PreTrainedConfig)]
    copies: dict[int, Any] = {}
    for module, name, value in held:
        vars(module)[name] = copy.deepcopy(value, copies)


def shared(model: PreTrainedModel, *wrappers: nn.Module) -> bool:
    """Whether another model that is alive has a config of this one."""
    return live.shares((model, *wrappers, *live.around(model)))


def refuse_part(model: PreTrainedModel) -> None:
    """Refuse to change a part of a model whose own rules hold for it: saved, they would bring back what they say.

    Raises:
        ValueError: names the model around.
    """
    for other in live.around(model):
        held = other is not model and WRITTEN in vars(other) and other.config is not model.config
        if held and model in set(other.modules()):
            raise ValueError(
                f"this {type(model).__name__} is a part of a {type(other).__name__} whose config.attn_plugin holds for "
                f"it; change the attention of the {type(other).__name__}, whose rules may name the part by roles or "
                "modules"
            )


def record(model: PreTrainedModel, configs: Iterable[Any]) -> None:
    """Note what was written into the configs of a model, the model's own first, so that :func:`check` can compare."""
    forget(model)
    for other in live.around(model):
        if other.config is model.config:
            _forget(other)
    unique = {id(config): config for config in (model.config, *configs)}
    setattr(model, WRITTEN, [(c, copy.deepcopy(c.attn_plugin), c._attn_implementation) for c in unique.values()])
    model.register_forward_pre_hook(before_forward)


def forget(model: PreTrainedModel) -> None:
    """Undo :func:`record` for a model and the models inside it."""
    for part in model.modules():
        _forget(part)


def _forget(part: nn.Module) -> None:
    if vars(part).pop(WRITTEN, None) is not None:
        remove_hooks(part, before_forward)


def mark(model: PreTrainedModel) -> None:
    """Name our implementation in the config of a model without rules that has a part with rules, and nowhere else.

    Other processes look for the name in the outermost config alone.
    """
    if model.config.attn_plugin is None:
        if any(WRITTEN in vars(part) for part in model.modules()):
            vars(model.config)["attn_implementation"] = IMPLEMENTATION
        else:
            vars(model.config).pop("attn_implementation", None)


def written(model: nn.Module) -> Iterator[tuple[PreTrainedModel, list[tuple[Any, Any, Any]]]]:
    """The swapped models among a model and those inside it, with what was written into their configs."""
    for part in model.modules():
        if WRITTEN in vars(part):
            assert isinstance(part, PreTrainedModel)
            yield part, getattr(part, WRITTEN)


def check(model: nn.Module) -> None:
    """Hold what the configs of a model say of its attention against what its modules have.

    Raises:
        ValueError: a config was edited without the modules being told.
    """
    for part, entries in written(model):
        _compare(part, entries)


def _compare(part: PreTrainedModel, entries: list[tuple[Any, Any, Any]]) -> None:
    name = type(part).__name__
    for config, rules, implementation in entries:
        if config.attn_plugin != rules or part.config is not entries[0][0]:
            now = part.config.attn_plugin if part.config is not entries[0][0] else config.attn_plugin
            raise ValueError(
                f"the config of this {name} has attn_plugin={now!r}, but its modules were given {rules!r}; assign "
                "the whole flag (model.config.attn_plugin = ...), which swaps them, rather than edit it in place "
                "or exchange the config"
            )
        if rules is not None and not from_file(config):
            raise ValueError(
                f"attn_implementation of the config of this {name} is no longer {IMPLEMENTATION!r}, by which "
                "other processes know that they need attn_plugins; leave it, or call restore_attention(model)"
            )
        if implementation == IMPLEMENTATION != config._attn_implementation:
            raise ValueError(
                f"the config of this {name} says {config._attn_implementation!r}, which bypasses its attn_plugin; "
                "call attn_plugins.restore_attention(model) first, or leave _attn_implementation as it was"
            )


def check_flags(model: PreTrainedModel) -> None:
    """As :func:`check`, and that no config carries a flag of which the modules know nothing.

    Raises:
        ValueError: names the model whose config does.
    """
    check(model)
    known = {id(config) for _, entries in written(model) for config, _, _ in entries}
    for part in model.modules():
        flag = part.config.attn_plugin if isinstance(part, PreTrainedModel) else None
        if flag is None or id(part.config) in known or any(slot_of(module) for module in part.modules()):
            continue
        raise ValueError(
            f"the config of this {type(part).__name__} has attn_plugin={flag!r}, of which its modules know nothing; "
            "call attn_plugins.swap_attention(model, rules)"
        )


def before_forward(model: Any, args: tuple[Any, ...]) -> None:
    """Runs before each forward of a swapped model, but where it is compiled: a graph is made once."""
    if not torch.compiler.is_compiling():
        _compare(model, getattr(model, WRITTEN))  # parts that were swapped alone have this hook too
