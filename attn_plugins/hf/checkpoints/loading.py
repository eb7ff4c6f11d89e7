"""Weights of slots and checkpoints: what a checkpoint lacks is initialised, what has no slot is refused.

What is called ``original`` below is transformers' own function, see hf/patches.py.
"""

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from attn_plugins.core.attention import Attention
from attn_plugins.hf.checkpoints.peft import declined
from attn_plugins.hf.names import SLOT
from attn_plugins.hf.parallel import tensor_parallel
from attn_plugins.hf.parallel.sharding import take_off_meta
from attn_plugins.hf.split import SplitAttention

_INITIALIZED = "_is_hf_initialized"
"""Attribute of modules, and of tensors that were loaded, by which transformers leaves them as they are."""


def own_weights_first(original: Any, self: PreTrainedModel) -> None:
    """A model's own weights, and then those of slots: a head is drawn last, and would differ with what these draw."""
    slots = [module for module in self.modules() if isinstance(module, Attention)]
    inside = {part for slot in slots for part in slot.modules() if not getattr(part, _INITIALIZED, False)}
    for part in inside:
        setattr(part, _INITIALIZED, True)
    try:
        original(self)
    finally:
        for part in inside:
            delattr(part, _INITIALIZED)
    if inside:
        original(self)


def initialize_weights(original: Any, self: PreTrainedModel, module: Any, *args: Any, **kwargs: Any) -> None:
    if not isinstance(module, Attention):
        original(self, module, *args, **kwargs)
    elif isinstance(module, SplitAttention):
        return  # its parts have been, before it
    elif not getattr(module, _INITIALIZED, False):
        take_off_meta(module)
        _initialize_slot(module)
        setattr(module, _INITIALIZED, True)


def _initialize_slot(slot: Attention) -> None:
    """Initialise those weights and buffers of a slot that the checkpoint did not bring.

    transformers guards loaded tensors in the functions of torch.nn.init. What writes a weight in another way, such as
    copy_ or row by row, would get past that, so what was loaded is put back.
    """

    def tensors() -> dict[str, torch.Tensor]:
        return {**dict(slot.named_parameters()), **dict(slot.named_buffers())}

    loaded = {name: x.detach().clone() for name, x in tensors().items() if getattr(x, _INITIALIZED, False)}
    if len(loaded) < len(tensors()):
        with tensor_parallel.whole(slot):
            slot.reset_parameters()
        for name, x in tensors().items():
            if name in loaded:
                x.detach().copy_(loaded[name])


def load_from_state_dict(
    original: Any, self: PreTrainedModel, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
) -> None:
    lost = [name for name in state_dict if name.startswith(prefix) and not _has(self, name.removeprefix(prefix))]
    if lost and declined(self):
        logging.get_logger("transformers.modeling_utils").warning(  # as it reports what a whole checkpoint leaves out
            f"attn_plugin=None leaves out {len(lost)} weights of attentions: {lost[0]}, ..."
        )
        for name in lost:
            del state_dict[name]
    elif lost:
        raise ValueError(
            f"the state dict holds weights of attentions that {type(self).__name__} has no slots for: {lost[0]}"
            f"{', ...' if lost[1:] else ''}; swap the model first, by the rules that these were trained under"
        )
    original(self, state_dict, prefix, *args, **kwargs)


def _has(model: PreTrainedModel, name: str) -> bool:
    """Whether a model has this weight of a slot; what is no slot's is torch's to check."""
    parts: list[str] = name.split(".")
    place: Any = model
    return SLOT not in parts or all((place := getattr(place, part, None)) is not None for part in parts)
