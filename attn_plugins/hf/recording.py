"""Whether a call is to return attention weights, as its own arguments or those of a model around it ask.

Few models hand ``output_attentions`` down to their attention modules. Most record what these return, and those that
transformers has itself return weights under "eager" in every call. Ours cost N x N: they are made where someone waits.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attn_plugins.core.tracing import exporting
from attn_plugins.hf.hooks import remove_hooks
from attn_plugins.hf.under_way import thread

WEIGHED = "_attn_plugin_weighed"
"""Attribute of an attention module: whether weights were wanted of its last call with gradients."""


def watch(model: nn.Module, paths: Iterable[str]) -> None:
    """Note ``output_attentions`` of the models that hold attention modules at these paths of ``model``."""
    names = {path[:end] for path in paths for end in range(len(path)) if end == 0 or path[end] == "."}
    for holder in (model.get_submodule(name) for name in names):
        if isinstance(holder, PreTrainedModel):
            holder.register_forward_pre_hook(_begin, with_kwargs=True)
            holder.register_forward_hook(_end, always_call=True)


def unwatch(model: nn.Module) -> None:
    """Undo :func:`watch`."""
    for module in model.modules():
        vars(module).pop(WEIGHED, None)
        remove_hooks(module, _begin, _end)


def weights_wanted(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call of a module's attention function is to return weights.

    Args:
        kwargs: of the attention function, or of the module.
    """
    wanted = bool(kwargs.get("output_attentions")) or _asking() is not None
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return wanted
    if torch._C._current_graph_task_id() >= 0:
        # Gradient checkpointing calls the layer again, in the backward, without the model around it.
        return wanted or getattr(module, WEIGHED, False)
    if wanted or hasattr(module, WEIGHED):
        setattr(module, WEIGHED, wanted)
    return wanted


def weights_wanted_of(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    """The same of a model that is about to be called."""
    return _asked(model, kwargs) or _asking() is not None


def _asking() -> int | None:
    """Identity of the model that asks for weights, unless a failed export has left it."""
    notes = thread.notes
    return None if notes.asking_exported and not torch.compiler.is_exporting() else notes.asking


def _asked(model: Any, kwargs: dict[str, Any]) -> bool:
    told = kwargs.get("output_attentions")
    return bool(getattr(model.config, "output_attentions", False) if told is None else told)


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    notes = thread.notes
    if _asking() in (None, id(model)):
        notes.asking = id(model) if _asked(model, kwargs) else None
        notes.asking_exported = exporting()


def _end(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if thread.notes.asking == id(model):
        thread.notes.asking = None
