"""Which models are alive in this process: what an edit of a config, or a swap, may reach beside the model at hand."""

import threading
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_models: "weakref.WeakSet[PreTrainedModel]" = weakref.WeakSet()
_lock = threading.Lock()


def remember(model: nn.Module) -> None:
    """Note a model that is complete, with the models inside it."""
    with _lock:
        _models.update(part for part in model.modules() if isinstance(part, PreTrainedModel))


def models() -> list[PreTrainedModel]:
    """All models that are alive, parts of others among them."""
    with _lock:
        return list(_models)


def holding(config: Any) -> list[PreTrainedModel]:
    """The outermost models whose ``config`` this is."""
    found = [model for model in models() if vars(model).get("config") is config]
    inside = {part for model in found for part in model.modules() if part is not model}
    return [model for model in found if model not in inside]


def around(model: nn.Module) -> list[PreTrainedModel]:
    """Models that hold ``model`` or a model inside it, itself among them if it is alive."""
    parts = {part for part in model.modules() if isinstance(part, PreTrainedModel)}
    return [other for other in models() if any(module in parts for module in other.modules())]


def shares(roots: Iterable[nn.Module]) -> bool:
    """Whether a model outside ``roots`` has a config in common with them."""
    modules = {module for root in roots for module in root.modules()}
    held = {id(config) for module in modules for config in configs_in(module)}
    return any(id(config) in held for model in models() if model not in modules for config in configs_in(model))


def configs_in(holder: Any) -> Iterator[PreTrainedConfig]:
    """Configs among the attributes of a module or config, and those inside them."""
    waiting, seen = [holder], set()
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, PreTrainedConfig) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
                yield value
