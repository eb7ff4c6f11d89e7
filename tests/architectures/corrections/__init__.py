"""What single model types need beyond the general rules: a file for each kind of input, a line or two for each type."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

Random = Callable[..., Any]
"""``source(*shape)`` is a normal tensor, ``source.ids(*shape)`` are token ids of text: the same in every run."""

CLASSES: dict[str, str] = {}
"""Model type -> class, where the first one of the auto mappings is not the one to build."""

CONFIGS: dict[str, dict[str, Any]] = {}
"""Model type -> fields of its config; a dict for a part goes into that part's own."""

REASONS: dict[str, str] = {
    "dinat": "needs natten with natten2dqkrpb and natten2dav, which its newer versions (0.21) have no more",
    "gemma4_assistant": "transformers builds none: it wants all layers to share keys, and refuses that",
    "gemma4_unified_assistant": "transformers builds none: it wants all layers to share keys, and refuses that",
    "qwen2_5_omni": "has no forward; its parts are model types of their own",
    "qwen3_omni_moe": "has no forward; its parts are model types of their own",
}
"""Model type -> why no tiny model or no inputs are made, where the error that is met does not say it."""

PARTS: dict[str, str] = {"bark": "semantic_config"}
"""Model type -> the field of its config that is the config to build with, where the whole has no forward."""

INPUTS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {}
"""Model type -> function of the model and of a source of random tensors that makes its inputs."""


MEDIA: dict[tuple[str, str], Callable[[Any, Any], dict[str, Any]]] = {}
"""(Model type, medium) -> function of the config and of a source that makes an image, a video, sound or something else
that is read beside a text; how many tokens stand for it is found out."""


def media(medium: str, *model_types: str) -> Callable:
    """Decorator of a function that makes a medium for these types."""

    def note(function: Callable) -> Callable:
        assert not {(model_type, medium) for model_type in model_types} & set(MEDIA), model_types
        MEDIA.update(dict.fromkeys(((model_type, medium) for model_type in model_types), function))
        return function

    return note


def inputs(*model_types: str) -> Callable:
    """Decorator of a function that makes the inputs of these types."""

    def note(function: Callable) -> Callable:
        assert not set(model_types) & set(INPUTS), model_types
        INPUTS.update(dict.fromkeys(model_types, function))
        return function

    return note


def collect() -> None:
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        for ours, theirs in ((CLASSES, "CLASSES"), (CONFIGS, "CONFIGS")):
            given = getattr(module, theirs, {})
            assert not set(given) & set(ours), set(given) & set(ours)
            ours.update(given)


collect()
