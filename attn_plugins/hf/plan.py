"""What a swap is to do to a model: rules are checked against its modules, and attentions built; nothing changes yet."""

import dataclasses
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.assignment import Share, Target, assign, by_own_paths, rules_that_serve, served_by, settled
from attn_plugins.core.rules import Rule, parse_rules, parse_saved_rules
from attn_plugins.hf import adapters
from attn_plugins.hf.checkpoints import configs
from attn_plugins.hf.discovery import inline
from attn_plugins.hf.discovery import modules as discovery
from attn_plugins.hf.names import BASE, IMPLEMENTATION, SLOT, slot_of
from attn_plugins.hf.slots import build


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What :func:`attach` is to do to a model, all of it checked and built."""

    model: PreTrainedModel
    rules: list[Rule]
    targets: list[Target]
    assigned: dict[str, list[Share]]
    slots: dict[str, nn.Module]
    modules: dict[str, nn.Module]
    bases: dict[str, str]


def make_plan(model: PreTrainedModel, rules: list[Rule], absent: dict[int, str] | None = None) -> Plan:
    """Check rules against a model and build their attentions; nothing changes.

    Args:
        absent: where given, the rules are those of a model of another class: see ``missing`` of rules.assign.

    Raises:
        ValueError: the rules do not fit.
    """
    targets = discovery.targets(model)
    if not targets:
        known = "".join(f"; {name}: {why}" for name, why in inline.reasons(model).items())
        raise ValueError(
            f"{type(model).__name__} has no attention that can be swapped: none of its modules dispatches through "
            "transformers' attention interface (ALL_ATTENTION_FUNCTIONS), and none is of a family with an adapter "
            f"({', '.join(adapters.families())}){known}"
        )
    if absent is not None and model.base_model is model and model.base_model_prefix:
        whole = model.base_model_prefix
        targets = [dataclasses.replace(target, path_in_whole=f"{whole}.{target.path}") for target in targets]
    assigned = settled(assign(rules, targets, missing=absent), targets)
    rules = rules_that_serve(assigned)
    if absent is not None:  # what is written into the config is for this class
        rules = [own for rule in rules for own in by_own_paths(rule, served_by(rule, assigned))]
    modules = {target.path: model.get_submodule(target.path) for target in targets}
    slots = {
        target.path: build(assigned[target.path], modules[target.path], model, target)
        for target in targets
        if target.path in assigned
    }
    bases = {path: getattr(module, BASE, None) or base_of(model, path, module) for path, module in modules.items()}
    discovery.warn_of_lost_dropout(assigned, modules)
    return Plan(model=model, rules=rules, targets=targets, assigned=assigned, slots=slots, modules=modules, bases=bases)


def refuse_loss(plan: Plan) -> None:
    """Refuse to take away what parts have brought that were loaded or swapped before the model around them was built.

    Raises:
        ValueError: names the part and its attention.
    """
    for part, _ in configs.written(plan.model):
        if part is plan.model:
            continue
        inside = {id(module) for module in part.modules()}
        for path, module in plan.modules.items():
            present = slot_of(module)
            if id(module) in inside and present is not None and plan.slots.get(path) is not getattr(module, SLOT):
                raise ValueError(
                    f"the attn_plugin of {type(plan.model).__name__} would replace {present.name!r} at {path}, which "
                    f"its part {type(part).__name__} came with; give rules that say the same, or build that part with "
                    "attn_plugin=None"
                )


def make_saved_plans(model: PreTrainedModel, missing: list[str]) -> list[Plan]:
    """What to attach by the rules of a model's config, nothing where all are for parts that it does not have.

    Rules that another class of model has saved were right there, and what is not here is left out; ``missing`` gets a
    line on each of these.
    """
    config = model.config
    if not configs.from_file(config):
        return [make_plan(model, parse_rules(config.attn_plugin))]
    rules = parse_saved_rules(config.attn_plugin)
    if type(model).__name__ in (config.architectures or ()):
        return [make_plan(model, rules)]
    absent: dict[int, str] = {}
    plan = make_plan(model, rules, absent)
    missing.extend(f"{type(model).__name__} leaves out a rule of the saved model: {why}" for why in absent.values())
    return [plan] if plan.assigned else []


def base_of(model: PreTrainedModel, path: str, module: nn.Module) -> str:
    """The implementation that serves the module where no rule matches: the one asked for beside the flag, or sdpa."""
    holder = discovery.owner(model, path)
    current = getattr(module, "config", holder.config)._attn_implementation
    if current is None:
        return "eager"  # what serves a part whose config no model has taken as its own (fun_asr_nano's adaptor)
    return holder.get_correct_attn_implementation(None) if current == IMPLEMENTATION else current
