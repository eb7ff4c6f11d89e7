"""Slots are attached while a model is constructed, by the outermost of the constructors under way.

What is called ``original`` below is transformers' own function, see hf/patches.py.
"""

import sys
from typing import Any

from transformers import PreTrainedModel

from attn_plugins.hf.checkpoints import live
from attn_plugins.hf.checkpoints.configs import is_flagged
from attn_plugins.hf.names import IMPLEMENTATION
from attn_plugins.hf.swap import attach_from_config


def init(original: Any, self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
    if getattr(config, "_attn_implementation", None) == IMPLEMENTATION:
        if not is_flagged(config) and _builder(self) is None:
            raise ValueError(
                f"attn_implementation={IMPLEMENTATION!r} needs rules; "
                f"pass attn_plugin=..., such as attn_plugin='local', instead{_of_a_name(config.name_or_path)}"
            )
        vars(self)[_CAME] = (config,)
        config._attn_implementation_internal = None
    original(self, config, *args, **kwargs)


def _of_a_name(name: str) -> str:
    """What to say where a live model of this name is swapped: trainers build its reference from its name alone."""
    alike = (model.config for model in live.models() if model.config.name_or_path == name)
    rules = next((config.attn_plugin for config in alike if name and config.attn_plugin is not None), None)
    if rules is None:
        return ""
    return (
        f". A model of the name {name!r} is swapped here, and the checkpoint of that name is not: give a trainer that "
        f"builds a reference model ref_model=..., or model_init_kwargs={{'attn_plugin': {rules}}}, by which weights of "
        "the attention begin anew, or save the swapped model and load it from there for training"
    )


_CAME = "_attn_plugins_came"
"""Attribute of a model under construction: the config that it came with, alone in a tuple, if that named ours."""

_INSIDE = "_attn_plugins_inside"
"""Attribute of a model under construction: flagged models that its constructor has built so far."""


def post_init(original: Any, self: PreTrainedModel) -> None:
    builder = _builder(self)
    if builder is not None:
        if self.config.attn_plugin is not None:
            vars(builder).setdefault(_INSIDE, []).append(self)
        original(self)
        return
    parts, flagged = set(self.modules()), vars(self).pop(_INSIDE, [])
    aside = [inner for inner in flagged if inner not in parts]
    if (self.config.attn_plugin is not None or flagged) and not any(weight.is_meta for weight in self.parameters()):
        self.initialize_weights()  # before slots are built, so that a seed gives the same weights under any rules
    try:
        attach_from_config(self)  # before the original, which initialises weights
        for inner in aside:  # built inside, but held elsewhere than among the modules, as a teacher may be
            attach_from_config(inner)
    finally:
        for model in (self, *aside):
            _give_back(model)
    original(self)
    for model in (self, *aside):
        live.remember(model)


def _give_back(model: PreTrainedModel) -> None:
    """Undo what was done to the configs that a model was built from, and does not keep: they may be another model's."""
    for part in model.modules():
        for came in vars(part).pop(_CAME, ()):
            if came is not getattr(part, "config", None) or live.holding(came):
                came._attn_implementation_internal = IMPLEMENTATION


def _builder(model: PreTrainedModel) -> PreTrainedModel | None:
    """The outermost model whose constructor is building this one, and will attach for both; None if there is none.

    Only the outermost model knows all paths, roles and stacks. The call stack tells without any state to keep, also
    where constructors raise. It is read up to a from_pretrained: what that builds gets its weights right away, so that
    its slots have to be there.
    """
    frame, found = sys._getframe(2), None
    while frame is not None and frame.f_code.co_name != "from_pretrained":
        if frame.f_code.co_name == "__init__":
            builder = frame.f_locals.get("self")
            if isinstance(builder, PreTrainedModel) and builder is not model:
                found = builder
        frame = frame.f_back  # type: ignore[assignment]
    return found
