"""The flag ``config.attn_plugin``: which attention serves which module, as far as no model is needed to tell.

The flag is a name, a rule or a list of rules. A rule is a dict with ``type`` (a registered name), the options of that
attention's ``Config``, and the keys that choose modules and heads: see :class:`Rule`. The first rule that matches wins,
see ``core/assignment.py``.
"""

import builtins
import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from attn_plugins.core.attention import Attention, AttentionConfig
from attn_plugins.core.backend import FORMS, list_backends
from attn_plugins.core.number_forms import ALLOWED, check_numbers, is_form
from attn_plugins.core.options import LARGEST_INT, did_you_mean, shown
from attn_plugins.core.registry import get_attention

Flag: TypeAlias = "str | Mapping[str, Any] | Sequence[Mapping[str, Any]]"

ROLES = ("encoder", "decoder", "cross")
HEAD_KEYS = ("heads", "kv_heads")
RULE_KEYS = ("type", "layers", *HEAD_KEYS, "roles", "modules", "backend")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One validated rule of the flag."""

    type: str
    """Registered name of the attention."""
    config: AttentionConfig
    """Its options, complete."""
    layers: Any = "all"
    """"all", 3, -1, "0-15", "every:4", "every:4+3", or a list of these: numbers within a stack."""
    heads: Any = None
    """Query heads, in the forms of ``layers``, or a mapping of layers to these; whole groups, where heads share keys.

    None, as for ``kv_heads``, is all that no earlier rule has taken."""
    kv_heads: Any = None
    """The same by the numbers of key/value heads, each with all query heads that share it."""
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
        for key in HEAD_KEYS:
            if (named := getattr(self, key)) is not None:
                chosen[key] = copy.deepcopy(named)
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


def parse_saved_rules(rules: Flag) -> list[Rule]:
    """As :func:`parse_rules`, of rules as :meth:`Rule.to_dict` spelled them out, maybe before an option was there.

    Such an option is what saved models did without it, which its default need not be.
    """
    if isinstance(rules, str) or not isinstance(rules, Sequence):
        return parse_rules(rules)
    return parse_rules([_as_saved(rule) for rule in rules])


def _as_saved(rule: Any) -> Any:
    if not isinstance(rule, Mapping) or "type" not in rule:
        return rule
    fields = dataclasses.fields(get_attention(rule["type"]).Config)
    return {**{f.name: f.metadata["before"] for f in fields if "before" in f.metadata}, **rule}


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
    since = attention.Config.since
    for option in since if {*known} - {*since} <= {*options} else ():
        if option not in options:
            raise ValueError(f"{name} ({attention.name!r}) was saved before it had {option}: {since[option]}")
    try:
        config = attention.Config(**{key: tuple(v) if isinstance(v, list) else v for key, v in options.items()})
    except ValueError as error:
        raise ValueError(f"{name} ({attention.name!r}): {error}") from None
    return Rule(
        type=attention.name,
        config=config,
        layers=check_numbers(entry.get("layers", "all"), "layers", "layer", name),
        **_check_heads(entry, name),
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


def _check_heads(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a rule says of heads, under its key."""
    named = {key: entry[key] for key in HEAD_KEYS if entry.get(key) is not None}
    if len(named) > 1:
        raise ValueError(
            f"{name} has heads={shown(named['heads'])} and kv_heads={shown(named['kv_heads'])}; allowed: one"
        )
    for key, value in named.items():
        if not isinstance(value, Mapping):
            named[key] = check_numbers(value, key, "head", name)
            continue
        if "layers" in entry:
            raise ValueError(
                f"{name}: {key}={shown(value)} and layers={shown(entry['layers'])} both name layers; allowed: one"
            )
        if not value:
            raise ValueError(f"{name}: {key}={{}} names no layer; allowed: a mapping of layers to heads")
        for layer in value:
            if not is_form(layer) or (isinstance(layer, int) and abs(layer) > LARGEST_INT):
                raise ValueError(f"{name}: {key} names layer {shown(layer)}; allowed: {ALLOWED.rpartition(',')[0]}")
        named[key] = {str(layer): check_numbers(heads, key, "head", name) for layer, heads in value.items()}
    return named
