"""Adapters of PEFT: they carry the rules that they were trained under, and a base model is swapped by these first.

adapter_config.json holds the rules under ``attn_plugin``. PEFT without this package would leave them out and run the
adapter with another attention, so its ``task_type`` says what is missing: PEFT refuses types that it does not know.

What is called ``original`` below is PEFT's own function, see hf/patches.py.
"""

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import assign
from attn_plugins.core.attention import Attention
from attn_plugins.core.rules import ROLES, Rule, parse_rules, parse_saved_rules
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import SLOT, slot_of
from attn_plugins.hf.split import attentions_in, parts_of
from attn_plugins.hf.swap import restore_attention, swap_attention

FIELD = "attn_plugin"
"""Where adapter_config.json, and a PeftConfig that was read from one or written to one, hold the rules."""

MISSING = " under attn_plugins (pip install attn-plugins, then import attn_plugins before this)"
"""What follows the type of the task in adapter_config.json."""


def rules_in(model: nn.Module) -> list[dict[str, Any]] | None:
    """The rules that a model is swapped by, as JSON holds them, or None where it has its own attention.

    None at all, ``[]``, where it has that because it was asked for: of a checkpoint that was saved swapped.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    if declined(model):
        return []
    if model.config.attn_plugin is not None:
        return [rule.to_dict() for rule in parse_rules(model.config.attn_plugin)]
    found: dict[Any, list[str]] = {}  # parts of it carry the flag: each slot's path says which
    for path, module in discovery.attention_modules(model):
        for part in parts_of(slot_of(module)):
            if part.attention is not None:
                found.setdefault(part.rule, []).append(discovery.place_of(path))
    return [
        Rule(
            type=name,
            config=config,
            backend=backend,
            roles=ROLES,
            modules=tuple(paths),
            kv_heads=None if kv_heads is None else list(kv_heads),
        ).to_dict()
        for (kv_heads, name, config, backend), paths in found.items()
    ] or None


def note_rules(model: nn.Module, configs: dict[str, Any]) -> None:
    """Before adapters are saved: their configs hold the rules of the model as it is."""
    rules = rules_in(model)
    for config in configs.values():
        if rules is not None or FIELD in vars(config):
            setattr(config, FIELD, rules)


def save_config(original: Any, self: Any, save_directory: Any, **kwargs: Any) -> None:
    """PeftConfig.save_pretrained: the rules go into the file too."""
    original(self, save_directory, **kwargs)
    if (rules := vars(self).get(FIELD)) is not None:
        path = Path(save_directory) / "adapter_config.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        tree[FIELD] = rules
        if rules:
            tree["task_type"] = (tree.get("task_type") or "") + MISSING
        path.write_text(json.dumps(tree, indent=2, sort_keys=True), encoding="utf-8")


def read_config(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """PeftConfig.from_pretrained: says also of an adapter that has no rules that it was read."""
    config = original(cls, *args, **kwargs)
    vars(config).setdefault(FIELD, None)
    return config


def make_config(original: Any, cls: Any, **kwargs: Any) -> Any:
    """PeftConfig.from_peft_type: the rules go into the object, beside its fields, which are PEFT's."""
    if FIELD not in kwargs:
        return original(cls, **kwargs)
    rules, task = kwargs.pop(FIELD), kwargs.get("task_type") or ""
    config = original(cls, **{**kwargs, "task_type": task.removesuffix(MISSING) or None})
    setattr(config, FIELD, rules)
    return config


