"""Masks that a model makes itself, and that modules attend with: the structure of the call goes into them there."""

from typing import Any

from torch import nn

from attn_plugins.core.mask import AttentionMask
from attn_plugins.hf.discovery.modules import attention_modules
from attn_plugins.hf.names import ROLE, SLOT
from attn_plugins.hf.structures import Given, active, check


def with_given_structure(mask: AttentionMask, module: nn.Module, made: Any) -> AttentionMask:
    """The mask that a module attends with, which has the structure in it.

    Args:
        made: what the model gave the module for a mask.

    Raises:
        ValueError: it is a structure of other sizes; or layers would run without it.
    """
    given = active()
    if given is None or mask.structure is not None or mask.cross or getattr(module, ROLE) == "cross":
        return mask
    key = (id(made), mask.batch_size, mask.q_length, mask.kv_length, mask.causal)
    if key not in given.masks:
        check(given.structure, mask.batch_size, mask.q_length, mask.kv_length, (mask.q_offset, mask.kv_offset))
        _refuse_lost(given)
        given.masks[key] = (made, mask.with_structure(given.structure))
        given.used = True
    return given.masks[key][1]


def _refuse_lost(given: Given) -> None:
    """Where a model makes its masks itself, the structure is in them only where modules with a slot attend."""
    model, name = given.model, type(given.model).__name__
    for path, module in attention_modules(model):
        if not hasattr(module, SLOT) and getattr(module, ROLE, None) != "cross":
            raise ValueError(
                f"{name} makes its masks itself, and {path} has no attention of attn_plugins to heed structure=; "
                'give those modules one too, for instance "softmax"'
            )
    if given.trains and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError(
            f"{name} makes its masks itself: with gradient checkpointing its layers run again without structure=; "
            "turn it off (gradient_checkpointing_disable)"
        )
