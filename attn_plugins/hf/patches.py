"""All global state of the package: two registrations and six changes to transformers, made once at import.

None of them does anything to a model whose config does not carry the flag.
"""

import functools
import sys
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from attn_plugins.attention import Attention
from attn_plugins.hf.caches import RECORDING
from attn_plugins.hf.dispatch import IMPLEMENTATION, attention_forward, lazy_mask
from attn_plugins.hf.swap import attach_from_config

_MARK = "_attn_plugins_original"


def install() -> None:
    """Make the flag known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    # Registering the function alone would give it mask=None even for padded batches.
    AttentionMaskInterface.register(IMPLEMENTATION, lazy_mask)

    # A config has no hook for new fields. As a class attribute, from_pretrained(path, attn_plugin=...) and config.json
    # set it like any field, and configs without the flag are saved as before.
    if not hasattr(PreTrainedConfig, "attn_plugin"):
        PreTrainedConfig.attn_plugin = None  # type: ignore[attr-defined]

    # Some models choose their attention classes in their constructor, by names of implementations that they know. They
    # are therefore built with their own default, also from a config.json that names ours.
    _wrap(PreTrainedModel, "__init__", _init)

    # Nothing public runs between a model's construction and the loading of its weights, which is when the slots have to
    # be there: post_init, which every model calls last in __init__, is that moment.
    _wrap(PreTrainedModel, "post_init", _post_init)

    # Weights that a checkpoint lacks are initialised by the model's own _init_weights, which does not know a slot's.
    _wrap(PreTrainedModel, "_initialize_weights", _initialize_weights)

    # A cache is told to record before its layers are exchanged for states, and ordinary layers do not remember it.
    _wrap(Cache, "activate_past_recording", _activate_past_recording)

    # It would bypass the slots in silence.
    _wrap(PreTrainedModel, "set_attn_implementation", _set_attn_implementation)


def _wrap(cls: type, name: str, around: Any) -> None:
    original = getattr(cls, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, original)
    setattr(cls, name, wrapped)


def _init(original: Any, self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
    if getattr(config, "_attn_implementation", None) == IMPLEMENTATION:
        if "attn_plugin" not in vars(config) and _builder(self) is None:
            raise ValueError(
                f"attn_implementation={IMPLEMENTATION!r} needs rules; "
                "pass attn_plugin=..., such as attn_plugin='local', instead"
            )
        config._attn_implementation_internal = None
    original(self, config, *args, **kwargs)


_INSIDE = "_attn_plugins_inside"
"""Attribute of a model under construction: flagged models that its constructor has built so far."""


def _post_init(original: Any, self: PreTrainedModel) -> None:
    builder = _builder(self)
    if builder is None:
        attach_from_config(self)  # before the original, which initialises weights
        parts = set(self.modules())
        for inner in vars(self).pop(_INSIDE, ()):
            if inner not in parts:  # built inside, but held elsewhere than among the modules, as a teacher may be
                attach_from_config(inner)
    elif self.config.attn_plugin is not None:
        vars(builder).setdefault(_INSIDE, []).append(self)
    original(self)


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


def _initialize_weights(original: Any, self: PreTrainedModel, module: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(module, Attention):
        original(self, module, *args, **kwargs)
    elif not getattr(module, "_is_hf_initialized", False):
        _initialize_slot(module)
        module._is_hf_initialized = True  # type: ignore[assignment]


def _initialize_slot(slot: Attention) -> None:
    """Initialise those weights and buffers of a slot that the checkpoint did not bring.

    transformers guards loaded tensors in the functions of torch.nn.init. What writes a weight in another way, such as
    copy_ or row by row, would get past that, so what was loaded is put back.
    """

    def held() -> dict[str, torch.Tensor]:
        return {**dict(slot.named_parameters()), **dict(slot.named_buffers())}

    loaded = {name: x.detach().clone() for name, x in held().items() if getattr(x, "_is_hf_initialized", False)}
    if len(loaded) < len(held()):
        slot.reset_parameters()
        for name, x in held().items():
            if name in loaded:
                x.detach().copy_(loaded[name])


def _set_attn_implementation(original: Any, self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    if self.config.attn_plugin is not None:
        raise ValueError(
            f"set_attn_implementation{args} would bypass this model's attn_plugin; "
            "call attn_plugins.restore_attention(model) first, set the implementation, then swap again"
        )
    original(self, *args, **kwargs)


def _activate_past_recording(original: Any, self: Cache) -> None:
    setattr(self, RECORDING, True)
    original(self)