def make_model(original: Any, self: Any, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """PeftModel.__init__: what was read for a swapped model swaps the base, before PEFT does anything."""
    swapped = prepare(model, peft_config, getattr(model, "peft_config", None))
    try:
        original(self, model, peft_config, *args, **kwargs)
    except Exception:
        if swapped:
            restore_attention(model)
        raise


def add_adapter(original: Any, self: Any, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
    """PeftModel.add_adapter: adapters that nothing is injected for, such as prompts, come by here alone."""
    model = self.base_model if isinstance(self.base_model, PreTrainedModel) else self.base_model.model
    prepare(model, peft_config, self.peft_config)
    original(self, adapter_name, peft_config, *args, **kwargs)
    warn_of_frozen(model, peft_config)


def inject_adapter(original: Any, self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """BaseTuner.inject_adapter: adapters of PeftModel, and those that transformers loads into a model itself."""
    prepare(model, self.peft_config[adapter_name], self.peft_config)
    original(self, model, adapter_name, *args, **kwargs)
    warn_of_frozen(model, self.peft_config[adapter_name])


def hotswap_adapter(original: Any, model: Any, state_dict: Any, adapter_name: str, config: Any, **options: Any) -> None:
    """hotswap_adapter_from_state_dict: an adapter's weights go into the place of another's, whose config stays."""
    inner = getattr(model, "_orig_mod", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    prepare(base, config, inner.peft_config)
    original(model, state_dict, adapter_name, config, **options)


def prepare(model: nn.Module, config: Any, adapters: dict[str, Any] | None) -> bool:
    """Give a base model the attention that an adapter was trained under, unless it has it.

    Args:
        adapters: what the model has already, which may include this one.

    Returns:
        whether it was swapped.

    Raises:
        ValueError: the model, or an adapter that it has, is swapped otherwise; or weights of slots are to be trained,
            and there are no slots.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    held = _held(model)
    if SLOT in (getattr(config, "modules_to_save", None) or ()) and not held and not vars(config).get(FIELD):
        raise ValueError(
            f"modules_to_save names {SLOT!r}, and {type(model).__name__} has its own attention; swap it first, with "
            "from_pretrained(..., attn_plugin=...) or attn_plugins.swap_attention(model, ...)"
        )
    if FIELD not in vars(config):
        return False  # a new adapter, of the model as it is
    rules = getattr(config, FIELD)
    others = {name: other for name, other in (adapters or {}).items() if other is not config}
    if not rules:
        if held and rules is not None:
            raise ValueError(
                "this adapter was trained with the model's own attention, and the model has "
                f"attn_plugin={rules_in(model)}; load the base model with attn_plugin=None"
            )
        for name, other in others.items():
            if vars(other).get(FIELD):
                raise ValueError(
                    "this adapter was trained with the model's own attention, and the model has adapter "
                    f"{name!r} with attn_plugin={getattr(other, FIELD)}; load them onto separate models"
                )
        return False
    if declined(model):
        return False  # load_state_dict tells what is left out
    saved, targets = parse_saved_rules(rules), discovery.targets(model)
    told = {target.path: (target.prefix_tokens, target.own_options) for target in targets}
    assigned = assign(saved, targets)
    if held == {
        path: [(share.kv_heads, share.rule.type, share.rule.config.settled(*told[path])) for share in shares]
        for path, shares in assigned.items()
    }:
        return False
    if held:
        raise ValueError(
            f"this adapter was trained with attn_plugin={rules}, and the model has attn_plugin={rules_in(model)}; "
            "load the base model with the adapter's rules, or without any"
        )
    if others:
        raise ValueError(
            f"this adapter was trained with attn_plugin={rules}, and the model has its own attention and adapters "
            f"{sorted(others)}; load them onto separate models, or swap the model first"
        )
    swap_attention(model, [rule.to_dict() for rule in saved])
    return True


def declined(model: PreTrainedModel) -> bool:
    """Whether attn_plugin=None was said of a model."""
    return "attn_plugin" in vars(model.config) and model.config.attn_plugin is None


def _held(model: PreTrainedModel) -> dict[str, Any]:
    """What sits in the slots: path -> (key/value heads, name, config) of each part."""
    slots = ((path, slot_of(module)) for path, module in discovery.attention_modules(model))
    return {
        path: [part.rule[:3] for part in parts_of(slot) if part.attention is not None]
        for path, slot in slots
        if slot is not None
    }


def warn_of_frozen(model: nn.Module, config: Any) -> None:
    """Say that a new adapter trains beside weights of attentions that it leaves as they are."""
    if FIELD in vars(config) or getattr(config, "inference_mode", False):
        return
    slots = [getattr(module, SLOT) for module in model.modules() if isinstance(getattr(module, SLOT, None), nn.Module)]
    frozen = [slot for slot in slots if _trainable(slot) == 0 and any(True for _ in slot.parameters())]
    if frozen:
        names = sorted({inner.name for slot in frozen for inner in attentions_in(slot)})
        warnings.warn(
            f"this adapter leaves the weights of {len(frozen)} attentions ({', '.join(names)}) frozen; to train and "
            f"save them, pass modules_to_save=[{SLOT!r}] to {type(config).__name__}",
            stacklevel=2,
        )


def _trainable(slot: nn.Module) -> int:
    return sum(parameter.requires_grad for parameter in slot.parameters())


def save_state(
    original: Any, model: Any, state_dict: Any = None, *args: Any, **options: Any
) -> dict[str, torch.Tensor]:
    """get_peft_model_state_dict: with what slots hold that no adapter trains, since the base model has none of it."""
    whole = model.state_dict() if state_dict is None else state_dict
    with _without_checkpoints(model):
        made = original(model, whole, *args, **options)
    return made | {name: value for name, value in whole.items() if _kept(name, model.peft_config)}


def load_state(original: Any, model: Any, state: Any, adapter_name: str = "default", **options: Any) -> Any:
    """set_peft_model_state_dict: several adapters share what no adapter trains, and none may change it for others."""
    kept = {name: value for name, value in state.items() if _kept(name, model.peft_config)}
    if kept and len(model.peft_config) > 1:
        held = model.state_dict()
        for name, value in kept.items():
            if name in held and not torch.equal(held[name].cpu(), value.to(held[name].dtype).cpu()):
                raise ValueError(
                    f"adapter {adapter_name!r} was trained beside another {name} than the one in the model, which "
                    f"serves all of its adapters; load it onto a model of its own"
                )
    with _without_checkpoints(model):
        return original(model, state, adapter_name, **options)


@contextlib.contextmanager
def _without_checkpoints(model: nn.Module) -> Iterator[None]:
    """While it lasts, nothing stands around layers whose activations FSDP computes again.

    PEFT takes paths of modules for keys of their state dict, and in those it has no place.
    """
    inside = "_checkpoint_wrapped_module"
    children = ((module, name, child) for module in model.modules() for name, child in module.named_children())
    held = [found for found in children if inside in found[2]._modules]
    for module, name, around in held:
        module._modules[name] = around._modules[inside]
    try:
        yield
    finally:
        for module, name, around in held:
            module._modules[name] = around


def _kept(name: str, adapters: Any) -> bool:
    """Whether a name is that of a slot's weight or buffer that no adapter trains."""
    parts = name.split(".")
    return SLOT in parts and not {"original_module", "modules_to_save", *adapters} & set(parts)


def replace_module(original: Any, self: Any, parent: nn.Module, name: str, new: nn.Module, child: nn.Module) -> None:
    """BaseTuner._replace_module: a slot that PEFT had around it goes back; it has no ``weight`` to be handed on."""
    if isinstance(new, Attention):
        setattr(parent, name, new)
    else:
        original(self, parent, name, new, child)
