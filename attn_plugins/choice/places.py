"""The modules whose heads are to be chosen among, and rules that name some of them."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel

from attn_plugins.core.assignment import Target, assign
from attn_plugins.core.rules import Flag, parse_rules
from attn_plugins.hf.discovery import modules as discovery

Level = Literal["heads", "layers"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """An attention module that a rule may serve."""

    target: Target
    groups: int
    """Key/value heads, G; 1 where their number is not known."""

    @property
    def path(self) -> str:
        return self.target.path

    @property
    def layer(self) -> int:
        return self.target.layer


class Places(Sequence[Place]):
    """The modules of a model that a rule may serve, in the model's order.

    Where the rule names no roles, those of the decoder, if there is one: its encoder and cross-attention keep their own
    attention. A model's own sliding layers are left alone, unless all of its layers are.

    Args:
        model: a transformers model without anything around it.
        flag: a name or a rule.

    Raises:
        ValueError: it is no single rule, chooses heads by itself, or matches nothing.
    """

    def __init__(self, model: PreTrainedModel, flag: Flag):
        rules = parse_rules(flag)
        if len(rules) != 1:
            raise ValueError(f"rule is a list of {len(rules)} rules; allowed: one, whose heads or layers are chosen")
        (rule,) = rules
        entry: Any = flag if isinstance(flag, (str, Mapping)) else flag[0]
        self.entry: dict[str, Any] = {"type": entry} if isinstance(entry, str) else dict(entry)
        for key in ("heads", "kv_heads"):
            if self.entry.get(key) is not None:
                raise ValueError(f"rule has {key}={self.entry[key]!r}; leave it out: it is what is to be chosen")
        targets = discovery.targets(model)
        self._targets = [dataclasses.replace(target, needs={}) for target in targets]
        sliding = {target.path for target in targets if "any_mask" in target.needs}
        assigned = assign([rule], self._targets)
        matched = [target for target in self._targets if target.path in assigned]
        if rule.roles is None:
            matched = [one for one in matched if one.role == "decoder"] or matched
        matched = [one for one in matched if one.path not in sliding] or matched
        self._places = [Place(target=target, groups=target.num_key_value_heads or 1) for target in matched]

    def __getitem__(self, index: Any) -> Any:
        return self._places[index]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The rule as it was given, for these modules and no others."""
        if _same(self._matched(self._given), self._targets_of(self)):
            return [self.entry]
        options = {key: value for key, value in self.entry.items() if key not in _PLACE_KEYS}
        rules = []
        for where, part in self._parts(self):
            layers = {} if _same(self._matched(where), part) else {"layers": _spans(part)}
            rules.append({**options, **where, **layers})
        return rules

    def keeping(self, kept: Mapping[str, Sequence[int]], *, level: Level) -> list[dict[str, Any]]:
        """Rules under which what was chosen has softmax attention, and the rest of these modules what the rule says.

        Args:
            kept: path -> numbers of key/value heads; the paths alone count where ``level`` is "layers".
        """
        rules = []
        for where, part in self._parts([place for place in self if place.path in kept]):
            if level == "layers":
                named: dict[str, Any] = {"layers": _spans(part)}
            else:
                named = {"kv_heads": {target.layer: sorted(kept[target.path]) for target in part}}
            rules.append({"type": "softmax", **where, **named})
        return [*rules, *self.rules]

    @property
    def _given(self) -> dict[str, Any]:
        return {key: self.entry[key] for key in _PLACE_KEYS if key in self.entry}

    def _parts(self, places: Sequence[Place]) -> Iterator[tuple[dict[str, Any], list[Target]]]:
        """These modules stack by stack, each with the keys of a rule that say which stack is meant."""
        given = {key: value for key, value in self._given.items() if key != "layers"}
        wanted = self._targets_of(places)
        for stack, role in dict.fromkeys((target.stack, target.role) for target in wanted):
            part = [target for target in wanted if (target.stack, target.role) == (stack, role)]
            tries = ({**given}, {**given, "roles": [role]}, {"roles": [role], "modules": [f"{stack}.*"]})
            where = (keys for keys in tries if _same(self._matched({**keys, "layers": _spans(part)}), part))
            yield next(where, {"modules": [target.path for target in part]}), part

    def _matched(self, keys: Mapping[str, Any]) -> list[Target]:
        assigned = assign(parse_rules({"type": "softmax", **keys}), self._targets)
        return [target for target in self._targets if target.path in assigned]

    def _targets_of(self, places: Iterable[Place]) -> list[Target]:
        paths = {place.path for place in places}
        return [target for target in self._targets if target.path in paths]


_PLACE_KEYS = ("layers", "roles", "modules")


def _same(some: list[Target], others: list[Target]) -> bool:
    return {target.path for target in some} == {target.path for target in others}


def _spans(targets: Sequence[Target]) -> list[int | str]:
    """Layer numbers as a rule names them: 3 or more in a row by the first and the last."""
    numbers = sorted({target.layer for target in targets})
    found: list[int | str] = []
    for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        row = [number for _, number in run]
        found += row if len(row) < 3 else [f"{row[0]}-{row[-1]}"]
    return found
