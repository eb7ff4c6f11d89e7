"""Which rule of the flag serves which module, or which of its heads: the first one that matches wins.

Nothing here knows transformers: modules arrive as :class:`Target`.
"""

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attn_plugins.core.backend import FORMS, get_backend
from attn_plugins.core.number_forms import numbers_of
from attn_plugins.core.options import shown
from attn_plugins.core.registry import get_attention, list_attentions
from attn_plugins.core.rules import HEAD_KEYS, Rule


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
    layers: int | None = None
    """How many its stack has."""
    path_in_whole: str | None = None
    """Its path in a model that has this one for its base, for rules that were written by one."""
    main: bool = True
    """Whether it belongs to the part that rules without ``roles`` and ``modules`` are for (the text model)."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Capability -> why the module needs it."""
    prefix_tokens: int | None = None
    """As in HeadShape."""
    own_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of its own attention, for those of a rule that are None: its window, the size of its blocks."""
    num_heads: int | None = None
    """Query heads, where they are known."""
    num_key_value_heads: int | None = None
    """Key/value heads, where they are known; each serves as many query heads that follow one another."""


@dataclass(frozen=True)
class Share:
    """What a rule serves of a module."""

    rule: Rule
    number: int
    """Of the rule, among those of the flag."""
    kv_heads: tuple[int, ...] | None = None
    """Key/value heads, ascending, each with all query heads that share it; None is the whole module."""


class NothingMatchesError(ValueError):
    """A rule of which a model has no module, or none that earlier rules have not taken."""


def assign(
    rules: Sequence[Rule], targets: Sequence[Target], *, missing: "dict[int, str] | None" = None
) -> dict[str, list[Share]]:
    """Choose rules for each module: path -> shares, in the order of the rules, without the paths that no rule matches.

    A rule takes those of the heads that it names which no earlier one has taken.

    Args:
        missing: where given, rules that match nothing are passed over, and why is noted here by their number. Rules of
            a saved model may name parts that another class does not have; what a user says is an error instead.

    Raises:
        ValueError: a layer or head is out of range, a part of a group of heads is named, a rule matches nothing, an
            attention cannot honour what a module needs, or a backend is not installed.
    """
    depth: dict[str, int] = {}
    for target in targets:
        depth[target.stack] = max(depth.get(target.stack, 0), target.layer + 1)
    assigned: dict[str, list[Share]] = {}
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
        for target, kv_heads in fresh:
            _check_needs(rule, target, name)
            assigned.setdefault(target.path, []).append(Share(rule, number, kv_heads))
    return assigned


def settled(assigned: Mapping[str, Sequence[Share]], targets: Sequence[Target]) -> dict[str, list[Share]]:
    """The same with the options of each rule settled, unless they are others in other modules that it serves."""
    told = {target.path: (target.prefix_tokens, target.own_options) for target in targets}
    known: dict[int, Rule] = {}
    for rule in rules_that_serve(assigned):
        found = {rule.config.settled(*told[path]) for path in served_by(rule, assigned)}
        known[id(rule)] = dataclasses.replace(rule, config=found.pop()) if len(found) == 1 else rule
    return {
        path: [dataclasses.replace(share, rule=known[id(share.rule)]) for share in shares]
        for path, shares in assigned.items()
    }


def rules_that_serve(assigned: Mapping[str, Sequence[Share]]) -> list[Rule]:
    """The rules that serve something, in their order."""
    rules = {share.number: share.rule for shares in assigned.values() for share in shares}
    return [rules[number] for number in sorted(rules)]


def served_by(rule: Rule, assigned: Mapping[str, Sequence[Share]]) -> dict[str, tuple[int, ...] | None]:
    """Paths of the modules that a rule serves, with the key/value heads of its :class:`Share` there."""
    return {path: share.kv_heads for path, shares in assigned.items() for share in shares if share.rule is rule}


def for_paths(rule: Rule, served: Mapping[str, tuple[int, ...] | None]) -> list[Rule]:
    """Rules with paths for their globs that serve what ``rule`` does.

    Args:
        served: path -> the key/value heads of the rule's :class:`Share` there.
    """
    paths: dict[tuple[int, ...] | None, list[str]] = {}
    for path, kv_heads in served.items():
        paths.setdefault(None if named_heads(rule) is None else kv_heads, []).append(path)
    plain = dataclasses.replace(rule, layers="all", heads=None)
    return [
        dataclasses.replace(plain, modules=tuple(named), kv_heads=None if heads is None else list(heads))
        for heads, named in paths.items()
    ]


def by_own_paths(rule: Rule, served: Mapping[str, tuple[int, ...] | None]) -> list[Rule]:
    """As :func:`for_paths`, or the rule alone where its globs name all of these paths as they are, or it has none."""
    if rule.modules is None or all(any(_glob(path, one) for one in rule.modules) for path in served):
        return [rule]
    return for_paths(rule, served)


def named_heads(rule: Rule) -> str | None:
    """The key under which a rule names heads, None where it names none."""
    return next((key for key in HEAD_KEYS if getattr(rule, key) is not None), None)


def _serves(
    rule: Rule, targets: Sequence[Target], depth: Mapping[str, int], assigned: Mapping[str, list[Share]], name: str
) -> list[tuple[Target, tuple[int, ...] | None]]:
    """Modules, each with those of its key/value heads that the rule serves."""
    eligible = [target for target in targets if _eligible(rule, target)]
    if not eligible:
        raise NothingMatchesError(f"{name} matches nothing{_why_nothing(rule, targets)}")
    key = named_heads(rule)
    if key is None:
        wanted = {
            target.path: _all_heads(target) for target in _in_layers(rule.layers, eligible, depth, name, "layers")
        }
    else:
        wanted = _chosen_heads(rule, key, eligible, depth, name)
    fresh = []
    for target in eligible:
        if target.path in wanted and (left := _left(wanted[target.path], assigned.get(target.path, ()))):
            fresh.append((target, None if left == _all_heads(target) else tuple(sorted(left))))
    if not fresh:
        what = "modules" if key is None else "heads"
        raise NothingMatchesError(
            f"{name} matches nothing: earlier rules take all of its {what} ({next(iter(wanted))}, ...)"
        )
    return fresh


def _all_heads(target: Target) -> set[int]:
    """Key/value heads of a module; of one whose number is not known, all of them as one."""
    return set(range(target.num_key_value_heads or 1))


def _left(wanted: set[int], taken: Sequence[Share]) -> set[int]:
    if any(share.kv_heads is None for share in taken):
        return set()
    return wanted.difference(*(share.kv_heads or () for share in taken))


def _chosen_heads(
    rule: Rule, key: str, eligible: Sequence[Target], depth: Mapping[str, int], name: str
) -> dict[str, set[int]]:
    """path -> key/value heads that a rule names under ``key``."""
    named: Any = getattr(rule, key)
    wanted: dict[str, set[int]] = {}
    by_layers = named if isinstance(named, dict) else {None: named}
    for layers, heads in by_layers.items():
        if layers is None:
            targets = _in_layers(rule.layers, eligible, depth, name, "layers")
        else:
            targets = _in_layers(layers, eligible, depth, name, f"a layer of {key}")
        for target in targets:
            wanted.setdefault(target.path, set()).update(_heads_of(target, key, heads, name))
    return wanted


def _heads_of(target: Target, key: str, named: Any, name: str) -> set[int]:
    """Key/value heads of a module that ``heads`` or ``kv_heads`` name."""
    heads, groups = target.num_heads, target.num_key_value_heads
    if heads is None or groups is None:
        raise ValueError(
            f"{name}: {key}={shown(named)} cannot name heads of {target.path}, whose number attn_plugins cannot tell; "
            "choose other modules with layers, roles or modules, or leave that key out"
        )
    count = groups if key == "kv_heads" else heads
    chosen: set[int] = set()
    for item in named if isinstance(named, list) else [named]:
        if (numbers := numbers_of(item, count)) is None:
            what = "key/value heads" if key == "kv_heads" else "query heads"
            raise ValueError(f"{name}: {key}={shown(item)} is out of range; {target.path} has {what} 0 to {count - 1}")
        chosen.update(numbers)
    if key == "kv_heads":
        return chosen
    size = heads // groups
    for group in sorted({head // size for head in chosen}):
        whole = range(group * size, (group + 1) * size)
        if lacking := [head for head in whole if head not in chosen]:
            raise ValueError(
                f"{name}: heads={shown(named)} names a part of the query heads {whole[0]} to {whole[-1]} that share "
                f"key/value head {group} of {target.path}, without {', '.join(map(str, lacking))}; allowed: all of "
                f"them, such as kv_heads={[group]}"
            )
    return {head // size for head in chosen}


def _in_layers(layers: Any, eligible: Sequence[Target], depth: Mapping[str, int], name: str, key: str) -> list[Target]:
    stacks = sorted({target.stack for target in eligible})
    numbers: dict[str, set[int]] = {stack: set() for stack in stacks}
    for item in layers if isinstance(layers, list) else [layers]:
        found = {stack: numbers_of(item, depth[stack]) for stack in stacks}
        if all(chosen is None for chosen in found.values()):
            ranges = ", ".join(f"0 to {depth[stack] - 1} in {stack or 'the model'}" for stack in stacks)
            raise ValueError(f"{name}: {key}={shown(item)} is out of range; there are layers {ranges}")
        for stack, chosen in found.items():
            numbers[stack].update(chosen or ())
    chosen_targets = [target for target in eligible if target.layer in numbers[target.stack]]
    if not chosen_targets:
        raise ValueError(f"{name} matches nothing: no module that it may serve is in {key}={shown(layers)}")
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
