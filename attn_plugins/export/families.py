"""How transformers' own families say in their configs which layers see a window: a line for each family."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from transformers import CONFIG_MAPPING, PreTrainedConfig

from attn_plugins.hf.checkpoints.configs import erase

Windows: TypeAlias = "list[int | None]"
"""For each layer how many keys a query sees, its own with them; None is all before it."""

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True, kw_only=True)
class Family:
    """What a family's config can say; ``sliding_window`` of all of these counts the query's own key."""

    can: Literal["none", "all", "some"]
    """Which layers may have a window: none; all or none, by ``sliding_window``; any, by ``layer_types``."""
    beside: Mapping[str, Any] = field(default_factory=dict)
    """What else its config has to say for a window to hold."""
    twins: tuple[str, ...] = ()
    """Families whose modules compute the same with the same weights under the same names, first what is read widest."""


FAMILIES = {
    "gemma2": Family(can="some"),
    "gemma3_text": Family(can="some"),
    "gpt_oss": Family(can="some"),
    "llama": Family(can="none", twins=("mistral", "ministral")),
    "ministral": Family(can="some"),
    "mistral": Family(can="all", twins=("ministral",)),
    "mixtral": Family(can="all"),
    "olmo3": Family(can="some"),
    "phi3": Family(can="all"),
    "qwen2": Family(can="some", beside={"use_sliding_window": True}),
    "qwen3": Family(can="some", beside={"use_sliding_window": True}),
    "smollm3": Family(can="some", beside={"use_sliding_window": True}),
    "starcoder2": Family(can="all"),
}
"""By ``model_type``. Families whose layers also differ otherwise by their type (Cohere 2, EXAONE 4) are left out."""


def windows_in(config: PreTrainedConfig) -> Windows:
    """The windows that a config says, where its family is known."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        return []
    layers = config.num_hidden_layers
    if family.can == "none" or config.sliding_window is None:
        return [None] * layers
    if family.can == "all":
        return [config.sliding_window] * layers
    return [config.sliding_window if kind == SLIDING else None for kind in config.layer_types]


def told(windows: Windows) -> str:
    """ "16 in layers 0, 2; none in layer 1"."""
    numbers: dict[int | None, list[int]] = {}
    for layer, window in enumerate(windows):
        numbers.setdefault(window, []).append(layer)
    parts = []
    for window, layers in numbers.items():
        where = "all layers" if len(numbers) == 1 else f"layer{'s' * (len(layers) > 1)} {_shown(layers)}"
        parts.append(f"{'none' if window is None else window} in {where}")
    return "; ".join(parts)


def _shown(layers: Sequence[int]) -> str:
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"{layers[0]} to {layers[-1]}"
    return ", ".join(map(str, layers))


def config_with(config: PreTrainedConfig, windows: Windows) -> PreTrainedConfig:
    """A config of the same family, or else of a twin, that says these windows, and nothing of this package.

    Raises:
        ValueError: no such config says them; tells why not, family by family.
    """
    plain = copy.deepcopy(config)
    erase(plain)
    tree = plain.to_dict()
    if windows == windows_in(config):
        return type(config).from_dict(tree)
    reasons = []
    for name in (config.model_type, *FAMILIES[config.model_type].twins):
        reason = _lacks(FAMILIES[name], config, windows)
        if reason is None:
            return _written(name, config, tree, windows)
        reasons.append(f"{name} {reason}")
    raise ValueError(f"no config of transformers says these windows: {told(windows)}. {'; '.join(reasons)}")


def _lacks(family: Family, config: PreTrainedConfig, windows: Windows) -> str | None:
    """Why a family cannot say these windows, or None."""
    if family.can == "none":
        return "has no windows"
    if len(set(windows) - {None}) > 1:
        return "has one size of window for all layers"
    if family.can == "all" and None in windows:
        return "has a window in all layers or in none"
    rope = getattr(config, "rope_parameters", None) or {}
    if family.can == "some" and SLIDING in rope and rope[SLIDING] != rope.get(FULL):
        own = windows_in(config)
        changed = [layer for layer, window in enumerate(windows) if (window is None) != (own[layer] is None)]
        if changed:
            return f"turns queries and keys in another way where there is a window (rope_parameters): {_shown(changed)}"
    return None


def _written(name: str, config: PreTrainedConfig, tree: dict[str, Any], windows: Windows) -> PreTrainedConfig:
    family, cls = FAMILIES[name], CONFIG_MAPPING[name]
    tree = {key: value for key, value in tree.items() if key != "model_type"}
    if cls is not type(config):
        theirs = {known.name for known in dataclasses.fields(cls)}
        foreign = {known.name for known in dataclasses.fields(type(config))} - theirs
        tree = {key: value for key, value in tree.items() if key not in foreign}
    tree |= family.beside
    tree["sliding_window"] = next(window for window in windows if window is not None)
    if family.can == "some":
        tree["layer_types"] = [FULL if window is None else SLIDING for window in windows]
    written = cls.from_dict(tree)
    assert windows_in(written) == windows, f"{cls.__name__} says {windows_in(written)}, not {windows}"
    return written
