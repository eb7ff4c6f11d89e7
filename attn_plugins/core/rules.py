"""The flag ``config.attn_plugin``: which attention serves which module. All validation of the flag is here.

The flag is a name, a rule or a list of rules; the first rule that matches a module wins. A rule is a dict with ``type``
(a registered name), the options of that attention's ``Config``, and the keys that choose modules: see :class:`Rule`.
Nothing here knows transformers: modules arrive as :class:`Target`.
"""

import builtins
import dataclasses
import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.backend import FORMS, get_backend, list_backends
from attn_plugins.core.options import did_you_mean, shown
from attn_plugins.core.registry import get_attention, list_attentions

Flag: TypeAlias = "str | Mapping[str, Any] | Sequence[Mapping[str, Any]]"

ROLES = ("encoder", "decoder", "cross")
RULE_KEYS = ("type", "layers", "roles", "modules", "backend")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One attention module of a model, as far as rules need to know it."""

    path: str
    """Dotted path in the model, such as ``model.layers.0.self_attn``."""
    role: str
    """encoder, decoder or cross."""
    stack: str
    """What it is numbered within, such as ``model.layers``."""
    layer: int
    """Its number in its stack, from 0."""
    path_in_whole: str | None = None
    """Its path in a model that has this one for its base, for rules that were written by one."""
    main: bool = True
    """Whether it belongs to the part that rules without ``roles`` and ``modules`` are for (the text model)."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Capability -> why the module needs it."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One validated rule of the flag."""

    type: str
    """Registered name of the attention."""
    config: AttentionConfig
    """Its options, complete."""
    layers: Any = "all"
    """"all", 3, -1, "0-15", "every:4", "every:4+3", or a list of these: numbers within a stack."""
    roles: tuple[str, ...] | None = None
    """Any of encoder, decoder, cross; None is all self-attention."""
    modules: tuple[str, ...] | None = None
    """Globs on module paths, matched against the whole path or any tail of it that begins at a dot."""
    backend: str = "auto"
    """auto (what is fastest here), reference (the dense form), torch (the form for CPUs), batched (the form for other
    devices), or one of :func:`attn_plugins.core.backend.list_backends`."""

    @property
    def attention(self) -> "builtins.type[Attention]":
        return get_attention(self.type)

    def to_dict(self) -> dict[str, Any]:
        """The rule as JSON holds it, with every option spelled out, so that later defaults change nothing."""
        options = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self.config).items()}
        chosen: dict[str, Any] = {}
        if self.layers != "all":
            chosen["layers"] = self.layers
        if self.roles is not None:
            chosen["roles"] = list(self.roles)
        if self.modules is not None:
            chosen["modules"] = list(self.modules)
        if self.backend != "auto":
            chosen["backend"] = self.backend
        return {"type": self.type, **options, **chosen}


def parse_rules(flag: Flag, **options: Any) -> list[Rule]:
    """Validate all of a flag that can be validated without a model.

    Args:
        flag: a name, a rule, or a list of rules.
        options: more keys of the one rule, where ``flag`` is a name.

    Raises:
        ValueError: says which rule, what was got and what is allowed.
    """
    if isinstance(flag, str):
        entries: list[Any] = [{"type": flag, **options}]
    elif options:
        raise ValueError(f"options {sorted(options)} go with a name, not with a {type(flag).__name__} of rules")
    else:
        entries = [flag] if isinstance(flag, Mapping) else list(flag) if isinstance(flag, Sequence) else [flag]
    if not entries:
        raise ValueError("the list of rules is empty; allowed: a name, a rule, or a list of at least one rule")
    return [
        _parse_rule(entry, f"rule {number}" if len(entries) > 1 else "rule") for number, entry in enumerate(entries)
    ]


class NothingMatchesError(ValueError):
    """A rule of which a model has no module, or none that earlier rules have not taken."""


def assign(
    rules: Sequence[Rule], targets: Sequence[Target], *, missing: "dict[int, str] | None" = None
) -> dict[str, Rule]:
    """Choose a rule for each module: path -> rule, without the paths that no rule matches.

    Args:
        missing: where given, rules that match nothing are passed over, and why is noted here by their number. Rules of
            a saved model may name parts that another class does not have; what a user says is an error instead.

    Raises:
        ValueError: a layer is out of range, a rule matches nothing, or an attention cannot honour what a module
            needs, or a backend is not installed.
    """
    depth: dict[str, int] = {}
    for target in targets:
        depth[target.stack] = max(depth.get(target.stack, 0), target.layer + 1)
    assigned: dict[str, Rule] = {}
    for number, rule in enumerate(rules):
        name = f"rule {number} ({rule.type!r})"
        lacking = None if rule.backend in FORMS else get_backend(rule.backend).missing()
        if lacking is not None:
            raise ValueError(f"{name}: backend={rule.backend!r} cannot run here: {lacking}; allowed: 'auto'")
        try:
            fresh = _serves(rule, targets, depth, assigned, name)
        except NothingMatchesError as error:
            if missing is None:
                raise
            missing[number] = str(error)
            continue
        for target in fresh:
            _check_needs(rule, target, name)
            assigned[target.path] = rule
    return assigned


def by_own_paths(rule: Rule, paths: Sequence[str]) -> Rule:
    """A rule that serves the modules at ``paths``, with these for its globs, unless it names all of them as it is."""
    if rule.modules is None or all(any(_glob(path, one) for one in rule.modules) for path in paths):
        return rule
    return dataclasses.replace(rule, modules=tuple(paths), layers="all")


def _serves(
    rule: Rule, targets: Sequence[Target], depth: Mapping[str, int], assigned: Mapping[str, Rule], name: str
) -> list[Target]:
    eligible = [target for target in targets if _eligible(rule, target)]
    if not eligible:
        raise NothingMatchesError(f"{name} matches nothing{_why_nothing(rule, targets)}")
    chosen = _choose_layers(rule, eligible, depth, name)
    fresh = [target for target in chosen if target.path not in assigned]
    if not fresh:
        taken = chosen[0].path
        raise NothingMatchesError(f"{name} matches nothing: earlier rules take all of its modules ({taken}, ...)")
    return fresh


def _parse_rule(entry: Any, name: str) -> Rule:
    if isinstance(entry, str):
        entry = {"type": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{name} is {shown(entry)} of type {type(entry).__name__}; allowed: a name or a mapping with 'type'"
        )
    if "type" not in entry:
        raise ValueError(
            f"{name} has no 'type', only {shown(list(entry))}; it names the attention, such as type='local'"
        )
    attention = get_attention(entry["type"])
    known = [f.name for f in dataclasses.fields(attention.Config)]
    options = {key: value for key, value in entry.items() if key not in RULE_KEYS}
    for key in options:
        if key not in known:
            allowed = [*known, *RULE_KEYS[1:]]
            raise ValueError(
                f"{name} ({attention.name!r}) has unknown option {shown(key)}{did_you_mean(key, allowed)}; "
                f"options: {', '.join(known) or 'none'}; rule keys: {', '.join(RULE_KEYS)}"
            )
    try:
        config = attention.Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
    except ValueError as error:
        raise ValueError(f"{name} ({attention.name!r}): {error}") from None
    return Rule(
        type=attention.name,
        config=config,
        layers=_check_layers(entry.get("layers", "all"), name),
        roles=_names(entry.get("roles"), "roles", name, ROLES),
        modules=_names(entry.get("modules"), "modules", name, None),
        backend=_one_of(entry.get("backend", "auto"), "backend", name, (*FORMS, *list_backends())),
    )


def _one_of(value: Any, key: str, name: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}: {key}={shown(value)}{did_you_mean(value, allowed)}; allowed: {', '.join(allowed)}")
    return value


def _names(value: Any, key: str, name: str, allowed: Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    values = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not values or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{name}: {key}={shown(value)}; allowed: a name or a list of names")
    if allowed is not None:
        for item in values:
            _one_of(item, key, name, allowed)
    return values


_SPAN = r"(-?\d{1,9})(?:-(-?\d{1,9}))?"
_LAYER_FORMS = '"all", 3, -1, "0-15", "every:4", "every:4+3", or a list of these'


def _check_layers(layers: Any, name: str) -> Any:
    items = list(layers) if isinstance(layers, (list, tuple, range)) else [layers]
    for item in items:
        valid = isinstance(item, int) and not isinstance(item, bool)
        if isinstance(item, str):
            valid = item == "all" or bool(re.fullmatch(rf"{_SPAN}|every:[1-9]\d{{0,8}}(\+\d{{1,9}})?", item))
        if not valid:
            raise ValueError(f"{name}: layers={shown(layers)}; allowed: {_LAYER_FORMS}")
    if not items:
        raise ValueError(f"{name}: layers={shown(layers)} names no layer; allowed: {_LAYER_FORMS}")
    return layers if isinstance(layers, (int, str)) else items


def _layer_numbers(item: int | str, depth: int) -> list[int] | None:
    """Numbers that ``item`` means in a stack of ``depth`` layers, or None if it leaves that range."""
    if item == "all":
        return list(range(depth))
    if isinstance(item, str) and item.startswith("every:"):
        step, _, offset = item.removeprefix("every:").partition("+")
        return list(range(int(offset or 0), depth, int(step))) or None
    if isinstance(item, int):
        bounds = [item]
    else:
        match = re.fullmatch(_SPAN, item)
        assert match is not None
        bounds = [int(bound) for bound in match.groups() if bound is not None]
    bounds = [n + depth if n < 0 else n for n in bounds]
    if not all(0 <= n < depth for n in bounds) or bounds[-1] < bounds[0]:
        return None
    return list(range(bounds[0], bounds[-1] + 1))


def _choose_layers(rule: Rule, eligible: Sequence[Target], depth: Mapping[str, int], name: str) -> list[Target]:
    stacks = sorted({target.stack for target in eligible})
    items = rule.layers if isinstance(rule.layers, list) else [rule.layers]
    numbers: dict[str, set[int]] = {stack: set() for stack in stacks}
    for item in items:
        found = {stack: _layer_numbers(item, depth[stack]) for stack in stacks}
        if all(chosen is None for chosen in found.values()):
            ranges = ", ".join(f"0 to {depth[stack] - 1} in {stack or 'the model'}" for stack in stacks)
            raise ValueError(f"{name}: layers={shown(item)} is out of range; there are layers {ranges}")
        for stack, chosen in found.items():
            numbers[stack].update(chosen or ())
    chosen_targets = [target for target in eligible if target.layer in numbers[target.stack]]
    if not chosen_targets:
        raise ValueError(f"{name} matches nothing: no module that it may serve is in layers={shown(rule.layers)}")
    return chosen_targets


def _eligible(rule: Rule, target: Target) -> bool:
    if rule.modules is not None and not _named(rule.modules, target):
        return False
    if rule.roles is not None:
        return target.role in rule.roles
    return target.role != "cross" and (target.main or rule.modules is not None)


def _named(patterns: Sequence[str], target: Target) -> bool:
    return any(_glob(path, one) for path in (target.path, target.path_in_whole) if path for one in patterns)


def _glob(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def _why_nothing(rule: Rule, targets: Sequence[Target]) -> str:
    reasons = []
    if rule.modules is not None:
        matched = [target for target in targets if _named(rule.modules, target)]
        if not matched:
            known = ", ".join(target.path for target in targets[:3])
            return f": no attention module's path matches modules={list(rule.modules)}; paths are {known}, ..."
        reasons.append(f"modules={list(rule.modules)} matches {matched[0].path} of role {matched[0].role!r}")
    roles = sorted({target.role for target in targets})
    wanted = "self-attention (the default, without roles)" if rule.roles is None else f"roles={list(rule.roles)}"
    return f": no module fits {' and '.join([wanted, *reasons])}; the model has roles {roles}"


def _check_needs(rule: Rule, target: Target, name: str) -> None:
    for capability, why in target.needs.items():
        if not getattr(rule.attention, capability):
            raise ValueError(
                f"{name} cannot serve {target.path}: {why}, and attention {rule.type!r} has no {capability!r}; "
                f"choose other modules with layers, roles or modules, or one of: {_able(target)}"
            )


def _able(target: Target) -> str:
    able = [n for n in list_attentions() if all(getattr(get_attention(n), need) for need in target.needs)]
    return ", ".join(able) or "none registered"
