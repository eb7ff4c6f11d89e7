"""What models of transformers declare of their attention modules: the classes whose outputs they record as weights.

``_can_record_outputs`` names nearly all classes that call the attention interface, by the outputs "attentions" and
"cross_attentions". It does not name those of models that record nothing, nor classes of remote code.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

EAGER_NAME = "eager_attention_forward"
"""How transformers' files name their function for "eager"."""


class Dispatch(NamedTuple):
    """What a class of attention modules calls the interface by."""

    interface: AttentionInterface
    eager: Callable | None
    """What it gives as the function for "eager", which the interface does not hold."""


def declares_cross_attention(model_cls: type, path: str, module: nn.Module) -> bool:
    """Whether a class of models records the weights of the module at ``path`` as those of cross-attention alone.

    Merged attention is recorded as self-attention too (T5Gemma 2).
    """

    def records(output: str) -> bool:
        return any(
            isinstance(module, cls) and (not layer or f".{layer.strip('.')}." in f".{path}.")
            for cls, layer in _recorded(model_cls, output)
        )

    return records("cross_attentions") and not records("attentions")


def declared_dispatch(cls: type[nn.Module]) -> Dispatch | None:
    """How a class calls the interface whose weights a model of its file records.

    None where no model does, or where the class calls it elsewhere than in its own forward, or beside another eager
    attention than its file's.
    """
    forward = inspect.unwrap(cls.forward)
    names = getattr(forward, "__globals__", {})
    models = (held for held in vars(sys.modules.get(cls.__module__, sys)).values() if isinstance(held, type))
    kinds = ("attentions", "cross_attentions")
    if EAGER_NAME not in names or not any(
        cls is declared
        for model_cls in models
        if issubclass(model_cls, PreTrainedModel)
        for kind in kinds
        for declared, _ in _recorded(model_cls, kind)
    ):
        return None
    held = (names.get(name) for name in forward.__code__.co_names)
    interface = next((x for x in held if isinstance(x, AttentionInterface)), None)
    return None if interface is None else Dispatch(interface, names[EAGER_NAME])


def _recorded(model_cls: Any, output: str) -> Iterator[tuple[type, str | None]]:
    """(class of modules, part of their paths or None) of what a class of models records as an output."""
    specs = (getattr(model_cls, "_can_record_outputs", None) or {}).get(output, ())
    for spec in specs if isinstance(specs, (list, tuple)) else (specs,):
        cls = getattr(spec, "target_class", spec)
        if isinstance(cls, type):
            yield cls, getattr(spec, "layer_name", None)
