"""Slots of models that accelerate's FSDP2 gives to several processes: the buffers that they save."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from attn_plugins.core.attention import Attention
from attn_plugins.hf.split import SplitAttention


def load_full_state_dict(
    original: Any, accelerator: Any, model: nn.Module, full_sd: dict[str, Any], **options: Any
) -> Any:
    """In place of accelerate's function, which takes every entry of a state dict for a parameter that is sharded.

    Buffers that slots save are left out of what it sees, and sent whole: each process has all of them.
    """
    held = list(_saved_buffers(model))
    if not held:
        return original(accelerator, model, full_sd, **options)
    keys = [key for key, _, _ in held]
    for _, module, name in held:
        module._non_persistent_buffers_set.add(name)
    try:
        loaded = original(accelerator, model, {k: v for k, v in full_sd.items() if k not in keys}, **options)
    finally:
        for _, module, name in held:
            module._non_persistent_buffers_set.discard(name)
    for key, module, name in held:
        like = module.get_buffer(name)
        if accelerator.is_main_process:
            whole = full_sd[key].detach().to(accelerator.device, like.dtype).contiguous()
        else:
            whole = torch.empty(like.shape, dtype=like.dtype, device=accelerator.device)
        dist.broadcast(whole, src=0)
        module._buffers[name] = whole
    return loaded


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(key in the state dict, module, name) of each buffer that a slot of the model saves."""
    for path, slot in model.named_modules():
        if isinstance(slot, Attention) and not isinstance(slot, SplitAttention):
            for inner, module in slot.named_modules(prefix=path):
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set and buffer is not None:
                        yield f"{inner}.{name}", module, name
